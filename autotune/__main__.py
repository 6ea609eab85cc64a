"""`python -m flashmoe.autotune`."""

from __future__ import annotations

import sys

from flashmoe.machine.environment import TOOL_PACKAGES, missing_packages

# As in cli/arguments.py, which needs the packages.
BAD_USAGE, INTERRUPTED = 2, 130


def main() -> int:
    if missing := missing_packages(*TOOL_PACKAGES):
        print(f"flashmoe.autotune: error: {missing}", file=sys.stderr)
        return BAD_USAGE
    try:
        from flashmoe.autotune.cli import dispatch  # takes seconds
    except KeyboardInterrupt:
        return INTERRUPTED
    return dispatch.main()


if __name__ == "__main__":
    sys.exit(main())
