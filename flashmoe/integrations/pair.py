"""A forward and its backward as two functions, for libraries that bring their own autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe.frontend import ops
from flashmoe.frontend.attend import Asked, attend, attend_dropping, new_rng_state
from flashmoe.frontend.varlen import packed_sequences
from flashmoe.spec.call import DENSE
from flashmoe.spec.terms import terms_of


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """out and softmax_lse of flash_attn_func, or with cu_seqlens_q of flash_attn_varlen_func; with
    dropout, S_dmask where return_weights asks for it; and the state of dropout, which says nothing
    without. Records nothing for autograd."""
    asked = Asked(softmax_scale, causal, window_size, return_lse=True)
    sequences = DENSE
    if cu_seqlens_q is not None:
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        sequences = packed_sequences(q, k, *lengths, seqused_k, block_table)
    if dropout_p == 0.0:
        terms = terms_of(softcap, alibi_slopes, None)
        out, lse, _ = attend(q, k, v, asked, terms, sequences)
        return out, lse, None, torch.zeros(2, dtype=torch.int64, device=q.device)
    state = new_rng_state(q.device)
    terms = terms_of(softcap, alibi_slopes, None, dropout_p, state)
    run = attend_dropping if return_weights else attend
    out, lse, weights = run(q, k, v, asked, terms, sequences)
    return out, lse, weights, state


@torch.no_grad()
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    *,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, shaped and typed as q, k, v, of what `forward` gave for `window` without limits
    or (left, 0) where it was causal, with rng_state where there is dropout."""
    if dropout_p and rng_state is None:
        raise ValueError("rng_state must be the forward's, with dropout_p, got None")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    # Kernels have head dimensions that are multiples of 8, and one for all.
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    wide = -(-max(sizes) // 8) * 8
    dout, q, k, v, out = (F.pad(x, (0, wide - x.shape[-1])) for x in (dout, q, k, v, out))
    saved = (dout, q, k, v, out, softmax_lse.contiguous(), None)
    dropout = (dropout_p, rng_state if dropout_p else None)
    how = (scale, *window, "", deterministic, softcap, alibi_slopes, None, *dropout, None)
    if cu_seqlens_q is None:
        found = ops.attention_backward(*saved, *how)
    else:
        lengths = (cu_seqlens_q, cu_seqlens_k, None, None, None, None, max_seqlen_q, max_seqlen_k)
        found = ops.attention_packed_backward(*saved, *how, *lengths)
    dq, dk, dv = (x[..., :size] for x, size in zip(found, sizes, strict=True))
    return dq, dk, dv
