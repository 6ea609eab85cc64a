"""The forward suite of the shipped databases: its problems, and what tuning them is worth.

    python benchmarks/tuned_suite.py shapes --suite rows --output rows.json
    python -m flashmoe.autotune --shapes rows.json --budget 280
    python benchmarks/tuned_suite.py measure --suite rows --database tuned.json --output worth.json
    python benchmarks/tuned_suite.py agree --databases one.json other.json --output agree.json
    python benchmarks/tuned_suite.py ship --databases a.json b.json --judged worth.json \
        --output flashmoe/tuned/GPU.json

`measure` times what a database chose beside the default (twice: the noise) and SDPA, and the best
tile where SDPA was chosen. `agree` times what two databases chose for the same problems side by
side. Both interleave in fresh processes that have part in no search. `ship` merges databases, keeps
the suite's problems without what `measure` found slower than the default (--judged), and drops
where the trials were kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from hopper.rows import ROWS

from flashmoe import Problem, database, device, shapes
from flashmoe.autotune.candidate import SDPA, Candidate, default_candidate, runs
from flashmoe.autotune.decide import AGAIN
from flashmoe.autotune.isolated import Processes
from flashmoe.autotune.suite import Group
from flashmoe.database import Entry
from flashmoe.stats import Interval, paired_ratio
from flashmoe.tiles import Tile

PROCESSES = 3
PATIENCE = 60.0
# Of one problem in one process.
MAX_SECONDS = 1.5
# Two choices agree within this; a choice must not be slower than SDPA by more.
CLOSE = 0.01


def _bf16(
    batch: int, heads_q: int, heads_kv: int, lengths: tuple[int, int], head_dim: int, causal: bool
) -> Problem:
    return Problem(batch, heads_q, heads_kv, *lengths, head_dim, "bfloat16", causal)


def _float32(batch: int, heads: int, seqlen: int, head_dim: int, causal: bool) -> Problem:
    return Problem(batch, heads, heads, seqlen, seqlen, head_dim, "float32", causal)


# By name: what the Hopper kernel is judged by (benchmarks/hopper/rows.py); what else runs on the
# CUDA kernels by default: short sequences, other head dimensions, few queries on many keys; and
# what runs on the Triton kernel by default, which is float32.
SUITES: dict[str, tuple[Problem, ...]] = {
    "rows": tuple(row.problem for row in ROWS),
    "short": (
        _bf16(8, 16, 16, (128, 128), 64, False),
        _bf16(8, 12, 12, (384, 384), 64, False),
        _bf16(64, 12, 12, (197, 197), 64, False),
        _bf16(8, 16, 16, (256, 256), 128, False),
        _bf16(4, 32, 8, (256, 256), 128, True),
        _bf16(2, 32, 8, (512, 512), 128, True),
        _bf16(1, 32, 8, (1024, 1024), 128, True),
        _bf16(1, 32, 8, (256, 4096), 128, True),
        _bf16(8, 32, 8, (16, 4096), 128, True),
        _bf16(8, 16, 16, (1024, 1024), 96, True),
    ),
    "triton": (
        _float32(8, 16, 128, 64, False),
        _float32(4, 16, 512, 64, False),
        _float32(4, 16, 512, 64, True),
        _float32(2, 16, 2048, 64, True),
        _float32(4, 16, 512, 128, False),
        _float32(2, 16, 2048, 128, False),
        _float32(2, 16, 2048, 128, True),
        _float32(1, 8, 2048, 256, False),
    ),
    # To try the commands without a GPU.
    "cpu": (_float32(1, 4, 256, 32, False), _float32(1, 4, 256, 32, True)),
}
# Eight problems for two runs that shall agree: every head dimension, short and long, GQA.
SUITES["agree"] = (
    *(SUITES["rows"][n] for n in (0, 3, 8, 11, 13, 16, 25)),
    SUITES["short"][6],
)
SHIPPED = tuple(p for name in ("rows", "short", "triton") for p in SUITES[name])


def candidate_of(entry: Entry) -> Candidate:
    return Candidate(entry.backend, Tile.parse(entry.tile) if entry.tile else None)


def measured(
    fields: Mapping[Problem, Mapping[str, Candidate]], here: torch.device, rounds: int
) -> dict[Problem, dict[str, list[float]]]:
    """Microseconds by problem and name, paired by round, those of all processes one after the
    other. What cannot be timed is left out, with a line on stderr."""
    found: dict[Problem, dict[str, list[float]]] = {problem: {} for problem in fields}
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
                    samples = found[problem].setdefault(name, [])
                    samples += [round(seconds * 1e6, 2) for seconds in result.samples]
            child.close()
    finally:
        processes.close()
    return found


def _text(ratio: Interval) -> str:
    return f"{ratio.value:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}]"


def measure(args: argparse.Namespace, here: torch.device) -> dict[str, Any]:
    entries = database.parse(args.database.read_text())
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
            # What stayed as it was gained nothing, whatever the noise says.
            kept = fields[problem]["chosen"] == fields[problem]["default"]
            gain = Interval(1.0, 1.0, 1.0) if kept else paired_ratio(x["default"], x["chosen"])
            sdpa = paired_ratio(x["sdpa"], x["chosen"]) if "sdpa" in x else None
            noise = paired_ratio(x["default"], x[AGAIN]).value - 1
            over_sdpa = f"{_text(sdpa)} over SDPA" if sdpa else "SDPA cannot"
            chosen = fields[problem]["chosen"]
            if sdpa and chosen != SDPA and sdpa.high < 1 - CLOSE:
                slower.append(problem.label)
            over.setdefault(name, []).append(gain.value)
            tile = x.get("tile", x["chosen"])
            if fields[problem]["default"] != SDPA and ("tile" in x or chosen != SDPA):
                over.setdefault(f"{name}, tiles alone", []).append(
                    1.0 if kept else paired_ratio(x["default"], tile).value
                )
            print(
                f"  {problem.label}: {median(x['default']):.1f} -> {median(x['chosen']):.1f} us, "
                f"{_text(gain)} over {fields[problem]['default']}, {over_sdpa}, "
                f"noise {abs(noise):.3f}: {chosen}",
                flush=True,
            )
    over["all"] = [gain for name in suite for gain in over.get(name, [])]
    means = {name: geometric_mean(gains) if gains else math.nan for name, gains in over.items()}
    for name, mean in means.items():
        print(f"geometric mean over the default, {name} ({len(over[name])}): {mean:.3f}")
    print(f"slower than SDPA by more than {CLOSE:.0%}: {', '.join(slower) or 'none'}")
    return {"geometric_means": means, "slower_than_sdpa": slower, **_rows_json(fields, samples)}


def agree(args: argparse.Namespace, here: torch.device) -> dict[str, Any]:
    one, other = (database.parse(path.read_text()) for path in args.databases)
    both = [entry.problem for bucket, entry in one.items() if bucket in other]
    if not both:
        raise SystemExit("--databases have no problem in common")
    fields = {
        problem: {
            "one": candidate_of(one[problem.bucket]),
            "other": candidate_of(other[problem.bucket]),
            "default": default_candidate(problem, here),
        }
        for problem in both
    }
    samples = measured(fields, here, args.rounds)
    close = []
    for problem in both:
        x, field = samples[problem], fields[problem]
        if not {"one", "other"} <= set(x):
            continue
        ratio = paired_ratio(x["one"], x["other"])
        same = field["one"] == field["other"]
        if same or abs(ratio.value - 1) <= CLOSE:
            close.append(problem.label)
        print(
            f"  {problem.label}: {field['one']} {median(x['one']):.1f} us, {field['other']} "
            f"{median(x['other']):.1f} us, {_text(ratio)}" + (", the same" if same else ""),
            flush=True,
        )
    print(f"within {CLOSE:.0%} of one another: {len(close)} of {len(both)}")
    return {"close": close, **_rows_json(fields, samples)}


def _rows_json(
    fields: Mapping[Problem, Mapping[str, Candidate]],
    samples: Mapping[Problem, Mapping[str, Sequence[float]]],
) -> dict[str, Any]:
    rows = [
        {
            "problem": problem.to_json(),
            "candidates": {name: str(candidate) for name, candidate in field.items()},
            "microseconds": samples[problem],
        }
        for problem, field in fields.items()
    ]
    return {"problems": rows}


def slower_than_default(judged: Path) -> set[tuple[str, str]]:
    """(bucket, candidate) of what `measure` wrote there that it found slower than the default,
    beyond the noise."""
    found = set()
    for row in json.loads(judged.read_text())["problems"]:
        chosen, samples = row["candidates"]["chosen"], row["microseconds"]
        if chosen == row["candidates"]["default"] or not {"default", "chosen"} <= set(samples):
            continue
        if paired_ratio(samples["default"], samples["chosen"]).high < 1:
            found.add((Problem.from_json(row["problem"]).bucket, chosen))
    return found


def ship(databases: Sequence[Path], judged: Sequence[Path], output: Path) -> None:
    """The suite's entries, those of later databases before those of earlier ones."""
    merged = {k: e for path in databases for k, e in database.parse(path.read_text()).items()}
    buckets = {problem.bucket for problem in SHIPPED}
    slower = {pair for path in judged for pair in slower_than_default(path)}
    kept = {
        bucket: dataclasses.replace(entry, storage="")
        for bucket, entry in merged.items()
        if bucket in buckets and (bucket, str(candidate_of(entry))) not in slower
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(database.text_of(kept))
    print(f"{output}: {len(kept)} of the suite's {len(buckets)} problems")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("shapes", "measure", "agree", "ship"))
    parser.add_argument("--suite", choices=tuple(SUITES), nargs="+", default=["rows"])
    parser.add_argument("--database", type=Path, metavar="FILE", help="what measure judges")
    parser.add_argument("--databases", type=Path, nargs="+", metavar="FILE", default=[])
    parser.add_argument(
        "--judged", type=Path, nargs="+", metavar="FILE", default=[], help="what measure wrote"
    )
    parser.add_argument("--rounds", type=int, default=150, help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(words)
    if args.command == "shapes":
        shapes.write(args.output, {p: 1 for name in args.suite for p in SUITES[name]})
        return 0
    if args.command == "ship":
        if not args.databases:
            parser.error("ship needs --databases")
        ship(args.databases, args.judged, args.output)
        return 0
    here = torch.device(args.device)
    if here.type == "cuda" and here.index is None:
        here = torch.device("cuda", torch.cuda.current_device())
    if args.command == "measure":
        if args.database is None:
            parser.error("measure needs --database")
        found = measure(args, here)
    else:
        if len(args.databases) != 2:
            parser.error("agree needs two --databases")
        found = agree(args, here)
    words = sys.argv[1:] if words is None else words
    document = {
        "command": shlex.join(["python", "benchmarks/tuned_suite.py", *words]),
        "fingerprint": device.fingerprint(here).to_json(),
        **found,
    }
    args.output.write_text(json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
