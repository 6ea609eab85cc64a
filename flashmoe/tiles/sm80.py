"""What is legal for the mma.sync kernel; csrc/forward/sm80/tile.h asserts the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashmoe.spec.problem import Problem

if TYPE_CHECKING:
    from flashmoe.machine.device import Arch
    from flashmoe.tiles.tile import Tile

# Head dimensions that the sm80 kernel is instantiated for; others are zero-filled to the next one.
SM80_HEAD_DIMS = (32, 64, 96, 128, 192, 256)
# Registers that the float32 fragments of S and O may take of a thread's 255 before ptxas spills.
_FRAGMENT_REGISTERS = 208


def instance_head_dim(head_dim: int) -> int:
    """The head dimension of the sm80 instance that runs `head_dim`."""
    return next(d for d in SM80_HEAD_DIMS if d >= head_dim)


def sm80_smem_bytes(tile: Tile, head_dim: int) -> int:
    """Shared memory of the sm80 kernel: Q, and num_stages buffers each of K and V, 16-bit."""
    return 2 * head_dim * (tile.block_m + 2 * tile.num_stages * tile.block_n)


def rules(tile: Tile, arch: Arch, problem: Problem) -> Iterator[str]:
    if arch.kind != "cuda" or arch.capability < (8, 0):
        yield f"the sm80 kernel needs compute capability 8.0, got {arch.capability} ({arch.kind})"
    if problem.direction != "fwd":
        yield "the sm80 kernel has no backward"
    if problem.dtype not in ("float16", "bfloat16"):
        yield f"dtype must be float16 or bfloat16 for the sm80 kernel, got {problem.dtype}"
    if tile.num_warps not in (4, 8):
        yield f"num_warps must be 4 or 8, got {tile.num_warps}"
        return
    rows = 16 * tile.num_warps
    if tile.block_m % rows or not rows <= tile.block_m <= 256:
        yield f"block_m must be a multiple of 16 * num_warps = {rows} up to 256, got {tile.block_m}"
    if tile.block_n % 16 or not 16 <= tile.block_n <= 256:
        yield f"block_n must be a multiple of 16 from 16 to 256, got {tile.block_n}"
    if not 1 <= tile.num_stages <= 4:
        yield f"num_stages must be from 1 to 4, got {tile.num_stages}"
    head_dim = instance_head_dim(problem.padded_dim)
    smem = sm80_smem_bytes(tile, head_dim)
    if smem > arch.smem_per_block:
        yield f"shared memory of {smem} bytes exceeds the {arch.smem_per_block} of {arch.name}"
    fragments = tile.block_m // rows * (tile.block_n // 2 + head_dim // 2)
    if fragments > _FRAGMENT_REGISTERS:
        yield (
            f"registers: fragments of S and O take {fragments} a thread, at most "
            f"{_FRAGMENT_REGISTERS} fit without spills"
        )
