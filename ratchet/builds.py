"""Other commits of this repository, built in folders of their own and measured by this harness."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import flashmoe
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.processes import Source
from flashmoe.ratchet.revision import git

# The harness is the same for both sides, whatever their own was.
_HARNESS = ("ratchet", "timing.py", "stats.py", "nvml.py")
_PACKAGE = Path(flashmoe.__file__).resolve().parent


class BuildError(UserError):
    """A commit does not build; the message ends with the compiler's words."""


def resolve(ref: str) -> str:
    """The commit that `ref` names; a commit in full is believed, so that builds can be used where
    there is no repository."""
    if re.fullmatch(r"[0-9a-f]{40}", ref):
        return ref
    return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")


def working_tree() -> str:
    """A commit of the working tree as it is: tracked files with their changes, none of it touched.
    HEAD where nothing is changed."""
    return git("stash", "create") or resolve("HEAD")


def build(commit: str, folder: Path) -> Path:
    """The folder with `commit`'s package and this harness in it, built now unless it was before:
    folder/COMMIT/site. FLASHMOE_CUDA and its kind apply as to any build.

    Raises BuildError when it does not build.
    """
    place = folder.resolve() / commit
    site = place / "site"
    if not (place / "built").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        _install(_export(commit, place / "source"), site)
        (place / "built").touch()
    for name in _HARNESS:
        _overlay(_harness(name), site / "flashmoe" / name)
    return site


def source(name: str, site: Path) -> Source:
    """Workers of a build, with no tuned plans but those it ships."""
    cache = site.parent / "cache"
    worker = (sys.executable, "-m", "flashmoe.ratchet.worker")
    # What else the caller has on its path stays, from wherever the worker starts.
    others = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(site), *others]),
        "FLASHMOE_CACHE_DIR": str(cache),
    }
    return Source(name, worker, str(site), environment)


def _export(commit: str, target: Path) -> Path:
    with tempfile.TemporaryFile() as archive:
        top = git("rev-parse", "--show-toplevel")
        subprocess.run(["git", "archive", commit], cwd=top, stdout=archive, check=True)
        archive.seek(0)
        with tarfile.open(fileobj=archive) as opened:
            # Python before 3.10.12 and 3.11.4 knows no filters.
            safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            opened.extractall(target, **safe)
    return target


def _install(source: Path, site: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", str(site), str(source)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        errors = [line.strip() for line in lines if "error" in line.lower()] or lines[-3:]
        raise BuildError(f"{source.parent.name[:12]} does not build: {' / '.join(errors[:3])}")


def _harness(name: str) -> Path:
    """Where this installation has it; `ratchet` is beside the package where that is editable."""
    if name == "ratchet":
        return Path(__file__).resolve().parent
    return _PACKAGE / name


def _overlay(origin: Path, target: Path) -> None:
    if origin.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(origin, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(origin, target)
