"""Who wins, from the finalists' samples: pure functions, no clock and no device.

A challenger replaces what is in place only if the interval of their ratio, with the process as the
unit, excludes 1, and the gain exceeds the noise floor: MIN_GAIN, and what timing the default
against itself shows in the same rounds. Ties change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flashmoe.autotune.running.candidate import SDPA, Candidate
from flashmoe.measure.stats import Interval, Processes, ratio_by_process

# The name under which the default is timed a second time in every round.
AGAIN = "default again"
# Medians of fewer rounds than this, all processes together, say nothing.
MIN_ROUNDS = 8
# What differs by less is not different.
MIN_GAIN = 0.005
CONFIDENCE = 0.95

# Seconds[process][round] by candidate name, paired by round.
Samples = Mapping[str, Processes]


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


def noise_floor(samples: Samples, default: Candidate) -> float:
    """The largest gain that the default may show over itself, and MIN_GAIN at least."""
    ratio = ratio_by_process(samples[str(default)], samples[AGAIN], CONFIDENCE)
    return max(ratio.high - 1.0, 1.0 / ratio.low - 1.0, MIN_GAIN)


def speedup(
    samples: Samples, candidate: Candidate, over: Candidate, confidence: float = CONFIDENCE
) -> Interval:
    """How many times faster `candidate` is than `over`."""
    return ratio_by_process(samples[str(over)], samples[str(candidate)], confidence)


def rounds_of(samples: Samples) -> int:
    """Rounds of all processes together."""
    return sum(len(process) for process in samples[AGAIN])


def decide(
    samples: Samples, base: Candidate, default: Candidate, challengers: Sequence[Candidate]
) -> Decision:
    """The winner among `base`, which is in place, and the challengers, SDPA among them.

    `samples` hold AGAIN. The fastest tile must beat base, and SDPA must beat the outcome of that,
    to be chosen.
    """
    noise = noise_floor(samples, default)
    rounds = rounds_of(samples)
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
        ratio = speedup(samples, challenger, holder, confidence)
        return ratio.low > 1.0 and ratio.value - 1.0 > noise

    gains = {candidate: speedup(samples, candidate, base).value for candidate in everyone}
    fastest = max(tiles, key=gains.__getitem__, default=None)
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
    best_other = max(rivals, key=gains.__getitem__)
    gain = speedup(samples, winner if winner != base else best_other, base)
    interval = f"{gain.value:.3f}x [{gain.low:.3f}, {gain.high:.3f}]"
    if winner != base:
        reason = f"{winner} is {interval} as fast as {base}; noise floor {noise:.1%}"
    else:
        reason = f"nothing beats {base}: best other {interval}; noise floor {noise:.1%}"
    second = max((c for c in everyone if c != winner), key=gains.__getitem__, default=None)
    return Decision(winner, base, best_tile, noise, reason, second)
