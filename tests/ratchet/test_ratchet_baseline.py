"""The baseline moves forward only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import ratchet_synthetic as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate import stats
from flashmoe.ratchet.gate.decide import decide
from flashmoe.ratchet.gate.thresholds import DEFAULTS
from flashmoe.ratchet.results.baseline import create, forward
from flashmoe.ratchet.results.values import CaseResult, Results, Series, slowed

FACTORS = st.lists(st.floats(0.8, 1.029), min_size=3, max_size=3)


def value(case: CaseResult) -> float:
    return float(np.mean(stats.log_speedups(case.ours.samples, case.sdpa.samples)))


def moved(
    current: Results, baseline: Results, confirming: Results | None = None
) -> tuple[Results, tuple[str, ...]]:
    """`confirming`: by default the same speeds, measured again."""
    confirming = confirming or again(current)
    first, second = (decide(run, baseline, DEFAULTS["cuda"]) for run in (current, confirming))
    return forward(baseline, current, confirming, first, second)


def again(run: Results) -> Results:
    """As if measured once more: other samples, but the same speeds."""
    scaled = [
        replace(
            case,
            ours=replace(case.ours, samples=tuple(p[::-1] for p in case.ours.samples)),
            sdpa=replace(case.sdpa, samples=tuple(p[::-1] for p in case.sdpa.samples)),
        )
        for case in run.cases
    ]
    return replace(run, run="f" * 32, cases=tuple(scaled))


@settings(max_examples=50, deadline=None)
@given(FACTORS, st.floats(1e-4, 0.1), st.integers(0, 99))
def test_no_case_ever_gets_lower(factors: list[float], noise: float, seed: int) -> None:
    baseline = synthetic.results(noise=noise)
    current = synthetic.results(noise=noise, seed=seed)
    for name, factor in zip(synthetic.NAMES, factors, strict=True):
        current = slowed(current, name, factor)
    if decide(current, baseline, DEFAULTS["cuda"]).exit_code not in (0, 3):
        return
    after, lines = moved(current, baseline)
    changed = [(b, a) for b, a in zip(baseline.cases, after.cases, strict=True) if a != b]
    assert len(changed) == len(lines)
    assert all(value(a) > value(b) for b, a in changed)


def test_an_improvement_is_taken_at_its_confirmed_value_with_its_origin() -> None:
    baseline = synthetic.results()
    lucky = slowed(synthetic.results(seed=50), synthetic.NAMES[0], 1 / 1.25)
    second = slowed(synthetic.results(seed=60), synthetic.NAMES[0], 1 / 1.2)
    second = replace(second, started="2026-09-09", command="python -m flashmoe.ratchet bench")
    after, lines = moved(lucky, baseline, second)
    assert after.cases[1:] == baseline.cases[1:]
    assert after.cases[0].ours == second.cases[0].ours
    origin = after.cases[0].origin
    assert origin is not None
    assert (origin.run, origin.started, origin.command, origin.commit) == (
        second.run,
        second.started,
        second.command,
        second.commit,
    )
    assert len(lines) == 1
    assert lines[0].startswith(f"{synthetic.NAMES[0]}: speedup over SDPA +20.0 %")
    assert lines[0].endswith("confirmed after +25.0 %")


def test_luck_that_does_not_repeat_moves_nothing() -> None:
    baseline = synthetic.results()
    lucky = slowed(synthetic.results(seed=50), synthetic.NAMES[0], 1 / 1.25)
    assert moved(lucky, baseline, synthetic.results(seed=60)) == (baseline, ())
    assert moved(synthetic.results(seed=60), baseline, lucky) == (baseline, ())


def test_a_run_does_not_confirm_itself() -> None:
    baseline = synthetic.results()
    fast = slowed(synthetic.results(seed=50), synthetic.NAMES[0], 1 / 1.25)
    for same in (fast, replace(fast, run="0123", started="2027")):
        with pytest.raises(UserError, match="a run cannot confirm itself"):
            moved(fast, baseline, same)


@pytest.mark.parametrize("what", ["kernels", "commit"])
def test_another_source_confirms_nothing(what: str) -> None:
    baseline = synthetic.results()
    fast = slowed(synthetic.results(seed=50), synthetic.NAMES[0], 1 / 1.25)
    other = replace(again(fast), commit="d" * 40)
    if what == "kernels":
        kernels = replace(fast.fingerprint, kernels="d" * 16)
        other = replace(again(fast), fingerprint=kernels)
    with pytest.raises(UserError, match=f"another source .*{what} dddd.* than the first"):
        moved(fast, baseline, other)


def test_a_confirming_run_that_regresses_moves_nothing() -> None:
    baseline = synthetic.results()
    fast = slowed(synthetic.results(seed=50), synthetic.NAMES[0], 1 / 1.25)
    mixed = slowed(again(fast), synthetic.NAMES[1], 1.2)
    with pytest.raises(UserError, match="the baseline stays: the confirming run failed"):
        moved(fast, baseline, mixed)


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
    assert decide(slowed(once, name, 1.02), after, DEFAULTS["cuda"]).exit_code == 1


def test_a_failed_gate_moves_nothing() -> None:
    baseline = synthetic.results()
    run = slowed(slowed(baseline, synthetic.NAMES[0], 0.5), synthetic.NAMES[1], 1.5)
    with pytest.raises(UserError, match="the baseline stays: the first run failed"):
        moved(run, baseline)


def test_a_first_baseline_needs_every_case() -> None:
    run = synthetic.results()
    assert create(run) == run
    broken = replace(run.cases[0], ours=Series("wrong", (), "off"))
    with pytest.raises(UserError, match=r"every case to have run: .*wrong: off"):
        create(replace(run, cases=(broken,)))


def test_a_first_baseline_needs_enough_processes() -> None:
    with pytest.raises(UserError, match="a baseline needs 3 processes of every case"):
        create(synthetic.results(processes=2))
