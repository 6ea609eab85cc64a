"""What a call saves by running right after itself: its code is in the instruction caches then.

    python benchmarks/instruction_cache.py --output benchmarks/results/instruction-cache-GPU.json

Each candidate (the default tile, what the shipped database chose, SDPA) is timed right after itself
and right after another one, with L2 flushed in between; then the same with the instruction caches
evicted as well, which is how flashmoe.measure.timing measures. Microseconds, medians; the share is
what the call after another one takes more.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from shipping import candidate_of
from suites import SUITES

from flashmoe import Problem
from flashmoe.autotune.running.candidate import SDPA, Candidate, default_candidate, runs
from flashmoe.backends import BACKENDS
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.timing import cuda_sampler
from flashmoe.planning import database
from flashmoe.spec.call import Call

DEVICE = torch.device("cuda", 0)


def candidates(problem: Problem, shipped: dict[str, database.Entry]) -> list[Candidate]:
    found = [default_candidate(problem, DEVICE)]
    if problem.bucket in shipped:
        found.append(candidate_of(shipped[problem.bucket]))
    found.append(SDPA)
    return [c for c in dict.fromkeys(found) if runs(c, problem, DEVICE)]


def call_of(problem: Problem, candidate: Candidate) -> Callable[[], object]:
    def tensor(heads: int, seqlen: int) -> torch.Tensor:
        shape = (problem.batch, seqlen, heads, problem.head_dim)
        return torch.randn(shape, device=DEVICE, dtype=getattr(torch, problem.dtype))

    q = tensor(problem.heads_q, problem.seqlen_q)
    k, v = (tensor(problem.heads_kv, problem.seqlen_kv) for _ in range(2))
    run = BACKENDS[candidate.backend].bind(problem, candidate.tile)
    return functools.partial(run, Call(q, k, v, float(problem.head_dim**-0.5)))


def timed(calls: dict[str, Callable[[], object]], rounds: int, evict_code: bool) -> dict[str, Any]:
    """Microseconds of each call after itself and after the next one."""
    sample = cuda_sampler(DEVICE, evict_code=evict_code)
    names = list(calls)
    found: dict[str, Any] = {name: {"after itself": [], "after another": []} for name in names}
    for number in range(-3, rounds):
        for name, other in zip(names, names[1:] + names[:1], strict=True):
            for before in (name, other):
                sample(calls[before])
                microseconds = round(sample(calls[name]) * 1e6, 2)
                if number >= 0:
                    when = "after itself" if before == name else "after another"
                    found[name][when].append(microseconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=tuple(SUITES), nargs="+", default=["short"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    here = fingerprint(DEVICE)
    shipped = database.load(database.shipped_path(here.device))
    document: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/instruction_cache.py", *sys.argv[1:]]),
        "fingerprint": here.to_json(),
        "problems": [],
    }
    for problem in (p for name in args.suite for p in SUITES[name]):
        calls = {str(c): call_of(problem, c) for c in candidates(problem, shipped)}
        if len(calls) < 2:
            continue
        row: dict[str, Any] = {"problem": problem.to_json()}
        line = []
        for kind, evict_code in (("code cached", False), ("code evicted", True)):
            row[kind] = timed(calls, args.rounds, evict_code)
            for name, x in row[kind].items():
                itself, another = median(x["after itself"]), median(x["after another"])
                line.append(f"{kind}, {name}: {itself:.1f}, {another / itself - 1:+.1%}")
        print(problem.label, *line, sep="\n  ", flush=True)
        # At once, so that an interruption loses only the problem at hand.
        document["problems"].append(row)
        args.output.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
