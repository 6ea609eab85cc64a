"""`python -m flashmoe.ratchet`."""

from __future__ import annotations

import sys

from flashmoe.machine.environment import missing_packages
from flashmoe.machine.terminal import fail

BAD_INPUT = 2


def main() -> int:
    try:
        # Both before the command line, which needs them.
        if missing := missing_packages("pynvml", "rich", "scipy"):
            return failed(missing)
        from flashmoe.ratchet import cli
    except Exception as error:  # noqa: BLE001 - Python would exit with 1, which is a regression
        return failed(f"it cannot be imported: {type(error).__name__}: {error}")
    return cli.main()


def failed(why: str) -> int:
    fail("flashmoe.ratchet", why)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
