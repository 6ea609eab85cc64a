"""The command line: arguments in, database, report and exit code out."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

import torch
from rich.console import Console

from flashmoe import api, database, device, plan
from flashmoe.autotune import report
from flashmoe.autotune.progress import shown
from flashmoe.autotune.result import Result
from flashmoe.autotune.suite import DEFAULTS, default_suite, named_problem
from flashmoe.autotune.tune import Options, tune
from flashmoe.backends import BACKENDS
from flashmoe.problem import DTYPE_BYTES, MAX_HEAD_DIM

PROG = "flashmoe.autotune"
DONE, NOTHING_MEASURED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
# Wide enough that no row of the table folds; used where nobody's terminal decides.
_REPORT_WIDTH = 160
_BACKENDS_WITH_TILES = ("cuda", "triton", "cpu")
_PROBLEM_OPTIONS = (
    "batch", "heads", "kv_heads", "seqlen", "seqlen_kv", "head_dim", "dtype", "causal",
)  # fmt: skip

_DESCRIPTION = """\
Find the fastest correct tile for attention problems on this machine and store it where
flash_attn_func looks. Without a problem option a default suite is tuned; any problem option tunes
that one problem, in which the others default as told below. What is stored for this device, torch
and kernels is measured again and kept unless something beats it."""


def _defaults_text(device_type: str) -> str:
    given = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in DEFAULTS[device_type].items())
    return f"  on {device_type}: {given}"


_EPILOG = f"""\
defaults of problem options, once one is given:
{_defaults_text("cpu")}
{_defaults_text("cuda")}
  --kv-heads as --heads, --seqlen-kv as --seqlen, --no-causal

exit codes:
    0  done: at least one problem has a result
    1  nothing could be measured, every candidate was wrong, or results could not be written
    2  bad usage
  130  interrupted; what was finished by then is stored and reported
