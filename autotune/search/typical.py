"""What a step takes, from what it took before."""

from __future__ import annotations

import collections
from statistics import median_low

_KEPT = 7


class Typical:
    """The lower median of the last few times: one that was slow for once counts for nothing."""

    def __init__(self) -> None:
        self._times: collections.deque[float] = collections.deque(maxlen=_KEPT)

    def __len__(self) -> int:
        return len(self._times)

    def add(self, seconds: float) -> None:
        self._times.append(seconds)

    @property
    def seconds(self) -> float:
        """0 where nothing is known."""
        return median_low(self._times) if self._times else 0.0
