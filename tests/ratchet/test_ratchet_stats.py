"""Statistics of samples[process][round]."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.ratchet import stats


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


def test_intervals_widen_with_the_spread_between_processes() -> None:
    """A thousand rounds of two processes that disagree say little: the bootstrap must know."""
    rng = np.random.default_rng(2)
    noise = np.exp(0.01 * rng.standard_normal((2, 500)))
    alike, apart = noise, noise * np.array([[1.0], [1.2]])
    one = np.exp(0.01 * rng.standard_normal((2, 500)))
    narrow, wide = stats.speedup(alike, one), stats.speedup(apart, one)
    assert narrow.high / narrow.low < 1.01
    assert wide.high / wide.low > 1.15
    assert stats.median(apart).high / stats.median(apart).low > 1.15


def test_speedup_and_median_values() -> None:
    ours, sdpa = [[1.0, 2.0, 3.0]], [[2.0, 4.0, 6.0]]
    assert stats.speedup(ours, sdpa).value == pytest.approx(2.0)
    assert stats.median(ours).value == 2.0


def test_processes_needed() -> None:
    assert stats.processes_needed(5, half_width=0.06, wanted=0.03) == 20
    assert stats.processes_needed(5, half_width=0.03, wanted=0.03) == 6
