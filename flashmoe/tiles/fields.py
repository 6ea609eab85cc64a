"""The one table of fields that the tiles of each family of kernels have.

Tile and its text, the C++ structs (a test compares them), the columns of csrc/instances, what is
compiled at run time and what a search tries all follow from it. It imports nothing of flashmoe,
because csrc/build_config.py reads it where nothing is installed yet.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


def _called(text: str) -> dict[str, str]:
    """What a field is called in the text of a tile."""
    return {"text": text}


@dataclass(frozen=True, slots=True)
class Fields:
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
    num_stages: int = field(default=1, metadata=_called("stages"))
    num_warps: int = field(default=1, metadata=_called("warps"))
    tma: bool = field(default=False, metadata=_called("tma"))
    q_stages: int = field(default=1, metadata=_called("q"))
    pingpong: bool = field(default=False, metadata=_called("pingpong"))
    q_in_registers: bool = field(default=False, metadata=_called("qreg"))
    exp2_fma: int = field(default=0, metadata=_called("fma"))
    ctas_per_sm: int = field(default=1, metadata=_called("ctas"))
    serial: bool = field(default=False, metadata=_called("serial"))
    do_stages: int = field(default=1, metadata=_called("do"))
    ds_stages: int = field(default=1, metadata=_called("ds"))
    late_dq: bool = field(default=False, metadata=_called("late"))
    split_blocks: int = field(default=0, metadata=_called("blocks"))


# The values that a search tries, from the least to the greatest.
Values = tuple[Any, ...]
# Those of the tiles that are listed in csrc/instances.
LISTED: Values = ()


class Family(NamedTuple):
    """`columns`: the fields that a tile has, behind head_dim in its C++ struct and in
    csrc/instances/KERNEL.txt, each with what a search tries; by kind where that depends on it.
    `at_launch`: fields that a compiled kernel is given."""

    columns: Mapping[str, Values | Mapping[str, Values]]
    at_launch: Mapping[str, Values] = {}


BOTH = (False, True)
FAMILIES = {
    "cpu": Family(
        {
            "block_m": (64, 128, 256, 512, 1024),
            "block_n": (64, 128, 256),
            "num_stages": (1,),
            "num_warps": (1,),
        }
    ),
    "decode": Family(
        {
            "block_m": LISTED,
            "block_n": LISTED,
            "num_stages": LISTED,
            "num_warps": LISTED,
            "ctas_per_sm": LISTED,
        },
        at_launch={"split_blocks": (1, 2, 3, 4, 6, 8)},  # times the multiprocessors
    ),
    "sm80": Family(
        {
            "block_m": LISTED,
            "block_n": LISTED,
            "num_stages": LISTED,
            "num_warps": LISTED,
        },
    ),
    "sm90": Family(
        {
            "block_m": (64, 128, 192, 256),
            "block_n": tuple(range(32, 257, 16)),
            "num_stages": (1, 2, 3, 4),
            "q_stages": (1, 2),
            "pingpong": BOTH,
            "q_in_registers": BOTH,
            "exp2_fma": tuple(range(9)),
            "ctas_per_sm": (1, 2),
            "serial": BOTH,
        },
    ),
    "sm90_bwd": Family(
        {
            "block_m": (64, 128),
            "block_n": (64, 128),
            "num_stages": (2, 3, 4),
            "do_stages": (1, 2, 3, 4),
            "ds_stages": (1, 2),
            "late_dq": BOTH,
        },
    ),
    # float32, in either direction, is no work for tensor cores.
    "triton": Family(
        {
            "block_m": {"fwd": (64, 128), "bwd": (32, 64, 128), "float32": (16, 32)},
            "block_n": {"fwd": (32, 64, 128), "bwd": (64, 128), "float32": (16, 32)},
            "num_stages": {"fwd": (2, 3, 4), "bwd": (1, 2, 3), "float32": (1, 2)},
            "num_warps": (4, 8),
            "tma": BOTH,
        }
    ),
}


def axes(kernel: str, kind: str = "") -> dict[str, Values]:
    """Of every column what a search tries, legal together or not."""
    return {
        name: values[kind] if isinstance(values, Mapping) else values
        for name, values in FAMILIES[kernel].columns.items()
    }


@functools.cache
def bounds(kernel: str, name: str) -> tuple[int, int]:
    """The least and the greatest value of a column."""
    values = axes(kernel)[name]
    return values[0], values[-1]


# The fields that are true or false.
FLAGS = frozenset(each.name for each in fields(Fields) if each.default is False)


def columns(kernel: str) -> tuple[str, ...]:
    return tuple(FAMILIES[kernel].columns)


def initializer(head_dim: int, tile: Mapping[str, int]) -> str:
    """Of a C++ struct whose fields are head_dim and the columns: their values by name."""
    values = (bool(value) if name in FLAGS else value for name, value in tile.items())
    return "{" + ", ".join(str(value).lower() for value in (head_dim, *values)) + "}"
