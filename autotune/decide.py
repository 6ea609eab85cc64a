"""Who wins, from the finalists' samples: pure functions, no clock and no device.

A challenger replaces what is in place only if the interval of their paired ratio excludes 1 and the
gain exceeds the noise floor, which is what timing the default against itself shows in the same
rounds. Ties change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flashmoe.autotune.space import SDPA, Candidate
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
    (None if no tile ran), and the noise floor, as a share of the time. `reason` says in one line
    why."""

    winner: Candidate
    base: Candidate
    tile: Candidate | None
    noise: float
    reason: str

    @property
    def changed(self) -> bool:
        return self.winner != self.base


def noise_floor(samples: Samples, default: Candidate) -> float:
    """The largest gain that the default shows over itself: the far end of the interval."""
    ratio = paired_ratio(samples[str(default)], samples[AGAIN], CONFIDENCE)
    return max(ratio.high - 1.0, 1.0 / ratio.low - 1.0)


def speedup(samples: Samples, candidate: Candidate, over: Candidate) -> Interval:
    """How many times faster `candidate` is than `over`, with its 95 % interval."""
    return paired_ratio(samples[str(over)], samples[str(candidate)])


def decide(
    samples: Samples,
    base: Candidate,
    default: Candidate,
    challengers: Sequence[Candidate],
) -> Decision:
    """The winner among `base`, which is in place, and the challengers, SDPA among them.

    `samples` are seconds by candidate name, paired by round, and hold AGAIN. The fastest tile
    must beat base, and SDPA must beat the outcome of that, to be chosen.
    """
    noise = noise_floor(samples, default)
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
        return ratio.low > 1.0 and ratio.value - 1.0 > noise

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
    return Decision(winner, base, best_tile, noise, reason)
