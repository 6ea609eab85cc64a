"""Other programs, and what they say; of git, which source this is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from flashmoe.ratchet.errors import UserError


def captured(
    command: Sequence[str],
    *,
    folder: Path | str | None = None,
    environment: Mapping[str, str] | None = None,
    told: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program in `folder`, with variables besides those of this process, `told` something on
    stdin. What it writes is read as UTF-8, whatever the locale, with a mark for what is not."""
    return subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        input=told,
    )


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
