"""Other programs, and what they say."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


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
