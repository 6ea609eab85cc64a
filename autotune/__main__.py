"""`python -m flashmoe.autotune`."""

from __future__ import annotations

import sys

from flashmoe.autotune.cli import main

if __name__ == "__main__":
    sys.exit(main())
