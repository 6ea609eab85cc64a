"""Intervals for medians and for ratios of medians, by bootstrap. Pure functions of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


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
    x, y = _checked("numerator", numerator), _checked("denominator", denominator)
    if len(x) != len(y):
        raise ValueError(
            f"numerator and denominator must be paired by round, got {len(x)} and {len(y)} samples"
        )
    index = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    estimates = np.median(x[index], axis=1) / np.median(y[index], axis=1)
    low, high = _bounds(estimates, confidence)
    return Interval(float(np.median(x) / np.median(y)), low, high)


def _checked(name: str, samples: Sequence[float]) -> np.ndarray:
    x = np.asarray(samples, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} must be a non-empty sequence of times, got shape {x.shape}")
    if not np.isfinite(x).all() or (x <= 0).any():
        raise ValueError(f"{name} must be finite and positive times")
    return x
