"""Which source this is."""

from __future__ import annotations

import os
from pathlib import Path

from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.measuring.programs import captured


def git(*arguments: str, folder: Path | None = None) -> str:
    """git's answer. Raises UserError with git's own words."""
    try:
        done = captured(["git", *arguments], folder=folder)
    except OSError as error:
        raise UserError(f"git cannot be run: {error.strerror}") from None
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["it failed"]
        raise UserError(f"git {' '.join(arguments)}: {words[-1]}")
    return done.stdout.strip()


def commit(folder: Path | None = None) -> str:
    """The commit checked out in `folder` (default: here), with a + where tracked files differ from
    it. Outside a repository what FLASHMOE_COMMIT says, for a copy of the files on another machine,
    or else empty."""
    try:
        head = git("rev-parse", "HEAD", folder=folder)
        changed = git("status", "--porcelain", "--untracked-files=no", folder=folder)
    except UserError:
        return os.environ.get("FLASHMOE_COMMIT", "")
    return head + ("+" if changed else "")
