"""torch.library registration: what torch.compile, autograd and opcheck see of our kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmoe import _extension, shapes
from flashmoe.backends import BACKENDS
from flashmoe.plan import remembered_plan
from flashmoe.problem import Problem

_extension.load()


def problem_of(q: Tensor, k: Tensor, causal: bool, direction: str = "fwd") -> Problem:
    """The Problem of q (batch, seqlen_q, heads_q, head_dim) and k (batch, seqlen_kv, heads_kv,
    head_dim)."""
    return Problem(
        batch=q.shape[0],
        heads_q=q.shape[2],
        heads_kv=k.shape[2],
        seqlen_q=q.shape[1],
        seqlen_kv=k.shape[1],
        head_dim=q.shape[3],
        dtype=str(q.dtype).removeprefix("torch."),
        causal=causal,
        direction=direction,
    )


def _fake_forward(q: Tensor) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


@torch.library.register_fake("flashmoe::fwd_cpu")  # type: ignore[untyped-decorator]
def _fwd_cpu_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, Tensor]:
    return _fake_forward(q)


@torch.library.register_fake("flashmoe::fwd_cuda")  # type: ignore[untyped-decorator]
def _fwd_cuda_fake(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, kernel: int
) -> tuple[Tensor, Tensor]:
    return _fake_forward(q)


@torch.library.custom_op("flashmoe::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    backend: str,
    tile: str,
) -> tuple[Tensor, Tensor]:
    """out and softmax_lse, differentiable in q, k and v through out. The plan is made at run time,
    by the first call for a problem, so a compiled graph follows the tuned database. Empty `backend`
    and `tile` do not override."""
    problem = problem_of(q, k, causal)
    if shapes.recorder is not None:
        shapes.recorder[problem] += 1
    plan = remembered_plan(problem, q.device, backend, tile, need_lse=True)
    out, lse = BACKENDS[plan.backend].forward(q, k, v, softmax_scale, causal, plan.tile)
    assert lse is not None, "need_lse chose a backend that does not tell lse"
    return out, lse


@attention.register_fake
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    backend: str,
    tile: str,
) -> tuple[Tensor, Tensor]:
    return _fake_forward(q)


@torch.library.custom_op("flashmoe::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    softmax_scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, shaped and typed as q, k, v."""
    plan = remembered_plan(problem_of(q, k, causal, "bwd"), q.device, backend)
    return BACKENDS[plan.backend].backward(
        dout, q, k, v, out, softmax_lse, softmax_scale, causal, plan.tile
    )


@attention_backward.register_fake
def _attention_backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    softmax_scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, softmax_scale, causal, backend, _ = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.arguments = (softmax_scale, causal, backend)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    # api hands out lse detached, so dlse is the zeros that autograd fills in.
    q, k, v, out, lse = ctx.saved_tensors
    dq, dk, dv = attention_backward(dout, q, k, v, out, lse, *ctx.arguments)
    return dq, dk, dv, None, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)
