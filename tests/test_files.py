"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import flashmoe
from flashmoe.machine import files
from flashmoe.planning import database
from flashmoe.spec import shapes

PROBLEM = flashmoe.Problem(1, 2, 2, 64, 64, 16, "float32")
ENTRY = database.Entry(PROBLEM, "cpu", "cpu:64x64", "cpu:128x128", judged="x")
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: files.write_whole(path, "new"),
    "database": lambda path: database.update(path, {PROBLEM.bucket: ENTRY}),
    "shapes": lambda path: shapes.write(path, {PROBLEM: 1}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_what_was_there_and_nothing_else(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    before = database.text_of({})
    path.write_text(before, encoding="utf-8")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            WRITERS[writer](path)
    assert path.read_text(encoding="utf-8") == before
    assert {file.name for file in tmp_path.iterdir()} <= {"x.json", "x.lock"}
    WRITERS[writer](path)
    assert path.read_text(encoding="utf-8") != before


def test_any_text_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.txt"
    files.write_whole(path, "5 µs in J\udcfcrgen")
    assert path.read_text(encoding="utf-8") == "5 µs in J\\udcfcrgen"


def test_a_database_that_takes_nothing_over_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "tuned" / "x.json"
    assert database.update(path, {}) == 0
    assert not path.exists()
    database.update(path, {PROBLEM.bucket: ENTRY})
    written = path.read_bytes()
    assert database.update(path, {PROBLEM.bucket: ENTRY}, replace=False) == 0
    assert path.read_bytes() == written


@pytest.mark.parametrize("check", [files.require_writable, lambda path: database.update(path, {})])
def test_what_cannot_be_written_is_told_beforehand(
    check: Callable[[Path], object], tmp_path: Path
) -> None:
    """A folder in its place, and a file in its folder's."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "folder", tmp_path / "file" / "x.json"):
        with pytest.raises(OSError, match=r"directory|exists"):
            check(path)
    assert {path.name for path in tmp_path.iterdir()} <= {"folder", "file", "folder.lock"}
