"""Tile: the tunable shape of a kernel, its text, and what is legal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, NamedTuple

from flashmoe.machine.device import Arch
from flashmoe.spec.problem import Problem
from flashmoe.tiles import cpu, decode, sm80, sm90, sm90_bwd, triton
from flashmoe.tiles.fields import FAMILIES, FLAGS, Fields


@dataclass(frozen=True, slots=True)
class Tile(Fields):
    __doc__ = Fields.__doc__

    def __str__(self) -> str:
        text = f"{self.kernel}:{self.block_m}x{self.block_n}"
        for option in _OPTIONS:
            value = getattr(self, option.field)
            if option.is_flag:
                text += f"-{option.text}" if value else ""
            elif value != option.default or self.kernel in option.always:
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
        match = _FORM.fullmatch(text)
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
    """A field that some kernels have, and its name in a tile's text: of the tiles of the kernels
    `always`, of others where it is not at its default."""

    field: str
    text: str
    default: Any
    kernels: tuple[str, ...]
    always: tuple[str, ...]

    @property
    def is_flag(self) -> bool:
        return self.field in FLAGS


_OPTIONS = tuple(
    _Option(
        *(each.name, each.metadata["text"], each.default),
        kernels=tuple(k for k, f in FAMILIES.items() if each.name in {*f.columns, *f.at_launch}),
        always=tuple(k for k, f in FAMILIES.items() if each.name in f.columns),
    )
    for each in fields(Fields)
    if each.metadata
)
_FORM = re.compile(
    r"(?P<kernel>\w+):(?P<m>\d+)x(?P<n>\d+)"
    + "".join(
        rf"(?P<{o.field}>-{o.text}{{}})?".format("" if o.is_flag else r"\d+") for o in _OPTIONS
    )
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
