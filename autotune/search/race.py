"""Racing: few samples first, more only for candidates that are not clearly behind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.running.runner import Bench
from flashmoe.autotune.search.typical import Typical
from flashmoe.measure.stats import Interval, ratio_by_process
from flashmoe.measure.timing import Measurement

_ANCHOR = "anchor"


# A candidate is clearly behind when its whole interval lies above the fastest's, and by this much:
# intervals of a first look's few samples are too narrow.
_MARGIN = 0.02


class AnchorFailed(RuntimeError):
    """The candidate that all others are compared with stopped working."""


class Race:
    """Samples of every candidate, each paired with one of the anchor from the same round: ratios
    to the anchor are comparable across looks, times are not."""

    def __init__(self, bench: Bench, anchor: Candidate) -> None:
        self._bench = bench
        self._anchor = anchor
        # By the process that took them: Bench.process, below 0 where that is another's.
        self._pairs: dict[Candidate, dict[int, list[tuple[float, float]]]] = {}
        # Times over the anchor's.
        self.ratios: dict[Candidate, Interval] = {}
        # What one costs on the clock, with what surrounds it.
        self.sample = Typical()

    def cost(self, candidates: int, rounds: int) -> float:
        """Seconds that a look at so many candidates takes, the anchor and the warm-up included."""
        return (candidates + 1) * (rounds + 1) * self.sample.seconds

    def look(
        self, candidates: Sequence[Candidate], rounds: int, max_seconds: float
    ) -> dict[Candidate, Measurement]:
        """Measure the candidates and the anchor together; a candidate that fails is out."""
        rivals = {str(candidate): candidate for candidate in candidates}
        rivals.pop(str(self._anchor), None)
        start = self._bench.now()
        measured = self._bench.measure(
            {_ANCHOR: self._anchor, **rivals},
            rounds=rounds,
            warmup=1,
            max_seconds=max(max_seconds, 0.0),
        )
        anchor = measured.pop(_ANCHOR)
        if anchor.status != "ok":
            raise AnchorFailed(f"{self._anchor}: {anchor.reason}")
        taken = sum(len(m.samples) + 1 for m in measured.values()) + len(anchor.samples) + 1
        self.sample.add((self._bench.now() - start) / taken)
        results = {rivals[name]: measurement for name, measurement in measured.items()}
        if self._anchor in candidates:
            results[self._anchor] = anchor
        for candidate, measurement in results.items():
            self._add(candidate, measurement, anchor, self._bench.process)
        return results

    def samples(self, candidate: Candidate) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Seconds of the candidate, and of the anchor in the same rounds."""
        taken = self._pairs[candidate]
        times, anchor_times = zip(*chain(*taken.values()), strict=True)
        return times, anchor_times

    def recall(
        self, candidate: Candidate, samples: Sequence[float], anchor: Sequence[float]
    ) -> None:
        """Take over samples that another process, or an earlier run, has taken."""
        mine, theirs = Measurement("ok", tuple(samples)), Measurement("ok", tuple(anchor))
        self._add(candidate, mine, theirs, -1 - len(self._pairs.get(candidate, ())))

    def behind(self, candidate: Candidate) -> bool:
        """Whether it is clearly behind the fastest so far."""
        best = min(self.ratios.values(), key=lambda ratio: ratio.value)
        ratio = self.ratios[candidate]
        return ratio.above(best) and ratio.value > best.value * (1 + _MARGIN)

    def contenders(self, limit: int) -> list[Candidate]:
        """At most `limit` candidates, fastest first, without those clearly behind the fastest:
        whose whole interval lies above the fastest's."""
        ranked = self.ranked()
        if not ranked:
            return []
        fastest = self.ratios[ranked[0]]
        return [c for c in ranked if not self.ratios[c].above(fastest)][:limit]

    def ranked(self) -> list[Candidate]:
        """All that were timed, fastest first."""
        return sorted(self.ratios, key=lambda candidate: self.ratios[candidate].value)

    def _add(
        self, candidate: Candidate, measurement: Measurement, anchor: Measurement, process: int
    ) -> None:
        if measurement.status != "ok":
            self._pairs.pop(candidate, None)
            self.ratios.pop(candidate, None)
            return
        taken = self._pairs.setdefault(candidate, {})
        pairs = zip(measurement.samples, anchor.samples, strict=True)
        taken.setdefault(process, []).extend(pairs)
        times, anchor_times = zip(*(zip(*x, strict=True) for x in taken.values()), strict=True)
        self.ratios[candidate] = ratio_by_process(times, anchor_times)
