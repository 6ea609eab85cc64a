"""What a user did or gave wrong: one line to stderr, exit code 2, caught once in the cli."""

from __future__ import annotations


class UserError(Exception):
    """The message is one line and says what to do about it."""
