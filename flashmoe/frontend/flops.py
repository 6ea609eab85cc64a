"""What torch.utils.flop_counter counts for the ops, by torch's own rule for attention: every query
with every key of its sequence, whatever a mask hides, and Q K^T once more in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from flashmoe.frontend.ops import (
    Arguments,
    attention_packed_backward,
    attention_split,
    saved_call,
)
from flashmoe.spec.call import Call
from flashmoe.spec.sequence import sequences_of

_ops = torch.ops.flashmoe


def _pairs(call: Call) -> int:
    """Of queries and keys. Of tensors without values, as torch.compile traces, as many as the
    longest sequences may have."""
    q, k, sequences = call.q, call.k, call.sequences
    if not isinstance(q, FakeTensor):
        return sum(x.seqlen_q * x.seqlen_kv for x in sequences_of(call))
    if sequences.cu_seqlens_q is None:
        batch, seqlen_q = q.shape[:2]
    else:
        batch, seqlen_q = sequences.cu_seqlens_q.shape[0] - 1, sequences.max_seqlen_q
    if sequences.cu_seqlens_k is not None:
        return batch * seqlen_q * sequences.max_seqlen_k
    pages = 1 if sequences.block_table is None else sequences.block_table.shape[1]
    return batch * seqlen_q * pages * k.shape[1]


def _flops(call: Call, of_q: int, of_v: int) -> int:
    """With so many matmuls of head_dim and of v's columns for each pair."""
    columns = of_q * call.q.shape[-1] + of_v * call.v.shape[-1]
    return 2 * _pairs(call) * call.q.shape[-2] * columns


def _positional(op: torch._ops.OpOverload, arguments: tuple[Any, ...], named: Any) -> list[Any]:
    """Those of an op, or of one that has fewer, some given by name."""
    known = op._schema.arguments
    given = {x.name: value for x, value in zip(known, arguments, strict=False)} | named
    return [given.get(x.name, x.default_value) for x in known]


@register_flop_formula(
    [_ops.attention, _ops.attention_without_lse, _ops.attention_packed, _ops.attention_split],
    get_raw=True,
)
def forward_flops(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    given = _positional(attention_split, arguments, named)
    return _flops(Arguments.of(*given).call, 1, 1)


@register_flop_formula([_ops.attention_backward, _ops.attention_packed_backward], get_raw=True)
def backward_flops(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    given = _positional(attention_packed_backward, arguments, named)
    return _flops(saved_call(*given)[0].call, 3, 2)


@register_flop_formula([_ops.attention_mask_backward], get_raw=True)
def mask_backward_flops(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    given = _positional(attention_packed_backward, arguments, named)
    return _flops(saved_call(*given)[0].call, 1, 1)
