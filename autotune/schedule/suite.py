"""The problems that are tuned when none is named, and the one that the command line names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flashmoe.spec.mask import FULL, Mask, causal_if
from flashmoe.spec.problem import Problem


@dataclass(frozen=True, slots=True)
class Group:
    """Problems of one bucket, which share a tile, with what each counts (as often as it runs)."""

    problems: tuple[Problem, ...]
    weights: tuple[float, ...]

    @property
    def main(self) -> Problem:
        """The problem that takes the most time of them all: it stands for the group."""
        costs = [w * p.flops for p, w in zip(self.problems, self.weights, strict=True)]
        return self.problems[costs.index(max(costs))]

    @property
    def shares(self) -> tuple[tuple[Problem, float], ...]:
        """The problems with their shares of the weight, sorted; empty for one alone."""
        if len(self.problems) == 1:
            return ()
        total = sum(self.weights)
        pairs = [(p, round(w / total, 6)) for p, w in zip(self.problems, self.weights, strict=True)]
        return tuple(sorted(pairs, key=lambda pair: pair[0].label))

    @property
    def cost(self) -> float:
        """What tuning costs, in no unit: timing costs in proportion to its flops, checks and
        compilation the same for all; the fourth root lies between, and a weight counts as flops."""
        return float(
            sum(w * max(p.flops, 1.0) for p, w in zip(self.problems, self.weights, strict=True))
            ** 0.25
        )


def grouped(problems: Iterable[tuple[Problem, float]]) -> list[Group]:
    """Problems with their weights, by bucket; the same problem twice counts with both weights."""
    buckets: dict[str, dict[Problem, float]] = {}
    for problem, weight in problems:
        bucket = buckets.setdefault(problem.bucket, {})
        bucket[problem] = bucket.get(problem, 0.0) + weight
    return [Group(tuple(bucket), tuple(bucket.values())) for bucket in buckets.values()]


def _problem(
    batch: int,
    heads: int,
    seqlen: int,
    head_dim: int,
    dtype: str,
    *,
    heads_kv: int | None = None,
    causal: bool = False,
) -> Problem:
    mask = causal_if(causal)
    return Problem(batch, heads, heads_kv or heads, seqlen, seqlen, head_dim, dtype, mask)


# Sizes that a laptop's CPU finishes in a tenth of a second.
CPU_SUITE = (
    _problem(1, 8, 1024, 64, "float32"),
    _problem(1, 8, 1024, 64, "float32", causal=True),
    _problem(1, 8, 2048, 128, "float32"),
    _problem(4, 8, 128, 64, "float32"),
)
# Short and long sequences, both common head dimensions, causal, and grouped queries.
GPU_SUITE = (
    _problem(32, 8, 512, 64, "bfloat16"),
    _problem(2, 16, 8192, 128, "bfloat16"),
    _problem(2, 16, 8192, 128, "bfloat16", causal=True),
    _problem(2, 32, 8192, 64, "bfloat16"),
    _problem(4, 32, 4096, 128, "bfloat16", heads_kv=8, causal=True),
)
# What an option that is not given means once any other problem option is.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"batch": 1, "heads": 8, "seqlen": 1024, "head_dim": 64, "dtype": "float32"},
    "cuda": {"batch": 2, "heads": 16, "seqlen": 4096, "head_dim": 128, "dtype": "bfloat16"},
}


def default_suite(device_type: str) -> tuple[Problem, ...]:
    return GPU_SUITE if device_type == "cuda" else CPU_SUITE


def named_problem(device_type: str, given: dict[str, Any]) -> Problem | None:
    """The problem described by the options that were `given` (by name: batch, heads, kv_heads,
    seqlen, seqlen_kv, head_dim, dtype, causal, window), None when there are none.

    heads_kv defaults to heads, seqlen_kv to seqlen, causal to False, window to none, the others to
    DEFAULTS. Raises ValueError naming the option, its value and what is allowed.
    """
    if not given:
        return None
    option = {**DEFAULTS[device_type], **given}
    heads, kv_heads = option["heads"], option.get("kv_heads", option["heads"])
    if heads % kv_heads:
        raise ValueError(f"--kv-heads must divide --heads ({heads}), got {kv_heads}")
    window: Mask = option.get("window", FULL)
    try:
        return Problem(
            batch=option["batch"],
            heads_q=heads,
            heads_kv=kv_heads,
            seqlen_q=option["seqlen"],
            seqlen_kv=option.get("seqlen_kv", option["seqlen"]),
            head_dim=option["head_dim"],
            dtype=option["dtype"],
            mask=Mask(window.left, 0 if option.get("causal") else window.right),
        )
    except ValueError as error:
        # What is left after argparse: a head dimension that no kernel has.
        raise ValueError(f"--{str(error).replace('head_dim', 'head-dim', 1)}") from None
