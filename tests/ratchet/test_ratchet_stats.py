"""Statistics of samples[process][round]."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.measure.stats import factor
from flashmoe.ratchet.gate import stats


@pytest.mark.parametrize(("n", "m"), [(5, 7), (10, 10), (3, 4)])
def test_change_is_yuens_test(n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.02, 0.01, n), rng.normal(0.0, 0.03, m)
    change = stats.change(a, b)
    means = [scipy.stats.trim_mean(x, stats.TRIM) for x in (a, b)]
    assert change.ratio.value == pytest.approx(math.exp(means[0] - means[1]))
    for side, p in (("greater", change.p_above), ("less", change.p_below)):
        expected = scipy.stats.ttest_ind(
            a, b, equal_var=False, trim=stats.TRIM, alternative=side
        ).pvalue
        assert p == pytest.approx(expected)
    # A change by exactly the interval's end would be significant at exactly 2.5 %.
    shifted = stats.change(a - math.log(change.ratio.low), b)
    assert shifted.p_above == pytest.approx(0.025)


def test_one_odd_process_in_ten_hides_nothing() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(-0.1, 0.02, 10), rng.normal(0.0, 0.02, 10)
    a[4] += 0.5
    b[7] -= 0.5
    assert stats.change(a, b).p_below < 1e-3


def test_change_without_spread_is_certain_and_finite() -> None:
    change = stats.change(np.full(3, -0.01), np.zeros(3))
    assert change.p_below < 1e-6
    assert change.ratio.low < math.exp(-0.01) < change.ratio.high


def two_states(
    rng: np.random.Generator, slow_share: float, slope: float, processes: int = 16
) -> stats.Times:
    """Processes of which some found the machine in a state in which SDPA takes 17 % longer, and
    ours `slope` times as much of that (as logarithms); both with noise of their own."""
    slow = 0.16 * (np.arange(processes) < slow_share * processes)
    return slow + rng.normal(0, 0.005, processes), slope * slow + rng.normal(0, 0.01, processes)


def at_equal_sdpa(current: stats.Times, baseline: stats.Times) -> stats.Change:
    return stats.change_at_equal_sdpa(current, baseline, stats.slope(current, baseline))


@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_a_state_of_the_machine_that_sdpa_feels_more_is_no_change_of_the_kernel(
    slope: float,
) -> None:
    rng = np.random.default_rng(2)
    found = [
        at_equal_sdpa(two_states(rng, 0.75, slope), two_states(rng, 0.25, slope))
        for _ in range(500)
    ]
    assert 0.02 <= sum(change.ratio.excludes(1.0) for change in found) / len(found) <= 0.08
    assert max(change.error for change in found) < 0.01


def test_a_slowdown_is_seen_at_equal_sdpa_where_the_speedups_hide_it() -> None:
    rng = np.random.default_rng(4)
    (x, y), baseline = two_states(rng, 0.75, 0.2), two_states(rng, 0.25, 0.2)
    slower = x, y + math.log(1.08)
    plain = stats.change(slower[0] - slower[1], baseline[0] - baseline[1])
    assert plain.p_below > 0.1
    adjusted = at_equal_sdpa(slower, baseline)
    assert adjusted.p_below < 1e-6
    assert adjusted.ratio.low < 1 / 1.08 < adjusted.ratio.high


def test_a_movement_of_sdpa_beyond_what_its_processes_show_adds_its_own_error() -> None:
    rng = np.random.default_rng(5)
    current, baseline = (two_states(rng, 0.0, 0.0) for _ in range(2))
    still = at_equal_sdpa(current, baseline)
    assert still.shared < 0.005
    moved = at_equal_sdpa((current[0] + 0.2, current[1]), baseline)
    assert moved.shared > 0.05
    # No number of processes makes up for it.
    needed = stats.processes_needed(16, moved, math.log(1.08), 0.001)
    assert needed == stats.MOST_PROCESSES


def test_a_yardstick_without_spread_leaves_the_plain_change() -> None:
    times = np.zeros(4), np.array([0.0, 0.01, 0.02, 0.03])
    by = stats.slope(times, times)
    assert (by.value, by.reach) == (1.0, 0.0)
    slower = times[0], times[1] + 0.1
    change = at_equal_sdpa(slower, times)
    assert change.ratio.value == pytest.approx(math.exp(-0.1))
    assert change.shared == 0.0


def rounds(*states: tuple[float, float, int]) -> stats.Sides:
    """Processes alike: of each (SDPA's time, ours, how many rounds)."""
    ours = [mine for _, mine, count in states for _ in range(count)]
    sdpa = [theirs for theirs, _, count in states for _ in range(count)]
    return [ours] * 3, [sdpa] * 3


def test_only_rounds_count_in_which_sdpa_was_undisturbed() -> None:
    current = rounds((7.3, 6.2, 8), (8.6, 6.4, 12))
    baseline = rounds((7.3, 6.2, 16), (24.0, 23.0, 4))
    for times in stats.calm_times(current, baseline):
        np.testing.assert_allclose(np.exp(times), [[7.3] * 3, [6.2] * 3])


def test_what_a_kernel_does_decides_nothing_about_which_rounds_count() -> None:
    current, baseline = rounds((7.3, 6.2, 8), (8.6, 6.4, 12)), rounds((7.3, 6.2, 20))
    slower = [[10 * x for x in process] for process in current[0]], current[1]
    (x, y), _ = stats.calm_times(current, baseline)
    (x_slower, y_slower), _ = stats.calm_times(slower, baseline)
    np.testing.assert_array_equal(x, x_slower)
    np.testing.assert_allclose(y_slower - y, math.log(10))


def test_a_process_that_found_no_calm_is_left_out() -> None:
    current, baseline = rounds((7.3, 6.2, 20)), rounds((7.3, 6.2, 20))
    ours, sdpa = list(current[0]), list(current[1])
    sdpa[1] = [7.3] * 3 + [9.0] * 17
    new, old = stats.calm_times((ours, sdpa), baseline)
    assert (len(new[0]), len(old[0])) == (2, 3)
    # Of few rounds all have to be calm, not four.
    few = rounds((7.3, 6.2, 2))
    assert len(stats.calm_times(few, few)[0][0]) == 3


def test_a_file_without_calm_rounds_has_no_times() -> None:
    new, old = stats.calm_times(rounds((14.0, 6.2, 20)), rounds((7.3, 6.2, 20)))
    assert (len(new[0]), len(old[0])) == (0, 3)


def test_change_needs_two_processes() -> None:
    with pytest.raises(ValueError, match="at least 2 processes on each side, got 1 and 3"):
        stats.change(np.zeros(1), np.zeros(3))


def test_change_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    missed = sum(
        stats.change(rng.normal(0, 0.02, 5), rng.normal(0, 0.02, 5)).ratio.excludes(1.0)
        for _ in range(2000)
    )
    assert 0.035 <= missed / 2000 <= 0.07


def test_holm_against_the_definition() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1, made monotone.
    assert stats.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert stats.holm([]) == []
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.randoms())
def test_holm_does_not_depend_on_order(p_values: list[float], random: object) -> None:
    order = list(range(len(p_values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = stats.holm([p_values[i] for i in order])
    assert shuffled == [stats.holm(p_values)[i] for i in order]
    assert all(p <= q for p, q in zip(p_values, stats.holm(p_values), strict=True))


def test_log_speedups_pair_by_round() -> None:
    ours = [[1.0, 10.0, 100.0], [2.0, 2.0, 2.0]]
    sdpa = [[2.0, 20.0, 200.0], [3.0, 3.0, 3.0]]
    assert stats.log_speedups(ours, sdpa) == pytest.approx([math.log(2), math.log(1.5)])


def test_processes_needed_makes_the_effect_detectable() -> None:
    rng = np.random.default_rng(5)
    change = stats.change(rng.normal(0, 0.03, 6), rng.normal(0, 0.03, 6))
    wanted = stats.detectable(change, 0.01) / 2
    needed = stats.processes_needed(6, change, wanted, 0.01)
    # Four times as many halve the error; fewer do, for the t-distribution narrows as well.
    assert 10 < needed < 24
    assert stats.processes_needed(6, change, 1e-6, 0.01) == stats.MOST_PROCESSES
    assert stats.processes_needed(6, change, 10.0, 0.01) == 7


def test_a_detectable_effect_is_detected_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    change = stats.change(rng.normal(0, 0.01, 400), rng.normal(0, 0.01, 400))
    # The noise is known that well, so what is left to chance is the estimate.
    effect = stats.detectable(change, 0.01)
    found = sum(
        stats.change(rng.normal(-effect, 0.01, 400), rng.normal(0, 0.01, 400)).p_below < 0.01
        for _ in range(1000)
    )
    assert 0.92 <= found / 1000 <= 0.98


def test_the_floor_is_what_same_against_same_exceeds_once_in_a_hundred() -> None:
    rng = np.random.default_rng(7)
    values = rng.normal(0, 0.01, 60)
    floor = stats.effect_floor(values, 10)
    differences = [
        math.log(stats.change(rng.normal(0, 0.01, 10), rng.normal(0, 0.01, 10)).ratio.value)
        for _ in range(3000)
    ]
    assert 0.002 <= np.mean(np.abs(differences) > floor) <= 0.03
    assert stats.effect_floor(np.zeros(8), 4) == 0
    # From fewer processes than two sides of that size, by the rule of standard errors.
    assert stats.effect_floor(values[:12], 10) == pytest.approx(floor, rel=0.6)
    with pytest.raises(ValueError, match="at least 2 processes, got 1"):
        stats.effect_floor(np.zeros(1), 4)


def test_rounds_wanted_leave_the_error_asked_for() -> None:
    rng = np.random.default_rng(0)

    def speedups(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return np.exp(0.06 * rng.standard_normal(shape)), np.ones(shape)

    wanted = stats.rounds_wanted(*speedups((4000,)), error=0.004)
    figures = stats.log_speedups(*speedups((2000, wanted)))
    assert figures.std() == pytest.approx(0.004, rel=0.1)
    assert stats.rounds_wanted([1.0] * 20, [2.0] * 20, error=0.004) == 0


def test_half_width_is_that_of_the_t_interval() -> None:
    x = np.random.default_rng(8).normal(0, 0.01, 4)  # too few to trim any
    low, high = scipy.stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert stats.half_width(x) == pytest.approx((high - low) / 2)
    assert stats.half_width(x[:1]) == math.inf


def test_processes_that_differ_by_orders_of_magnitude_overflow_nothing() -> None:
    wild = stats.change(np.array([0.0, 0.0, 900.0]), np.zeros(3))
    assert 0 < wild.ratio.low < 1 < wild.ratio.high < math.inf
    assert math.isfinite(1 / wild.ratio.low)
    assert factor(stats.detectable(wild, 0.005)) < math.inf
