"""Packed and cached calls by what computes dense ones: one sequence at a time, whose lengths are
read on the host. It serves what has no kernel of its own for them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flashmoe.backends.base import Run, RunBackward
from flashmoe.spec.call import DENSE, Call, Saved
from flashmoe.spec.dropout import rng_state_of_sequence
from flashmoe.spec.sequence import rows_of_keys, sequences_of


def forward_of_each(call: Call, attend: Run) -> tuple[Tensor, Tensor]:
    """out as q, with v's head_dim, and softmax_lse (heads_q, total_q) where q is packed, else
    (batch, heads_q, seqlen_q). Rows of q in no sequence have out 0 and softmax_lse -inf."""
    q = call.q
    out = q.new_zeros(*q.shape[:-1], call.v.shape[-1])
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    lse = torch.full(shape, float("-inf"), dtype=torch.float32, device=q.device)
    for index, rows, _, dense in each_sequence(call):
        one_out, one_lse = attend(dense)
        assert one_lse is not None, "one sequence's softmax_lse"
        if call.sequences.cu_seqlens_q is None:
            out[index], lse[index] = one_out[0], one_lse[0]
        else:
            out[rows], lse[:, rows] = one_out[0], one_lse[0]
    return out, lse


def backward_of_each(
    call: Call, saved: Saved, attend_backward: RunBackward
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of a packed call. What is in no sequence gets 0."""
    assert call.sequences.cu_seqlens_q is not None, "needs a packed q, too"
    gradients = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in call[:3])
    dout, out, lse, dlse = saved
    for _, rows, keys, dense in each_sequence(call):
        of_one = Saved(
            dout[None, rows],
            out[None, rows],
            lse[None, :, rows].contiguous(),
            None if dlse is None else dlse[None, :, rows].contiguous(),
        )
        for x, where, gradient in zip(
            gradients, (rows, keys, keys), attend_backward(dense, of_one), strict=True
        ):
            x[where] = gradient[0]
    dq, dk, dv = gradients
    return dq, dk, dv


def each_sequence(call: Call) -> Iterator[tuple[int, slice, slice | Tensor, Call]]:
    """Of every sequence: its number, its rows of q, its rows of the batches or pages of k, and the
    call of it alone, a batch of one."""
    slopes, packed = call.terms.alibi_slopes, call.sequences.cu_seqlens_q is not None
    k_rows, v_rows = (x.flatten(0, -3) for x in (call.k, call.v))
    for index, sequence in enumerate(sequences_of(call)):
        rows = slice(sequence.q_begin, sequence.q_begin + sequence.seqlen_q)
        keys: slice | Tensor = slice(sequence.k_begin, sequence.k_begin + sequence.seqlen_kv)
        if call.sequences.cu_seqlens_k is None:
            keys = rows_of_keys(call, index, sequence)
        terms = call.terms
        if slopes is not None and slopes.dim() == 2:
            terms = terms._replace(alibi_slopes=slopes[index])
        if terms.rng_state is not None:
            terms = terms._replace(rng_state=rng_state_of_sequence(terms.rng_state, index))
        q = call.q[None, rows] if packed else call.q[index : index + 1]
        dense = call._replace(
            q=q, k=k_rows[None, keys], v=v_rows[None, keys], terms=terms, sequences=DENSE
        )
        yield index, rows, keys, dense
