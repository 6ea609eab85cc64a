"""Tuning itself, as a command: arguments in, database, report and exit code out."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from optuna.storages import BaseStorage
from rich.console import Console

from flashmoe import api
from flashmoe.autotune.cli import arguments, calibrate, dry_run
from flashmoe.autotune.cli.arguments import (
    DONE,
    INTERRUPTED,
    NOTHING_MEASURED,
    PROG,
    UsageError,
    usable,
    warn,
)
from flashmoe.autotune.cli.progress import shown
from flashmoe.autotune.report import html as report_html
from flashmoe.autotune.report import texts as report
from flashmoe.autotune.running.isolated import IsolatedBench, Processes
from flashmoe.autotune.schedule import helper
from flashmoe.autotune.schedule.budget import tune
from flashmoe.autotune.schedule.place import Options, Place
from flashmoe.autotune.schedule.result import Result
from flashmoe.autotune.schedule.suite import SUITES, Group, grouped
from flashmoe.autotune.search import storage
from flashmoe.backends import BACKENDS
from flashmoe.machine import cache, files
from flashmoe.machine.environment import variable
from flashmoe.measure.fingerprint import Fingerprint, fingerprint
from flashmoe.measure.timing import Limits, limits_of
from flashmoe.planning import database
from flashmoe.spec import shapes
from flashmoe.spec.options import BOTH, given_options, problems_of, spelled
from flashmoe.spec.problem import Problem

# Wide enough that no row of the table folds; used where nobody's terminal decides.
_REPORT_WIDTH = 160
# A candidate that shows no progress for this share of the budget, within limits in seconds, hangs.
_PATIENCE_SHARE, _PATIENCE = 0.1, (10.0, 60.0)


def run(words: Sequence[str]) -> int:
    """`python -m flashmoe.autotune [options]`; returns the exit code."""
    clock = time.perf_counter
    start = clock()
    args = arguments.parser().parse_args(words)
    target = arguments.device(args.device, args.backend)
    command = shlex.join(["python", "-m", PROG, *words])
    if args.calibrate:
        return calibrate.run(target, command)
    groups = _groups(args, target)
    if args.backend and (reason := BACKENDS[args.backend].unavailable(target)):
        raise UsageError(
            f"--backend must be one that runs on {target}, got {args.backend!r}: {reason}"
        )
    low, high = _PATIENCE
    patience = min(max(args.budget * _PATIENCE_SHARE, low), high)
    workers = arguments.worker_devices(args.workers, target)
    processes = Processes(target, workers=len(workers))
    make_bench = partial(IsolatedBench, processes=processes, seed=args.seed, patience=patience)
    if args.dry_run:
        try:
            for line in dry_run.lines(groups, target, args.backend, make_bench):
                print(line, flush=True)
        finally:
            processes.close()
        return DONE
    suggestions, page = (args.output / name for name in ("suggestions.md", "report.html"))
    _require_writable(suggestions, page)
    for name in ("FLASHMOE_BACKEND", "FLASHMOE_TILE"):
        if variable(name):
            warn(f"{name} is set and overrides what is tuned here")

    here = fingerprint(target)
    path = database.user_path(here.device)
    where = args.storage or str(storage.journal_path(here.device))
    opened = storage.open_storage(where) if args.storage else None
    _require_writable_database(path)
    place = _place(target, here, path, opened or storage.open_storage(where), storage.shown(where))
    options = Options(
        args.backend, args.trials, args.budget, args.seed, args.force, args.sampler, args.study
    )
    searched = [g for g in groups if args.force or not place.is_current(g.main.bucket)]
    if searched:
        processes.warm_up()
    found: dict[Problem, Result] = {}
    interrupted, written = False, True
    limits: dict[str, Limits] = {}
    others = [device for device in workers if device != target]
    helpers = helper.start(searched, place, others, where, options, patience)
    with shown(Console(stderr=True)) as watch:
        try:
            # First, so that the budget knows what it took.
            watch.stage("measuring the device's limits")
            limits = limits_of(target, (group.main.dtype for group in groups))
            if searched:
                watch.stage("starting processes")
                processes.get_ready(searched, args.backend, patience)
            spent = clock() - start
            for result in tune(groups, place, options, watch, clock, make_bench, spent):
                # A second turn that was interrupted leaves what the first one found.
                if result.best is not None or result.problem not in found:
                    found[result.problem] = result
                # At once, so that an interruption loses only the problem at hand.
                if result.store:
                    entry = {result.problem.bucket: result.entry(here, command)}
                    written &= _written(path, partial(database.update, path, entry))
        except KeyboardInterrupt:
            interrupted = True
        finally:
            processes.close()
            for child in helpers:
                if failure := helper.failure(child):
                    warn(f"a worker failed: {failure}")
                child.close()
    results = [found[group.main] for group in groups if group.main in found]
    api.forget_plans()

    measured = any(result.best for result in results)
    if measured:
        text = report.suggestions_text(results, here, path, command)
        written &= _written(suggestions, partial(files.write_whole, suggestions, text))
        text = report_html.html(results, here, limits, command=command, database=str(path))
        written &= _written(page, partial(files.write_whole, page, text))
    for line in report.rejections(results):
        warn(line)
    seconds = clock() - start
    if args.json:
        document = report.document(
            results,
            here,
            command=command,
            seed=args.seed,
            budget=args.budget,
            seconds=seconds,
            interrupted=interrupted,
            database=str(path),
            suggestions=str(suggestions) if measured else None,
        )
        print(json.dumps(document, indent=1))
    else:
        told = {"database": path}
        if measured:
            told |= {"suggestions": suggestions, "report": page}
        _print_report(results, told, seconds)
    if interrupted:
        print(f"{PROG}: interrupted; what was measured is kept", file=sys.stderr)
        return INTERRUPTED
    if not measured:
        reason = "; ".join(f"{r.problem.label}: {r.reason}" for r in results)
        print(f"{PROG}: error: nothing could be measured: {reason}", file=sys.stderr)
    return DONE if measured and written else NOTHING_MEASURED


def _groups(args: argparse.Namespace, target: torch.device) -> list[Group]:
    given = given_options(args)
    direction = given.get("direction", BOTH)
    weighted = [(problem, 1.0) for problem in SUITES[target.type]]
    if args.shapes is not None:
        if others := given.keys() - {"direction"}:
            names = spelled(sorted(others))
            raise UsageError(f"--shapes names the problems already, got {names} too")
        try:
            with usable("--shapes must be a file that can be read", args.shapes):
                weighted = shapes.read(args.shapes)
        except shapes.ShapesError as error:
            raise UsageError(f"--shapes: {error}") from None
    elif given.keys() - {"direction"}:
        try:
            return grouped((problem, 1.0) for problem in problems_of(given, target.type))
        except ValueError as error:
            raise UsageError(str(error)) from None
    weighted = [x for x in weighted if direction in (BOTH, x[0].direction)]
    if not weighted:
        raise UsageError(f"--direction must be one that --shapes has, got {direction}")
    return grouped(weighted)


def _place(
    target: torch.device, here: Fingerprint, path: Path, studies: BaseStorage, name: str
) -> Place:
    shipped, mine = _load(database.shipped_path(here.device)), _load(path)
    # As plans see it: what was judged with other kernels is not in place, and is tried like what
    # won on other devices.
    both = [*shipped.items(), *mine.items()]
    stored = {bucket: entry for bucket, entry in both if entry.judged == here.kernels}
    outdated = [entry for _, entry in reversed(both) if entry.judged != here.kernels]
    elsewhere = outdated + [
        entry
        for folder in (path.parent, database.shipped_path(here.device).parent)
        for other in sorted(folder.glob("*.json"))
        if other.stem != path.stem
        for entry in _load(other).values()
    ]
    return Place(target, here, stored, elsewhere, studies, name)


def _require_writable(*paths: Path) -> None:
    for path in paths:
        try:
            files.require_writable(path)
        except OSError as error:
            raise UsageError(
                f"--output must be a folder that can be written, got {str(path.parent)!r}: "
                f"{path.name}: {error.strerror}"
            ) from None


def _require_writable_database(path: Path) -> None:
    cache.require_writable()
    try:
        database.update(path, {})
    except OSError as error:
        raise UsageError(
            f"{path} cannot be used ({error.strerror}): set FLASHMOE_CACHE_DIR to another folder"
        ) from None
    except database.NewerDatabase as error:
        raise UsageError(f"{error}: set FLASHMOE_CACHE_DIR to another folder") from None


def _load(path: Path) -> dict[str, database.Entry]:
    try:
        return database.load(path)
    except OSError as error:
        raise RuntimeError(f"{path} could not be read: {error.strerror}") from error


def _written(path: Path, write: Callable[[], object]) -> bool:
    """Whether `write` could; warns otherwise."""
    try:
        write()
    except OSError as error:
        warn(f"{path} could not be written: {error.strerror}")
    except database.NewerDatabase as error:
        warn(f"{error}: nothing was stored")
    else:
        return True
    return False


def _print_report(results: Sequence[Result], told: Mapping[str, Path], seconds: float) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_REPORT_WIDTH)
    console.print(report.table(results))
    lines = [
        *report.costs(results),
        f"{seconds:.1f} s",
        *(f"{name}: {path}" for name, path in told.items()),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
