"""Result files: reading with validation, and writing so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from flashmoe.machine.files import require_writable, write_whole
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.results.schema import from_json, to_json
from flashmoe.ratchet.results.values import Results

T = TypeVar("T")


def read_text(path: Path) -> str:
    """Raises UserError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8 text") from None


def read_json(path: Path, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of it. Raises UserError naming the path and what is wrong; the file
    stays."""
    text = read_text(path)
    try:
        if not text.strip():
            raise ValueError("the file is empty")
        return parse(json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: no whole JSON document ({error})") from None
    except (ValueError, UserError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def load(path: Path) -> Results:
    return read_json(path, from_json)


def save(results: Results, path: Path) -> None:
    """Write atomically, creating the folder: a reader sees the old file or the new one."""
    write_json(path, to_json(results))


def check_writable(*paths: Path) -> None:
    """Raises UserError where `write_text` would, for want of a place."""
    for path in paths:
        with _named(path):
            require_writable(path)


def write_text(path: Path, text: str) -> None:
    """Atomically. Raises UserError when the place cannot be written."""
    with _named(path):
        write_whole(path, text)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_json(path: Path, data: Any) -> None:
    """Atomically, a list of scalars a line, which keeps a committed file's diffs readable."""
    text = json.dumps(data, indent=1, allow_nan=False)
    joined = re.sub(
        r"\[\n\s*([^\[\]{}\"]*?)\n\s*\]", lambda match: f"[{' '.join(match[1].split())}]", text
    )
    write_text(path, joined + "\n")
