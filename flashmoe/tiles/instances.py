"""A tile as a line of csrc/instances, the lists of what is compiled ahead of time."""

from __future__ import annotations

from flashmoe.spec.problem import Problem
from flashmoe.tiles import PLAIN, Tile, Variant, columns, instance_head_dim, sm90_head_dim

# The lists that it writes lines of: their columns behind the head dimension.
COLUMNS = {kernel: columns(kernel) for kernel in ("sm80", "sm90")}


def line(head_dim: int, tile: Tile, variant: Variant = PLAIN) -> str:
    """The tile's line; `head_dim` is the instance's."""
    return " ".join([*(str(int(x)) for x in (head_dim, *_values(tile))), *variant.names])


def line_of(problem: Problem, tile: Tile) -> str:
    """The line of the instance that runs a tile for a problem."""
    if tile.kernel == "sm90":
        return line(sm90_head_dim(problem.head_dim), tile, Variant.of(problem))
    # The other kernel decides at run time what variants are for, and has one head_dim for all.
    return line(instance_head_dim(problem.padded_dim), tile)


def _values(tile: Tile) -> list[int]:
    return [int(getattr(tile, name)) for name in COLUMNS[tile.kernel]]
