"""The problems that shipped databases cover, by suite."""

from __future__ import annotations

from hopper.rows import ROWS

from flashmoe import Problem
from flashmoe.spec.mask import causal_if


def _bf16(
    batch: int, heads_q: int, heads_kv: int, lengths: tuple[int, int], head_dim: int, causal: bool
) -> Problem:
    return Problem(batch, heads_q, heads_kv, *lengths, head_dim, "bfloat16", mask=causal_if(causal))


def _float32(batch: int, heads: int, seqlen: int, head_dim: int, causal: bool) -> Problem:
    return Problem(batch, heads, heads, seqlen, seqlen, head_dim, "float32", mask=causal_if(causal))


# By name: what the Hopper kernel is judged by (benchmarks/hopper/rows.py); what else runs on the
# CUDA kernels by default: short sequences, other head dimensions, few queries on many keys; and
# what runs on the Triton kernel by default, which is float32.
SUITES: dict[str, tuple[Problem, ...]] = {
    "rows": tuple(row.problem for row in ROWS),
    "short": (
        _bf16(8, 16, 16, (128, 128), 64, False),
        _bf16(8, 12, 12, (384, 384), 64, False),
        _bf16(64, 12, 12, (197, 197), 64, False),
        _bf16(8, 16, 16, (256, 256), 128, False),
        _bf16(4, 32, 8, (256, 256), 128, True),
        _bf16(2, 32, 8, (512, 512), 128, True),
        _bf16(1, 32, 8, (1024, 1024), 128, True),
        _bf16(1, 32, 8, (256, 4096), 128, True),
        _bf16(8, 32, 8, (16, 4096), 128, True),
        _bf16(8, 16, 16, (1024, 1024), 96, True),
    ),
    "triton": (
        _float32(8, 16, 128, 64, False),
        _float32(4, 16, 512, 64, False),
        _float32(4, 16, 512, 64, True),
        _float32(2, 16, 2048, 64, True),
        _float32(4, 16, 512, 128, False),
        _float32(2, 16, 2048, 128, False),
        _float32(2, 16, 2048, 128, True),
        _float32(1, 8, 2048, 256, False),
    ),
    # To try the commands without a GPU.
    "cpu": (_float32(1, 4, 256, 32, False), _float32(1, 4, 256, 32, True)),
}
# Eight problems for two runs that shall agree: every head dimension, short and long, GQA.
SUITES["agree"] = (
    *(SUITES["rows"][n] for n in (0, 3, 8, 11, 13, 16, 25)),
    SUITES["short"][6],
)
SHIPPED = tuple(p for name in ("rows", "short", "triton") for p in SUITES[name])
