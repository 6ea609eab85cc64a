"""Verdicts in the order, and with the figures, that every form of a report shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from flashmoe.measure.stats import Interval
from flashmoe.ratchet.gate.decide import FAIL, IMPROVED, INCONCLUSIVE, INTEGRITY, PASS, Verdict
from flashmoe.ratchet.gate.thresholds import percent
from flashmoe.ratchet.results.values import CaseResult

# Worst first.
ORDER = (FAIL, INTEGRITY, IMPROVED, INCONCLUSIVE, PASS)
SIGNS = dict(zip(ORDER, "🔴🟠🟢⚪✅", strict=True))


class Figures(NamedTuple):
    """As text, empty where there is nothing to compare: the speedup over SDPA of both sides, its
    change with a 95 % interval, and the smallest slowdown that would have been seen."""

    baseline: str = ""
    now: str = ""
    change: str = ""
    bounds: str = ""
    sees: str = ""


def ranked(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Worst first; within a verdict the slowest change first."""
    return sorted(
        verdicts, key=lambda v: (ORDER.index(v.verdict), v.change.value if v.change else 0.0)
    )


def by_kind(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    """`ranked`, kinds of cases apart: first the kind that has the worst."""
    groups: dict[str, list[Verdict]] = {}
    for v in ranked(verdicts):
        groups.setdefault(v.kind, []).append(v)
    return groups


def figures(v: Verdict) -> Figures:
    if v.change is None or v.current is None or v.baseline is None:
        return Figures()
    sees = "" if v.detectable is None else f"{percent(1 / v.detectable):.1f} %"
    change = f"{percent(v.change.value):+.1f} %"
    return Figures(speedup(v.baseline), speedup(v.current), change, bounds(v.change), sees)


def bounds(interval: Interval) -> str:
    return f"[{percent(interval.low):+.1f}, {percent(interval.high):+.1f}]"


def plan(case: CaseResult) -> str:
    return ", ".join(map(str, case.plans))


def speedup(case: CaseResult) -> str:
    x = case.speedup
    return f"{x.value:.3f} [{x.low:.3f}, {x.high:.3f}]"
