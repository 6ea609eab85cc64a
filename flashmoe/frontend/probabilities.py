"""What flash-attn calls S_dmask: weights, and which of them dropout dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmoe.backends.each import each_sequence
from flashmoe.measure.reference import scores_of
from flashmoe.spec.call import DENSE, Call
from flashmoe.spec.dropout import kept_weights
from flashmoe.spec.mask import Mask


def signed_weights(call: Call, mask: Mask) -> Tensor:
    """(batch, heads_q, seqlen_q, seqlen_kv), or of packed sequences (batch, heads_q, max_seqlen_q,
    max_seqlen_k), typed as q: exp(score - the row's largest), negative where it was dropped, 0 of
    what is hidden or in no sequence. For tests: in torch operations, and all of it in memory."""
    if call.sequences is DENSE:
        return _of_dense(call, mask)
    s, k = call.sequences, call.k
    batch = len(call.q) if s.cu_seqlens_q is None else len(s.cu_seqlens_q) - 1
    longest_q = call.q.shape[1] if s.cu_seqlens_q is None else s.max_seqlen_q
    longest_k = s.max_seqlen_k
    if s.cu_seqlens_k is None:
        longest_k = k.shape[1] * (1 if s.block_table is None else s.block_table.shape[1])
    found = call.q.new_zeros(batch, call.q.shape[-2], longest_q, longest_k)
    for index, _, _, dense in each_sequence(call):
        found[index, :, : dense.q.shape[1], : dense.k.shape[1]] = _of_dense(dense, mask)[0]
    return found


def _of_dense(call: Call, mask: Mask) -> Tensor:
    q, k, _, scale, terms, _ = call
    assert terms.rng_state is not None, "of a call with dropout"
    rows = torch.arange(q.shape[1], device=q.device).unsqueeze(1)
    options = (terms.softcap, terms.alibi_slopes, terms.attn_mask, rows, q.shape[1])
    scores, _ = scores_of(q, k, scale, mask, torch.float32, *options)
    largest = scores.amax(-1, keepdim=True) if k.shape[1] else scores
    weights = (scores - largest.masked_fill(largest == -torch.inf, 0.0)).exp()
    sides = (0, q.shape[1]), (0, k.shape[1])
    kept = kept_weights(terms.rng_state, terms.dropout_p, len(q), q.shape[2], *sides)
    return torch.where(kept, weights, -weights).to(q.dtype)
