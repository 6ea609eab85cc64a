"""How commands end, and how they warn."""

from __future__ import annotations

import sys

from flashmoe.autotune.cli.arguments import PROG

DONE, NOTHING_MEASURED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130


def warn(text: str) -> None:
    print(f"{PROG}: warning: {text}", file=sys.stderr)
