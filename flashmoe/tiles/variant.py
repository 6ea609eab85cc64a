"""What a CUDA kernel is compiled for besides the plain dense call. csrc/common/variant.h has the
same fields but for head_dim_v, which is the tile's (a test compares them). It imports nothing of
flashmoe, because csrc/build_config.py reads it where nothing is installed yet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashmoe.spec.problem import Problem


@dataclass(frozen=True, slots=True)
class Variant:
    """local: any window; without, a kernel computes full and causal attention. deterministic: a
    backward's dQ is the same bits every time. whole: a backward's thread block has all keys of a
    head, and its dQ is, too. packed: lengths are read on the device. head_dim_v: the columns of V
    and O that a forward is compiled for, where V has a head_dim of its own; 0 where it has not. The
    others: terms of that name."""

    local: bool = False
    deterministic: bool = False
    softcap: bool = False
    alibi: bool = False
    sink: bool = False
    dropout: bool = False
    mask: bool = False
    whole: bool = False
    packed: bool = False
    head_dim_v: int = 0

    @classmethod
    def of(cls, problem: Problem) -> Variant:
        """The one that computes a problem. To a backward sinks are a part of softmax_lse, and V is
        padded to the head_dim of K, or K to V's."""
        is_forward = problem.direction == "fwd"
        terms = {x: True for x in problem.terms if x != "sink" or is_forward}
        own_dim = problem.head_dim_v or 0
        return cls(
            local=problem.mask.is_local,
            packed=problem.layout == "packed",
            head_dim_v=-(-own_dim // 16) * 16 if is_forward else 0,
            **terms,
        )

    @classmethod
    def named(cls, names: Iterable[str]) -> Variant:
        """The inverse of names. Raises TypeError for one that is unknown."""
        flags = dict.fromkeys(names, True)
        head_dim_v = 0
        for name in [name for name in flags if re.fullmatch(r"v\d+", name)]:
            head_dim_v = int(name[1:])
            del flags[name]
        return cls(head_dim_v=head_dim_v, **flags)

    @property
    def flags(self) -> tuple[str, ...]:
        """The FLAGS that are set."""
        return tuple(name for name in FLAGS if getattr(self, name))

    @property
    def names(self) -> tuple[str, ...]:
        """As lists of instances spell a variant: flags, then head_dim_v as `v128`."""
        return (*self.flags, *((f"v{self.head_dim_v}",) if self.head_dim_v else ()))


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
# Families of which a line may end in a head_dim of V's own, as v128.
OWN_HEAD_DIM_V = ("sm90",)
# Those that a general kernel, of which some head dimensions have one, decides at run time. All
# others have what their line names, and no more.
RUNTIME = {"sm80": ("local", "softcap", "alibi", "sink", "dropout")}


def initializer(names: Iterable[str]) -> str:
    """Of a C++ Variant with these fields."""
    return "{" + ", ".join(f".{name} = true" for name in names) + "}"
