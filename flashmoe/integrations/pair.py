"""A forward and its backward as two functions, for libraries that bring their own autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flashmoe
from flashmoe.frontend import ops


@torch.no_grad()
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out and softmax_lse of flash_attn_func, or with cu_seqlens_q of flash_attn_varlen_func, whose
    other arguments are `options`. Records nothing for autograd."""
    if cu_seqlens_q is None:
        result = flashmoe.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    else:
        result = flashmoe.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            return_attn_probs=True,
            **options,
        )
    return result[0], result[1]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, shaped and typed as q, k, v, of what `forward` gave for `window` without limits
    or (left, 0) where it was causal."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    # Kernels have head dimensions that are multiples of 8, and one for all.
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    wide = -(-max(sizes) // 8) * 8
    dout, q, k, v, out = (F.pad(x, (0, wide - x.shape[-1])) for x in (dout, q, k, v, out))
    saved = (dout, q, k, v, out, softmax_lse.contiguous(), None)
    how = (scale, *window, "", deterministic, softcap, alibi_slopes, None, None)
    if cu_seqlens_q is None:
        found = ops.attention_backward(*saved, *how)
    else:
        lengths = (cu_seqlens_q, cu_seqlens_k, None, None, None, None, max_seqlen_q, max_seqlen_k)
        found = ops.attention_packed_backward(*saved, *how, *lengths)
    dq, dk, dv = (x[..., :size] for x, size in zip(found, sizes, strict=True))
    return dq, dk, dv
