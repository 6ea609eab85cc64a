"""A tile as a line of csrc/instances, the lists of what is compiled ahead of time."""

from __future__ import annotations

from flashmoe.tiles import Tile, instance_head_dim, sm90_head_dim

# The columns behind the head dimension, as the head of KERNEL.txt names them.
COLUMNS = {
    "sm80": ("block_m", "block_n", "num_stages", "num_warps"),
    "sm90": (
        *("block_m", "block_n", "num_stages", "q_stages"),
        *("pingpong", "q_in_registers", "exp2_fma", "ctas_per_sm", "serial"),
    ),
}


def head_dim_of(kernel: str, head_dim: int) -> int:
    """The head dimension of the instance that runs `head_dim`."""
    return sm90_head_dim(head_dim) if kernel == "sm90" else instance_head_dim(head_dim)


def line(head_dim: int, tile: Tile) -> str:
    """The tile's line; `head_dim` is the instance's."""
    return " ".join(str(int(x)) for x in (head_dim, *_values(tile)))


def _values(tile: Tile) -> list[int]:
    return [int(getattr(tile, name)) for name in COLUMNS[tile.kernel]]
