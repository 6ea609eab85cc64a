"""What is legal for the Hopper backward kernel; csrc/backward/sm90/tile.h asserts the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashmoe.spec.problem import Problem
from flashmoe.tiles.fields import bounds

if TYPE_CHECKING:
    from flashmoe.machine.device import Arch
    from flashmoe.tiles.tile import Tile

# Head dimensions that the kernel is written for; others are zero-filled to the next one.
SM90_BWD_HEAD_DIMS = (64, 96, 128, 256)


def sm90_bwd_head_dim(head_dim: int) -> int:
    """The head dimension of an sm90_bwd kernel compiled for `head_dim`, zero-filled from there."""
    return next(d for d in SM90_BWD_HEAD_DIMS if d >= head_dim)


def sm90_bwd_smem_bytes(tile: Tile, head_dim: int) -> int:
    """Shared memory of the sm90_bwd kernel: K and V, num_stages buffers of Q and of its rows'
    statistics, do_stages of dO, ds_stages of dS, P where both warpgroups have the same keys, and
    what its warps tell each other."""
    row = 128 * -(-head_dim // 64)
    m, n, stages = tile.block_m, tile.block_n, tile.num_stages
    buffers = row * (2 * n + m * (stages + tile.do_stages))
    products = tile.ds_stages + (n == 64)
    return 256 + buffers + 2 * m * n * products + 8 * m * stages


def rules(tile: Tile, arch: Arch, problem: Problem) -> Iterator[str]:
    if arch.kind != "cuda" or arch.capability[0] != 9:
        yield f"the sm90_bwd kernel needs compute capability 9.x, got {arch.capability}"
    if problem.direction != "bwd":
        yield "the sm90_bwd kernel has no forward"
    if problem.dtype not in ("float16", "bfloat16"):
        yield f"dtype must be float16 or bfloat16 for the sm90_bwd kernel, got {problem.dtype}"
    head_dim = sm90_bwd_head_dim(problem.padded_dim)
    block_m = 128 if head_dim == 64 else 64
    if tile.block_m != block_m:
        yield f"block_m must be {block_m} at head_dim {head_dim}, got {tile.block_m}"
    block_n = 128 if head_dim <= 128 else 64
    if tile.block_n != block_n:
        yield f"block_n must be {block_n} at head_dim {head_dim}, got {tile.block_n}"
    for name in ("num_stages", "do_stages", "ds_stages"):
        low, high = bounds("sm90_bwd", name)
        if name == "ds_stages" and head_dim > 128:
            high = 1
        if not low <= getattr(tile, name) <= high:
            yield f"{name} must be from {low} to {high}, got {getattr(tile, name)}"
    if tile.late_dq and tile.ds_stages != 2:
        yield f"late_dq needs ds_stages 2, got {tile.ds_stages}"
    smem = sm90_bwd_smem_bytes(tile, head_dim)
    if smem > arch.smem_per_block:
        yield f"shared memory of {smem} bytes exceeds the {arch.smem_per_block} of {arch.name}"
