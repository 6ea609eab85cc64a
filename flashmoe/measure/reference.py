"""Attention as mathematics in float64: the judge of every kernel's correctness."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmoe.spec.mask import FULL, Mask


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    mask: Mask = FULL,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V, materialized, differentiable, computed in `dtype`.

    q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen_kv, heads_kv, head_dim).
    Returns out (as q) and softmax_lse (batch, heads_q, seqlen_q), both in `dtype`; a row that sees
    no key has out 0 and lse -inf. With `dtype` the inputs' own it is the same-dtype PyTorch
    computation that tolerances are measured against.
    """
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    qh = q.transpose(1, 2).to(dtype)
    kh = k.transpose(1, 2).to(dtype).repeat_interleave(group, dim=1)
    vh = v.transpose(1, 2).to(dtype).repeat_interleave(group, dim=1)
    scores = qh @ kh.transpose(-1, -2) * scale
    i, j = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
    hidden = mask.hides(i.unsqueeze(1), j, q.shape[1], k.shape[1])
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    empty = hidden.all(-1)
    # A row that sees nothing is 0 by definition, where softmax gives NaN. Not exp(scores - lse): a
    # large lse is rounded by more than the logarithm of the number of keys.
    empty = empty.unsqueeze(-1)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return (weights @ vh).transpose(1, 2), lse


def error_bound(actual_dtype: torch.dtype, same_dtype_error: float, scale: float) -> float:
    """Largest allowed absolute error: twice that of the same-dtype PyTorch computation, plus the
    rounding of a reference value of magnitude `scale` to the output's dtype."""
    return 2.0 * same_dtype_error + torch.finfo(actual_dtype).eps * scale
