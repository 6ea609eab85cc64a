"""How processes that measure end."""

from __future__ import annotations

import signal


def signal_name(number: int) -> str:
    """`SIGSEGV`, or `signal 40` for those without a name, as real-time ones."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
