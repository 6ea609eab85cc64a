"""The command line: finds the subcommand, runs it, and says what a user gave wrong in one line."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from flashmoe.machine.terminal import fail, lenient
from flashmoe.ratchet.commands.common import PROGRAM
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate.decide import EXIT_BAD_INPUT
from flashmoe.ratchet.results.files import check_writable

COMMANDS = ("bench", "gate", "ab", "static", "selftest", "trend", "profile", "sota")
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    with lenient():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    try:
        arguments = parser().parse_args(argv)
        check_writable(*arguments.writes(arguments))
        code: int = arguments.run(arguments, argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - Python would exit with 1, which is a regression
        if "--debug" in argv:
            traceback.print_exc()
        why = f"unexpected {type(error).__name__}: {error}; --debug shows where"
        fail(PROGRAM, str(error) if isinstance(error, UserError) else why)
        return EXIT_BAD_INPUT
    return code


def command(name: str) -> ModuleType:
    return importlib.import_module(f"flashmoe.ratchet.commands.{name.replace('-', '_')}")


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Measure attention against SDPA and let no kernel get slower unnoticed.",
    )
    subparsers = root.add_subparsers(required=True, metavar="|".join(COMMANDS))
    for name in COMMANDS:
        module = command(name)
        one = subparsers.add_parser(
            name, help=module.HELP, description=module.DESCRIPTION, epilog=module.EPILOG
        )
        module.add(one)
        one.set_defaults(run=module.run, writes=module.writes)
    return root
