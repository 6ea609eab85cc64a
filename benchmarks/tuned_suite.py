"""The forward suite of the shipped databases, and what tuning it is worth.

    python benchmarks/tuned_suite.py shapes --suite rows --output rows.json
    python -m flashmoe.autotune --shapes rows.json --budget 280
    python benchmarks/tuned_suite.py measure --suite rows --databases tuned.json --output worth.json
    python benchmarks/tuned_suite.py agree --databases one.json other.json --output agree.json
    python benchmarks/tuned_suite.py ship --databases a.json b.json.xz --judged worth.json \
        --output flashmoe/tuned/GPU.json --evidence benchmarks/results/tuned-database-GPU.json.xz
    python benchmarks/tuned_suite.py fresh --output fresh.json

`measure` times what databases chose beside the default (twice: the noise) and SDPA, and the best
tile where SDPA was chosen. `agree` times what two databases chose for the same problems side by
side. `fresh` times what an install without compiler and without a database of its own plans, beside
the defaults of an earlier commit (--before). All interleave in fresh processes that have part in no
search, and the process is the unit of what they tell. `ship` writes what plans need of the suite's
entries (shipping.py); --evidence keeps the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any
from unittest import mock

import torch
from shipping import candidate_of, read, ship, speedup
from suites import SUITES

from flashmoe import Problem
from flashmoe.autotune.running.candidate import SDPA, Candidate, default_candidate, runs
from flashmoe.autotune.running.isolated import Processes
from flashmoe.autotune.schedule.suite import Group
from flashmoe.autotune.verdict.decide import AGAIN
from flashmoe.machine import device
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.stats import Interval
from flashmoe.planning.plan import make_plan, reload_databases
from flashmoe.spec import shapes
from flashmoe.tiles import Tile

PROCESSES = 3
PATIENCE = 60.0
# Of one problem in one process.
MAX_SECONDS = 1.5
# Two choices agree within this; a choice must not be slower than SDPA by more.
CLOSE = 0.01
BEFORE = Path(__file__).with_name("defaults-0a46d67.json")

Fields = Mapping[Problem, Mapping[str, Candidate]]
# Microseconds[process][round], by problem and name.
Samples = Mapping[Problem, Mapping[str, Sequence[Sequence[float]]]]


def measured(fields: Fields, here: torch.device, rounds: int) -> Samples:
    """Times paired by round. What cannot be timed in every process is left out, with a line on
    stderr."""
    found: dict[Problem, dict[str, list[list[float]]]] = {problem: {} for problem in fields}
    processes = Processes(here)
    try:
        for part in range(PROCESSES):
            child = processes.take(fresh=True)
            for number, (problem, field) in enumerate(fields.items()):
                group = Group((problem,), (1.0,))
                order = (part + 1) * 1_000_003 + number
                child.request("open", group, 0, order, reference=False, patience=PATIENCE)
                results = child.request(
                    "measure",
                    dict(field),
                    rounds=-(-rounds // PROCESSES),
                    warmup=3,
                    max_seconds=MAX_SECONDS,
                    patience=PATIENCE,
                )
                for name, result in results.items():
                    if result.status != "ok":
                        print(f"{problem.label}: {name}: {result.reason}", file=sys.stderr)
                        continue
                    samples = [round(seconds * 1e6, 2) for seconds in result.samples]
                    found[problem].setdefault(name, []).append(samples)
            child.close()
    finally:
        processes.close()
    return {
        problem: {name: x for name, x in samples.items() if len(x) == PROCESSES}
        for problem, samples in found.items()
    }


def _text(ratio: Interval) -> str:
    return f"{ratio.value:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}]"


def _us(samples: Sequence[Sequence[float]]) -> str:
    return f"{median(itertools.chain(*samples)):.1f}"


def measure(args: argparse.Namespace, here: torch.device) -> dict[str, Any]:
    entries = read(args.databases)
    suite = {name: [p for p in SUITES[name] if p.bucket in entries] for name in args.suite}
    fields: dict[Problem, dict[str, Candidate]] = {}
    for problem in (p for found in suite.values() for p in found):
        entry = entries[problem.bucket]
        default = default_candidate(problem, here)
        fields[problem] = {
            "default": default,
            AGAIN: default,
            "chosen": candidate_of(entry),
        }
        if runs(SDPA, problem, here):
            fields[problem]["sdpa"] = SDPA
        if entry.tile_with_lse:
            fields[problem]["tile"] = Candidate.of_tile(Tile.parse(entry.tile_with_lse))
    samples = measured(fields, here, args.rounds)
    over: dict[str, list[float]] = {}
    slower = []
    for name, problems in suite.items():
        missing = [p.label for p in SUITES[name] if p.bucket not in entries]
        print(f"{name}: {len(problems)} problems" + (f", without {missing}" if missing else ""))
        for problem in problems:
            x = samples[problem]
            if not set(fields[problem]) <= set(x):
                slower.append(f"{problem.label} (not measured)")
                continue
            chosen, default = fields[problem]["chosen"], fields[problem]["default"]
            # What stayed as it was gained nothing, whatever the noise says.
            kept = chosen == default
            gain = _same() if kept else speedup(x, "chosen", over="default")
            sdpa = speedup(x, "chosen", over="sdpa") if "sdpa" in x else None
            noise = speedup(x, AGAIN, over="default").value - 1
            over_sdpa = f"{_text(sdpa)} over SDPA" if sdpa else "SDPA cannot"
            if sdpa and chosen != SDPA and sdpa.high < 1 - CLOSE:
                slower.append(problem.label)
            over.setdefault(name, []).append(gain.value)
            tile = "tile" if "tile" in x else "chosen"
            if default != SDPA and ("tile" in x or chosen != SDPA):
                over.setdefault(f"{name}, tiles alone", []).append(
                    1.0 if kept else speedup(x, tile, over="default").value
                )
            print(
                f"  {problem.label}: {_us(x['default'])} -> {_us(x['chosen'])} us, "
                f"{_text(gain)} over {default}, {over_sdpa}, noise {abs(noise):.3f}: {chosen}",
                flush=True,
            )
    over["all"] = [gain for name in suite for gain in over.get(name, [])]
    means = {name: geometric_mean(gains) if gains else math.nan for name, gains in over.items()}
    for name, mean in means.items():
        print(f"geometric mean over the default, {name} ({len(over[name])}): {mean:.3f}")
    print(f"slower than SDPA by more than {CLOSE:.0%}: {', '.join(slower) or 'none'}")
    return {"geometric_means": means, "slower_than_sdpa": slower, **_rows_json(fields, samples)}


def agree(args: argparse.Namespace, here: torch.device) -> dict[str, Any]:
    one, other = (read([path]) for path in args.databases)
    both = [entry.problem for bucket, entry in one.items() if bucket in other]
    if not both:
        raise SystemExit("--databases have no problem in common")
    fields = {}
    for problem in both:
        default = default_candidate(problem, here)
        fields[problem] = {
            "one": candidate_of(one[problem.bucket]),
            "other": candidate_of(other[problem.bucket]),
            "default": default,
        }
    samples = measured(fields, here, args.rounds)
    close = []
    for problem in both:
        x, field = samples[problem], fields[problem]
        if not {"one", "other"} <= set(x):
            continue
        ratio = speedup(x, "other", over="one")
        same = field["one"] == field["other"]
        if same or abs(ratio.value - 1) <= CLOSE:
            close.append(problem.label)
        print(
            f"  {problem.label}: {field['one']} {_us(x['one'])} us, {field['other']} "
            f"{_us(x['other'])} us, {_text(ratio)}" + (", the same" if same else ""),
            flush=True,
        )
    print(f"within {CLOSE:.0%} of one another: {len(close)} of {len(both)}")
    return {"close": close, **_rows_json(fields, samples)}


@contextlib.contextmanager
def fresh_install() -> Iterator[None]:
    """Plans are made as where there is no compiler, no cached kernel and no user database."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {
            "FLASHMOE_CACHE_DIR": folder,
            "FLASHMOE_COMPILER": "none",
            **dict.fromkeys(("FLASHMOE_COMPILE", "FLASHMOE_BACKEND", "FLASHMOE_TILE"), ""),
        }
        try:
            with mock.patch.dict(os.environ, variables):
                reload_databases()
                yield
        finally:
            reload_databases()


