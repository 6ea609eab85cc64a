"""Tile and Arch: the tunable shape of a kernel, and the one place that says what is legal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, NamedTuple

from flashmoe.problem import DTYPE_BYTES, Problem

# Head dimensions that the sm80 kernel is instantiated for; others are zero-filled to the next one.
SM80_HEAD_DIMS = (32, 64, 96, 128, 192, 256)
# Registers that the float32 fragments of S and O may take of a thread's 255 before ptxas spills.
_SM80_FRAGMENT_REGISTERS = 208
# The same for the sm90 kernel, of what setmaxnreg gives a consumer: what a thread needs besides its
# fragments. benchmarks/hopper/check_tiles.py compares the rule with the compiler.
_SM90_OTHER_REGISTERS = 32
# What ptxas asks for besides the accumulators to compile one wgmma at all.
_WGMMA_REGISTERS = 30
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
    """One configuration of one kernel. `kernel` is one of cpu, sm80, sm90, triton. A tile handles
    block_m query rows by block_n keys a step, with num_stages K/V buffers in flight.

    num_warps: warps a thread block. tma: operands are fetched by the tensor memory accelerator,
    where alignment allows it. q_stages: buffers of Q. pingpong: groups of 64 rows take turns at the
    tensor cores. q_in_registers: Q from registers instead of shared memory. exp2_fma: sixteenths of
    the exponentials computed on the FMA pipes. ctas_per_sm: thread blocks on a multiprocessor.
    A field that its kernel does not have must be left at its default.
    """

    kernel: str
    block_m: int
    block_n: int
    num_stages: int = 1
    num_warps: int = 1
    tma: bool = False
    q_stages: int = 1
    pingpong: bool = False
    q_in_registers: bool = False
    exp2_fma: int = 0
    ctas_per_sm: int = 1

    def __str__(self) -> str:
        text = f"{self.kernel}:{self.block_m}x{self.block_n}"
        for option in _OPTIONS:
            value = getattr(self, option.field)
            if option.is_flag:
                text += f"-{option.text}" if value else ""
            elif self.kernel in option.kernels or value != option.default:
                text += f"-{option.text}{value}"
        return text

    @property
    def backend(self) -> str:
        """The backend that runs this kernel."""
        return "cuda" if self.kernel.startswith("sm") else self.kernel

    @classmethod
    def parse(cls, text: str) -> Tile:
        """The inverse of str(): `KERNEL:MxN` and the options of Tile's fields; those that are
        absent are at their defaults.

        Raises ValueError naming the text and the form.
        """
        match = re.fullmatch(_FORM, text)
        if match is None or match["kernel"] not in _RULES:
            raise ValueError(
                f"tile must look like KERNEL:MxN{_SYNTAX} with KERNEL one of "
                f"{', '.join(_RULES)}, got {text!r}"
            )
        options: dict[str, Any] = {
            o.field: True if o.is_flag else int(match[o.field][len(o.text) + 1 :])
            for o in _OPTIONS
            if match[o.field]
        }
        return cls(match["kernel"], int(match["m"]), int(match["n"]), **options)

    def violations(self, arch: Arch, problem: Problem) -> list[str]:
        """Why this tile cannot run `problem` on `arch`; empty when it is legal."""
        if self.kernel not in _RULES:
            return [f"kernel must be one of {', '.join(_RULES)}, got {self.kernel!r}"]
        foreign = [
            f"{option.field} must be {option.default} for the {self.kernel} kernel, "
            f"got {getattr(self, option.field)}"
            for option in _OPTIONS
            if self.kernel not in option.kernels and getattr(self, option.field) != option.default
        ]
        return [*foreign, *_RULES[self.kernel](self, arch, problem)]


class _Option(NamedTuple):
    """A field of Tile that some kernels have, and its name in a tile's text."""

    field: str
    text: str
    kernels: tuple[str, ...]

    @property
    def default(self) -> Any:
        return next(field.default for field in fields(Tile) if field.name == self.field)

    @property
    def is_flag(self) -> bool:
        return self.default is False


_OPTIONS = (
    _Option("num_stages", "stages", ("cpu", "sm80", "sm90", "triton")),
    _Option("num_warps", "warps", ("cpu", "sm80", "triton")),
    _Option("tma", "tma", ("triton",)),
    _Option("q_stages", "q", ("sm90",)),
    _Option("pingpong", "pingpong", ("sm90",)),
    _Option("q_in_registers", "qreg", ("sm90",)),
    _Option("exp2_fma", "fma", ("sm90",)),
    _Option("ctas_per_sm", "ctas", ("sm90",)),
)
_FORM = r"(?P<kernel>\w+):(?P<m>\d+)x(?P<n>\d+)" + "".join(
    rf"(?P<{o.field}>-{o.text}{{}})?".format("" if o.is_flag else r"\d+") for o in _OPTIONS
)
_SYNTAX = "".join(f"[-{o.text}{'' if o.is_flag else o.text[0].upper()}]" for o in _OPTIONS)


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


