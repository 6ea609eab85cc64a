"""What several subcommands share."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flashmoe.machine.device import named
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate.thresholds import DEFAULTS, Thresholds, with_cases
from flashmoe.ratchet.measuring.suite import NAME_FORM, SUITES

PROGRAM = "flashmoe.ratchet"
# Wide enough for every column, where the output is a file that does not wrap.
_FILE_WIDTH = 160


def add_cases(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--suite", choices=list(SUITES), default="quick", help="default: %(default)s")
    add(
        "--case",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="these cases instead of a suite: patterns such as '*-causal', or names of the form "
        + NAME_FORM.replace("%", "%%"),
    )


# Options of more than one command.
_OPTIONS: dict[str, dict[str, Any]] = {
    "device": {"help": "cpu, cuda or cuda:N (default: cuda where there is one)"},
    "seed": {"type": int, "default": 0, "help": "of inputs and orders (default: %(default)s)"},
    "price-per-hour": {"type": float, "metavar": "PRICE", "help": "of the machine: tells the cost"},
    "build-folder": {
        "type": Path,
        "default": Path("build/ab"),
        "metavar": "FOLDER",
        "help": "builds, kept by commit and tools (default: %(default)s)",
    },
    "build-only": {
        "action": "store_true",
        "help": "build, and tell the builds' names: where there is no compiler or repository, a "
        "name stands for its REF, with a copy of the build folder",
    },
    "debug": {
        "action": "store_true",
        "help": "show tracebacks, and what compilers and workers say",
    },
}


def add(parser: argparse.ArgumentParser, *names: str) -> None:
    """Some of _OPTIONS, and --debug, which every command has."""
    for name in (*names, "debug"):
        parser.add_argument(f"--{name}", **_OPTIONS[name])


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    for name in ("fail", "improve"):
        defaults = (f"{getattr(x, name):+g} on {kind}" for kind, x in DEFAULTS.items())
        add(
            f"--threshold-{name}",
            type=float,
            metavar="PERCENT",
            help=f"default: {', '.join(defaults)}",
        )
    add(
        "--threshold",
        action="append",
        default=[],
        metavar="PATTERN=FAIL[/IMPROVE]",
        help="for the cases a pattern names, such as 'fwd-b8-*=-5/+8'; the last that matches",
    )


def thresholds(arguments: argparse.Namespace, kind: str) -> Thresholds:
    """As told, and otherwise the defaults of a `kind` of device."""
    default, fail, improve = DEFAULTS[kind], arguments.threshold_fail, arguments.threshold_improve
    return with_cases(
        default.fail if fail is None else fail,
        default.improve if improve is None else improve,
        arguments.threshold,
    )


def device(name: str | None) -> str:
    """A device that exists; cuda where there is one and none was named."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        named(name)
    except ValueError as error:
        raise UserError(str(error)) from None
    return name


def command(argv: Sequence[str]) -> str:
    """The command as it would be repeated elsewhere: no path of this machine in it."""
    return shlex.join(["python", "-m", PROGRAM, *map(portable, argv)])


def portable(argument: str) -> str:
    if not os.path.isabs(argument):
        return argument
    relative = os.path.relpath(argument)
    return os.path.basename(argument) if relative.startswith("..") else relative


def stdout() -> Console:
    return _console(width=None if sys.stdout.isatty() else _FILE_WIDTH)


def _console(**options: Any) -> Console:
    """Shows text as it is: what comes from files and exceptions may look like markup."""
    return Console(markup=False, emoji=False, highlight=False, **options)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, or a line for each tenth where that is no terminal; what is yielded is told
    each step as it begins."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    shown = _console(stderr=True)
    with Progress(*columns, console=shown) as bar:
        task = bar.add_task("starting", total=total)
        begun = 0

        def step(line: str) -> None:
            nonlocal begun
            expected = max(total, begun + 1)
            if not shown.is_terminal and begun * 10 // total > (begun - 1) * 10 // total:
                shown.print(f"{begun} of {expected}: {line}")
            bar.update(task, description=line, completed=begun, total=expected)
            begun += 1

        yield step
        bar.update(task, description="done", completed=begun)
