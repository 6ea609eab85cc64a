"""What is legal for the Hopper kernel; csrc/forward/sm90/tile.h asserts the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashmoe.spec.problem import Problem
from flashmoe.tiles.fields import axes, bounds

if TYPE_CHECKING:
    from flashmoe.machine.device import Arch
    from flashmoe.tiles.tile import Tile

# Registers that a thread needs besides its fragments, of what setmaxnreg gives a consumer; and more
# with the exponential's polynomial, long rows of O, or two buffers of Q, once again with the last
# two. benchmarks/hopper/check_tiles.py holds these and the next against the compiler.
_OTHER_REGISTERS, _MORE_REGISTERS = 28, 4
# What ptxas asks for besides the accumulators to compile one wgmma at all.
_WGMMA_REGISTERS = 30


def sm90_head_dim(head_dim: int) -> int:
    """The head dimension of an sm90 kernel compiled for `head_dim`: a multiple of 16, zero-filled
    from head_dim on."""
    return -(-head_dim // 16) * 16


def sm90_smem_bytes(tile: Tile, head_dim: int, head_dim_v: int = 0) -> int:
    """Shared memory of the sm90 kernel: q_stages buffers of Q (of O, where that is wider and leaves
    through one), num_stages each of K and V, 16-bit in panels of 64 columns, and what its warps
    tell each other. head_dim_v: 0 where it is head_dim."""
    k_row, v_row = (128 * -(-d // 64) for d in (head_dim, head_dim_v or head_dim))
    q_row = max(k_row, v_row) if tile.q_stages > 1 else k_row
    return (
        512
        + q_row * tile.block_m * tile.q_stages
        + (k_row + v_row) * tile.block_n * tile.num_stages
    )


def sm90_entry_registers(tile: Tile) -> int:
    """Registers of every thread of the sm90 kernel before setmaxnreg."""
    return min(65536 // (128 * (tile.block_m // 64 + 1) * tile.ctas_per_sm) // 8 * 8, 255)


def sm90_registers(tile: Tile, head_dim: int, head_dim_v: int = 0) -> tuple[int, int]:
    """Registers that a consumer thread of the sm90 kernel needs for O, S, P beside it, Q where it
    is kept there, and the rest; and those that setmaxnreg gives it. head_dim_v: 0 where it is
    head_dim."""
    columns = head_dim_v or head_dim
    needed = columns // 2 + tile.block_n // 2 + (0 if tile.serial else tile.block_n // 4)
    long_rows, two_buffers = columns > 128, tile.q_stages > 1
    more = bool(tile.exp2_fma or long_rows or two_buffers) + (long_rows and two_buffers)
    needed += _OTHER_REGISTERS + more * _MORE_REGISTERS
    if tile.q_in_registers:
        needed += head_dim // 4 + 4
    consumers, entry = tile.block_m // 64, sm90_entry_registers(tile)
    producer = 24 if consumers == 2 and tile.q_stages == 1 else 32
    return needed, min(((entry - producer) // consumers + entry) // 8 * 8, 240)


def rules(tile: Tile, arch: Arch, problem: Problem) -> Iterator[str]:
    if arch.kind != "cuda" or arch.capability[0] != 9:
        yield f"the sm90 kernel needs compute capability 9.x, got {arch.capability} ({arch.kind})"
    if problem.direction != "fwd":
        yield "the sm90 kernel has no backward"
    if problem.dtype not in ("float16", "bfloat16"):
        yield f"dtype must be float16 or bfloat16 for the sm90 kernel, got {problem.dtype}"
    bounded = True
    for name in ("num_stages", "q_stages", "exp2_fma", "ctas_per_sm"):
        low, high = bounds("sm90", name)
        if not low <= getattr(tile, name) <= high:
            bounded = False
            yield f"{name} must be from {low} to {high}, got {getattr(tile, name)}"
    if tile.block_m not in axes("sm90")["block_m"]:
        bounded = False
        yield f"block_m must be 64, 128, 192 or 256, got {tile.block_m}"
    elif tile.pingpong and tile.block_m == 64:
        yield "pingpong needs two groups of 64 rows, got block_m 64"
    if tile.serial and tile.q_stages > 1 and tile.block_m < 256:
        yield (
            f"serial needs one buffer of Q or block_m 256, got q_stages {tile.q_stages} and "
            f"block_m {tile.block_m}"
        )
    if tile.block_n not in axes("sm90")["block_n"]:
        bounded = False
        yield f"block_n must be a multiple of 16 from 32 to 256, got {tile.block_n}"
    if not bounded:
        return
    head_dim, head_dim_v = map(sm90_head_dim, (problem.head_dim, problem.value_dim))
    # P and Q are of one size then, and ptxas 13.0 gives them the same registers: every tile of keys
    # but the first was wrong (ptxas 13.5 does not).
    if tile.serial and tile.q_in_registers and tile.block_n == head_dim:
        yield f"serial with Q in registers needs block_n other than head_dim {head_dim}"
    smem = sm90_smem_bytes(tile, head_dim, head_dim_v)
    # Each resident block takes 1 KiB besides, of which smem_per_block leaves room for one.
    limit = (arch.smem_per_block + 1024) // tile.ctas_per_sm - 1024
    if smem > limit:
        each = " each" if tile.ctas_per_sm > 1 else ""
        yield f"shared memory of {smem} bytes{each} exceeds the {limit} of {arch.name}"
    columns, entry = max(head_dim_v, tile.block_n), sm90_entry_registers(tile)
    if columns // 2 + _WGMMA_REGISTERS > entry:
        yield (
            f"registers: a wgmma of {columns} columns needs {columns // 2 + _WGMMA_REGISTERS}, and "
            f"a thread starts with {entry}"
        )
    needed, given = sm90_registers(tile, head_dim, head_dim_v)
    if needed > given:
        yield f"registers: a thread needs {needed}, and {given} are there without spills"
