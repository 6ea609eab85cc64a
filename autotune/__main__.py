"""`python -m flashmoe.autotune`."""

from __future__ import annotations

import sys

from flashmoe.machine.environment import TOOL_PACKAGES, missing_packages
from flashmoe.machine.terminal import fail

# As in cli/arguments.py, which needs the packages.
BAD_USAGE, INTERRUPTED = 2, 130


def main() -> int:
    if missing := missing_packages(*TOOL_PACKAGES):
        fail("flashmoe.autotune", missing)
        return BAD_USAGE
    try:
        from flashmoe.autotune.cli import dispatch  # takes seconds
    except KeyboardInterrupt:
        return INTERRUPTED
    return dispatch.main()


if __name__ == "__main__":
    sys.exit(main())
