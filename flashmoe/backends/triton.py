"""Triton kernels, forward and backward: the same parameters, compiled on the user's machine."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashmoe import tiles
from flashmoe.backends.base import (
    Backend,
    Default,
    Features,
    Run,
    RunBackward,
    first_default,
    last_contiguous,
    reasons_of,
    reject_illegal,
)
from flashmoe.backends.each import backward_of_each, forward_of_each
from flashmoe.backends.padding import run_backward_padded, run_padded
from flashmoe.machine.device import Arch
from flashmoe.prediction import costs
from flashmoe.spec.call import Call, Saved, Terms
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile


def _tile(block_m: int, block_n: int, num_stages: int, num_warps: int, tma: bool = False) -> Tile:
    return Tile("triton", block_m, block_n, num_stages, num_warps, tma)


# The first entry that applies and is legal is the default. Each list ends in what fits the 99 KiB
# of shared memory of consumer GPUs. sm90: the fastest on an H200 (bfloat16, batch 2 to 4, seqlen
# 4096 to 8192, Triton 3.6); at seqlen 512 and head_dim 64 pointers beat tma, 311 to 288 TFLOP/s.
_DEFAULTS: dict[tuple[str, str], tuple[Default, ...]] = {
    ("sm90", "fwd"): (
        Default(64, _tile(64, 128, 2, 4, tma=True), min_seqlen_q=2048),
        Default(64, _tile(64, 64, 3, 4)),
        Default(128, _tile(64, 64, 3, 4, tma=True)),
        Default(256, _tile(128, 64, 2, 8, tma=True)),
        Default(256, _tile(64, 32, 2, 4)),
    ),
    ("sm90", "bwd"): (
        Default(64, _tile(64, 64, 3, 4, tma=True)),
        Default(128, _tile(64, 128, 3, 8), causal=True),
        Default(128, _tile(64, 64, 2, 4, tma=True)),
        Default(256, _tile(64, 64, 2, 8)),
        Default(256, _tile(64, 64, 1, 8)),
        Default(256, _tile(32, 32, 1, 8)),
    ),
    ("sm80", "fwd"): (
        Default(64, _tile(128, 64, 3, 4)),
        Default(128, _tile(128, 64, 2, 8)),
        Default(256, _tile(64, 32, 2, 4)),
    ),
    ("sm80", "bwd"): (
        Default(64, _tile(64, 128, 2, 8)),
        Default(128, _tile(64, 64, 2, 8)),
        Default(128, _tile(64, 64, 1, 8)),
        Default(256, _tile(32, 32, 1, 8)),
    ),
    ("float32", "fwd"): (
        Default(64, _tile(32, 32, 2, 4)),
        Default(128, _tile(32, 32, 2, 8)),
        Default(256, _tile(16, 32, 2, 8)),
        Default(256, _tile(16, 32, 1, 8)),
    ),
    ("float32", "bwd"): (
        Default(64, _tile(32, 32, 1, 4)),
        Default(128, _tile(16, 32, 1, 8)),
        Default(256, _tile(16, 16, 1, 8)),
    ),
}
# Neither size nor warps matter to the interpreter.
_INTERPRETED = _tile(16, 16, 1, 4)


def _considered(problem: Problem) -> list[Tile]:
    kind = "float32" if problem.dtype == "float32" else problem.direction
    return tiles.grid("triton", **tiles.axes("triton", kind))


_TERMS = ("softcap", "alibi", "sink", "dropout", "mask")


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(Backend):
    name = "triton"
    # Packed and cached ones are computed one sequence at a time.
    features: ClassVar[Features] = {
        "fwd": frozenset({"window", "head_dim_v", *_TERMS, "packed", "cache", "paged"}),
        "bwd": frozenset({"window", "head_dim_v", *_TERMS, "packed"}),
    }

    def unavailable(self, device: torch.device) -> str:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            return "" if major >= 8 else f"needs compute capability 8.0, got {major}.{minor}"
        if device.type == "cpu" and _interpreted():
            return ""
        return f"needs a CUDA device (or TRITON_INTERPRET=1), got {device.type}"

    def default_tile(self, problem: Problem, arch: Arch) -> Tile:
        if arch.kind == "cpu":
            return _INTERPRETED
        family = "sm90" if arch.capability >= (9, 0) else "sm80"
        if problem.dtype == "float32":
            family = "float32"
        tile = first_default(_DEFAULTS[family, problem.direction], problem, arch)
        assert tile is not None, "each list ends in what fits every GPU"
        return tile

    def predicted(self, tile: Tile | None, problem: Problem, arch: Arch) -> float | None:
        """Only where it was calibrated."""
        if tile is None or problem.direction != "fwd" or problem.layout != "dense":
            return None
        head_dim = tiles.triton.triton_head_dim(problem.padded_dim)
        return costs.tile_microseconds(tile, head_dim, problem, arch)

    def tiles(self, problem: Problem, arch: Arch) -> list[Tile]:
        if arch.kind == "cpu":
            return [_INTERPRETED]
        legal = [t for t in _considered(problem) if not t.violations(arch, problem)]
        default = self.default_tile(problem, arch)
        return legal if default in legal else [default, *legal]

    def reasons(self, problem: Problem, arch: Arch) -> dict[Tile, str]:
        return reasons_of(_considered(problem), self.tiles(problem, arch), problem, arch)

    def rejects(self, tile: Tile | None, problem: Problem, arch: Arch) -> str:
        return reject_illegal(tile, problem, arch)

    def is_compiled(self, tile: Tile, problem: Problem) -> bool:
        return False  # only Triton knows, and answers by compiling

    def precompile(self, tile: Tile, problem: Problem, device: torch.device) -> None:
        """Into Triton's own cache on disk. Tensors of the problem's shape are allocated, for their
        strides and alignment are compiled in."""
        from flashmoe.backends.triton_bwd import attention_backward
        from flashmoe.backends.triton_fwd import attention_forward

        # Other layouts are computed one sequence at a time.
        batch = problem.batch if problem.layout == "dense" else 1
        dtype: torch.dtype = getattr(torch, problem.dtype)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        is_forward = problem.direction == "fwd"
        head_dims = (
            (problem.head_dim, problem.value_dim) if is_forward else (problem.padded_dim,) * 2
        )
        q = empty(batch, problem.seqlen_q, problem.heads_q, head_dims[0])
        k, v = (empty(batch, problem.seqlen_kv, problem.heads_kv, d) for d in head_dims)
        of_heads = empty(problem.heads_q, dtype=torch.float32)
        terms = Terms(
            float("softcap" in problem.terms),
            of_heads if "alibi" in problem.terms else None,
            of_heads if "sink" in problem.terms else None,
            0.5 if "dropout" in problem.terms else 0.0,
            empty(2, dtype=torch.int64) if "dropout" in problem.terms else None,
            empty(batch, 1, 1, problem.seqlen_kv, dtype=torch.bool)
            if "mask" in problem.terms
            else None,
        )
        call = Call(q, k, v, float(problem.head_dim**-0.5), terms)
        if is_forward:
            attention_forward(call, problem.mask, **_options(tile), launch=False)
            return
        lse = empty(batch, problem.heads_q, problem.seqlen_q, dtype=torch.float32)
        attention_backward(call, Saved(q, q, lse), problem.mask, **_options(tile), launch=False)

    def bind(self, problem: Problem, tile: Tile | None) -> Run:
        from flashmoe.backends.triton_fwd import attention_forward

        assert tile is not None, "the triton forward needs a tile"
        mask, options = problem.mask, _options(tile)

        def run(call: Call) -> tuple[Tensor, Tensor | None]:
            q, k, v = (last_contiguous(x) for x in call[:3])
            return attention_forward(call._replace(q=q, k=k, v=v), mask, **options)

        chosen: Run = run
        if problem.head_dim_v is not None and problem.dtype != "float32":
            chosen = _padded_where_miscompiled(run)
        return chosen if problem.layout == "dense" else lambda call: forward_of_each(call, chosen)

    def bind_backward(
        self, problem: Problem, tile: Tile | None, deterministic: bool = False
    ) -> RunBackward:
        from flashmoe.backends.triton_bwd import attention_backward

        assert tile is not None, "the triton backward needs a tile"
        mask, options = problem.mask, _options(tile)

        def run(call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v, dout = (last_contiguous(x) for x in (*call[:3], saved.dout))
            contiguous = call._replace(q=q, k=k, v=v)
            return attention_backward(contiguous, saved._replace(dout=dout), mask, **options)

        def run_packed(call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
            return backward_of_each(call, saved, run)

        chosen = run_packed if problem.layout == "packed" else run
        return chosen if problem.head_dim_v is None else run_backward_padded(chosen)


def _padded_where_miscompiled(run: Run) -> Run:
    """`run`, but with one head_dim on a GPU where a stride is no multiple of 16 elements. There
    Triton 3.6 miscompiles 16-bit values that are narrower than their keys: on an H200 head_dim 64
    and 32 came out wrong, or read where nothing is."""
    run_of_one = run_padded(run)

    def run_of_two(call: Call) -> tuple[Tensor, Tensor | None]:
        is_ragged = any(n % 16 for x in call[:3] for n in x.stride()[:-1])
        return (run_of_one if is_ragged and call.q.is_cuda else run)(call)

    return run_of_two


def _options(tile: Tile) -> dict[str, Any]:
    """The tile as its kernels take it."""
    return {
        "block_m": tile.block_m,
        "block_n": tile.block_n,
        "num_stages": tile.num_stages,
        "num_warps": tile.num_warps,
        "use_tma": tile.tma,
    }