"""


class UsageError(Exception):
    """An argument that names itself, what it got and what is allowed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _whole(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")


def _head_dim(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) % 8 == 0 and 8 <= number <= MAX_HEAD_DIM:
            return number
    raise argparse.ArgumentTypeError(
        f"must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {text!r}"
    )


def _seed(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 0 <= (number := int(text)) < 2**32:
            return number
    raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**32 - 1, got {text!r}")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")


def _parser() -> _Parser:
    parser = _Parser(
        prog=f"python -m {PROG}",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    problem = parser.add_argument_group("problem")
    problem.add_argument("--batch", type=_whole, metavar="N")
    problem.add_argument("--heads", type=_whole, metavar="N", help="query heads")
    problem.add_argument("--kv-heads", type=_whole, metavar="N", help="key and value heads")
    problem.add_argument("--seqlen", type=_whole, metavar="N", help="length of the queries")
    problem.add_argument("--seqlen-kv", type=_whole, metavar="N", help="length of the keys")
    problem.add_argument("--head-dim", type=_head_dim, metavar="N")
    problem.add_argument("--dtype", choices=tuple(DTYPE_BYTES))
    problem.add_argument("--causal", action=argparse.BooleanOptionalAction)
    search = parser.add_argument_group("search")
    search.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: a GPU)")
    search.add_argument(
        "--backend", choices=_BACKENDS_WITH_TILES, help="search this one's tiles only"
    )
    search.add_argument("--trials", type=_whole, metavar="N", help="tiles tried per problem")
    search.add_argument(
        "--budget",
        type=_seconds,
        default=100.0,
        metavar="SECONDS",
        help="for all problems together, compilation included (default: %(default)g)",
    )
    search.add_argument("--seed", type=_seed, default=0, metavar="N", help="(default: 0)")
    search.add_argument("--force", action="store_true", help="search what is stored already, too")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        default=Path("tuning"),
        metavar="DIR",
        help="folder of suggestions.md (default: tuning)",
    )
    output.add_argument("--json", action="store_true", help="one JSON document on stdout")
    output.add_argument("--debug", action="store_true", help="tracebacks with errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        return _run(_parser().parse_args(words), words)
    except UsageError as error:
        return _fail(error, BAD_USAGE, debug)
    except KeyboardInterrupt:
        return _fail(RuntimeError("interrupted"), INTERRUPTED, debug)
    except Exception as error:  # noqa: BLE001 - the command line's one place for surprises
        return _fail(error, NOTHING_MEASURED, debug)


def _fail(error: Exception, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"{PROG}: error: {text}", file=sys.stderr)
    return code


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    warnings.showwarning = _show_warning
    target = _device(args.device, args.backend)
    given = {name: getattr(args, name) for name in _PROBLEM_OPTIONS}
    try:
        problem = named_problem(target.type, {k: v for k, v in given.items() if v is not None})
    except ValueError as error:
        raise UsageError(str(error)) from None
    _require_backend(args.backend, target)
    folder = _output_folder(args.output)
    for name in ("FLASHMOE_BACKEND", "FLASHMOE_TILE"):
        if os.environ.get(name):
            _warn(f"{name} is set and overrides what is tuned here")

    here = device.fingerprint(target)
    path = database.user_path(here.device)
    stored = {**_load(database.shipped_path(here.device)), **_load(path)}
    command = shlex.join(["python", "-m", PROG, *words])
    options = Options(args.backend, args.trials, args.budget, args.seed, args.force)
    problems = default_suite(target.type) if problem is None else (problem,)
    results: list[Result] = []
    interrupted = unwritten = False
    start = time.perf_counter()
    with shown(Console(stderr=True)) as watch:
        try:
            for result in tune(
                problems, target, options, stored, here, watch, now=time.perf_counter
            ):
                results.append(result)
                # At once, so that an interruption loses only the problem at hand.
                if result.store and not _store(path, result, here, command):
                    unwritten = True
        except KeyboardInterrupt:
            interrupted = True
    seconds = time.perf_counter() - start
    results.sort(key=lambda result: problems.index(result.problem))
    plan.reload_databases()
    api.forget_plans()

    suggestions = None
    if any(result.best for result in results):
        suggestions = folder / "suggestions.md"
        suggestions.write_text(report.suggestions_text(results, here, path, command))
    for line in report.rejections(results):
        _warn(line)
    if args.json:
        document = report.document(
            results,
            here,
            command=command,
            seed=args.seed,
            budget=args.budget,
            seconds=seconds,
            interrupted=interrupted,
            database=path,
            suggestions=suggestions,
        )
        print(json.dumps(document, indent=1))
    else:
        _print_report(results, path, suggestions, seconds, sys.stdout)
    if interrupted:
        print(f"{PROG}: interrupted; finished problems are stored", file=sys.stderr)
        return INTERRUPTED
    if suggestions is None:
        reason = "; ".join(f"{r.problem.label}: {r.reason}" for r in results)
        print(f"{PROG}: error: nothing could be measured: {reason}", file=sys.stderr)
    return DONE if suggestions is not None and not unwritten else NOTHING_MEASURED


def _device(text: str | None, backend: str | None) -> torch.device:
    if text is None:
        text = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
    try:
        chosen = torch.device(text)
    except RuntimeError:
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {text!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {text!r}")
    if chosen.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise UsageError(f"--device must be cpu, for torch finds no CUDA device, got {text!r}")
    if chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if chosen.index >= count:
        raise UsageError(f"--device must be cuda:0 to cuda:{count - 1}, got {text!r}")
    return chosen


def _require_backend(name: str | None, target: torch.device) -> None:
    if name is not None and (reason := BACKENDS[name].unavailable(target)):
        raise UsageError(f"--backend must be one that runs on {target}, got {name!r}: {reason}")


def _output_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output must be a folder that can be written, got {str(folder)!r}: {error.strerror}"
        ) from None
    return folder


def _load(path: Path) -> dict[str, database.Entry]:
    try:
        return database.load(path)
    except OSError as error:
        raise RuntimeError(f"{path} could not be read: {error.strerror}") from error


def _store(path: Path, result: Result, here: device.Fingerprint, command: str) -> bool:
    try:
        database.update(path, {result.problem.bucket: result.entry(here, command)})
    except OSError as error:
        _warn(f"{path} could not be written: {error.strerror}")
        return False
    return True


def _print_report(
    results: Sequence[Result], path: Path, suggestions: Path | None, seconds: float, out: TextIO
) -> None:
    console = Console(file=out)
    if not console.is_terminal:
        console = Console(file=out, width=_REPORT_WIDTH)
    console.print(report.table(results))
    for line in (f"{seconds:.1f} s", f"database: {path}", f"suggestions: {suggestions or '-'}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _warn(text: str) -> None:
    print(f"{PROG}: warning: {text}", file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line a warning; where it was raised, which Python would add, helps no user."""
    _warn(" ".join(str(message).split()))
