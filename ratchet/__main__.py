"""`python -m flashmoe.ratchet`."""

from __future__ import annotations

import sys

from flashmoe.environment import missing_packages

BAD_INPUT = 2


def main() -> int:
    if missing := missing_packages("pynvml", "rich", "scipy"):
        print(f"flashmoe.ratchet: error: {missing}", file=sys.stderr)
        return BAD_INPUT
    try:
        from flashmoe.ratchet import cli
    except Exception as error:  # noqa: BLE001 - Python would exit with 1, which is a regression
        why = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"flashmoe.ratchet: error: it cannot be imported: {why}", file=sys.stderr)
        return BAD_INPUT
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
