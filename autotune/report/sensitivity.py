"""How much a winner's neighbours lose: what each axis is worth, from what was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter

from flashmoe.autotune.schedule.result import Result
from flashmoe.tiles import Tile

AXES = ("block_m", "block_n", "num_stages")


@dataclass(frozen=True, slots=True)
class Step:
    """Moving one step along `axis` from the best tile to `tile` makes it slower by `loss` (0.1: by
    10 %; negative: faster in the search, but not in the final). None: not measured."""

    axis: str
    tile: Tile
    loss: float | None


def steps(result: Result) -> list[Step]:
    """The measured neighbours of the best tile: along each axis, the next smaller and larger value
    with all else equal."""
    best = best_tile(result)
    if best is None or result.search is None:
        return []
    ratios = {trial.tile: trial.ratio for trial in result.search.trials}
    mine = ratios.get(best)
    found: list[Step] = []
    for axis in AXES:
        value = attrgetter(axis)
        # All that differ along this axis alone.
        others = [t for t in ratios if t != best and replace(t, **{axis: value(best)}) == best]
        below = sorted((t for t in others if value(t) < value(best)), key=value)
        above = sorted((t for t in others if value(t) > value(best)), key=value)
        for tile in (*below[-1:], *above[:1]):
            ratio = ratios[tile]
            loss = ratio.value / mine.value - 1 if ratio is not None and mine is not None else None
            found.append(Step(axis, tile, loss))
    return found


def best_tile(result: Result) -> Tile | None:
    """The winner's tile, or the best one where SDPA won."""
    if result.best is not None and result.best.tile is not None:
        return result.best.tile
    return Tile.parse(result.tile_with_lse) if result.tile_with_lse else None
