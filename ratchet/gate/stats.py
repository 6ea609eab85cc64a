"""Statistics of samples[process][round]: the process is the unit that varies, rounds refine it.

Pure functions; tested alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from flashmoe.measure.stats import Array, Interval, factor, spread

Samples = Sequence[Sequence[float]]
# Of one file: the samples of ours and of SDPA.
Sides = tuple[Samples, Samples]
# Of the processes of one file: the logarithms of SDPA's times and of ours.
Times = tuple[Array, Array]

# Of the processes, at each end.
TRIM = 0.2
MOST_PROCESSES = 200
# Of pairs of same-against-same sides.
_DRAWS = 1000
# Contention that SDPA felt took 16 % or more (`yardstick`); rounds of one state differ by 3 %.
_CALM, _CALM_ROUNDS = 1.1, 4
# Below this a standard error (in log units, so relative) says more about the clock than about us.
_LEAST_ERROR = 1e-5


@dataclass(frozen=True, slots=True)
class Change:
    """current / baseline with its 95 % interval, and one-sided p-values that it is below and above
    1 by chance alone. `error` is the standard error of its logarithm, `freedom` the degrees of
    freedom behind that; `shared` is the part of the error that more processes do not reduce."""

    ratio: Interval
    p_below: float
    p_above: float
    error: float
    freedom: float
    shared: float = 0.0


def medians(samples: Samples) -> Array:
    """Each process's median time."""
    return np.asarray(np.median(np.asarray(samples, dtype=np.float64), axis=1))


def log_times(ours: Samples, sdpa: Samples) -> Times:
    """Each process's logarithms of SDPA's median time and of ours."""
    return np.log(medians(sdpa)), np.log(medians(ours))


def calm_times(current: Sides, baseline: Sides) -> tuple[Times, Times]:
    """`log_times` of both files, from the rounds in which SDPA tells that the machine was as fast
    as it gets: at most _CALM times as long as the fastest tenth of both files' rounds. Processes
    with fewer than _CALM_ROUNDS such rounds are left out. Chosen by SDPA's time alone, and by one
    limit for both, so nothing that a kernel does to its own time decides which rounds count."""
    every = np.concatenate([np.ravel(sdpa) for _, sdpa in (current, baseline)])
    limit = _CALM * float(np.quantile(every, 0.1))
    new, old = (_calm(*side, limit) for side in (current, baseline))
    return new, old


def _calm(ours: Samples, sdpa: Samples, limit: float) -> Times:
    found = []
    for mine, theirs in zip(ours, sdpa, strict=True):
        calm = [i for i, seconds in enumerate(theirs) if seconds <= limit]
        if len(calm) >= min(_CALM_ROUNDS, len(theirs)):
            found.append([float(np.median([side[i] for i in calm])) for side in (theirs, mine)])
    times = np.log(np.asarray(found).reshape(-1, 2))
    return times[:, 0], times[:, 1]


def log_speedups(ours: Samples, sdpa: Samples) -> Array:
    """Each process's median over rounds of log(time of SDPA / time of ours), paired by round."""
    ratios = np.log(np.asarray(sdpa, dtype=np.float64)) - np.log(np.asarray(ours, dtype=np.float64))
    return np.asarray(np.median(ratios, axis=1))


@dataclass(frozen=True, slots=True)
class Slope:
    """How far ours follows SDPA's time when the environment moves both: `value` times as far, in
    logarithms, known with the standard error `error` for movements up to `reach`."""

    value: float
    error: float
    reach: float = 0.0


# Both follow the clock alike; a neighbour on the memory, say, is felt by one of them alone.
_EXPECTED = Slope(1.0, 0.5)


def slope(current: Times, baseline: Times) -> Slope:
    """From how both times vary from process to process within each file: least squares, with an
    _EXPECTED slope that counts for little where the processes of these files tell more. Needs two
    processes on each side."""
    both = current, baseline
    x, y = (np.concatenate([t[side] - t[side].mean() for t in both]) for side in (0, 1))
    across, along = float(x @ x), float(x @ y)
    freedom = max(len(x) - 3, 1)
    left = y - along / across * x if across else y
    noise = max(float(left @ left) / freedom, _LEAST_ERROR**2)
    prior = noise / _EXPECTED.error**2
    value = (along + prior * _EXPECTED.value) / (across + prior)
    error = math.sqrt(noise / (across + prior))
    return Slope(value, error, reach=2 * math.sqrt(across / max(len(x) - 2, 1)))


def at_equal_sdpa(times: Times, by: Slope) -> Array:
    """Log speedups as `log_speedups`, had ours followed SDPA by `by`: what a kernel does to them
    stays, and what moved ours and SDPA unlike each other is taken out."""
    sdpa, ours = times
    return by.value * sdpa - ours


def change_at_equal_sdpa(current: Times, baseline: Times, by: Slope) -> Change:
    """`change` of the speedup between processes that found SDPA equally fast: an analysis of
    covariance, SDPA's time being the covariate and `by` their `slope`. How far SDPA's time itself
    moved adds to the error, as much as the slope is uncertain. What of it exceeds anything that the
    processes of a file show has a cause of its own: it is taken to have the _EXPECTED slope."""
    moved = _trimmed(current[0])[0] - _trimmed(baseline[0])[0]
    beyond = math.copysign(max(abs(moved) - by.reach, 0.0), moved)
    shared = math.hypot(by.error * (moved - beyond), _EXPECTED.error * beyond)
    new = at_equal_sdpa(current, by) + (_EXPECTED.value - by.value) * beyond
    return change(new, at_equal_sdpa(baseline, by), shared=shared)


