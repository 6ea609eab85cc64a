"""flash_attn_interface: FlashAttention-3's private forward/backward pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmoe.frontend.validation import Asked
from flashmoe.frontend.varlen import packed_sequences
from flashmoe.integrations import pair
from flashmoe.integrations.flash_attn import fa3
from flashmoe.spec.call import DENSE, Saved
from flashmoe.spec.terms import terms_of

__all__ = ["_flash_attn_backward", "_flash_attn_forward"]


@torch.no_grad()
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, softmax_lse, and two tensors of nothing. Records nothing for autograd."""
    how: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "qv": qv,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "window_size": (window_size_left, window_size_right),
        "attention_chunk": attention_chunk,
        "softcap": softcap,
    }
    if cu_seqlens_k is None and any(
        x is not None for x in (k_new, seqused_k, page_table, kv_batch_idx, leftpad_k)
    ):
        if seqused_q is not None:
            raise NotImplementedError("seqused_q must be None with a cache (not supported)")
        out, lse = fa3.flash_attn_with_kvcache(
            *(q, k, v, k_new, v_new),
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            cache_seqlens=seqused_k,
            cache_batch_idx=kv_batch_idx,
            cache_leftpad=leftpad_k,
            page_table=page_table,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k_new=cu_seqlens_k_new,
            max_seqlen_q=max_seqlen_q,
            rotary_seqlens=seqlens_rotary,
            rotary_interleaved=rotary_interleaved,
            num_splits=num_splits,
            return_softmax_lse=True,
            **how,
        )
    elif cu_seqlens_q is None:
        out, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True, **how)
    else:
        lengths: Any = (
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            seqused_q,
            seqused_k,
        )
        out, lse = fa3.flash_attn_varlen_func(
            q, k, v, *lengths, **how | {"return_attn_probs": True}
        )
    nothing = out.new_empty(0)
    return (out if out_ is None else out_.copy_(out)), lse, nothing, nothing


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    """Writes dq, dk and dv; returns the rows' sums of dout * out (batch, heads, seqlen), or
    (heads, total) with cu_seqlens_q."""
    for name, x in (("sequed_q", sequed_q), ("sequed_k", sequed_k)):
        if x is not None:
            raise NotImplementedError(f"{name} must be None (not supported), got a tensor")
    asked = Asked(softmax_scale, is_causal, (window_size_left, window_size_right), deterministic)
    sequences = DENSE
    if cu_seqlens_q is not None:
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0)
        sequences = packed_sequences(q, k, *lengths)
    saved, terms = Saved(dout, out, softmax_lse), terms_of(softcap, None, None)
    found = pair.backward(q, k, v, saved, asked, terms, sequences)
    for place, gradient in zip((dq, dk, dv), found, strict=True):
        if place is not None:
            place.copy_(gradient)
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2)
