"""Statistics of samples[process][round]: the process is the unit that varies, rounds refine it.

Pure functions; tested alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats

from flashmoe.stats import RESAMPLES, Interval

Samples = Sequence[Sequence[float]]
Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# Of the processes, at each end.
TRIM = 0.2
# Below this a standard error (in log units, so relative) says more about the clock than about us.
_LEAST_ERROR = 1e-5


@dataclass(frozen=True, slots=True)
class Change:
    """current / baseline with its 95 % interval, and one-sided p-values that it is below and above
    1 by chance alone. `error` is the standard error of its logarithm, `freedom` the degrees of
    freedom behind that."""

    ratio: Interval
    p_below: float
    p_above: float
    error: float
    freedom: float


def medians(samples: Samples) -> Array:
    """Each process's median time."""
    return np.asarray(np.median(np.asarray(samples, dtype=np.float64), axis=1))


def log_speedups(ours: Samples, sdpa: Samples) -> Array:
    """Each process's median over rounds of log(time of SDPA / time of ours), paired by round."""
    ratios = np.log(np.asarray(sdpa, dtype=np.float64)) - np.log(np.asarray(ours, dtype=np.float64))
    return np.asarray(np.median(ratios, axis=1))


def change(current: Array, baseline: Array) -> Change:
    """The change between two sets of per-process logarithms, by Yuen's test on trimmed means (Yuen
    1974): Welch's t-test for data in which a few processes, up to TRIM on either side, were hit by
    something else. Needs two processes on each side."""
    if min(len(current), len(baseline)) < 2:
        raise ValueError(
            f"change needs at least 2 processes on each side, got {len(current)} and "
            f"{len(baseline)}"
        )
    new, a, n = _trimmed(current)
    old, b, m = _trimmed(baseline)
    difference, error, freedom = new - old, math.sqrt(a + b), float(n + m - 2)
    if error < _LEAST_ERROR:
        error = _LEAST_ERROR
    else:
        freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
    t = scipy.stats.t(freedom)
    half = float(t.ppf(0.975)) * error
    ratio = Interval(math.exp(difference), math.exp(difference - half), math.exp(difference + half))
    below = float(t.cdf(difference / error))
    return Change(ratio, below, float(t.sf(difference / error)), error, freedom)


def _trimmed(x: Array) -> tuple[float, float, int]:
    """The mean without the TRIM smallest and largest values, the square of its standard error
    (from the winsorized variance), and how many values are left."""
    n = len(x)
    cut = int(TRIM * n)
    kept = np.sort(x)[cut : n - cut]
    winsorized = np.clip(x, kept[0], kept[-1])
    h = len(kept)
    return float(kept.mean()), float(winsorized.var(ddof=1)) * (n - 1) / (h * (h - 1)), h


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): rejecting where the result is below alpha keeps the
    chance of any false rejection in the family below alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = largest
    return adjusted


def processes_needed(processes: int, half_width: float, wanted: float) -> int:
    """How many processes on each side would narrow an interval from `half_width` to `wanted`:
    a standard error shrinks with the square root of their number."""
    return max(processes + 1, math.ceil(processes * (half_width / wanted) ** 2))


def _resampled(samples: Array, resamples: int, seed: int) -> tuple[Indices, Indices]:
    """Indices (resamples, processes, rounds): processes drawn first, rounds within each next."""
    processes, rounds = samples.shape
    rng = np.random.default_rng(seed)
    which = rng.integers(0, processes, (resamples, processes, 1))
    return which, rng.integers(0, rounds, (resamples, processes, rounds))


def _interval(value: float, estimates: Array) -> Interval:
    low, high = np.percentile(estimates, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def median(samples: Samples, seed: int = 0) -> Interval:
    """The median over all rounds with its 95 % interval by hierarchical bootstrap."""
    x = np.asarray(samples, dtype=np.float64)
    i, j = _resampled(x, RESAMPLES, seed)
    return _interval(float(np.median(x)), np.median(x[i, j], axis=(1, 2)))


def speedup(ours: Samples, sdpa: Samples, seed: int = 0) -> Interval:
    """exp(mean over processes of `log_speedups`) with its 95 % interval by hierarchical bootstrap,
    ours and SDPA's samples of a round drawn together."""
    x = np.log(np.asarray(sdpa, dtype=np.float64)) - np.log(np.asarray(ours, dtype=np.float64))
    i, j = _resampled(x, RESAMPLES, seed)
    estimates = np.exp(np.median(x[i, j], axis=2).mean(axis=1))
    return _interval(float(np.exp(np.median(x, axis=1).mean())), estimates)