def fresh(args: argparse.Namespace, here: torch.device) -> dict[str, Any]:
    before = json.loads(args.before.read_text(encoding="utf-8"))
    if before["device"] != device.arch(here).name:
        raise SystemExit(f"--before is of {before['device']}, this is {device.arch(here).name}")
    fields: dict[Problem, dict[str, Candidate]] = {}
    sources = {}
    with fresh_install():
        for row in before["problems"]:
            problem, text = Problem.from_json(row["problem"]), row["default"]
            old = SDPA if text == str(SDPA) else Candidate.of_tile(Tile.parse(text))
            plan = make_plan(problem, here)
            sources[problem] = plan.source
            fields[problem] = {"before": old, AGAIN: old, "fresh": Candidate.of_plan(plan)}
    samples = measured(fields, here, args.rounds)
    gains = []
    for problem, field in fields.items():
        x = samples[problem]
        if not set(field) <= set(x):
            raise SystemExit(f"{problem.label}: {set(field) - set(x)} cannot be measured")
        same = field["before"] == field["fresh"]
        gain = _same() if same else speedup(x, "fresh", over="before")
        gains.append(gain.value)
        print(
            f"  {problem.label}: {_us(x['before'])} -> {_us(x['fresh'])} us, {_text(gain)}: "
            f"{field['before']} -> {field['fresh']} ({sources[problem]})",
            flush=True,
        )
    mean = geometric_mean(gains)
    print(f"a fresh install over the defaults of {before['commit']} ({len(gains)}): {mean:.4f}")
    return {"commit": before["commit"], "geometric_mean": mean, **_rows_json(fields, samples)}


