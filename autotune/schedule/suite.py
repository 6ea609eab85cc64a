"""The problems that are tuned when none is named, and which of them share a tile."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flashmoe.spec.options import add_options, given_options, problems_of
from flashmoe.spec.problem import Problem

# Every step of a serving loop has lengths of its own, and each problem's tensors take memory.
_MOST = 8


@dataclass(frozen=True, slots=True)
class Group:
    """Problems of one bucket, which share a tile, with what each counts (as often as it runs)."""

    problems: tuple[Problem, ...]
    weights: tuple[float, ...]

    @property
    def main(self) -> Problem:
        """The problem that takes the most time of them all: it stands for the group."""
        costs = [w * p.flops for p, w in zip(self.problems, self.weights, strict=True)]
        return self.problems[costs.index(max(costs))]

    @property
    def shares(self) -> tuple[tuple[Problem, float], ...]:
        """The problems with their shares of the weight, sorted; empty for one alone."""
        if len(self.problems) == 1:
            return ()
        total = sum(self.weights)
        pairs = [(p, round(w / total, 6)) for p, w in zip(self.problems, self.weights, strict=True)]
        return tuple(sorted(pairs, key=lambda pair: pair[0].label))

    @property
    def cost(self) -> float:
        """What tuning costs, in no unit: timing costs in proportion to its flops, checks and
        compilation the same for all; the fourth root lies between, and a weight counts as flops."""
        return float(
            sum(w * max(p.flops, 1.0) for p, w in zip(self.problems, self.weights, strict=True))
            ** 0.25
        )


def grouped(problems: Iterable[tuple[Problem, float]]) -> list[Group]:
    """Problems with their weights, by bucket; the same problem twice counts with both weights."""
    buckets: dict[str, dict[Problem, float]] = {}
    for problem, weight in problems:
        bucket = buckets.setdefault(problem.bucket, {})
        bucket[problem] = bucket.get(problem, 0.0) + weight
    groups = map(_typical, buckets.values())
    return [Group(tuple(bucket), tuple(bucket.values())) for bucket in groups]


def _typical(bucket: Mapping[Problem, float]) -> Mapping[Problem, float]:
    """At most _MOST of the problems with all of their weight: by what they cost, those in the
    middle of equal shares."""
    if len(bucket) <= _MOST:
        return bucket
    share, passed = sum(bucket.values()) / _MOST, 0.0
    found: dict[Problem, float] = {}
    for problem in sorted(bucket, key=lambda problem: problem.flops):
        passed += bucket[problem]
        while sum(found.values()) + 0.5 * share <= passed:
            found[problem] = found.get(problem, 0.0) + share
    return found


def _problem(*options: str, kind: str = "cuda") -> Problem:
    parser = argparse.ArgumentParser()
    add_options(parser)
    (problem,) = problems_of(given_options(parser.parse_args(options)), kind)
    return problem


# What is tuned when nothing is named, as the command line names it.
SUITES: dict[str, tuple[Problem, ...]] = {
    kind: tuple(_problem(*line.split(), kind=kind) for line in lines.strip().splitlines())
    for kind, lines in {
        # Sizes that a laptop's CPU finishes in a tenth of a second.
        "cpu": """
            --batch 4 --seqlen 128
            --seqlen 1024
            --seqlen 1024 --causal
            --seqlen 2048 --head-dim 128
            --batch 4 --kv-heads 2 --seqlen 1 --seqlen-kv 2048 --layout cache
            --seqlen 512 --causal --direction bwd
        """,
        # Short and long sequences, a prompt in chunks, cross attention, few heads; training, also
        # of a packed batch; and decoding, of many sequences in pages and of one.
        "cuda": """
            --batch 2048 --heads 16 --seqlen 34 --causal
            --batch 1024 --heads 16 --seqlen 128 --head-dim 64 --causal
            --batch 1 --heads 32 --kv-heads 8 --seqlen 512 --seqlen-kv 8192 --causal
            --heads 8 --seqlen 4096 --seqlen-kv 77 --head-dim 40
            --batch 1 --heads 2 --seqlen 16384 --causal
            --seqlen 8192
            --batch 4 --heads 32 --kv-heads 8 --causal
            --batch 1 --heads 32 --kv-heads 8 --seqlen 8192 --causal --window 1023,0 --sinks
            --batch 8 --seqlen 1024 --head-dim 64 --causal --direction bwd
            --batch 4 --heads 32 --kv-heads 8 --causal --direction bwd
            --heads 16 --layout packed --lengths 4096,1500*2,700*6,200*10 --causal --direction bwd
            --heads 32 --kv-heads 8 --layout paged --lengths 1x8192*4,1x3000*20,1x1000*40 --causal
            --batch 1 --heads 32 --kv-heads 8 --seqlen 1 --seqlen-kv 16384 --layout cache --causal
        """,
    }.items()
}
