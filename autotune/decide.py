"""Who wins, from the finalists' samples: pure functions, no clock and no device.

A challenger replaces what is in place only if the interval of their paired ratio excludes 1 and the
gain exceeds the noise floor, which is what timing the default against itself shows in the same
rounds. Ties change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.autotune.candidate import SDPA, Candidate
from flashmoe.stats import Interval, paired_ratio

# The name under which the default is timed a second time in every round.
AGAIN = "default again"
# A bootstrap over fewer rounds than this finds significance in noise.
MIN_ROUNDS = 8
CONFIDENCE = 0.95

Samples = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Decision:
    """The winner, what it replaced (itself if nothing changed), the best choice that has a tile
    (None if no tile ran), the noise floor, as a share of the time, and the fastest but the winner
    (None if there was no other). `reason` says in one line why."""

    winner: Candidate
    base: Candidate
    tile: Candidate | None
    noise: float
    reason: str
    runner_up: Candidate | None = None

    @property
    def changed(self) -> bool:
        return self.winner != self.base


def noise_floor(samples: Samples, default: Candidate, parts: Sequence[Samples] = ()) -> float:
    """The largest gain that the default shows over itself: the far end of the interval, and in any
    single process, whose samples are `parts`, the point."""
    ratio = paired_ratio(samples[str(default)], samples[AGAIN], CONFIDENCE)
    points = [_gain(part, AGAIN, str(default)) for part in parts]
    return max(ratio.high - 1.0, 1.0 / ratio.low - 1.0, *map(abs, points))


def _gain(samples: Samples, name: str, over: str) -> float:
    return float(np.median(samples[over]) / np.median(samples[name])) - 1.0


def speedup(samples: Samples, candidate: Candidate, over: Candidate) -> Interval:
    """How many times faster `candidate` is than `over`, with its 95 % interval."""
    return paired_ratio(samples[str(over)], samples[str(candidate)])


def decide(
    samples: Samples,
    base: Candidate,
    default: Candidate,
    challengers: Sequence[Candidate],
    parts: Sequence[Samples] = (),
) -> Decision:
    """The winner among `base`, which is in place, and the challengers, SDPA among them.

    `samples` are seconds by candidate name, paired by round, and hold AGAIN. The fastest tile
    must beat base, and SDPA must beat the outcome of that, to be chosen. `parts` are the same
    samples by process: who wins must be faster in every one of them.
    """
    noise = noise_floor(samples, default, parts)
    rounds = len(samples[str(base)])
    everyone = dict.fromkeys([base, default, *challengers])
    rivals = [candidate for candidate in everyone if candidate != base]
    tiles = [candidate for candidate in everyone if candidate != SDPA]
    in_place = next((c for c in (base, default) if c != SDPA), None)
    if rounds < MIN_ROUNDS:
        reason = f"{rounds} rounds are too few to change anything (at least {MIN_ROUNDS})"
        return Decision(base, base, in_place, noise, reason)
    if not rivals:
        return Decision(base, base, in_place, noise, "nothing else was left to compare")

    def beats(challenger: Candidate, holder: Candidate, confidence: float) -> bool:
        ratio = paired_ratio(samples[str(holder)], samples[str(challenger)], confidence)
        everywhere = all(_gain(part, str(challenger), str(holder)) > 0 for part in parts)
        return ratio.low > 1.0 and ratio.value - 1.0 > noise and everywhere

    # speedup(base, c) is smallest for the fastest.
    fastest = min(tiles, key=lambda c: speedup(samples, base, c).value, default=None)
    # Each tile had its chance to look fast by luck: the confidence is shared among them.
    shared = 1 - (1 - CONFIDENCE) / max(len(tiles), 1)
    best_tile = in_place
    if fastest is not None and (in_place is None or beats(fastest, in_place, shared)):
        best_tile = fastest
    winner = base
    if best_tile is not None and best_tile != base and beats(best_tile, base, shared):
        winner = best_tile
    if SDPA in rivals and beats(SDPA, winner, CONFIDENCE):
        winner = SDPA
    best_other = min(rivals, key=lambda c: speedup(samples, base, c).value)
    gain = speedup(samples, winner if winner != base else best_other, base)
    interval = f"{gain.value:.3f}x [{gain.low:.3f}, {gain.high:.3f}]"
    if winner != base:
        reason = f"{winner} is {interval} as fast as {base}; noise floor {noise:.1%}"
    else:
        reason = f"nothing beats {base}: best other {interval}; noise floor {noise:.1%}"
    others = [candidate for candidate in everyone if candidate != winner]
    second = min(others, key=lambda c: float(np.median(samples[str(c)])), default=None)
    return Decision(winner, base, best_tile, noise, reason, second)
