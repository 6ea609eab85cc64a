"""What a search found, trial by trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.measure.stats import Interval
from flashmoe.tiles import Tile

# Why a search ended; others are in words only.
BUDGET_REACHED, TRIALS_REACHED = "--budget reached", "--trials reached"


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one tile: status as in flashmoe.measure.timing, its time over the anchor's
    when ok, the reason when not; `pruned` when a first look showed it clearly behind."""

    tile: Tile
    status: str
    ratio: Interval | None = None
    reason: str = ""
    pruned: bool = False


@dataclass(frozen=True, slots=True)
class Search:
    """The trials in the order of their first look, the contenders fastest first, which sampler
    walked a space of how many tiles, what a sample costs on the clock, why the search ended, the
    study's name, (seconds, value) of every trial as it was told, how many of the trials are this
    run's own (the others were found before or elsewhere), and what it took."""

    trials: tuple[Trial, ...]
    contenders: tuple[Candidate, ...]
    sampler: str
    space: int
    sample_seconds: float = 0.0
    ended: str = ""
    study: str = ""
    told: tuple[tuple[float, float], ...] = ()
    importances: dict[str, float] = field(default_factory=dict)
    tried: int = 0
    seconds: float = 0.0


def best_so_far(trials: Sequence[Trial]) -> str:
    """The fastest trial, with how its time compares with the default's; empty without any."""
    timed = [(trial.ratio.value, trial) for trial in trials if trial.ratio is not None]
    if not timed:
        return ""
    _, best = min(timed, key=lambda pair: pair[0])
    assert best.ratio is not None
    ratio = best.ratio
    return f"best {best.tile} {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of the default"
