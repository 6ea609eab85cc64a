"""The problems that are tuned when none is named, and which of them share a tile."""

from __future__ import annotations

import argparse
import configparser
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

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


def _suites() -> dict[str, tuple[Problem, ...]]:
    """What is tuned when nothing is named, by the kind of device."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    lists = configparser.ConfigParser(allow_no_value=True)
    lists.read_string(Path(__file__).with_name("suites.ini").read_text(encoding="utf-8"))
    found: dict[str, tuple[Problem, ...]] = {}
    for kind in lists.sections():
        given = [given_options(parser.parse_args(words.split())) for words in lists[kind]]
        found[kind] = tuple(problem for one in given for problem in problems_of(one, kind))
    return found


SUITES = _suites()