def sm90_head_dim(head_dim: int) -> int:
    """The head dimension of an sm90 kernel compiled for `head_dim`: a multiple of 16, zero-filled
    from head_dim on."""
    return -(-head_dim // 16) * 16


def sm90_smem_bytes(tile: Tile, head_dim: int) -> int:
    """Shared memory of the sm90 kernel: q_stages buffers of Q, num_stages each of K and V, 16-bit
    in panels of 64 columns, and what its warps tell each other."""
    row = 128 * -(-head_dim // 64)
    return 512 + row * (tile.block_m * tile.q_stages + 2 * tile.block_n * tile.num_stages)


def sm90_entry_registers(tile: Tile) -> int:
    """Registers of every thread of the sm90 kernel before setmaxnreg."""
    return min(65536 // (128 * (tile.block_m // 64 + 1) * tile.ctas_per_sm) // 8 * 8, 255)


def sm90_registers(tile: Tile, head_dim: int) -> tuple[int, int]:
    """Registers that a consumer thread of the sm90 kernel needs for O, S, P, Q where it is kept
    there, and the rest; and those that setmaxnreg gives it."""
    needed = head_dim // 2 + tile.block_n // 2 + tile.block_n // 4 + _SM90_OTHER_REGISTERS
    if tile.q_in_registers:
        needed += head_dim // 4
    consumers, entry = tile.block_m // 64, sm90_entry_registers(tile)
    producer = 24 if consumers == 2 and tile.q_stages == 1 else 32
    return needed, min(((entry - producer) // consumers + entry) // 8 * 8, 240)


def _sm90_rules(tile: Tile, arch: Arch, problem: Problem) -> Iterator[str]:
    if arch.kind != "cuda" or arch.capability[0] != 9:
        yield f"the sm90 kernel needs compute capability 9.x, got {arch.capability} ({arch.kind})"
    if problem.direction != "fwd":
        yield "the sm90 kernel has no backward"
    if problem.dtype not in ("float16", "bfloat16"):
        yield f"dtype must be float16 or bfloat16 for the sm90 kernel, got {problem.dtype}"
    ranges = {"num_stages": (1, 4), "q_stages": (1, 2), "exp2_fma": (0, 8), "ctas_per_sm": (1, 2)}
    bounded = True
    for name, (low, high) in ranges.items():
        if not low <= getattr(tile, name) <= high:
            bounded = False
            yield f"{name} must be from {low} to {high}, got {getattr(tile, name)}"
    if tile.block_m not in (64, 128, 192, 256):
        bounded = False
        yield f"block_m must be 64, 128, 192 or 256, got {tile.block_m}"
    elif tile.pingpong and tile.block_m == 64:
        yield "pingpong needs two groups of 64 rows, got block_m 64"
    if tile.block_n % 16 or not 32 <= tile.block_n <= 256:
        bounded = False
        yield f"block_n must be a multiple of 16 from 32 to 256, got {tile.block_n}"
    if not bounded:
        return
    head_dim = sm90_head_dim(problem.head_dim)
    smem = sm90_smem_bytes(tile, head_dim)
    # Each resident block takes 1 KiB besides, of which smem_per_block leaves room for one.
    limit = (arch.smem_per_block + 1024) // tile.ctas_per_sm - 1024
    if smem > limit:
        each = " each" if tile.ctas_per_sm > 1 else ""
        yield f"shared memory of {smem} bytes{each} exceeds the {limit} of {arch.name}"
    columns, entry = max(head_dim, tile.block_n), sm90_entry_registers(tile)
    if columns // 2 + _WGMMA_REGISTERS > entry:
        yield (
            f"registers: a wgmma of {columns} columns needs {columns // 2 + _WGMMA_REGISTERS}, and "
            f"a thread starts with {entry}"
        )
    needed, given = sm90_registers(tile, head_dim)
    if needed > given:
        yield f"registers: a thread needs {needed}, and {given} are there without spills"


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
    "sm90": _sm90_rules,
    "triton": _triton_rules,
}


def grid(kernel: str, **axes: tuple[Any, ...]) -> list[Tile]:
    """Every Tile of `kernel` over the product of the axes, legal or not."""
    names = list(axes)
    return [
        Tile(kernel, **dict(zip(names, values, strict=True))) for values in product(*axes.values())
    ]
