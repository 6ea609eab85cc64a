"""`static`: what the compiler made of every kernel, against a committed baseline; no GPU needed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

import flashmoe
from flashmoe.ratchet.commands import common
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.machine_code.cubins import compiler, kernels
from flashmoe.ratchet.machine_code.static import (
    FAIL,
    Comparison,
    Snapshot,
    compare,
    load,
    markdown,
    to_json,
)
from flashmoe.ratchet.measuring.programs import commit
from flashmoe.ratchet.results.files import write_json, write_text

HELP = "compare registers, spills and instructions of every compiled kernel with a baseline"
DESCRIPTION = """Read registers, stack, shared memory, code size and the numbers of HGMMA, HMMA,
MUFU, LDL and STL instructions of every kernel from the built extension, and compare them with a
committed baseline. More spills, or tensor cores no longer used, fail; other changes are told."""
EPILOG = """Exit codes: 0 pass; 1 a kernel spills more or lost its tensor-core instructions; 2 bad
usage or input; 4 not comparable: kernels missing or extra, or another compiler. --update takes what
changed into the baseline, except what fails."""


def add(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--extension", type=Path, help="default: the installed package's")
    add("--baseline", type=Path, default=Path("baselines/static.json"), help="default: %(default)s")
    add("--report", type=Path, metavar="FILE", help="write a Markdown report here")
    add("--update", action="store_true", help="write the baseline anew; without one, create it")
    common.add(parser)


def writes(arguments: argparse.Namespace) -> list[Path]:
    baseline = [arguments.baseline] if arguments.update else []
    return [*baseline, *([arguments.report] if arguments.report else [])]


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    extension = arguments.extension or installed()
    if not extension.exists():
        raise UserError(f"there is no extension {extension}")
    version = compiler(extension)
    if not version:
        raise UserError(f"{extension} has no CUDA kernels: build it where nvcc is")
    now = Snapshot(version, commit(), tuple(kernels(extension)))
    path = arguments.baseline
    if not path.exists():
        if not arguments.update:
            raise UserError(f"there is no baseline {path}; the same command with --update makes it")
        write_json(path, to_json(now))
        print(f"created baseline {path} with {len(now.kernels)} kernels")
    before = load(path)
    comparison = compare(now, before)
    if arguments.report:
        write_text(arguments.report, markdown(comparison))
    _show(comparison)
    if arguments.update and (comparison.changes or comparison.problems):
        if any(change.verdict == FAIL for change in comparison.changes):
            print(f"baseline {path} stays: it takes no kernel that got worse")
        else:
            write_json(path, to_json(now))
            told = f"baseline {path} updated: {len(comparison.changes)} kernels"
            other = now.compiler != before.compiler
            print(f"{told}, now of CUDA {now.compiler} after {before.compiler}" if other else told)
    return comparison.exit_code


def installed() -> Path:
    found = sorted(Path(flashmoe.__file__).parent.glob("_C*.so"))
    if not found:
        raise UserError("the installed package has no extension; pass --extension")
    return found[0]


def _show(comparison: Comparison) -> None:
    out = common.stdout()
    table = Table(title=f"static ratchet {comparison.summary}")
    table.add_column("kernel", overflow="fold")
    table.add_column("verdict")
    table.add_column("what changed")
    for change in comparison.changes:
        table.add_row(change.label, change.verdict, change.what)
    if comparison.changes:
        out.print(table)
    else:
        out.print(f"static ratchet {comparison.summary}")
    for problem in comparison.problems:
        out.print(f"not comparable: {problem}")