def _same() -> Interval:
    return Interval(1.0, 1.0, 1.0)


def _rows_json(fields: Fields, samples: Samples) -> dict[str, Any]:
    rows = [
        {
            "problem": problem.to_json(),
            "candidates": {name: str(candidate) for name, candidate in field.items()},
            "microseconds": samples[problem],
        }
        for problem, field in fields.items()
    ]
    return {"problems": rows}


_MEASURING = {"measure": measure, "agree": agree, "fresh": fresh}
# How many databases these take.
_DATABASES = {"measure": range(1, 100), "agree": range(2, 3), "ship": range(1, 100)}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("shapes", *_MEASURING, "ship"))
    parser.add_argument("--suite", choices=tuple(SUITES), nargs="+", default=["rows"])
    parser.add_argument("--databases", type=Path, nargs="+", metavar="FILE", default=[])
    parser.add_argument(
        "--judged", type=Path, nargs="+", metavar="FILE", default=[], help="what measure wrote"
    )
    parser.add_argument("--evidence", type=Path, metavar="FILE", help="the entries, whole")
    parser.add_argument("--before", type=Path, metavar="FILE", default=BEFORE)
    parser.add_argument("--rounds", type=int, default=150, help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(words)
    if len(args.databases) not in _DATABASES.get(args.command, range(100)):
        parser.error(f"{args.command} needs {_DATABASES[args.command].start} --databases")
    if args.command == "shapes":
        shapes.write(args.output, {p: 1 for name in args.suite for p in SUITES[name]})
        return 0
    if args.command == "ship":
        ship(args.databases, args.judged, args.output, args.evidence)
        return 0
    here = torch.device(args.device)
    if here.type == "cuda" and here.index is None:
        here = torch.device("cuda", torch.cuda.current_device())
    found = _MEASURING[args.command](args, here)
    words = sys.argv[1:] if words is None else words
    document = {
        "command": shlex.join(["python", "benchmarks/tuned_suite.py", *words]),
        "fingerprint": fingerprint(here).to_json(),
        **found,
    }
    args.output.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
