"""Attention as mathematics in float64: the judge of every kernel's correctness."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmoe.spec.call import Call
from flashmoe.spec.dropout import dropout_scale, kept_weights, rng_state_of_sequence
from flashmoe.spec.mask import FULL, Mask
from flashmoe.spec.sequence import rows_of_keys, sequences_of


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    mask: Mask = FULL,
    dtype: torch.dtype = torch.float64,
    *,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    attn_mask: Tensor | None = None,
    first_row: int = 0,
    seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V, materialized, differentiable, computed in `dtype`.

    q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen_kv, heads_kv, head_dim);
    alibi_slopes (heads_q,) or (batch, heads_q), sinks (heads_q,), rng_state (2,), int64, attn_mask
    as SDPA's. Where q is only some of the queries, it begins at the first_row of seqlen_q, and so
    do attn_mask's rows.
    Returns out (as q) and softmax_lse (batch, heads_q, seqlen_q), both in `dtype`; a row that sees
    no key has out 0 and its sink, or -inf, as lse. With `dtype` the inputs' own it is the
    same-dtype PyTorch computation that tolerances are measured against; slopes and sinks stay
    float32 there, as those of models are.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    seqlen_q = q.shape[1] if seqlen_q is None else seqlen_q
    vh = v.transpose(1, 2).to(dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    i = first_row + torch.arange(q.shape[1], device=q.device).unsqueeze(1)
    terms = softcap, alibi_slopes, attn_mask
    scores, hidden = scores_of(q, k, scale, mask, dtype, *terms, i, seqlen_q)
    if sinks is not None:
        sink = (
            sinks.to(torch.promote_types(dtype, torch.float32))
            .reshape(-1, 1, 1)
            .expand(*scores.shape[:3], 1)
        )
        scores = torch.cat((scores, sink), dim=-1)
    # In two steps, for its gradient is exp(scores - lse), and a large lse is rounded by more than
    # the logarithm of the number of keys.
    rounded = torch.logsumexp(scores.detach(), dim=-1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
    lse = (rounded.squeeze(-1) + torch.logsumexp(scores - rounded, dim=-1)).to(dtype)
    empty = hidden.all(-1)
    # A row that sees nothing is 0 by definition, where softmax gives NaN.
    empty = empty.unsqueeze(-1)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    weights = weights[..., : k.shape[1]]
    if rng_state is not None:
        sides = (first_row, first_row + q.shape[1]), (0, k.shape[1])
        kept = kept_weights(rng_state, dropout_p, len(q), q.shape[2], *sides)
        weights = weights * kept * dropout_scale(dropout_p)
    return _product(weights.to(dtype), vh).transpose(1, 2), lse


def scores_of(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Mask,
    dtype: torch.dtype,
    softcap: float,
    alibi_slopes: Tensor | None,
    attn_mask: Tensor | None,
    i: Tensor,
    seqlen_q: int,
) -> tuple[Tensor, Tensor]:
    """(batch, heads_q, seqlen_q, seqlen_kv), -inf where a query does not see a key; and where that
    is. Arguments as in attention_reference; i (rows of q, 1) are their numbers among seqlen_q."""
    kh = k.transpose(1, 2).to(dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    scores = _product(q.transpose(1, 2).to(dtype), kh.transpose(-1, -2)) * scale
    j = torch.arange(k.shape[1], device=k.device)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = (i + k.shape[1] - seqlen_q - j).abs()
        slopes = alibi_slopes.to(torch.promote_types(dtype, torch.float32))
        scores = scores - slopes[..., None, None] * distance
    hidden: Tensor = mask.hides(i, j, seqlen_q, k.shape[1])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = hidden | ~attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
        hidden = hidden | (attn_mask == float("-inf"))
    return scores.masked_fill(hidden, float("-inf")), hidden


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b. torch sums 16-bit products in float32 and rounds once; without 16-bit matrix units its
    float32 product, rounded, has the same errors in a tenth of the time."""
    if a.device.type == "cpu" and a.dtype.itemsize < 4:
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def sequences_reference(
    call: Call, mask: Mask = FULL, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """attention_reference of any Call, one sequence at a time: packed, in a cache or in pages.

    Returns out (as q) and softmax_lse (heads_q, total_q) where q is packed, else (batch, heads_q,
    seqlen_q), both in `dtype`. Rows of q in no sequence have out 0 and lse -inf. Page and batch
    indices are clamped to what k has; without a page, or a batch, there are no keys.
    """
    q, terms = call.q, call.terms
    packed = call.sequences.cu_seqlens_q is not None
    k_rows, v_rows = (x.flatten(0, -3) for x in (call.k, call.v))
    out = torch.zeros((*q.shape[:-1], call.v.shape[-1]), dtype=dtype, device=q.device)
    lse = out.new_full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -torch.inf)
    for index, sequence in enumerate(sequences_of(call)):
        rows = slice(sequence.q_begin, sequence.q_begin + sequence.seqlen_q)
        keys = rows_of_keys(call, index, sequence)
        slopes = terms.alibi_slopes
        one_out, one_lse = attention_reference(
            (q if packed else q[index])[rows].unsqueeze(0),
            k_rows[keys].unsqueeze(0),
            v_rows[keys].unsqueeze(0),
            call.softmax_scale,
            mask,
            dtype,
            softcap=terms.softcap,
            alibi_slopes=slopes[index] if slopes is not None and slopes.dim() == 2 else slopes,
            sinks=terms.sinks,
            dropout_p=terms.dropout_p,
            rng_state=rng_state_of_sequence(terms.rng_state, index),
            attn_mask=_of_batch(terms.attn_mask, index),
        )
        (out if packed else out[index])[rows] = one_out[0]
        (lse if packed else lse[index])[:, rows] = one_lse[0]
    return out, lse


def _of_batch(attn_mask: Tensor | None, index: int) -> Tensor | None:
    if attn_mask is None or attn_mask.dim() < 4 or attn_mask.shape[0] == 1:
        return attn_mask
    return attn_mask[index : index + 1]


def error_bound(actual_dtype: torch.dtype, same_dtype_error: float, scale: float) -> float:
    """Largest allowed absolute error: twice that of the same-dtype PyTorch computation, plus the
    rounding of a reference value of magnitude `scale` to the output's dtype."""
    return 2.0 * same_dtype_error + torch.finfo(actual_dtype).eps * scale
