"""How much a winner's neighbours lose: what each axis is worth, from what was measured."""

from __future__ import annotations

from dataclasses import dataclass, fields

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
        others = [t for t in ratios if _same_but(t, best, axis)]
        value = getattr(best, axis)
        below = [t for t in others if getattr(t, axis) < value]
        above = [t for t in others if getattr(t, axis) > value]
        nearest = [max(below, key=lambda t: getattr(t, axis))] if below else []
        nearest += [min(above, key=lambda t: getattr(t, axis))] if above else []
        for tile in nearest:
            ratio = ratios[tile]
            loss = ratio.value / mine.value - 1 if ratio is not None and mine is not None else None
            found.append(Step(axis, tile, loss))
    return found


def best_tile(result: Result) -> Tile | None:
    """The winner's tile, or the best one where SDPA won."""
    if result.best is not None and result.best.tile is not None:
        return result.best.tile
    return Tile.parse(result.tile_with_lse) if result.tile_with_lse else None


def _same_but(tile: Tile, other: Tile, axis: str) -> bool:
    if getattr(tile, axis) == getattr(other, axis) or tile.kernel != other.kernel:
        return False
    names = [field.name for field in fields(Tile) if field.name != axis]
    return all(getattr(tile, name) == getattr(other, name) for name in names)
