"""flash_attn.layers.rotary and flash_attn.ops.triton.rotary, in torch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x (batch, seqlen, heads, head_dim), or with cu_seqlens (total, heads, head_dim), the first
    rotary_dim columns of which are rotated by cos and sin (seqlen_rotary, rotary_dim / 2) of the
    position in the sequence, shifted by seqlen_offsets, an int or (batch,).

    interleaved: columns 0 and 1, 2 and 3, ... are pairs (GPT-J); else column i and i +
    rotary_dim / 2 (GPT-NeoX). inplace: x is overwritten, too. max_seqlen is not needed.
    """
    if cu_seqlens is None:
        positions = torch.arange(x.shape[1], device=x.device)
        offsets = seqlen_offsets
        if isinstance(offsets, Tensor):
            offsets = offsets.view(-1, 1)
        positions = positions + offsets
    else:
        rows = torch.arange(x.shape[0], device=x.device)
        # Rows past the last sequence are left as they are; which one they use says nothing.
        sequence = torch.searchsorted(cu_seqlens.long(), rows, right=True) - 1
        sequence = sequence.clamp(max=len(cu_seqlens) - 2)
        positions = rows - cu_seqlens[sequence]
        if isinstance(seqlen_offsets, Tensor):
            positions = positions + seqlen_offsets[sequence]
        else:
            positions = positions + seqlen_offsets
        positions = torch.where(rows < cu_seqlens[-1], positions, 0)
    rotated = _rotated(x, cos[positions], sin[positions], interleaved)
    if cu_seqlens is not None:
        rotated = torch.where((rows < cu_seqlens[-1]).view(-1, 1, 1), rotated, x)
    return x.copy_(rotated) if inplace else rotated


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """apply_rotary_emb by the name of its Triton kernel; conjugate: rotated back."""
    how = (interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)
    return apply_rotary_emb(x, cos, -sin if conjugate else sin, *how)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """apply_rotary_emb with cos and sin (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2)
    of each position."""
    return _rotated(x, cos, sin, interleaved)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates q and k of qkv (batch, seqlen, 3, heads, head_dim), or with num_heads_q (batch,
    seqlen, num_heads_q + 2 * heads_k, head_dim), in place. Returns qkv."""
    if qkv.dim() == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        if num_heads_q is None:
            raise ValueError("num_heads_q must be given with qkv (batch, seqlen, heads, head_dim)")
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + heads_k]
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    apply_rotary_emb(k, cos_k, sin_k, interleaved, True, seqlen_offsets)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotates k of kv (batch, seqlen, 2, heads, head_dim) in place. Returns kv."""
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """In float32, as the Triton kernel does."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    rotary, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        a, b = rotary[..., ::2], rotary[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = rotary.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([turned.to(x.dtype), rest], -1)
