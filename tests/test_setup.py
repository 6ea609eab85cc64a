"""setup.py and the source distribution: complete, without build products, and free of GNU's linker
options where there is another linker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import missing

ROOT = Path(__file__).resolve().parents[1]
PRODUCTS = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", ".*_cache", ".hypothesis")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the repository, for setup.py writes beside itself."""
    if not (ROOT / "setup.py").exists():
        missing("the tests of an installed package have no setup.py")
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=PRODUCTS))


def run(tree: Path, *arguments: str, **variables: str) -> str:
    """What Python prints in `tree`."""
    environment = {**os.environ, "FLASHMOE_CUDA": "off", **variables}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources(tree: Path, folder: str) -> set[str]:
    return {
        str(path.relative_to(tree))
        for path in (tree / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so") and "kernels" not in path.parts
    }


def test_the_sdist_has_all_that_a_build_and_the_tests_need(tree: Path, tmp_path: Path) -> None:
    (tree / "flashmoe" / "kernels").mkdir(exist_ok=True)
    (tree / "flashmoe" / "kernels" / "copied.cuh").touch()
    (tree / "flashmoe" / "_C.abi3.so").touch()
    run(tree, "setup.py", "-q", "sdist", "-d", str(tmp_path))
    (archive,) = tmp_path.glob("flashmoe-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    found = sources(unpacked, ".")
    for folder in ("csrc", "autotune", "ratchet", "flashmoe", "tests"):
        missing = sources(tree, folder) - found
        assert not missing, folder
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"} <= found
    assert not [
        x for x in unpacked.rglob("*") if x.suffix in (".so", ".pyc") or x.name == "kernels"
    ]
    # Far enough to have read csrc/build_config.py and generated the registry.
    run(unpacked, "setup.py", "-q", "egg_info", "-e", str(tmp_path))


def test_a_wheel_has_every_package(tree: Path) -> None:
    listed = set(
        re.findall(r'^    "(flashmoe[\w.]*)",$', (tree / "pyproject.toml").read_text(), re.M)
    )
    folders = {"flashmoe": "flashmoe", **{t: f"flashmoe.{t}" for t in ("autotune", "ratchet")}}
    found = {
        ".".join([prefix, *path.parent.relative_to(tree / folder).parts])
        for folder, prefix in folders.items()
        for path in (tree / folder).rglob("__init__.py")
    }
    assert found - listed == {"flashmoe.ratchet.ci"}  # what only this repository's CI runs
    assert listed <= found


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_linker_options_are_those_of_the_platforms_linker(tree: Path, platform: str) -> None:
    script = f"""
import runpy, setuptools, sys
import torch.utils.cpp_extension
setuptools.setup = lambda ext_modules, **_: print(*ext_modules[0].extra_link_args)
sys.platform = {platform!r}
runpy.run_path("setup.py")
"""
    printed = run(tree, "-c", script).split()
    gnu = [option for option in printed if option in ("-Wl,--exclude-libs,ALL", "-s")]
    assert len(gnu) == (2 if platform == "linux" else 0)


def test_empty_variables_are_unset(tree: Path) -> None:
    script = """
import runpy, setuptools
setuptools.setup = lambda **_: None
globals = runpy.run_path("setup.py")
print(*globals["cuda_archs"]())
"""
    names = ("FLASHMOE_CUDA", "FLASHMOE_CUDA_ARCHS", "MAX_JOBS", "CUDA_HOME")
    assert run(tree, "-c", script, **dict.fromkeys(names, "")) == "80 90\n"
