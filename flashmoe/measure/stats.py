"""Intervals for medians and for ratios of times. Pure functions of samples.

Of one process the rounds are resampled. Of several, seconds[process][round], the process is the
unit that varies (allocation, clocks, code placement): however many rounds one has, it says nothing
about the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

RESAMPLES = 2000
# How far a ratio of times is assumed to lie from one process to the next, as a standard deviation
# of its logarithm, with what it adds in seconds, and how many degrees of freedom that is worth: two
# processes alone hardly tell. Of 26 tiles beside the default on an H200, three processes each, it
# was 0.06 to 0.13 % from 100 us on, which rounds explain for the most part, and about 0.1 us below
# (benchmarks/results/tuned-nvidia-h200.json).
_ASSUMED_SPREAD, _ASSUMED_SECONDS, _ASSUMED_FREEDOM = 0.002, 1e-7, 3
# Of a normal distribution: the distance of its quartiles in standard deviations, and the standard
# error of its median as a multiple of its mean's.
_QUARTILES, _MEDIAN_ERROR = 2 * float(special.ndtri(0.75)), math.sqrt(math.pi / 2)
# Logarithm of a ratio beyond which a float does not hold it or its inverse.
_MOST_LOG = 700.0

Processes = Sequence[Sequence[float]]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate with its confidence interval."""

    value: float
    low: float
    high: float

    def excludes(self, x: float) -> bool:
        return x < self.low or x > self.high

    def above(self, other: Interval) -> bool:
        """Whether it lies above all of the other."""
        return self.low > other.high

    def map(self, function: Callable[[float], float]) -> Interval:
        """Of what an increasing function makes of the value."""
        return Interval(*(function(x) for x in self.to_json()))

    def to_json(self) -> list[float]:
        return [self.value, self.low, self.high]


def _bounds(estimates: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(estimates, [tail, 100 - tail])
    return float(low), float(high)


def median_interval(
    samples: Sequence[float], confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The median of `samples` with its percentile-bootstrap interval."""
    x = _checked("samples", samples)
    index = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    low, high = _bounds(np.median(x[index], axis=1), confidence)
    return Interval(float(np.median(x)), low, high)


def paired_ratio(
    numerator: Sequence[float],
    denominator: Sequence[float],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """median(numerator) / median(denominator) with a bootstrap interval over rounds: sample i of
    both was taken in the same round, so rounds are resampled together and drift cancels.

    The speed-up of `a` over `b` is paired_ratio(times_of_b, times_of_a).
    """
    x, y = _paired(numerator, denominator)
    index = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    estimates = np.median(x[index], axis=1) / np.median(y[index], axis=1)
    low, high = _bounds(estimates, confidence)
    return Interval(float(np.median(x) / np.median(y)), low, high)


def median_by_process(samples: Processes, confidence: float = 0.95) -> Interval:
    """The geometric mean of the processes' medians of `samples`[process][round], with the interval
    of ratio_by_process."""
    return _by_process([np.log(_checked("samples", x)) for x in samples], samples, confidence)


def ratio_by_process(
    numerator: Processes, denominator: Processes, confidence: float = 0.95
) -> Interval:
    """The geometric mean of the processes' median ratios; `numerator` and `denominator` are
    seconds[process][round], paired by round.

    The interval is a moderated t-test's (Smyth 2004, "Linear models and empirical Bayes methods"):
    the variance between processes is averaged with an assumed one, by degrees of freedom. So it
    holds for one process, too, and every further one tightens it.
    """
    pairs = [_paired(x, y) for x, y in zip(numerator, denominator, strict=True)]
    logs = [np.log(x) - np.log(y) for x, y in pairs]
    return _by_process(logs, [*numerator, *denominator], confidence)


def _by_process(logs: Sequence[Array], times: Processes, confidence: float) -> Interval:
    """Of the processes' medians of `logs`, which are of these times."""
    if not logs:
        raise ValueError("samples must be of at least 1 process, got none")
    medians = np.array([np.median(x) for x in logs])
    # What the rounds of one process leave open.
    errors = np.array([_MEDIAN_ERROR * spread(x) / math.sqrt(len(x)) for x in logs])
    seconds = float(np.median(np.concatenate([*times])))
    assumed = _ASSUMED_SPREAD**2 + (_ASSUMED_SECONDS / seconds) ** 2 + np.mean(errors**2)
    mean = float(medians.mean())
    freedom = _ASSUMED_FREEDOM + len(logs) - 1
    variance = (_ASSUMED_FREEDOM * assumed + np.sum((medians - mean) ** 2)) / freedom
    half = float(special.stdtrit(freedom, (1 + confidence) / 2)) * math.sqrt(variance / len(logs))
    return Interval(*(factor(x) for x in (mean, mean - half, mean + half)))


def factor(logarithm: float) -> float:
    """Its exponential, as far as a float holds that: a few processes that differ by orders of
    magnitude bound nothing."""
    return math.exp(min(max(logarithm, -_MOST_LOG), _MOST_LOG))


def spread(x: Array) -> float:
    """The standard deviation of a normal distribution with the quartiles of `x`."""
    low, high = np.quantile(x, (0.25, 0.75))
    return float(high - low) / _QUARTILES


def _paired(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[Array, Array]:
    x, y = _checked("numerator", numerator), _checked("denominator", denominator)
    if len(x) != len(y):
        raise ValueError(
            f"numerator and denominator must be paired by round, got {len(x)} and {len(y)} samples"
        )
    return x, y


def _checked(name: str, samples: Sequence[float]) -> Array:
    x = np.asarray(samples, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} must be a non-empty sequence of times, got shape {x.shape}")
    if not np.isfinite(x).all() or (x <= 0).any():
        raise ValueError(f"{name} must be finite and positive times")
    return x
