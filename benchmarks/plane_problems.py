"""The forward problems that the untuned choice is judged by: random ones over the whole plane,
those that showed its gaps, and those that the kernels were developed on."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import NamedTuple

from flashmoe.spec.mask import causal_if
from flashmoe.spec.problem import MAX_HEAD_DIM, Problem

sys.path.insert(0, str(Path(__file__).resolve().parent / "hopper"))
from rows import ROWS, UNEVEN

# Those that judge, and as many more that only teach.
RANDOM = 400
_SEQLENS, _PAIRS = (16, 65536), (1, 65536)
_HEADS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 128)
_GROUPS = (2, 3, 4, 5, 6, 8, 16)
# Half of the problems have one of these; the others any multiple of 8 from 16 on.
_USUAL_HEAD_DIMS = (32, 64, 64, 80, 96, 128, 128, 256)
# What a kernel in between the best and the worst reaches on an H200.
_FLOPS, _BYTES_PER_SECOND, _LAUNCH = 450e12, 3.5e12, 5e-6
_MAX_SECONDS, _MAX_BYTES = 2e-3, 4e9
_PADDED = 64


class Case(NamedTuple):
    """A problem, the set it belongs to, and what it is called in results."""

    name: str
    problem: Problem


def _bf16(batch: int, heads_q: int, heads_kv: int, *rest: int) -> Problem:
    seqlen_q, seqlen_kv, head_dim, causal = rest
    return Problem(
        batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim, "bfloat16", causal_if(bool(causal))
    )


# The default of November 2026 was up to 3 times slower here than the best tile.
TABLE = (
    _bf16(8192, 16, 16, 34, 34, 128, True),
    _bf16(4096, 12, 12, 49, 49, 64, False),
    _bf16(2048, 16, 16, 64, 64, 128, False),
    _bf16(1024, 16, 16, 128, 128, 64, True),
    _bf16(128, 12, 12, 128, 128, 64, False),
    _bf16(1024, 16, 16, 128, 128, 128, False),
    _bf16(512, 16, 16, 256, 256, 128, True),
    _bf16(1, 32, 8, 512, 8192, 128, True),
    _bf16(2, 8, 8, 4096, 77, 40, False),
    _bf16(2, 8, 8, 1024, 1024, 80, False),
    _bf16(1, 2, 2, 16384, 16384, 128, True),
    _bf16(1, 16, 16, 1000, 1000, 96, True),
    _bf16(2, 8, 8, 256, 256, 160, False),
)
# Short sequences besides those of the table.
SHORT = (
    _bf16(512, 16, 16, 256, 256, 64, False),
    _bf16(64, 16, 16, 197, 197, 64, False),
    _bf16(4096, 4, 4, 49, 49, 32, False),
)


def _uniform_log(rng: random.Random, low: int, high: int) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _padded(size: int) -> int:
    return -(-size // _PADDED) * _PADDED


def expected_seconds(problem: Problem) -> float:
    """About what the problem takes on an H200."""
    work = 4.0 * problem.batch * problem.heads_q * problem.head_dim
    work *= _padded(problem.seqlen_q) * _padded(problem.seqlen_kv)
    if (
        problem.mask.is_causal
    ):  # what a row sees in the mean, where there are no more queries than keys
        work *= 1 - (problem.seqlen_q - 1) / (2 * problem.seqlen_kv)
    return _LAUNCH + max(work / _FLOPS, problem.bytes / _BYTES_PER_SECOND)


def _draw(rng: random.Random) -> Problem:
    usual = rng.random() < 0.5
    head_dim = rng.choice(_USUAL_HEAD_DIMS) if usual else 8 * rng.randint(2, MAX_HEAD_DIM // 8)
    seqlen_q = round(_uniform_log(rng, *_SEQLENS))
    seqlen_kv = round(_uniform_log(rng, *_SEQLENS)) if rng.random() < 1 / 3 else seqlen_q
    causal = rng.random() < 0.5
    if causal and seqlen_q > seqlen_kv:  # its first queries would see nothing
        seqlen_q, seqlen_kv = seqlen_kv, seqlen_q
    pairs = _uniform_log(rng, *_PAIRS)
    heads = rng.choice([h for h in _HEADS if h <= pairs])
    groups = [g for g in _GROUPS if heads % g == 0]
    group = rng.choice(groups) if groups and rng.random() < 0.4 else 1  # 1 head has no group
    return _bf16(
        max(round(pairs / heads), 1), heads, heads // group, seqlen_q, seqlen_kv, head_dim, causal
    )


def random_problems(count: int, seed: int = 0) -> list[Problem]:
    """`count` different problems of sizes uniform in their logarithm, each of at most 2 ms on an
    H200 as far as this can be told beforehand. A longer list begins with the shorter one."""
    rng = random.Random(seed)
    found: dict[Problem, None] = {}
    while len(found) < count:
        problem = _draw(rng)
        if expected_seconds(problem) <= _MAX_SECONDS and problem.bytes <= _MAX_BYTES:
            found[problem] = None
    return list(found)


def cases() -> dict[str, list[Case]]:
    """All problems by set, each in the order in which it is measured."""
    drawn = random_problems(2 * RANDOM)
    uneven = dict.fromkeys(problem for pair in UNEVEN for problem in pair)
    sets = {
        "row": [row.problem for row in ROWS],
        "table": TABLE,
        "short": SHORT,
        "random": drawn[:RANDOM],
        "uneven": [p for p in uneven if p.bytes <= _MAX_BYTES],
        "train": drawn[RANDOM:],
    }
    return {
        name: [Case(f"{name} {i}", problem) for i, problem in enumerate(problems)]
        for name, problems in sets.items()
    }
