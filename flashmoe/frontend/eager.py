"""Autograd without the dispatcher, for calls that nothing traces or transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmoe.frontend.gradients import Training, mask_gradient, saved_of, sinks_gradient
from flashmoe.frontend.ops import attention_backward, attention_packed_backward
from flashmoe.spec.call import DENSE, NO_TERMS, Call, Saved, Sequences, Terms


class PlainAttention(torch.autograd.Function):
    """(q, k, v, softmax_scale, Training) -> out: EagerAttention of calls that have nothing else,
    whose every argument, result and layer costs host time."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, training: Training
    ) -> Tensor:
        out, lse = training.forward(Call(q, k, v, softmax_scale))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.others = softmax_scale, training
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        scale, training = ctx.others
        if torch.is_grad_enabled():  # by create_graph: the op refuses a second derivative
            arguments = (out, lse, None, scale, *training.arguments)
            return *attention_backward(dout, q, k, v, *arguments), None, None
        gradients = training.gradients(Call(q, k, v, scale), Saved(dout, out, lse))
        return *gradients, None, None


class EagerAttention(torch.autograd.Function):
    """(q, k, v, softmax_scale, Training, sinks, attn_mask, Terms, Sequences) -> out, softmax_lse:
    what the op `attention` computes, without the dispatcher, which takes longer than a small
    problem. For ordinary tensors, where nothing is traced or transformed. `sinks` and `attn_mask`
    are those of the Terms."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        training: Training,
        sinks: Tensor | None = None,
        attn_mask: Tensor | None = None,
        terms: Terms = NO_TERMS,
        sequences: Sequences = DENSE,
    ) -> tuple[Tensor, Tensor]:
        out, lse = training.forward(Call(q, k, v, softmax_scale, terms, sequences))
        assert lse is not None, "need_lse chose a backend that does not return softmax_lse"
        if terms is NO_TERMS and sequences is DENSE:
            ctx.save_for_backward(q, k, v, out, lse)
        else:  # what is changed in place before the backward is an error
            ctx.save_for_backward(q, k, v, out, lse, *terms.tensors, *sequences[:3])
        ctx.others = softmax_scale, training, terms, sequences
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return (None,) * 9
        q, k, v, out, lse, *_ = ctx.saved_tensors
        scale, training, terms, sequences = ctx.others
        saved = saved_of(dout, out, lse, dlse)
        call = Call(q, k, v, scale, terms, sequences)
        if torch.is_grad_enabled():  # by create_graph: the op refuses a second derivative
            arguments = (*saved[1:], scale, *training.arguments, *terms)
            if sequences is DENSE:
                gradients = attention_backward(saved.dout, q, k, v, *arguments)
            else:
                gradients = attention_packed_backward(saved.dout, q, k, v, *arguments, *sequences)
        else:
            gradients = training.gradients(call, saved)
        dsinks = dmask = None
        if terms.sinks is not None and ctx.needs_input_grad[5]:
            dsinks = sinks_gradient(call, saved)
        if terms.attn_mask is not None and ctx.needs_input_grad[6]:
            dmask = mask_gradient(call, saved, training.mask)
        return *gradients, None, None, dsinks, dmask, None, None
