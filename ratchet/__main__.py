"""`python -m flashmoe.ratchet`."""

from __future__ import annotations

import importlib.util
import sys

# What the ratchet needs and attention does not: modules, and the packages that bring them.
PACKAGES = {"pynvml": "nvidia-ml-py", "rich": "rich", "scipy": "scipy"}
BAD_INPUT = 2


def main() -> int:
    missing = [name for module, name in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        told = f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}"
        print(f"flashmoe.ratchet: error: {told}", file=sys.stderr)
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
