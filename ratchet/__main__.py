"""`python -m flashmoe.ratchet`."""

from __future__ import annotations

import sys

from flashmoe.ratchet.cli import main

if __name__ == "__main__":
    sys.exit(main())
