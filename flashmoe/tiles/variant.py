"""What a CUDA kernel is compiled for besides the plain dense call. csrc/common/variant.h has the
same fields (a test compares them). It imports nothing of flashmoe, because csrc/build_config.py
reads it where nothing is installed yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashmoe.spec.problem import Problem


@dataclass(frozen=True, slots=True)
class Variant:
    """local: any window; without, a kernel computes full and causal attention. deterministic: a
    backward's dQ is the same bits every time. whole: a backward's thread block has all keys of a
    head, and its dQ is, too. packed: lengths are read on the device. The others:
    terms of that name."""

    local: bool = False
    deterministic: bool = False
    softcap: bool = False
    alibi: bool = False
    sink: bool = False
    dropout: bool = False
    mask: bool = False
    whole: bool = False
    packed: bool = False

    @classmethod
    def of(cls, problem: Problem) -> Variant:
        """The one that computes a problem. To a backward sinks are a part of softmax_lse."""
        terms = {x: True for x in problem.terms if x != "sink" or problem.direction == "fwd"}
        return cls(local=problem.mask.is_local, packed=problem.layout == "packed", **terms)

    @classmethod
    def named(cls, names: Iterable[str]) -> Variant:
        """The inverse of names. Raises TypeError for one that is unknown."""
        return cls(**dict.fromkeys(names, True))

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that are set, as lists of instances spell a variant."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name))


PLAIN = Variant()

# The fields that are true or false, as C++ has them.
FLAGS = tuple(field.name for field in fields(Variant) if field.default is False)
# By family, those that a kernel may be compiled with: words behind the columns of a line in
# csrc/instances.
COMPILED: dict[str, tuple[str, ...]] = {
    "decode": (),  # every kernel of it has them all
    "sm80": (),
    "sm90": ("local", "softcap", "alibi", "sink", "dropout", "mask", "packed"),
    "sm90_bwd": (
        *("local", "deterministic", "softcap", "alibi", "dropout", "mask", "whole", "packed"),
    ),
}
# Those that a general kernel, of which some head dimensions have one, decides at run time. All
# others have what their line names, and no more.
RUNTIME = {"sm80": ("local", "softcap", "alibi", "sink", "dropout")}


def initializer(names: Iterable[str]) -> str:
    """Of a C++ Variant with these fields."""
    return "{" + ", ".join(f".{name} = true" for name in names) + "}"
