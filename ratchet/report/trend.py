"""Where a time series of speedups takes another level. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.measure.stats import Interval
from flashmoe.ratchet.report.svg import Point
from flashmoe.ratchet.results.history import Entry

# A change has to be this many standard errors, and this large as a logarithm, to be one. (Every run
# is a candidate, so the usual 2 would find one in every series.)
_ERRORS = 5.0
_LEAST = 0.01


@dataclass(frozen=True, slots=True)
class Series:
    """One case over time; `breaks` are points that begin another environment, `changes` points that
    begin another level within one."""

    name: str
    entries: tuple[Entry, ...]
    breaks: tuple[int, ...]
    changes: tuple[int, ...]

    def values(self) -> list[Interval]:
        return [one.speedups[self.name] for one in self.entries]

    def points(self) -> list[Point]:
        segments = np.searchsorted(self.breaks, range(len(self.entries)), side="right")
        points = []
        for i, (one, value) in enumerate(zip(self.entries, self.values(), strict=True)):
            label = f"{one.started[:16]} {one.commit[:10]}"
            point = Point(label, value, int(segments[i]), i in self.changes)
            points.append(point)
        return points


_TICKS = "▁▂▃▄▅▆▇█"
_MOST_TICKS = 30


def sparklines(entries: Sequence[Entry], environment: tuple[object, ...]) -> dict[str, str]:
    """For each case its latest speedups in this environment, lowest to highest, as text."""
    same = [one for one in entries if one.environment == environment][-_MOST_TICKS:]
    return {
        series.name: f"{sparkline(values)} {values[0]:.2f} to {values[-1]:.2f}, {len(values)} runs"
        for series in all_series(same)
        if len(values := [value.value for value in series.values()]) > 1
    }


def sparkline(values: Sequence[float]) -> str:
    """Values that differ by less than _LEAST of each other make a flat line, not a mountain."""
    low, high = min(values), max(values)
    span = max(high - low, _LEAST * high)
    top = len(_TICKS) - 1
    return "".join(_TICKS[round(top * (value - low) / span)] for value in values)


def all_series(entries: Sequence[Entry]) -> list[Series]:
    """One of each case that any entry has, in the order in which they first appear."""
    names = dict.fromkeys(name for one in entries for name in one.speedups)
    return [_series(name, [one for one in entries if name in one.speedups]) for name in names]


def _series(name: str, entries: Sequence[Entry]) -> Series:
    breaks = [
        i for i in range(1, len(entries)) if entries[i].environment != entries[i - 1].environment
    ]
    changes: list[int] = []
    for start, end in zip([0, *breaks], [*breaks, len(entries)], strict=True):
        part = [one.speedups[name] for one in entries[start:end]]
        changes += [start + i for i in change_points(part)]
    return Series(name, tuple(entries), tuple(breaks), tuple(changes))


def change_points(values: Sequence[Interval]) -> list[int]:
    """Indices at which a new level begins: binary segmentation (Scott and Knott 1974), splitting
    where the means of both sides differ most in standard errors, as long as that is a change. A run
    varies by what its interval says, or by what successive runs differ, if that is more."""
    x = np.log([v.value for v in values])
    if len(x) < 2:
        return []
    within = float(np.median([math.log(v.high / v.low) for v in values])) / (2 * 1.96)
    # The median over successive differences does not see the few that are changes.
    between = 1.4826 * float(np.median(np.abs(np.diff(x)))) / math.sqrt(2) if len(x) > 4 else 0.0
    return sorted(_split(x, max(within, between, 1e-4), 0))


def _split(x: np.ndarray, noise: float, offset: int) -> list[int]:
    n = len(x)
    if n < 2:
        return []
    k = np.arange(1, n)
    left = np.cumsum(x)[:-1] / k
    right = (x.sum() - np.cumsum(x)[:-1]) / (n - k)
    errors = np.abs(right - left) / (noise * np.sqrt(1 / k + 1 / (n - k)))
    best = int(np.argmax(errors))
    if errors[best] < _ERRORS or abs(right[best] - left[best]) < _LEAST:
        return []
    cut = best + 1
    before, after = _split(x[:cut], noise, offset), _split(x[cut:], noise, offset + cut)
    return [*before, offset + cut, *after]
