"""The command line: which command runs, and how its errors and warnings are told."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from flashmoe.autotune.cli import apply as command_apply
from flashmoe.autotune.cli import show as command_show
from flashmoe.autotune.cli import tune as command_tune
from flashmoe.autotune.cli.arguments import (
    BAD_USAGE,
    INTERRUPTED,
    NOTHING_MEASURED,
    PROG,
    UsageError,
    warn,
)
from flashmoe.autotune.search.storage import StorageError
from flashmoe.machine.cache import NoCacheFolder
from flashmoe.machine.terminal import fail, lenient

# Without one of these words, the problem named by the options is tuned.
_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "show": command_show.show,
    "export": command_show.export,
    "import": command_show.import_,
    "apply": command_apply.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    with lenient():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(words: list[str]) -> int:
    debug = "--debug" in words
    warnings.showwarning = _show_warning
    try:
        if words and words[0] in _COMMANDS:
            return _COMMANDS[words[0]](words[1:])
        return command_tune.run(words)
    except (UsageError, NoCacheFolder, StorageError) as error:
        return _fail(error, BAD_USAGE, debug)
    except KeyboardInterrupt:
        return _fail(RuntimeError("interrupted"), INTERRUPTED, debug)
    except Exception as error:  # noqa: BLE001 - the command line's one place for surprises
        return _fail(error, NOTHING_MEASURED, debug)


def _fail(error: Exception, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    fail(PROG, str(error) or type(error).__name__)
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line a warning; where it was raised, which Python would add, helps no user."""
    warn(" ".join(str(message).split()))
