"""What is legal for the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashmoe.spec.problem import DTYPE_BYTES, Problem

if TYPE_CHECKING:
    from flashmoe.machine.device import Arch
    from flashmoe.tiles.tile import Tile

# Registers that a thread's fragments may take, as triton_registers counts them. Where the tensor
# cores read operands from shared memory, the backward spills a little before 256 and is fastest
# there all the same (H200, bfloat16, head_dim 128: 64x64 with 4 warps); past it ptxas serializes
# wgmma. Elsewhere ptxas gives up from 224 on: 32 registers, 20 KiB of spills.
_FORWARD_REGISTERS = 192
_BACKWARD_REGISTERS = 208
_WGMMA_BACKWARD_REGISTERS = 256


def triton_smem_bytes(tile: Tile, problem: Problem) -> int:
    """Shared memory of the triton kernels, at least what Triton 3.6 and 3.9 report for sm_80 and
    sm_90: forward Q and num_stages buffers of K and V; backward K and V (in the pass over queries
    Q and dO) and num_stages buffers of the other two with their statistics, unpipelined with one
    more where there is no wgmma; of a mask num_stages buffers, as if it were float32; and
    scratch."""
    k_row, v_row, row = (
        DTYPE_BYTES[problem.dtype] * triton_head_dim(d)
        for d in (problem.head_dim, problem.value_dim, problem.padded_dim)
    )
    m, n, stages = tile.block_m, tile.block_n, tile.num_stages
    mask = 4 * m * n * stages if "mask" in problem.terms else 0
    if problem.direction == "fwd":
        return k_row * m + (k_row + v_row) * stages * n + mask + 1024
    buffers = 2 * stages + (stages == 1)
    return row * (2 * n + buffers * m) + 8 * stages * m + mask + 1024


def triton_registers(tile: Tile, problem: Problem) -> float:
    """Registers of a thread that the triton kernels' large fragments take: forward O, and S with P
    in half its width; backward dK, dV, S, dP and what is visited."""
    m, n = tile.block_m, tile.block_n
    if problem.direction == "fwd":
        elements = m * (triton_head_dim(problem.value_dim) + 1.5 * n)
    else:
        head_dim = triton_head_dim(problem.padded_dim)
        elements = 2.0 * n * head_dim + 2.0 * m * n + m * head_dim
    return elements / (32 * tile.num_warps)


def triton_head_dim(head_dim: int) -> int:
    """The head dimension of the triton kernels' tiles: a power of two, zero-filled from head_dim
    on."""
    return max(16, 1 << (head_dim - 1).bit_length())


def rules(tile: Tile, arch: Arch, problem: Problem) -> Iterator[str]:
    if arch.kind == "cuda" and arch.capability < (8, 0):
        yield f"the triton kernels need compute capability 8.0, got {arch.capability}"
    largest = 256 if problem.direction == "fwd" else 128
    if problem.dtype == "float32":
        largest = 32  # no tensor core multiplies it in full precision
    blocks_ok = True
    for name, value in (("block_m", tile.block_m), ("block_n", tile.block_n)):
        if value & (value - 1) or not 16 <= value <= largest:
            blocks_ok = False
            yield (
                f"{name} must be a power of two from 16 to {largest} for {problem.dtype} "
                f"{problem.direction}, got {value}"
            )
    if not 1 <= tile.num_stages <= 5:
        yield f"num_stages must be from 1 to 5, got {tile.num_stages}"
    if tile.tma and arch.capability < (9, 0):
        yield f"tma needs compute capability 9.0, got {arch.capability}"
    if tile.tma and problem.dtype == "float32":
        yield "tma needs a 16-bit dtype, got float32"
    if tile.num_warps not in (4, 8):
        yield f"num_warps must be 4 or 8, got {tile.num_warps}"
        return
    if arch.kind != "cuda" or not blocks_ok:
        return  # the interpreter has neither shared memory nor registers
    smem = triton_smem_bytes(tile, problem)
    if smem > arch.smem_per_block:
        yield f"shared memory of {smem} bytes exceeds the {arch.smem_per_block} of {arch.name}"
    registers, limit = triton_registers(tile, problem), _FORWARD_REGISTERS
    if problem.direction == "bwd":
        wgmma = (9, 0) <= arch.capability < (12, 0)
        limit = _WGMMA_BACKWARD_REGISTERS if wgmma else _BACKWARD_REGISTERS
    if registers > limit:
        yield f"registers: fragments take {registers:.0f} a thread, at most {limit} run well"
