"""A problem on a command line: its options, their defaults and what they mean, for every command
that takes one."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from flashmoe.spec.mask import FULL, Mask
from flashmoe.spec.problem import DIRECTIONS, DTYPE_BYTES, LAYOUTS, MAX_HEAD_DIM, Problem

# What an option that is not given means, by kind of device.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"batch": 1, "heads": 8, "seqlen": 1024, "head_dim": 64, "dtype": "float32"},
    "cuda": {"batch": 2, "heads": 16, "seqlen": 4096, "head_dim": 128, "dtype": "bfloat16"},
}
BOTH = "both"
# Options that are terms of spec/problem.py, by its names.
_TERMS = {"softcap": "softcap", "alibi": "alibi", "sinks": "sink", "dropout": "dropout"}

Lengths = tuple[tuple[int, int, int], ...]


def whole(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")


def _head_dim(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) % 8 == 0 and 8 <= number <= MAX_HEAD_DIM:
            return number
    raise argparse.ArgumentTypeError(
        f"must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {text!r}"
    )


def parse_window(text: str) -> Mask:
    try:
        left, right = map(int, text.split(","))
        return Mask(left, right)
    except ValueError:
        allowed = "two integers LEFT,RIGHT of at least -1"
        raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}") from None


def parse_lengths(text: str) -> Lengths:
    """`128*3,1x700`: three sequences of 128 queries and keys, and one of a query and 700 keys."""
    found = []
    for each in text.split(","):
        match = re.fullmatch(r"(\d+)(?:x(\d+))?(?:\*(\d+))?", each)
        if match is None:
            form = "SEQLEN[xSEQLEN_KV][*COUNT] with commas between"
            raise argparse.ArgumentTypeError(f"must be {form}, got {text!r}")
        seqlen_q, seqlen_kv, count = match.groups()
        found.append((int(seqlen_q), int(seqlen_kv or seqlen_q), int(count or 1)))
    return tuple(found)


_WINDOW_HELP = "keys seen before and after a query's own place; -1: all (as --window=128,0)"
_LENGTHS_HELP = "the sequences of a packed batch or a cache, as 128*3,1x700: instead of --batch "
_LENGTHS_HELP += "and --seqlen, and without a cache --seqlen-kv"
_FLAG: dict[str, Any] = {"action": "store_true", "default": None}
_OPTIONS: dict[str, dict[str, Any]] = {
    "batch": {"type": whole, "metavar": "N"},
    "heads": {"type": whole, "metavar": "N", "help": "query heads"},
    "kv_heads": {"type": whole, "metavar": "N", "help": "key and value heads"},
    "seqlen": {"type": whole, "metavar": "N", "help": "length of the queries"},
    "seqlen_kv": {"type": whole, "metavar": "N", "help": "length of the keys; of a cache its room"},
    "head_dim": {"type": _head_dim, "metavar": "N"},
    "head_dim_v": {"type": _head_dim, "metavar": "N", "help": "of v and out (default: --head-dim)"},
    "dtype": {"choices": tuple(DTYPE_BYTES)},
    "causal": {"action": argparse.BooleanOptionalAction},
    "window": {"type": parse_window, "metavar": "LEFT,RIGHT", "help": _WINDOW_HELP},
    "softcap": {**_FLAG, "help": "scores are capped"},
    "alibi": {**_FLAG, "help": "scores are less for keys that are further away"},
    "sinks": {**_FLAG, "help": "each head has a sink"},
    "dropout": {**_FLAG, "help": "weights are dropped at random"},
    "layout": {"choices": LAYOUTS, "help": "how sequences lie in memory (default: dense)"},
    "lengths": {"type": parse_lengths, "metavar": "LENGTHS", "help": _LENGTHS_HELP},
    "direction": {"choices": (*DIRECTIONS, BOTH), "help": "default: fwd"},
}


def add_options(parser: argparse._ActionsContainer) -> None:
    """Those that name a problem. None is required; one that is not given is None."""
    for name, keywords in _OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by name."""
    values = {name: getattr(arguments, name) for name in _OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def spelled(names: Iterable[str]) -> str:
    """As on the command line."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def problems_of(given: Mapping[str, Any], device_type: str) -> tuple[Problem, ...]:
    """What these options name: one problem, or with direction both the forward and the backward.

    The others default to DEFAULTS; kv_heads to heads, seqlen_kv to seqlen. Sequences that are not
    dense are all as long as may be where there are no lengths. Raises ValueError naming the option,
    its value and what is allowed.
    """
    option = {**DEFAULTS[device_type], "layout": "dense", "direction": "fwd", **given}
    heads, kv_heads = option["heads"], option.get("kv_heads", option["heads"])
    if heads % kv_heads:
        raise ValueError(f"--kv-heads must divide --heads ({heads}), got {kv_heads}")
    layout, direction = option["layout"], option["direction"]
    if direction != "fwd" and layout not in ("dense", "packed"):
        allowed = f"--direction must be fwd with --layout {layout}"
        raise ValueError(f"{allowed}, which has no backward, got {direction}")
    sizes = option["batch"], option["seqlen"], option.get("seqlen_kv", option["seqlen"])
    lengths: Lengths = option.get("lengths", ())
    if lengths:
        if layout == "dense":
            raise ValueError("--layout must be another than dense with --lengths, got dense")
        named = {
            "batch",
            "seqlen",
            *(() if "cache" in layout or "paged" in layout else ("seqlen_kv",)),
        }
        if both := named & given.keys():
            raise ValueError(f"--lengths says what {spelled(sorted(both))} would, got both")
        longest = max(each[1] for each in lengths)
        sizes = (
            sum(each[2] for each in lengths),
            max(each[0] for each in lengths),
            option.get("seqlen_kv", longest),
        )
    elif layout.startswith("packed"):
        # The problem's own sizes are rounded up.
        lengths = ((*sizes[1:], sizes[0]),)
    window: Mask = option.get("window", FULL)
    batch, seqlen_q, seqlen_kv = sizes
    try:
        forward = Problem(
            *(batch, heads, kv_heads, seqlen_q, seqlen_kv, option["head_dim"], option["dtype"]),
            mask=Mask(window.left, 0 if option.get("causal") else window.right),
            terms=tuple(term for name, term in _TERMS.items() if option.get(name)),
            layout=layout,
            lengths=lengths,
            head_dim_v=option.get("head_dim_v"),
        )
    except ValueError as error:
        text = str(error).replace("head_dim_v", "head-dim-v", 1).replace("head_dim", "head-dim", 1)
        raise ValueError(f"--{text}") from None
    chosen = DIRECTIONS if direction == BOTH else (direction,)
    return tuple(replace(forward, direction=each) for each in chosen)
