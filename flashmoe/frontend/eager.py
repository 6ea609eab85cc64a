"""Autograd without the dispatcher, for calls that nothing traces or transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmoe.frontend.gradients import Training, mask_gradient, saved_of, sinks_gradient
from flashmoe.frontend.ops import attention_backward, attention_packed_backward
from flashmoe.spec.call import DENSE, NO_TERMS, Call, Saved


class PlainAttention(torch.autograd.Function):
    """(Training, Call, q, k, v) -> out: EagerAttention of calls without sinks and attn_mask whose
    softmax_lse nobody sees: a second result costs a step 40 us (H200)."""

    @staticmethod
    def forward(ctx: Any, training: Training, call: Call, *_: Tensor) -> Tensor:
        return _forward(ctx, training, call)[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        return None, None, *_backward(ctx, dout, None)[0]


class EagerAttention(torch.autograd.Function):
    """(Training, Call, q, k, v, sinks, attn_mask) -> out, softmax_lse: what the op `attention`
    computes, without the dispatcher, which takes longer than a small problem. For ordinary tensors,
    where nothing is traced or transformed. Behind the Call are those of its tensors that get
    gradients, for autograd looks into no tuple."""

    @staticmethod
    def forward(
        ctx: Any, training: Training, call: Call, *_: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return _forward(ctx, training, call)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return (None,) * 7
        gradients, call, saved = _backward(ctx, dout, dlse)
        dsinks = dmask = None
        if call.terms.sinks is not None and ctx.needs_input_grad[5]:
            dsinks = sinks_gradient(call, saved)
        if call.terms.attn_mask is not None and ctx.needs_input_grad[6]:
            dmask = mask_gradient(call, saved, ctx.others[0].mask)
        return None, None, *gradients, dsinks, dmask


def _forward(ctx: Any, training: Training, call: Call) -> tuple[Tensor, Tensor]:
    out, lse = training.forward(call)
    assert lse is not None, "need_lse chose a backend that does not return softmax_lse"
    q, k, v, scale, terms, sequences = call
    if terms is NO_TERMS and sequences is DENSE:
        ctx.save_for_backward(q, k, v, out, lse)
    else:  # what is changed in place before the backward is an error
        ctx.save_for_backward(q, k, v, out, lse, *terms.tensors, *sequences[:3])
    ctx.others = training, scale, terms, sequences
    return out, lse


def _backward(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Call, Saved]:
    """dq, dk and dv, and what they are of."""
    q, k, v, out, lse, *_ = ctx.saved_tensors
    training, scale, terms, sequences = ctx.others
    saved, call = saved_of(dout, out, lse, dlse), Call(q, k, v, scale, terms, sequences)
    if not torch.is_grad_enabled():
        return training.gradients(call, saved), call, saved
    # By create_graph: the op refuses a second derivative.
    arguments = (saved.dout, q, k, v, *saved[1:], scale, *training.arguments, *terms)
    if sequences is DENSE:
        return attention_backward(*arguments), call, saved
    return attention_packed_backward(*arguments, *sequences), call, saved
