"""Tile and Arch: the tunable shape of a kernel, and the one place that says what is legal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from flashmoe.problem import DTYPE_BYTES, Problem

# Head dimensions that the sm80 kernel is instantiated for; others are zero-filled to the next one.
SM80_HEAD_DIMS = (32, 64, 96, 128, 192, 256)
# Registers that the float32 fragments of S and O may take of a thread's 255 before ptxas spills.
_SM80_FRAGMENT_REGISTERS = 208
# The same for Triton's kernels, as triton_registers counts. Where the tensor cores read operands
# from shared memory, the backward spills a little before 256 and is fastest there all the same
# (H200, bfloat16, head_dim 128: 64x64 with 4 warps); past it ptxas serializes wgmma. Elsewhere
# ptxas gives up from 224 on: 32 registers, 20 KiB of spills.
_TRITON_FORWARD_REGISTERS = 192
_TRITON_BACKWARD_REGISTERS = 208
_TRITON_WGMMA_BACKWARD_REGISTERS = 256


@dataclass(frozen=True, slots=True)
class Arch:
    """What a tile must fit. `capability` is the CUDA compute capability, (0, 0) for a CPU;
    `smem_per_block` is the opt-in shared memory of one thread block in bytes."""

    kind: str
    name: str
    capability: tuple[int, int] = (0, 0)
    sm_count: int = 0
    smem_per_block: int = 0


@dataclass(frozen=True, slots=True)
class Tile:
    """One configuration of one kernel. `kernel` is one of cpu, sm80, triton. A tile handles
    block_m query rows by block_n keys a step, with num_stages K/V buffers in flight and num_warps
    warps a thread block (1 and 1 for the cpu kernel, which has neither). `tma`: operands are
    fetched by the tensor memory accelerator, where alignment allows it."""

    kernel: str
    block_m: int
    block_n: int
    num_stages: int = 1
    num_warps: int = 1
    tma: bool = False

    def __str__(self) -> str:
        return (
            f"{self.kernel}:{self.block_m}x{self.block_n}-stages{self.num_stages}"
            f"-warps{self.num_warps}{'-tma' if self.tma else ''}"
        )

    @property
    def backend(self) -> str:
        """The backend that runs this kernel."""
        return "cuda" if self.kernel.startswith("sm") else self.kernel

    @classmethod
    def parse(cls, text: str) -> Tile:
        """The inverse of str(): `kernel:MxN-stagesS-warpsW`, with `-tma` where it is used; stages
        and warps default to 1.

        Raises ValueError naming the text and the form.
        """
        match = re.fullmatch(r"(\w+):(\d+)x(\d+)(?:-stages(\d+))?(?:-warps(\d+))?(-tma)?", text)
        if match is None or match[1] not in _RULES:
            raise ValueError(
                f"tile must look like KERNEL:MxN-stagesS-warpsW[-tma] with KERNEL one of "
                f"{', '.join(_RULES)}, got {text!r}"
            )
        m, n, stages, warps = (int(x) if x else 1 for x in match.groups()[1:5])
        return cls(match[1], m, n, stages, warps, match[6] is not None)

    def violations(self, arch: Arch, problem: Problem) -> list[str]:
        """Why this tile cannot run `problem` on `arch`; empty when it is legal."""
        if self.kernel not in _RULES:
            return [f"kernel must be one of {', '.join(_RULES)}, got {self.kernel!r}"]
        return list(_RULES[self.kernel](self, arch, problem))


def instance_head_dim(head_dim: int) -> int:
    """The head dimension of the sm80 instance that runs `head_dim`."""
    return next(d for d in SM80_HEAD_DIMS if d >= head_dim)


def _cpu_rules(tile: Tile, arch: Arch, problem: Problem) -> Iterator[str]:
    if arch.kind != "cpu":
        yield f"the cpu kernel runs on cpu tensors, not on {arch.kind}"
    if problem.direction != "fwd":
        yield "the cpu kernel has no tile for the backward"
    for name, value in (("block_m", tile.block_m), ("block_n", tile.block_n)):
        if not 1 <= value <= 4096:
            yield f"{name} must be from 1 to 4096, got {value}"
    for name, value in (("num_stages", tile.num_stages), ("num_warps", tile.num_warps)):
        if value != 1:
            yield f"{name} must be 1 for the cpu kernel, got {value}"
    if tile.tma:
        yield "tma must be false for the cpu kernel"


def sm80_smem_bytes(tile: Tile, head_dim: int) -> int:
    """Shared memory of the sm80 kernel: Q, and num_stages buffers each of K and V, 16-bit."""
    return 2 * head_dim * (tile.block_m + 2 * tile.num_stages * tile.block_n)


def _sm80_rules(tile: Tile, arch: Arch, problem: Problem) -> Iterator[str]:
    if arch.kind != "cuda" or arch.capability < (8, 0):
        yield f"the sm80 kernel needs compute capability 8.0, got {arch.capability} ({arch.kind})"
    if problem.direction != "fwd":
        yield "the sm80 kernel has no backward"
    if problem.dtype not in ("float16", "bfloat16"):
        yield f"dtype must be float16 or bfloat16 for the sm80 kernel, got {problem.dtype}"
    if tile.tma:
        yield "tma must be false for the sm80 kernel"
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
    head_dim = instance_head_dim(problem.head_dim)
    smem = sm80_smem_bytes(tile, head_dim)
    if smem > arch.smem_per_block:
        yield f"shared memory of {smem} bytes exceeds the {arch.smem_per_block} of {arch.name}"
    fragments = tile.block_m // rows * (tile.block_n // 2 + head_dim // 2)
    if fragments > _SM80_FRAGMENT_REGISTERS:
        yield (
            f"registers: fragments of S and O take {fragments} a thread, at most "
            f"{_SM80_FRAGMENT_REGISTERS} fit without spills"
        )


def triton_smem_bytes(tile: Tile, problem: Problem) -> int:
    """Shared memory of the triton kernels, at least what Triton 3.6 and 3.9 report for sm_80 and
    sm_90: forward Q and num_stages buffers of K and V; backward K and V (in the pass over queries
    Q and dO) and num_stages buffers of the other two with their statistics, unpipelined with one
    more where there is no wgmma; and scratch."""
    row = DTYPE_BYTES[problem.dtype] * triton_head_dim(problem.head_dim)
    m, n, stages = tile.block_m, tile.block_n, tile.num_stages
    if problem.direction == "fwd":
        return row * (m + 2 * stages * n) + 1024
    buffers = 2 * stages + (stages == 1)
    return row * (2 * n + buffers * m) + 8 * stages * m + 1024


def triton_registers(tile: Tile, problem: Problem) -> float:
    """Registers of a thread that the triton kernels' large fragments take: forward O, and S with P
    in half its width; backward dK, dV, S, dP and what is visited."""
    head_dim = triton_head_dim(problem.head_dim)
    m, n = tile.block_m, tile.block_n
    if problem.direction == "fwd":
        elements = m * (head_dim + 1.5 * n)
    else:
        elements = 2.0 * n * head_dim + 2.0 * m * n + m * head_dim
    return elements / (32 * tile.num_warps)


def triton_head_dim(head_dim: int) -> int:
    """The head dimension of the triton kernels' tiles: a power of two, zero-filled from head_dim
    on."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _triton_rules(tile: Tile, arch: Arch, problem: Problem) -> Iterator[str]:
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
    registers, limit = triton_registers(tile, problem), _TRITON_FORWARD_REGISTERS
    if problem.direction == "bwd":
        wgmma = (9, 0) <= arch.capability < (12, 0)
        limit = _TRITON_WGMMA_BACKWARD_REGISTERS if wgmma else _TRITON_BACKWARD_REGISTERS
    if registers > limit:
        yield f"registers: fragments take {registers:.0f} a thread, at most {limit} run well"


_RULES: dict[str, Callable[[Tile, Arch, Problem], Iterator[str]]] = {
    "cpu": _cpu_rules,
    "sm80": _sm80_rules,
    "triton": _triton_rules,
}


def grid(kernel: str, **axes: tuple[Any, ...]) -> list[Tile]:
    """Every Tile of `kernel` over the product of the axes, legal or not."""
    names = list(axes)
    return [
        Tile(kernel, **dict(zip(names, values, strict=True))) for values in product(*axes.values())
    ]
