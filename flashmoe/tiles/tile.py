"""Tile and Arch: the tunable shape of a kernel, and the one place that says what is legal."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, NamedTuple

from flashmoe.machine.device import Arch
from flashmoe.spec.problem import Problem
from flashmoe.tiles import cpu, decode, sm80, sm90, sm90_bwd, triton


@dataclass(frozen=True, slots=True)
class Tile:
    """One configuration of one kernel. `kernel` is one of cpu, decode, sm80, sm90, sm90_bwd,
    triton. A tile handles block_m query rows by block_n keys a step, with num_stages K/V buffers in
    flight. Rows of decode are (query, head of a group) pairs.

    num_warps: warps a thread block. tma: operands are fetched by the tensor memory accelerator,
    where alignment allows it. q_stages: buffers of Q. pingpong: groups of 64 rows take turns at the
    tensor cores. q_in_registers: Q from registers instead of shared memory. exp2_fma: sixteenths of
    the exponentials computed on the FMA pipes. ctas_per_sm: thread blocks on a multiprocessor.
    serial: the softmax of 64 rows waits for their matmuls, and others fill the gap.
    do_stages, ds_stages: buffers of dO and dS in the backward, where num_stages are those of Q.
    late_dq: dQ is computed a step late. split_blocks: how many thread blocks share the keys of a
    batch, as far as that goes evenly; 0 for as many as run at a time.
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
    serial: bool = False
    do_stages: int = 1
    ds_stages: int = 1
    late_dq: bool = False
    split_blocks: int = 0

    def __str__(self) -> str:
        text = f"{self.kernel}:{self.block_m}x{self.block_n}"
        for option in _OPTIONS:
            value = getattr(self, option.field)
            if option.is_flag:
                text += f"-{option.text}" if value else ""
            elif value != option.default or (option.is_told and self.kernel in option.kernels):
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
    """A field of Tile that some kernels have, and its name in a tile's text, where it `is_told`
    even at its default."""

    field: str
    text: str
    kernels: tuple[str, ...]
    is_told: bool = True

    @property
    def default(self) -> Any:
        return _default(self.field)

    @property
    def is_flag(self) -> bool:
        return self.default is False


@functools.cache
def _default(name: str) -> Any:
    return next(field.default for field in fields(Tile) if field.name == name)


_OPTIONS = (
    _Option("num_stages", "stages", ("cpu", "decode", "sm80", "sm90", "sm90_bwd", "triton")),
    _Option("num_warps", "warps", ("cpu", "decode", "sm80", "triton")),
    _Option("tma", "tma", ("triton",)),
    _Option("q_stages", "q", ("sm90",)),
    _Option("pingpong", "pingpong", ("sm90",)),
    _Option("q_in_registers", "qreg", ("sm90",)),
    _Option("exp2_fma", "fma", ("sm90",)),
    _Option("ctas_per_sm", "ctas", ("decode", "sm90")),
    _Option("serial", "serial", ("sm90",)),
    _Option("do_stages", "do", ("sm90_bwd",)),
    _Option("ds_stages", "ds", ("sm90_bwd",)),
    _Option("late_dq", "late", ("sm90_bwd",)),
    _Option("split_blocks", "blocks", ("decode",), is_told=False),
)
_FORM = r"(?P<kernel>\w+):(?P<m>\d+)x(?P<n>\d+)" + "".join(
    rf"(?P<{o.field}>-{o.text}{{}})?".format("" if o.is_flag else r"\d+") for o in _OPTIONS
)
_SYNTAX = "".join(f"[-{o.text}{'' if o.is_flag else o.text[0].upper()}]" for o in _OPTIONS)

_RULES: dict[str, Callable[[Tile, Arch, Problem], Iterator[str]]] = {
    "cpu": cpu.rules,
    "decode": decode.rules,
    "sm80": sm80.rules,
    "sm90": sm90.rules,
    "sm90_bwd": sm90_bwd.rules,
    "triton": triton.rules,
}


def grid(kernel: str, **axes: tuple[Any, ...]) -> list[Tile]:
    """Every Tile of `kernel` over the product of the axes, legal or not."""
    names = list(axes)
    return [
        Tile(kernel, **dict(zip(names, values, strict=True))) for values in product(*axes.values())
    ]
