"""The baseline moves forward only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import ratchet_synthetic as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.ratchet import stats
from flashmoe.ratchet.baseline import create, forward
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate import Thresholds, decide
from flashmoe.ratchet.results import CaseResult, Results, Series, slowed

FACTORS = st.lists(st.floats(0.8, 1.029), min_size=3, max_size=3)


def value(case: CaseResult) -> float:
    return float(np.mean(stats.log_speedups(case.ours.samples, case.sdpa.samples)))


def moved(current: Results, baseline: Results) -> tuple[Results, tuple[str, ...]]:
    return forward(baseline, current, decide(current, baseline, Thresholds()))


@settings(max_examples=50, deadline=None)
@given(FACTORS, st.floats(1e-4, 0.1), st.integers(0, 99))
def test_no_case_ever_gets_lower(factors: list[float], noise: float, seed: int) -> None:
    baseline = synthetic.results(noise=noise)
    current = synthetic.results(noise=noise, seed=seed)
    for name, factor in zip(synthetic.NAMES, factors, strict=True):
        current = slowed(current, name, factor)
    decision = decide(current, baseline, Thresholds())
    if decision.exit_code:
        return
    after, lines = forward(baseline, current, decision)
    changed = [(b, a) for b, a in zip(baseline.cases, after.cases, strict=True) if a != b]
    assert len(changed) == len(lines)
    assert all(value(a) > value(b) for b, a in changed)


def test_an_improvement_is_taken_whole_with_its_origin() -> None:
    baseline = synthetic.results()
    fast = slowed(synthetic.results(seed=5), synthetic.NAMES[0], 0.8)
    fast = replace(fast, started="2026-09-09", command="python -m flashmoe.ratchet bench --seed 5")
    after, lines = moved(fast, baseline)
    assert after.cases[1:] == baseline.cases[1:]
    assert after.cases[0].ours == fast.cases[0].ours
    origin = after.cases[0].origin
    assert origin is not None
    assert (origin.started, origin.command) == (fast.started, fast.command)
    assert len(lines) == 1
    assert lines[0].startswith(f"{synthetic.NAMES[0]}: speedup over SDPA +25.0 %")


def test_small_gains_add_up_until_they_are_taken() -> None:
    baseline = synthetic.results()
    name = synthetic.NAMES[0]
    once = slowed(baseline, name, 1 / 1.03)
    assert moved(once, baseline) == (baseline, ())
    twice, lines = moved(slowed(once, name, 1 / 1.03), baseline)
    assert len(lines) == 1
    assert value(twice.cases[0]) > value(baseline.cases[0])


def test_losses_below_the_threshold_do_not_creep() -> None:
    """Each run 2 % slower than the last: the second fails, for the baseline stayed."""
    baseline = synthetic.results()
    name = synthetic.NAMES[0]
    once = slowed(baseline, name, 1.02)
    after, lines = moved(once, baseline)
    assert (after, lines) == (baseline, ())
    assert decide(slowed(once, name, 1.02), after, Thresholds()).exit_code == 1


def test_a_failed_gate_moves_nothing() -> None:
    baseline = synthetic.results()
    run = slowed(slowed(baseline, synthetic.NAMES[0], 0.5), synthetic.NAMES[1], 1.5)
    with pytest.raises(UserError, match="the baseline does not move: the gate failed"):
        moved(run, baseline)


def test_a_first_baseline_needs_every_case() -> None:
    run = synthetic.results()
    assert create(run) == run
    broken = replace(run.cases[0], ours=Series("wrong", (), "off"))
    with pytest.raises(UserError, match=r"every case to have run: .*wrong: off"):
        create(replace(run, cases=(broken,)))
