"""stdout and stderr of a command. What it found is in its files and its exit code: neither a reader
that is gone (`gate … | head -1`) nor a character that the locale lacks may change those."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


def fail(program: str, why: str) -> None:
    """One line on stderr."""
    print(f"{program}: error: {' '.join(why.split())}", file=sys.stderr)


class Lenient:
    """A text stream that shows what it can: `?` for what `stream` cannot encode, and nothing any
    more once a write has failed. In all else it is `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = self._stream.encoding
        with self._or_nowhere():
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._or_nowhere():
            self._stream.flush()

    @contextlib.contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # Where it leads from now on: what is left in its buffers would fail again at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Makes sys.stdout and sys.stderr Lenient; one that was closed from the start leads nowhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        out, err = (Lenient(stream or nowhere) for stream in (sys.stdout, sys.stderr))
        redirected = contextlib.redirect_stdout(cast(TextIO, out))
        with redirected, contextlib.redirect_stderr(cast(TextIO, err)):
            try:
                yield
            finally:
                out.flush()
                err.flush()
