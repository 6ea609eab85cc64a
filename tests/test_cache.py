"""Where the cache folder is, whose it must be, and what happens without one."""

from __future__ import annotations

import errno
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from flashmoe.machine import cache

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASHMOE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of kernels, made as the cache makes it."""
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "cache"))
    cache.make_folder(tmp_path / "cache" / "kernels")
    return tmp_path / "cache" / "kernels"


def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom neither HOME nor the system's list of users gives a home."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "/home/me/.cache/flashmoe"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/flashmoe"),
        ({"XDG_CACHE_HOME": "~/caches"}, "/home/me/caches/flashmoe"),
        ({"FLASHMOE_CACHE_DIR": "/mine", "XDG_CACHE_HOME": "/caches"}, "/mine"),
        ({"FLASHMOE_CACHE_DIR": "~/mine"}, "/home/me/mine"),
        ({"FLASHMOE_CACHE_DIR": "~"}, "/home/me"),
        ({"FLASHMOE_CACHE_DIR": "~root/mine"}, "/root/mine"),
        ({"FLASHMOE_CACHE_DIR": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/flashmoe"),
        ({"HOME": ""}, "/home/listed/.cache/flashmoe"),
        ({"HOME": "", "FLASHMOE_CACHE_DIR": "~/mine"}, "/home/listed/mine"),
    ],
)
def test_where_it_is(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    listed = pwd.struct_passwd(("me", "x", 1, 1, "", "/home/listed", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: listed)
    assert cache.cache_dir() == Path(expected)


@pytest.mark.parametrize("explicit", ["", "~/mine", "~no-such-user/mine"])
def test_without_a_home_the_variable_is_named(
    explicit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    homeless(monkeypatch)
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", explicit)
    with pytest.raises(cache.NoCacheFolder, match="set FLASHMOE_CACHE_DIR"):
        cache.cache_dir()
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", "/mine")
    assert cache.cache_dir() == Path("/mine")


HOMELESS = """
import pwd, runpy, sys, warnings
import torch

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown
warnings.simplefilter("error")
"""
ATTEND = """
import flashmoe
q = torch.randn(1, 8, 2, 16)
print(flashmoe.flash_attn_func(q, q, q).shape)
print(flashmoe.make_plan(flashmoe.Problem(1, 2, 2, 8, 8, 16, "float32"), q.device).source)
"""
RUN = "sys.argv[1:] = {words}; runpy.run_module({module!r}, run_name='__main__')"


def without_a_home(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FLASHMOE_CACHE_DIR": ""}
    del environment["HOME"]
    return subprocess.run(
        [sys.executable, "-c", HOMELESS + code],
        capture_output=True,
        encoding="utf-8",
        env=environment,
    )


def test_without_a_home_attention_runs_untuned() -> None:
    done = without_a_home(ATTEND)
    assert done.stdout.splitlines() == ["torch.Size([1, 8, 2, 16])", "heuristic"], done.stderr


def test_without_a_home_the_tuner_says_what_to_set(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--budget", "1", "--output", str(tmp_path / "tuning")]
    done = without_a_home(RUN.format(words=words, module="flashmoe.autotune"))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("flashmoe.autotune: error: there is no home folder")
    assert "FLASHMOE_CACHE_DIR" in line


def test_without_a_home_the_overview_says_what_to_set() -> None:
    done = without_a_home(RUN.format(words=[], module="flashmoe"))
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("  tuned (yours): ")]
    assert "set FLASHMOE_CACHE_DIR" in line


def test_folders_are_made_for_the_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "new" / "cache"))
    before = os.umask(0)
    try:
        cache.make_folder(tmp_path / "new" / "cache" / "kernels")
    finally:
        os.umask(before)
    for path in ("new", "new/cache", "new/cache/kernels"):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == 0o700
    cache.make_folder(tmp_path / "new" / "cache" / "kernels")
    assert cache.not_ours(tmp_path / "new" / "cache" / "kernels") == ""


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
@pytest.mark.parametrize("where", ["", "kernels"])
def test_a_folder_that_others_write_is_not_ours(folder: Path, where: str, mode: int) -> None:
    path = folder.parent / where
    path.chmod(mode)
    assert cache.not_ours(folder) == f"{path} can be written by others (chmod go-w {path})"
    path.chmod(mode & ~0o022)
    assert cache.not_ours(folder) == ""


@as_root
@pytest.mark.parametrize("where", ["", "kernels"])
def test_a_folder_of_somebody_else_is_not_ours(folder: Path, where: str) -> None:
    os.chown(folder.parent / where, NOBODY, NOBODY)
    assert f"{folder.parent / where} belongs to user {NOBODY}, not to you" in cache.not_ours(folder)


def test_a_link_leads_to_what_counts(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.rmdir()
    folder.symlink_to(elsewhere)
    assert cache.not_ours(folder) == ""
    elsewhere.chmod(0o770)
    assert "can be written by others" in cache.not_ours(folder)


@as_root
def test_a_link_of_somebody_else_is_not_ours(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    folder.rmdir()
    folder.symlink_to(mine)
    os.chown(folder, NOBODY, NOBODY, follow_symlinks=False)
    assert f"{folder} belongs to user {NOBODY}" in cache.not_ours(folder)


def test_only_a_file_of_ours_is_read(folder: Path) -> None:
    file, link = folder / "file", folder / "link"
    file.write_bytes(b"code")
    file.chmod(0o644)
    assert cache.read_ours(file) == b"code"
    link.symlink_to(file)
    with pytest.raises(PermissionError, match="link is a symbolic link"):
        cache.read_ours(link)
    file.chmod(0o664)
    with pytest.raises(PermissionError, match="can be written by others"):
        cache.read_ours(file)
    with pytest.raises(FileNotFoundError):
        cache.read_ours(folder / "absent")


@as_root
def test_a_file_of_somebody_else_is_not_read(folder: Path) -> None:
    file = folder / "file"
    file.write_bytes(b"code")
    os.chown(file, NOBODY, NOBODY)
    with pytest.raises(PermissionError, match=f"file belongs to user {NOBODY}"):
        cache.read_ours(file)


def test_a_cache_that_cannot_be_written_names_the_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.require_writable()

    def read_only(**_: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cache.tempfile, "TemporaryFile", read_only)
    with pytest.raises(cache.NoCacheFolder, match=r"Read-only file system.*set FLASHMOE_CACHE_DIR"):
        cache.require_writable()
