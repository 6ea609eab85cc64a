"""Result files: reading with validation, and writing so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.results import Results
from flashmoe.ratchet.schema import from_json, to_json


def load(path: Path) -> Results:
    """Read and validate. Raises UserError naming the path and what is wrong; the file stays."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8 text") from None
    try:
        if not text.strip():
            raise ValueError("the file is empty")
        return from_json(json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: no whole JSON document ({error})") from None
    except (ValueError, UserError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def save(results: Results, path: Path) -> None:
    """Write atomically, creating the folder: a reader sees the old file or the new one."""
    write_json(path, to_json(results))


def check_writable(*paths: Path) -> None:
    """Raises UserError where `write_text` would, for want of a place: to be told before minutes of
    measuring, not after them. Makes the folders, which it would make as well."""
    for path in paths:
        temporary = _temporary(path)
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            temporary.unlink()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def write_text(path: Path, text: str) -> None:
    """Atomically. Raises UserError when the place cannot be written."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_json(path: Path, data: Any) -> None:
    """Atomically, a list of scalars a line, which keeps a committed file's diffs readable."""
    text = json.dumps(data, indent=1, allow_nan=False)
    joined = re.sub(
        r"\[\n\s*([^\[\]{}\"]*?)\n\s*\]", lambda match: f"[{' '.join(match[1].split())}]", text
    )
    write_text(path, joined + "\n")
