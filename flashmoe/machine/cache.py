"""Where files are kept between runs, whom they belong to, and what becomes of damaged ones."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import time
from pathlib import Path

from flashmoe.machine.environment import variable

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NoCacheFolder(OSError):
    """There is no folder to keep files in; the message says how to name one."""


def cache_dir() -> Path:
    """FLASHMOE_CACHE_DIR, or flashmoe/ in XDG_CACHE_HOME, or ~/.cache/flashmoe; it need not exist.
    Raises NoCacheFolder where the user has no home either."""
    if explicit := variable("FLASHMOE_CACHE_DIR"):
        return _expanded(explicit)
    base = variable("XDG_CACHE_HOME")
    return (_expanded(base) if base else _home() / ".cache") / "flashmoe"


def _expanded(text: str) -> Path:
    path = Path(text)
    if path.parts[:1] == ("~",):
        return _home().joinpath(*path.parts[1:])
    try:
        return path.expanduser()
    except RuntimeError:
        raise NoCacheFolder(
            f"{path.parts[0]} has no home folder: set FLASHMOE_CACHE_DIR to another folder"
        ) from None


def _home() -> Path:
    """Path.home(), which takes an empty HOME for the root folder."""
    if home := variable("HOME"):
        return Path(home)
    try:
        import pwd

        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except (ImportError, KeyError):
        raise NoCacheFolder(
            "there is no home folder to keep results in: set FLASHMOE_CACHE_DIR to a folder"
        ) from None


def make_folder(folder: Path) -> None:
    """Create `folder` and what is missing above it, for the user alone. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def require_writable() -> None:
    """Create the cache folder if need be. Raises NoCacheFolder where nothing can be written."""
    folder = cache_dir()
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise NoCacheFolder(
            f"{folder} cannot be written ({error.strerror}): set FLASHMOE_CACHE_DIR to a folder "
            "that can"
        ) from None


def not_ours(folder: Path) -> str:
    """Why somebody else may have put a file into `folder`, which is cache_dir() or in it; empty
    when only the user can have. Raises OSError where it cannot be looked at."""
    end = cache_dir()
    for path in (folder, *folder.parents):
        # Of a link, whose it is; what it leads to is the folder that is written.
        for status in (path.lstat(), path.stat()):
            if why := _not_ours(path, status):
                return why
        if path == end:
            break
    return ""


def read_ours(path: Path) -> bytes:
    """The content of a file that nobody but the user can have written. Raises PermissionError for
    any other, a symbolic link among them, and OSError for what cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise PermissionError(f"{path} is a symbolic link") from None
        raise
    with open(descriptor, "rb") as file:
        if why := _not_ours(path, os.fstat(descriptor)):
            raise PermissionError(why)
        return file.read()


def _not_ours(path: Path, status: os.stat_result) -> str:
    if status.st_uid != os.geteuid():
        return f"{path} belongs to user {status.st_uid}, not to you ({os.geteuid()})"
    # The mode of a link itself says nothing.
    if not stat.S_ISLNK(status.st_mode) and status.st_mode & _OTHERS_WRITE:
        return f"{path} can be written by others (chmod go-w {path})"
    return ""


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that it is neither used nor lost; returns its new path."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        aside = path.with_name(f"{path.name}.damaged-{stamp}-{number}")
        if not aside.exists():
            path.rename(aside)
            return aside
    raise FileExistsError(f"too many damaged copies beside {path}")
