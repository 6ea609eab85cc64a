"""What is legal for the decode kernel; csrc/decode/tile.h asserts the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashmoe.spec.problem import Problem

if TYPE_CHECKING:
    from flashmoe.machine.device import Arch
    from flashmoe.tiles.tile import Tile

# Head dimensions that the decode kernel is instantiated for; others are zero-filled to the next.
DECODE_HEAD_DIMS = (64, 96, 128, 256)
MOST_BLOCKS = 1 << 20
_ROWS = (16, 32, 64)
_WARPS = (2, 4, 8, 16)
# Results that are merged at once, each with a weight for each row (csrc/decode/split.h).
_MERGE_ALL = 40
# Registers of a thread, and those that are not for fragments of S and O.
_REGISTERS = 255
_OTHER_REGISTERS = 64


def decode_smem_bytes(tile: Tile, head_dim: int) -> int:
    """Shared memory of the decode kernel: Q, and when it has been read what is merged; and a ring
    of num_stages buffers of K and V, 16-bit, for each warp."""
    merge = tile.block_m * (_MERGE_ALL * 4 + 8) + 16
    front = -(-max(2 * tile.block_m * head_dim, merge) // 128) * 128
    return front + tile.num_stages * 4 * tile.block_n * head_dim


def rules(tile: Tile, arch: Arch, problem: Problem) -> Iterator[str]:
    if arch.kind != "cuda" or arch.capability < (8, 0):
        yield f"the decode kernel needs compute capability 8.0, got {arch.capability} ({arch.kind})"
    if problem.direction != "fwd":
        yield "the decode kernel has no backward"
    if problem.dtype not in ("float16", "bfloat16"):
        yield f"dtype must be float16 or bfloat16 for the decode kernel, got {problem.dtype}"
    if tile.block_m not in _ROWS:
        yield f"block_m must be 16, 32 or 64, got {tile.block_m}"
        return
    if tile.num_warps not in _WARPS:
        yield f"num_warps must be 2, 4, 8 or 16, got {tile.num_warps}"
        return
    warp_n = tile.block_n // tile.num_warps
    if tile.block_n % tile.num_warps or warp_n not in (16, 32):
        yield f"block_n must be 16 or 32 for each of {tile.num_warps} warps, got {tile.block_n}"
        return
    if not 1 <= tile.num_stages <= 8:
        yield f"num_stages must be from 1 to 8, got {tile.num_stages}"
    if not 0 <= tile.split_blocks <= MOST_BLOCKS:
        yield f"split_blocks must be from 0 to {MOST_BLOCKS}, got {tile.split_blocks}"
    if tile.ctas_per_sm < 1 or tile.num_warps * tile.ctas_per_sm > 32:
        yield f"ctas_per_sm must be from 1 to 32 / num_warps, got {tile.ctas_per_sm}"
        return
    head_dim = next(d for d in DECODE_HEAD_DIMS if d >= problem.padded_dim)
    smem = decode_smem_bytes(tile, head_dim)
    if smem > arch.smem_per_block:
        yield f"shared memory of {smem} bytes exceeds the {arch.smem_per_block} of {arch.name}"
    ring, results = tile.num_stages * 4 * warp_n * head_dim, tile.block_m * (head_dim * 4 + 40)
    if ring < results:
        yield f"the ring of a warp has {ring} bytes, of which its O needs {results} in the end"
    registers = min(_REGISTERS, 65536 // (32 * tile.num_warps * tile.ctas_per_sm))
    fragments = tile.block_m // 16 * (warp_n // 2 + head_dim // 2)
    if fragments > registers - _OTHER_REGISTERS:
        yield (
            f"registers: fragments of S and O take {fragments} a thread, at most "
            f"{registers - _OTHER_REGISTERS} fit"
        )
