"""Tuning itself, as a command: arguments in, database, report and exit code out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from optuna.storages import BaseStorage, InMemoryStorage
from rich.console import Console

from flashmoe import api
from flashmoe.autotune.cli import arguments, calibrate, dry_run
from flashmoe.autotune.cli.arguments import PROG, UsageError
from flashmoe.autotune.cli.exits import DONE, INTERRUPTED, NOTHING_MEASURED, warn
from flashmoe.autotune.cli.progress import shown
from flashmoe.autotune.report import html as report_html
from flashmoe.autotune.report import texts as report
from flashmoe.autotune.running.isolated import IsolatedBench, Processes
from flashmoe.autotune.running.process import Child
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
from flashmoe.measure.timing import Limits, measure_limits
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
    start = time.perf_counter()
    args = arguments.parser().parse_args(words)
    target = arguments.device(args.device, args.backend)
    command = shlex.join(["python", "-m", PROG, *words])
    if args.calibrate:
        return calibrate.run(target, command)
    groups = _groups(args, target)
    _require_backend(args.backend, target)
    low, high = _PATIENCE
    patience = min(max(args.budget * _PATIENCE_SHARE, low), high)
    workers = arguments.worker_devices(args.workers, target)
    processes = Processes(target, workers=len(workers))
    if args.dry_run:
        try:
            for line in dry_run.lines(
                groups,
                target,
                args.backend,
                lambda group: IsolatedBench(group, processes, args.seed, patience),
            ):
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
    opened = _storage(where) if args.storage else None
    _require_writable_database(path)
    place = _place(target, here, path, opened or _storage(where), storage.shown(where))
    options = Options(
        args.backend, args.trials, args.budget, args.seed, args.force, args.sampler, args.study
    )
    searched = [g for g in groups if args.force or not place.is_current(g.main.bucket)]
    if searched:
        processes.warm_up()
    found: dict[Problem, Result] = {}
    interrupted, written = False, True
    limits: dict[str, Limits] = {}
    helpers = _helpers(searched, place, workers, where, options, patience)
    with shown(Console(stderr=True)) as watch:
        try:
            # First, so that the budget knows what it took.
            watch.stage("measuring the device's limits")
            limits = _limits(target, {group.main.dtype for group in groups})
            if searched:
                watch.stage("starting processes")
                processes.get_ready(searched, args.backend, patience)
            for result in tune(
                groups,
                place,
                options,
                watch,
                time.perf_counter,
                lambda group: IsolatedBench(group, processes, args.seed, patience),
                spent=time.perf_counter() - start,
            ):
                # A second turn that was interrupted leaves what the first one found.
                if result.best is not None or result.problem not in found:
                    found[result.problem] = result
                # At once, so that an interruption loses only the problem at hand.
                if result.store:
                    written &= _store(path, result, here, command)
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
        written &= _write(suggestions, report.suggestions_text(results, here, path, command))
        text = report_html.html(results, here, limits, command=command, database=str(path))
        written &= _write(page, text)
    for line in report.rejections(results):
        warn(line)
    seconds = time.perf_counter() - start
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
            suggestions=suggestions if measured else None,
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
            weighted = shapes.read(args.shapes)
        except OSError as error:
            raise UsageError(
                f"--shapes must be a file that can be read, got {str(args.shapes)!r}: "
                f"{error.strerror}"
            ) from None
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


def _storage(where: str) -> BaseStorage:
    try:
        return storage.open_storage(where)
    except storage.StorageError as error:
        raise UsageError(str(error)) from None


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


def _helpers(
    groups: Sequence[Group],
    place: Place,
    workers: Sequence[torch.device],
    where: str,
    options: Options,
    patience: float,
) -> list[Child]:
    """Workers for the other devices, unless nothing is searched."""
    if len(workers) == 1 or not groups:
        return []
    places = [
        dataclasses.replace(place, device=other, storage=InMemoryStorage())
        for other in workers
        if other != place.device
    ]
    return helper.start(groups, places, where, options, patience)


def _limits(target: torch.device, dtypes: set[str]) -> dict[str, Limits]:
    """What the device sustains, by dtype; a CPU's do not depend on it."""
    if target.type == "cpu":
        return dict.fromkeys(dtypes, measure_limits(target, torch.float32))
    return {name: measure_limits(target, getattr(torch, name)) for name in sorted(dtypes)}


def _require_backend(name: str | None, target: torch.device) -> None:
    if name is not None and (reason := BACKENDS[name].unavailable(target)):
        raise UsageError(f"--backend must be one that runs on {target}, got {name!r}: {reason}")


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


def _write(path: Path, text: str) -> bool:
    try:
        files.write_whole(path, text)
    except OSError as error:
        warn(f"{path} could not be written: {error.strerror}")
        return False
    return True


def _load(path: Path) -> dict[str, database.Entry]:
    try:
        return database.load(path)
    except OSError as error:
        raise RuntimeError(f"{path} could not be read: {error.strerror}") from error


def _store(path: Path, result: Result, here: Fingerprint, command: str) -> bool:
    try:
        database.update(path, {result.problem.bucket: result.entry(here, command)})
    except OSError as error:
        warn(f"{path} could not be written: {error.strerror}")
        return False
    except database.NewerDatabase as error:
        warn(f"{error}: nothing was stored")
        return False
    return True


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