def change(current: Array, baseline: Array, *, shared: float = 0.0) -> Change:
    """The change between two sets of per-process logarithms, by Yuen's test on trimmed means (Yuen
    1974): Welch's t-test for data in which a few processes, up to TRIM on either side, were hit by
    something else. `shared` is a known standard error besides that of the processes. Needs two
    processes on each side."""
    if min(len(current), len(baseline)) < 2:
        raise ValueError(
            f"change needs at least 2 processes on each side, got {len(current)} and "
            f"{len(baseline)}"
        )
    new, a, n = _trimmed(current)
    old, b, m = _trimmed(baseline)
    difference, own, freedom = new - old, math.sqrt(a + b), float(n + m - 2)
    if own < _LEAST_ERROR:
        own = _LEAST_ERROR
    else:
        freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
    # Of Welch and Satterthwaite's freedom, with that of `shared` infinite.
    error = math.hypot(own, shared)
    freedom *= (error / own) ** 4
    half = _quantile(freedom, 0.975) * error
    ratio = Interval(*(factor(x) for x in (difference, difference - half, difference + half)))
    below, above = (
        float(special.stdtr(freedom, x)) for x in (difference / error, -difference / error)
    )
    return Change(ratio, below, above, error, freedom, shared)


def _quantile(freedom: float, probability: float) -> float:
    """Of Student's t distribution. (scipy.stats.t costs a hundred times as much a call.)"""
    return float(special.stdtrit(freedom, probability))


def _trimmed(x: Array) -> tuple[float, float, int]:
    """The mean without the TRIM smallest and largest values, the square of its standard error
    (from the winsorized variance), and how many values are left."""
    n = len(x)
    kept = _kept(x)
    winsorized = np.clip(x, kept[0], kept[-1])
    h = len(kept)
    return float(kept.mean()), float(winsorized.var(ddof=1)) * (n - 1) / (h * (h - 1)), h


def _kept(x: Array) -> Array:
    """Sorted along the last axis, without the TRIM smallest and largest values."""
    n = x.shape[-1]
    cut = int(TRIM * n)
    return np.asarray(np.sort(x, axis=-1)[..., cut : n - cut])


def rounds_wanted(ours: Sequence[float], sdpa: Sequence[float], error: float) -> int:
    """How many rounds of one process it takes for their median log speedup to have the standard
    error `error`, judged by the spread of these rounds. The median's standard error is that of a
    normal distribution, sqrt(pi / 2) times the mean's."""
    sigma = spread(np.log(np.asarray(sdpa) / np.asarray(ours)))
    return math.ceil(math.pi / 2 * (sigma / error) ** 2)


def half_width(values: Array) -> float:
    """Of the 95 % interval of the trimmed mean; infinite with fewer than two values."""
    if len(values) < 2:
        return math.inf
    _, variance, n = _trimmed(values)
    return _quantile(n - 1, 0.975) * max(math.sqrt(variance), _LEAST_ERROR)


def detectable(change: Change, alpha: float, power: float = 0.95) -> float:
    """The minimum detectable effect, as a logarithm: how large a fall has to be for a one-sided
    test at level `alpha` to see it with probability `power`, given this change's noise."""
    return change.error * _units(change.freedom, alpha, power)


def _units(freedom: float, alpha: float, power: float) -> float:
    return _quantile(freedom, 1 - alpha) + _quantile(freedom, power)


def effect_floor(values: Array, size: int, seed: int = 0) -> float:
    """What same against same shows: the 99th percentile of the change's size between two disjoint
    draws of `size` processes each from `values`, one side's processes, as a logarithm. Of fewer
    than 2 * `size` processes halves are drawn, and the result scaled as a standard error is."""
    drawn = min(size, len(values) // 2)
    if drawn < 1:
        raise ValueError(f"effect_floor needs at least 2 processes, got {len(values)}")
    order = np.random.default_rng(seed).random((_DRAWS, len(values))).argsort(axis=1)
    shuffled = np.asarray(values)[order]
    a, b = (_kept(x).mean(axis=1) for x in (shuffled[:, :drawn], shuffled[:, -drawn:]))
    return float(np.percentile(np.abs(a - b), 99)) * math.sqrt(drawn / size)


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


def processes_needed(processes: int, change: Change, wanted: float, alpha: float) -> int:
    """How many processes on each side would make an effect of `wanted` (a logarithm) detectable
    by a test at level `alpha`, with the noise that `processes` on each side showed. At most
    MOST_PROCESSES, which then means: too noisy for any number one would wait for."""
    freedom = max(change.freedom, 1.0)
    own = math.sqrt(change.error**2 - change.shared**2)
    for more in range(processes + 1, MOST_PROCESSES):
        error = math.hypot(own * math.sqrt(processes / more), change.shared)
        if error * _units(freedom * more / processes, alpha, 0.95) <= wanted:
            return more
    return MOST_PROCESSES
