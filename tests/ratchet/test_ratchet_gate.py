"""The gate's decisions, from results made up so that the truth is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ratchet_synthetic as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.measure.timing import HOW
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate.decide import (
    FAIL,
    IMPROVED,
    INCONCLUSIVE,
    INTEGRITY,
    PASS,
    Decision,
    decide,
)
from flashmoe.ratchet.gate.integrity import COMPARED
from flashmoe.ratchet.gate.thresholds import DEFAULTS, Thresholds, percent, with_cases
from flashmoe.ratchet.results.values import Origin, Results, Series, Telemetry, slowed

NAME = synthetic.NAMES[0]


def gate(current: Results, baseline: Results | None = None) -> Decision:
    """Of two runs, whatever they were made from."""
    current = replace(current, run="f" * 32)
    return decide(current, baseline or synthetic.results(), DEFAULTS["cuda"])


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


def test_a_run_is_not_compared_with_itself() -> None:
    run = synthetic.results()
    decision = decide(run, run, DEFAULTS["cuda"])
    assert decision.exit_code == 4
    assert decision.integrity == (
        "both are the same run (000000000000): nothing can differ from itself",
    )
    assert decide(run, run, DEFAULTS["cuda"], created=True).exit_code == 0


def test_a_case_is_not_compared_with_the_run_that_moved_it() -> None:
    run, older = synthetic.results(), synthetic.results(seed=9)
    origin = Origin(run.run, run.started, run.command, run.commit, "abc")
    moved = replace(older, cases=(replace(run.cases[0], origin=origin), *older.cases[1:]))
    decision = decide(run, moved, DEFAULTS["cuda"])
    assert decision.exit_code == 4
    assert decision.problems == (
        f"{NAME}: the baseline has this case from the same run: nothing can differ from itself",
    )


def test_the_same_speeds_pass() -> None:
    decision = gate(synthetic.results())
    assert decision.exit_code == 0
    assert set(verdicts(decision).values()) == {PASS}
    assert decision.environment == ()


def test_another_run_passes() -> None:
    decision = gate(synthetic.results(noise=0.004, processes=10, seed=7))
    assert decision.exit_code == 0


def test_ten_percent_slower_fails_with_realistic_noise() -> None:
    baseline = synthetic.results(noise=0.01, processes=12)
    current = synthetic.results(noise=0.01, processes=12, seed=7)
    decision = gate(slowed(current, NAME, 1.1), baseline)
    assert decision.exit_code == 1
    assert verdicts(decision)[NAME] == FAIL
    assert list(verdicts(decision).values()).count(FAIL) == 1


@settings(max_examples=60, deadline=None)
@given(st.floats(0.7, 1.4))
def test_verdict_flips_at_the_thresholds(factor: float) -> None:
    """Without noise the verdict depends on the size alone."""
    change = percent(1 / factor)
    if min(abs(change + 3), abs(change - 5)) < 0.02:
        return
    expected = FAIL if change < -3 else IMPROVED if change > 5 else PASS
    decision = gate(slowed(synthetic.results(), NAME, factor))
    assert verdicts(decision)[NAME] == expected
    assert decision.exit_code == (1 if expected == FAIL else 0)
    assert decision.verdicts[0].percent == pytest.approx(change)


@pytest.mark.parametrize("factor", [1.03, 1.05])
def test_a_slowdown_of_exactly_the_threshold_fails(factor: float) -> None:
    """An estimate that has to exceed the threshold would let every other one pass."""
    baseline = synthetic.results(noise=0.002, processes=8)
    caught = sum(
        verdicts(
            gate(
                slowed(synthetic.results(noise=0.002, processes=8, seed=s), NAME, factor), baseline
            )
        )[NAME]
        == FAIL
        for s in range(50, 90)
    )
    assert caught >= 38


def test_percent_is_what_people_say() -> None:
    assert percent(1 / 1.03) == pytest.approx(-3)
    assert percent(1.05) == pytest.approx(5)
    assert percent(1.0) == 0


def test_thresholds_are_the_users() -> None:
    run = slowed(synthetic.results(), NAME, 1.1)
    assert decide(run, synthetic.results(), Thresholds(-20, 5)).exit_code == 0
    strict = decide(slowed(run, NAME, 0.99 / 1.1), synthetic.results(), Thresholds(-3, 0.5))
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


def test_thresholds_of_single_cases() -> None:
    run = slowed(synthetic.results(), NAME, 1.1)
    loose = with_cases(-3, 5, ["fwd-*=-2", f"{NAME}=-20/+8"])
    assert loose.of(NAME) == Thresholds(-20, 8)
    assert loose.of(synthetic.NAMES[1]) == Thresholds(-2, 5)
    assert loose.of(synthetic.NAMES[2]) == loose
    assert decide(run, synthetic.results(), loose).exit_code == 0
    tight = with_cases(-20, 5, [f"{NAME}=-5"])
    assert decide(run, synthetic.results(), tight).exit_code == 1


def test_a_pattern_that_names_no_case_is_bad_input() -> None:
    run = synthetic.results()
    unused = with_cases(-3, 5, ["fwd-*=-2", "fwd-b8-*=-5"])
    with pytest.raises(UserError, match=r"threshold 'fwd-b8-\*' names no case; there are fwd-b2"):
        decide(run, synthetic.results(seed=9), unused)
    # One of either file is enough: a missing case is told as such.
    fewer = replace(run, cases=run.cases[1:])
    assert decide(fewer, synthetic.results(seed=9), with_cases(-3, 5, [f"{NAME}=-2"])).problems


@pytest.mark.parametrize("text", ["", "x", "x=", "=-3", "x=-3/", "x=a", "x=3", "x=-3/-5"])
def test_bad_thresholds_of_cases(text: str) -> None:
    with pytest.raises(UserError, match="threshold"):
        with_cases(-3, 5, [text])


def test_a_slowdown_lost_in_noise_is_inconclusive_and_says_what_would_do() -> None:
    decision = gate(
        slowed(synthetic.results(noise=0.2, seed=9), NAME, 1.1), synthetic.results(noise=0.2)
    )
    assert decision.exit_code == 3
    noisy = decision.named(INCONCLUSIVE)
    assert noisy
    assert all("processes in both runs would do (now 5)" in v.reason for v in noisy)
    assert all(v.detectable > 1.1 for v in noisy)
    assert f"{len(noisy)} INCONCLUSIVE" in decision.summary


def test_as_many_processes_as_it_says_do() -> None:
    noise = 0.01
    few = gate(synthetic.results(noise=noise, seed=2), synthetic.results(noise=noise))
    asked = [int(v.reason.split("about ")[1].split()[0]) for v in few.named(INCONCLUSIVE)]
    assert asked
    enough = 2 * max(asked)  # an estimate from five processes is rough itself
    many = gate(
        synthetic.results(noise=noise, processes=enough, seed=3),
        synthetic.results(noise=noise, processes=enough, seed=40),
    )
    assert many.exit_code == 0


def test_a_slowdown_that_same_against_same_shows_as_well_is_not_proven() -> None:
    """Now and then a process is 6 % slower. Trimming hides that from the baseline's own error, but
    five processes of which two are of that kind are no rarity."""
    baseline, run = synthetic.results(processes=12), synthetic.results(seed=3, processes=5)
    series = baseline.cases[0].ours
    mixed = tuple(
        tuple(x * (1.06 if i in (2, 9) else 1.0) for x in p) for i, p in enumerate(series.samples)
    )
    case = replace(baseline.cases[0], ours=replace(series, samples=mixed))
    baseline = replace(baseline, cases=(case, *baseline.cases[1:]))
    found = {
        factor: decide(slowed(run, NAME, factor), baseline, Thresholds(-1, 5)).verdicts[0]
        for factor in (1.015, 1.04)
    }
    assert found[1.015].verdict == INCONCLUSIVE
    assert "same against same differs by up to 2.0 % in the baseline" in found[1.015].reason
    assert found[1.04].verdict == FAIL


def test_false_alarms_over_many_gates_stay_below_alpha() -> None:
    """Same against same with 3 % spread of processes, 12 cases: a FAIL is as good as never."""
    names = [f"fwd-b{b}-h8-s512-d64-float32" for b in range(1, 13)]
    runs = [synthetic.results(names, noise=0.03, seed=100 * i) for i in range(10)]
    pairs = [(a, b) for a in runs for b in runs if a is not b][:60]
    assert sum(gate(a, b).exit_code == 1 for a, b in pairs) <= 1


def test_missing_and_extra_cases_are_4() -> None:
    full = synthetic.results()
    fewer = replace(full, cases=full.cases[1:])
    missing, extra = gate(fewer, full), gate(full, fewer)
    assert missing.exit_code == extra.exit_code == 4
    assert missing.problems == (f"{NAME}: missing from the current run",)
    assert extra.problems == (f"{NAME}: not in the baseline",)
    assert verdicts(missing)[NAME] == verdicts(extra)[NAME] == INTEGRITY


def test_a_renamed_case_is_4_and_says_what_it_was() -> None:
    full = synthetic.results()
    name = NAME.replace("s512", "s513")
    other = synthetic.case(name)
    decision = gate(replace(full, cases=(other, *full.cases[1:])))
    assert decision.exit_code == 4
    assert decision.problems == (
        f"{name}: not in the baseline; renamed from {NAME}?",
        f"{NAME}: missing from the current run; renamed to {name}?",
    )


def test_no_case_in_common_is_no_pass() -> None:
    full = synthetic.results()
    decision = gate(replace(full, cases=full.cases[:1]), replace(full, cases=full.cases[1:]))
    assert decision.exit_code == 4
    assert "3 INTEGRITY" in decision.summary


@pytest.mark.parametrize("where", ["now", "then"])
def test_another_sdpa_backend_is_4(where: str) -> None:
    full = synthetic.results()
    other = replace(full.cases[0], sdpa_backend="flash_attention")
    changed = replace(full, cases=(other, *full.cases[1:]))
    decision = gate(changed) if where == "now" else gate(full, changed)
    assert decision.exit_code == 4
    new, old = ("flash", "cudnn") if where == "now" else ("cudnn", "flash")
    assert decision.problems == (
        f"{NAME}: SDPA ran by its {new}_attention backend, in the baseline by {old}_attention: "
        "the yardstick is another one",
    )


@pytest.mark.parametrize(("rounds", "code"), [(20, 0), (21, 4)])
def test_a_throttled_gpu_is_4(rounds: int, code: int) -> None:
    """Of 5 processes with 20 rounds each; a fifth may be."""
    full = synthetic.results()
    marks = [min(max(rounds - 20 * i, 0), 20) for i in range(5)]
    hot = tuple(
        Telemetry(1200, 2619, 88, 400.0, ("hw_thermal", "power_cap"), tuple(range(n)))
        for n in marks
    )
    throttled = replace(full, cases=(replace(full.cases[0], telemetry=hot), *full.cases[1:]))
    for decision, where in ((gate(throttled), "now"), (gate(full, throttled), "in the baseline")):
        assert decision.exit_code == code
        if code:
            assert decision.problems == (
                f"{NAME}: the GPU was throttled in 21% of the rounds {where} (hw_thermal); at most "
                "20% can be judged",
            )


@pytest.mark.parametrize("field", COMPARED)
def test_foreign_fingerprints_are_4(field: str) -> None:
    other = 16 if field == "threads" else "another"
    foreign = replace(synthetic.FINGERPRINT, **{field: other})
    decision = gate(replace(synthetic.results(), fingerprint=foreign))
    assert decision.exit_code == 4
    assert f"fingerprint: {field}: {other!r} here" in decision.integrity[0]


def test_times_that_were_taken_otherwise_are_4() -> None:
    def timed(how: str) -> Results:
        run = replace(synthetic.results(), fingerprint=gpu)
        return replace(run, settings={**run.settings, "timing": how} if how else run.settings)

    gpu = replace(synthetic.FINGERPRINT, threads=0)
    decision = gate(timed(HOW["cuda"]), timed(""))
    assert decision.exit_code == 4
    assert decision.integrity == (
        "fingerprint: timing: 'device time, L2 flushed, code evicted' here, "
        "'device time, L2 flushed' there",
    )
    assert gate(timed(HOW["cuda"]), timed(HOW["cuda"])).exit_code == 0


def test_other_kernels_and_power_limits_compare() -> None:
    newer = replace(synthetic.FINGERPRINT, kernels="f" * 16, power_limit=650.0)
    decision = gate(replace(synthetic.results(), fingerprint=newer))
    assert decision.exit_code == 0
    assert decision.environment == ("power_limit: 650.0 here, 700.0 there",)


def test_a_faster_yardstick_is_the_environments_change() -> None:
    decision = gate(sdpa_scaled(synthetic.results(), NAME, 0.9))
    assert verdicts(decision)[NAME] == INCONCLUSIVE
    assert decision.exit_code == 3
    assert decision.verdicts[0].environment
    assert "the environment changed, not the kernel: SDPA's own time by -10.0 % here" in (
        decision.verdicts[0].reason
    )
    assert any(f"SDPA's time in {NAME} changed by -10.0 %" in x for x in decision.environment)


def test_a_slower_yardstick_improves_nothing() -> None:
    decision = gate(sdpa_scaled(synthetic.results(), NAME, 1.1))
    assert verdicts(decision)[NAME] == INCONCLUSIVE
    assert decision.named(IMPROVED) == ()


def test_a_fall_beyond_the_yardsticks_movement_is_the_kernels() -> None:
    run = slowed(sdpa_scaled(synthetic.results(), NAME, 0.97), NAME, 1.1)
    assert verdicts(gate(run))[NAME] == FAIL


def test_a_slower_kernel_is_not_excused_by_a_yardstick_that_moved_a_little() -> None:
    run = slowed(sdpa_scaled(synthetic.results(), NAME, 0.99), NAME, 1.025)
    assert verdicts(gate(run))[NAME] == FAIL


def test_other_clocks_excuse_nothing_on_a_gpu() -> None:
    """Everything 4 % slower, and one kernel 4 % more: a ratio cancels the clocks."""
    run = synthetic.results()
    for name in synthetic.NAMES:
        run = slowed(sdpa_scaled(run, name, 1.04), name, 1.04)
    decision = gate(slowed(run, NAME, 1.04))
    assert verdicts(decision)[NAME] == FAIL
    assert list(verdicts(decision).values()).count(PASS) == 2


def test_a_slower_machine_changes_nothing_but_a_note() -> None:
    slow = synthetic.results()
    for name in synthetic.NAMES:
        slow = slowed(sdpa_scaled(slow, name, 1.3), name, 1.3)
    decision = gate(slow)
    assert decision.exit_code == 0
    assert set(verdicts(decision).values()) == {PASS}
    assert len(decision.environment) == 3


def on_cpu(run: Results) -> Results:
    return replace(run, fingerprint=replace(synthetic.FINGERPRINT, threads=2))


def test_a_busy_cpu_that_slows_us_more_than_sdpa_is_the_environments_change() -> None:
    run = slowed(sdpa_scaled(synthetic.results(), NAME, 1.2), NAME, 1.2 * 1.1)
    decision = gate(on_cpu(run), on_cpu(synthetic.results()))
    assert verdicts(decision)[NAME] == INCONCLUSIVE
    assert decision.verdicts[0].environment


def test_a_fall_within_the_drift_of_all_yardsticks_is_a_busy_cpus_doing() -> None:
    run = synthetic.results()
    for name in synthetic.NAMES[1:]:
        run = slowed(sdpa_scaled(run, name, 1.08), name, 1.08)
    base = on_cpu(synthetic.results())
    assert verdicts(gate(on_cpu(slowed(run, NAME, 1.05)), base))[NAME] == INCONCLUSIVE
    assert verdicts(gate(on_cpu(slowed(run, NAME, 1.1)), base))[NAME] == FAIL


def test_a_fall_clearly_beyond_the_yardsticks_movement_is_the_kernels_on_a_cpu_too() -> None:
    run = slowed(sdpa_scaled(synthetic.results(), NAME, 0.95), NAME, 1.1 * 0.95)
    assert verdicts(gate(on_cpu(run), on_cpu(synthetic.results())))[NAME] == FAIL
    within = slowed(sdpa_scaled(synthetic.results(), NAME, 0.92), NAME, 1.1 * 0.92)
    assert verdicts(gate(on_cpu(within), on_cpu(synthetic.results())))[NAME] == INCONCLUSIVE


def test_when_every_yardstick_moved_nothing_was_judged() -> None:
    run = on_cpu(synthetic.results())
    for name in synthetic.NAMES:
        run = sdpa_scaled(run, name, 0.9)
    decision = gate(run, on_cpu(synthetic.results()))
    assert decision.exit_code == 4
    assert decision.problems == ("the environment changed under every case: nothing was judged",)


@pytest.mark.parametrize(("side", "verdict", "code"), [("ours", FAIL, 1), ("sdpa", INTEGRITY, 4)])
def test_a_case_that_did_not_run(side: str, verdict: str, code: int) -> None:
    full = synthetic.results()
    series = {"ours": Series("ok"), "sdpa": Series("ok"), side: Series("wrong", (), "off by 1")}
    decision = gate(replace(full, cases=(replace(full.cases[0], **series), *full.cases[1:])))
    assert verdicts(decision)[NAME] == verdict
    assert decision.exit_code == code
    assert "wrong: off by 1" in decision.verdicts[0].reason


def test_a_regression_wins_over_what_is_inconclusive() -> None:
    run = sdpa_scaled(slowed(synthetic.results(), NAME, 1.3), synthetic.NAMES[1], 0.9)
    decision = gate(run)
    assert {FAIL, INCONCLUSIVE} < set(verdicts(decision).values())
    assert decision.exit_code == 1


def test_too_few_processes_decide_nothing() -> None:
    few = synthetic.results(processes=2)
    for current, baseline, which in (
        (few, synthetic.results(), "current"),
        (synthetic.results(), few, "baseline"),
    ):
        with pytest.raises(UserError, match=rf"{which} case .* comes from 2 process.*needs 3"):
            gate(current, baseline)


def without(run: Results, status: str) -> Results:
    """`run` with a first case that has no figures."""
    broken = replace(run.cases[0], ours=Series(status, (), "boom"))
    return replace(run, cases=(broken, *run.cases[1:]))


def test_a_baseline_without_figures_is_compared_with_nothing() -> None:
    decision = gate(synthetic.results(), without(synthetic.results(), "failed"))
    assert decision.exit_code == 4
    assert decision.problems == (f"{NAME}: the baseline has no figures (failed: boom)",)


def test_what_the_baselines_build_does_not_support_is_skipped_and_named() -> None:
    full = synthetic.results()
    older = without(full, "unsupported")
    for current in (full, older, slowed(full, NAME, 2.0)):
        decision = gate(current, older)
        assert (decision.exit_code, decision.skipped) == (0, (f"{NAME}: boom",))
        assert NAME not in verdicts(decision)
    decision = gate(older, full)  # what a change takes away is a failure
    assert (decision.exit_code, verdicts(decision)[NAME]) == (1, FAIL)
    assert "unsupported: boom" in decision.named(FAIL)[0].reason


@pytest.mark.parametrize("bad", [{"fail": 0.0}, {"fail": 3.0}, {"fail": -100.0}, {"improve": 0.0}])
def test_bad_thresholds(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"threshold-{next(iter(bad))} must be"):
        Thresholds(**{"fail": -3.0, "improve": 5.0, **bad})
    with pytest.raises(UserError):
        Thresholds(float("nan"), 5.0)
