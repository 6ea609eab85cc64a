"""The gate's decisions, from results made up so that the truth is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ratchet_synthetic as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate import (
    COMPARED,
    FAIL,
    IMPROVED,
    INCONCLUSIVE,
    PASS,
    YARDSTICK,
    Decision,
    Thresholds,
    decide,
)
from flashmoe.ratchet.results import Results, Series, slowed

NAME = synthetic.NAMES[0]


def gate(current: Results, baseline: Results | None = None) -> Decision:
    return decide(current, baseline or synthetic.results(), Thresholds())


def verdicts(decision: Decision) -> dict[str, str]:
    return {v.name: v.verdict for v in decision.verdicts}


def sdpa_scaled(results: Results, name: str, factor: float) -> Results:
    """As if SDPA took `factor` times as long in one case."""
    cases = [
        replace(
            case,
            sdpa=replace(
                case.sdpa, samples=tuple(tuple(x * factor for x in p) for p in case.sdpa.samples)
            ),
        )
        if case.name == name
        else case
        for case in results.cases
    ]
    return replace(results, cases=tuple(cases))


def test_the_same_run_passes() -> None:
    decision = gate(synthetic.results())
    assert decision.exit_code == 0
    assert set(verdicts(decision).values()) == {PASS}
    assert decision.environment == ()


def test_another_run_passes() -> None:
    assert gate(synthetic.results(noise=0.005, seed=7)).exit_code == 0


def test_ten_percent_slower_fails_with_realistic_noise() -> None:
    baseline = synthetic.results(noise=0.015)
    decision = gate(slowed(synthetic.results(noise=0.015, seed=7), NAME, 1.1), baseline)
    assert decision.exit_code == 1
    assert verdicts(decision)[NAME] == FAIL
    assert list(verdicts(decision).values()).count(FAIL) == 1


@settings(max_examples=60, deadline=None)
@given(st.floats(0.7, 1.4))
def test_verdict_flips_at_the_thresholds(factor: float) -> None:
    """Without noise the verdict depends on the size alone: speedup changes by 1 / factor."""
    change = 100 * (1 / factor - 1)
    if min(abs(change + 3), abs(change - 5)) < 0.01:
        return
    expected = FAIL if change < -3 else IMPROVED if change > 5 else PASS
    decision = gate(slowed(synthetic.results(), NAME, factor))
    assert verdicts(decision)[NAME] == expected
    assert decision.exit_code == (1 if expected == FAIL else 0)
    assert decision.verdicts[0].percent == pytest.approx(change)


def test_thresholds_are_the_users() -> None:
    run = slowed(synthetic.results(), NAME, 1.1)
    assert decide(run, synthetic.results(), Thresholds(fail=-20)).exit_code == 0
    strict = decide(slowed(run, NAME, 0.99 / 1.1), synthetic.results(), Thresholds(improve=0.5))
    assert verdicts(strict)[NAME] == IMPROVED


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(3)), st.permutations(range(3)), st.floats(0.9, 1.15))
def test_order_of_cases_does_not_matter(a: list[int], b: list[int], factor: float) -> None:
    baseline = synthetic.results(noise=0.01)
    current = slowed(synthetic.results(noise=0.01, seed=3), NAME, factor)
    expected = gate(current, baseline)
    shuffled = gate(
        replace(current, cases=tuple(current.cases[i] for i in a)),
        replace(baseline, cases=tuple(baseline.cases[i] for i in b)),
    )
    assert verdicts(shuffled) == verdicts(expected)
    assert shuffled.exit_code == expected.exit_code


def test_a_slowdown_lost_in_noise_is_inconclusive_and_says_what_would_do() -> None:
    decision = gate(
        slowed(synthetic.results(noise=0.2, seed=9), NAME, 1.1), synthetic.results(noise=0.2)
    )
    assert decision.exit_code == 0
    noisy = decision.named(INCONCLUSIVE)
    assert noisy
    assert all("processes in both runs would do (now 5)" in v.reason for v in noisy)
    assert f"{len(noisy)} INCONCLUSIVE" in decision.summary


def test_false_alarms_over_many_gates_stay_below_alpha() -> None:
    """Same against same with 3 % spread of processes, 12 cases: any FAIL in at most 5 %."""
    names = [f"fwd-b{b}-h8-s512-d64-float32" for b in range(1, 13)]
    runs = [synthetic.results(names, noise=0.03, seed=100 * i) for i in range(10)]
    pairs = [(a, b) for a in runs for b in runs if a is not b][:60]
    alarms = sum(gate(a, b).exit_code != 0 for a, b in pairs)
    assert alarms <= 3


def test_missing_and_extra_cases_are_4() -> None:
    full = synthetic.results()
    fewer = replace(full, cases=full.cases[1:])
    missing, extra = gate(fewer, full), gate(full, fewer)
    assert missing.exit_code == extra.exit_code == 4
    assert missing.integrity == (f"case missing from the current run: {NAME}",)
    assert extra.integrity == (f"case not in the baseline: {NAME}",)
    assert NAME not in verdicts(missing)


def test_no_case_in_common_is_no_pass() -> None:
    full = synthetic.results()
    decision = gate(replace(full, cases=full.cases[:1]), replace(full, cases=full.cases[1:]))
    assert decision.exit_code == 4
    assert "no case compared" in decision.summary


@pytest.mark.parametrize("field", COMPARED)
def test_foreign_fingerprints_are_4(field: str) -> None:
    other = 16 if field == "threads" else "another"
    foreign = replace(synthetic.FINGERPRINT, **{field: other})
    decision = gate(replace(synthetic.results(), fingerprint=foreign))
    assert decision.exit_code == 4
    assert f"fingerprint: {field}: {other!r} here" in decision.integrity[0]


def test_other_kernels_and_power_limits_compare() -> None:
    newer = replace(synthetic.FINGERPRINT, kernels="f" * 16, power_limit=650.0)
    decision = gate(replace(synthetic.results(), fingerprint=newer))
    assert decision.exit_code == 0
    assert decision.environment == ("power_limit: 650.0 here, 700.0 there",)


def test_a_faster_yardstick_is_the_environments_change() -> None:
    decision = gate(sdpa_scaled(synthetic.results(), NAME, 0.9))
    assert verdicts(decision)[NAME] == YARDSTICK
    assert decision.exit_code == 0
    assert "1 YARDSTICK" in decision.summary
    assert "SDPA's own time changed by -10.0 %" in decision.verdicts[0].reason
    assert any(f"SDPA's time in {NAME} changed by -10.0 %" in x for x in decision.environment)


def test_a_slower_machine_that_slows_us_a_little_more_is_the_environments_change() -> None:
    run = slowed(sdpa_scaled(synthetic.results(), NAME, 1.2), NAME, 1.2 * 1.1)
    assert verdicts(gate(run))[NAME] == YARDSTICK


def test_a_slower_yardstick_improves_nothing() -> None:
    assert verdicts(gate(sdpa_scaled(synthetic.results(), NAME, 1.1)))[NAME] == YARDSTICK


def test_a_fall_beyond_the_yardsticks_movement_is_the_kernels() -> None:
    run = slowed(sdpa_scaled(synthetic.results(), NAME, 1.02), NAME, 1.02 * 1.1)
    assert verdicts(gate(run))[NAME] == FAIL


def test_when_every_yardstick_moved_nothing_was_judged() -> None:
    run = synthetic.results()
    for name in synthetic.NAMES:
        run = sdpa_scaled(run, name, 0.9)
    assert gate(run).exit_code == 4


def test_a_slower_kernel_is_not_excused_by_a_yardstick_that_moved_a_little() -> None:
    both = slowed(sdpa_scaled(synthetic.results(), NAME, 0.96), NAME, 1.1)
    assert gate(both).exit_code == 1


def test_a_fall_within_the_drift_of_all_yardsticks_is_the_environments_change() -> None:
    run = synthetic.results()
    for name in synthetic.NAMES[1:]:
        run = slowed(sdpa_scaled(run, name, 1.08), name, 1.08)
    assert verdicts(gate(slowed(run, NAME, 1.1)))[NAME] == YARDSTICK
    assert verdicts(gate(slowed(run, NAME, 1.25)))[NAME] == FAIL


def test_a_slower_machine_changes_nothing_but_a_note() -> None:
    slow = synthetic.results()
    for name in synthetic.NAMES:
        slow = slowed(sdpa_scaled(slow, name, 1.3), name, 1.3)
    decision = gate(slow)
    assert decision.exit_code == 0
    assert set(verdicts(decision).values()) == {PASS}
    assert len(decision.environment) == 3


@pytest.mark.parametrize(("side", "verdict", "code"), [("ours", FAIL, 1), ("sdpa", YARDSTICK, 4)])
def test_a_case_that_did_not_run(side: str, verdict: str, code: int) -> None:
    full = synthetic.results()
    series = {"ours": Series("ok"), "sdpa": Series("ok"), side: Series("wrong", (), "off by 1")}
    decision = gate(replace(full, cases=(replace(full.cases[0], **series), *full.cases[1:])))
    assert verdicts(decision)[NAME] == verdict
    assert decision.exit_code == code
    assert "wrong: off by 1" in decision.verdicts[0].reason


def test_a_regression_wins_over_a_yardstick() -> None:
    run = sdpa_scaled(slowed(synthetic.results(), NAME, 1.3), synthetic.NAMES[1], 0.9)
    decision = gate(run)
    assert {FAIL, YARDSTICK} < set(verdicts(decision).values())
    assert decision.exit_code == 1


def test_too_few_processes_decide_nothing() -> None:
    few = synthetic.results(processes=2)
    for current, baseline, which in (
        (few, synthetic.results(), "current"),
        (synthetic.results(), few, "baseline"),
    ):
        with pytest.raises(UserError, match=rf"{which} case .* comes from 2 process.*needs 3"):
            gate(current, baseline)


def test_a_baseline_without_figures_is_bad_input() -> None:
    full = synthetic.results()
    broken = replace(full.cases[0], ours=Series("failed", (), "boom"))
    with pytest.raises(UserError, match=r"baseline case .* has no figures \(failed: boom"):
        gate(full, replace(full, cases=(broken, *full.cases[1:])))


@pytest.mark.parametrize("bad", [{"fail": 0.0}, {"fail": 3.0}, {"fail": -100.0}, {"improve": 0.0}])
def test_bad_thresholds(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"threshold-{next(iter(bad))} must be"):
        Thresholds(**bad)
    with pytest.raises(UserError):
        Thresholds(fail=float("nan"))
