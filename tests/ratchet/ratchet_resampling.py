"""Whole gates resampled from recorded processes: what a gate would have said, a thousand times."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from flashmoe.ratchet.gate.decide import FAIL, INCONCLUSIVE, decide
from flashmoe.ratchet.gate.thresholds import Thresholds
from flashmoe.ratchet.results.values import CaseResult, Results, Series, slowed


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares of gates: that had any FAIL; in which the slowed case was FAIL; whose exit code was
    that of an inconclusive gate."""

    alarmed: float
    caught: float
    inconclusive: float


def rates(
    recorded: Results,
    thresholds: Thresholds,
    processes: int,
    gates: int,
    factor: float = 1.0,
    seed: int = 0,
) -> Rates:
    """`gates` gates of two disjoint draws of `processes` recorded processes each, the current one
    with one case (each in turn) slowed by `factor`."""
    rng = np.random.default_rng(seed)
    names = [case.name for case in recorded.cases]
    counts: Counter[str] = Counter()
    for number in range(gates):
        current, baseline = _sides(recorded, processes, rng)
        slow = names[number % len(names)]
        decision = decide(slowed(current, slow, factor), baseline, thresholds)
        failed = {v.name for v in decision.named(FAIL)}
        counts["alarmed"] += bool(failed)
        counts["caught"] += slow in failed
        counts["inconclusive"] += not failed and bool(decision.named(INCONCLUSIVE))
    return Rates(*(counts[key] / gates for key in ("alarmed", "caught", "inconclusive")))


def _sides(recorded: Results, processes: int, rng: np.random.Generator) -> tuple[Results, Results]:
    """The same processes for all cases, as in a real run."""
    fewest = min(len(case.ours.samples) for case in recorded.cases)
    if fewest < 2 * processes:
        raise ValueError(f"two sides of {processes} processes need {2 * processes}, got {fewest}")
    order = rng.permutation(fewest)
    sides = order[:processes], order[processes : 2 * processes]
    return tuple(  # type: ignore[return-value]
        replace(recorded, cases=tuple(_drawn(case, side) for case in recorded.cases))
        for side in sides
    )


def _drawn(case: CaseResult, which: np.ndarray) -> CaseResult:
    ours, sdpa = (
        Series("ok", tuple(series.samples[i] for i in which)) for series in (case.ours, case.sdpa)
    )
    telemetry = tuple(case.telemetry[i] for i in which) if case.telemetry else ()
    return replace(case, ours=ours, sdpa=sdpa, telemetry=telemetry)
