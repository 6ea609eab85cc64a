"""Other commits of this repository, built in folders of their own and measured by this harness."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

import flashmoe
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.machine_code.cubins import compiler
from flashmoe.ratchet.measuring.processes import Source
from flashmoe.ratchet.measuring.programs import captured, git

# Every build is measured by this harness, not by its own: the code that times and judges, and what
# that code imports. It is copied beside the build as another package, so that the two do not share
# modules, and it uses only what the package `flashmoe` exports.
_HARNESS = "flashmoe_harness"
ROOMS = ("ratchet", "measure", "spec", "machine")
_OURS = re.compile(rf"\bflashmoe\.({'|'.join(ROOMS)})\b")
_PACKAGE = Path(flashmoe.__file__).resolve().parent


class BuildError(UserError):
    """A commit does not build; the message ends with the compiler's words."""


def resolve(ref: str) -> str:
    """The name of the build of what `ref` names, by this machine's tools: COMMIT-TOOLS. A name of
    that form is believed, so that builds can be used where there is neither a repository nor a
    compiler. Raises UserError when there is no such commit."""
    if re.fullmatch(r"[0-9a-f]{40}-[0-9a-f]{8}", ref):
        return ref
    return _name(_commit(ref))


def working_tree() -> str:
    """As `resolve`, of a commit of the working tree as it is: tracked files with their changes,
    none of it touched. HEAD where nothing is changed."""
    return _name(git("stash", "create") or _commit("HEAD"))


def commit_of(name: str) -> str:
    return name.partition("-")[0]


def build(name: str, folder: Path, debug: bool = False) -> Path:
    """The folder with the commit's package and this harness in it, built now unless it was before:
    folder/NAME/site. FLASHMOE_CUDA and its kind apply as to any build. `debug` shows what the
    compilers say.

    Raises BuildError when it does not build.
    """
    place = folder.resolve() / name
    site = place / "site"
    if not (place / "built").exists():
        if name != _name(commit_of(name)):
            raise UserError(f"there is no build {place}, and the tools here would make another")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        _install(_export(commit_of(name), place / "source"), site, debug)
        shutil.rmtree(place / "source")
        (place / "built").touch()
    _copy_harness(site / _HARNESS)
    return site


def source(name: str, site: Path, *, cuda: bool) -> Source:
    """Workers of a build, with no tuned plans but those it ships. Raises UserError when it is for
    `cuda` and has no CUDA kernels: it would be Triton's or SDPA's that are compared."""
    extensions = sorted((site / "flashmoe").glob("_C*.so"))
    if cuda and not (extensions and compiler(extensions[0])):
        raise UserError(
            f"{commit_of(site.parent.name)[:12]} was built without CUDA kernels: build it where "
            "nvcc is, with FLASHMOE_CUDA=on, which says what is missing"
        )
    cache = site.parent / "cache"
    worker = (sys.executable, "-m", f"{_HARNESS}.ratchet.measuring.worker")
    # What else the caller has on its path stays, from wherever the worker starts.
    others = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(site), *others]),
        "FLASHMOE_CACHE_DIR": str(cache),
    }
    commit = commit_of(site.parent.name)
    return Source(name, worker, str(site), environment, commit=commit)


def _commit(ref: str) -> str:
    try:
        return git("rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}")
    except UserError as error:
        raise UserError(f"there is no commit {ref!r} here ({error})") from None


def _name(commit: str) -> str:
    return f"{commit}-{_tools()}"


def _tools() -> str:
    """Eight digits for all that makes another build of the same source."""
    wishes = sorted(x for x in os.environ.items() if x[0].startswith("FLASHMOE_CUDA") and x[1])
    parts = (torch.__version__, platform.python_version(), _nvcc(), repr(wishes))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


@functools.cache
def _nvcc() -> str:
    """What the compiler that setup.py takes tells of its version; empty without one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    found = found or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        return ""
    return captured([found, "--version"]).stdout.strip()


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


def _install(source: Path, site: Path, debug: bool) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = captured([*pip, "--target", str(site), str(source)], environment=quiet)
    log = done.stdout + done.stderr
    if debug:
        print(log, file=sys.stderr)
    if done.returncode:
        lines = log.strip().splitlines()
        errors = [line.strip() for line in lines if "error" in line.lower()] or lines[-3:]
        commit = commit_of(source.parent.name)[:12]
        raise BuildError(f"{commit} does not build: {' / '.join(errors[:3])}")


def _copy_harness(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for room in ROOMS:
        # In an editable install `ratchet` is not inside the package's folder.
        origin = Path(__file__).resolve().parents[1] if room == "ratchet" else _PACKAGE / room
        for path in (x for x in origin.rglob("*") if x.suffix in (".py", ".ini", ".css")):
            copy = target / room / path.relative_to(origin)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8")
            copy.write_text(_OURS.sub(rf"{_HARNESS}.\1", text), encoding="utf-8")
