"""flash_attn_2_cuda: the functions of flash-attn's compiled extension, by its order of arguments.

xformers and TransformerEngine call them directly, with every argument in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashmoe.integrations.flash_attn import fa2

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]

_MaybeTensor = Tensor | None


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: _MaybeTensor,
    alibi_slopes: _MaybeTensor,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: None,
) -> list[Any]:
    """out, softmax_lse, the probabilities (none) and the random state."""
    _refuse(generator)
    terms = (window_size_left, window_size_right, softcap, alibi_slopes)
    how = (p_dropout, softmax_scale, is_causal, *terms, return_softmax)
    return _written(out, fa2._flash_attn_forward(q, k, v, *how))


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: _MaybeTensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: _MaybeTensor,
    leftpad_k: _MaybeTensor,
    block_table: _MaybeTensor,
    alibi_slopes: _MaybeTensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: None,
    num_splits: int = 0,
) -> list[Any]:
    """fwd of packed sequences."""
    _refuse(generator)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    terms = (window_size_left, window_size_right, softcap, alibi_slopes)
    how = (p_dropout, softmax_scale, is_causal, *terms, return_softmax)
    keys = (block_table, leftpad_k, seqused_k, zero_tensors, num_splits)
    arguments = (q, k, v, *lengths, *how, *keys)
    return _written(out, fa2._flash_attn_varlen_forward(*arguments))


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: _MaybeTensor,
    dk: _MaybeTensor,
    dv: _MaybeTensor,
    alibi_slopes: _MaybeTensor,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: None,
    rng_state: _MaybeTensor,
) -> list[Tensor]:
    """dq, dk, dv, in the tensors that were given for them, and the rows' sums of dout * out."""
    _refuse(generator)
    gradients = _place(dq, q), _place(dk, k), _place(dv, v)
    terms = (window_size_left, window_size_right, softcap, alibi_slopes)
    how = (p_dropout, softmax_scale, is_causal, *terms, deterministic, rng_state)
    arguments = (dout, q, k, v, out, softmax_lse, *gradients, *how)
    return [*gradients, fa2._flash_attn_backward(*arguments)]


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: _MaybeTensor,
    dk: _MaybeTensor,
    dv: _MaybeTensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: _MaybeTensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: None,
    rng_state: _MaybeTensor,
) -> list[Tensor]:
    """bwd of packed sequences."""
    _refuse(generator)
    gradients = _place(dq, q), _place(dk, k), _place(dv, v)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    terms = (window_size_left, window_size_right, softcap, alibi_slopes)
    how = (p_dropout, softmax_scale, is_causal, *terms, deterministic, rng_state)
    arguments = (dout, q, k, v, out, softmax_lse, *gradients, *lengths, *how)
    return [*gradients, fa2._flash_attn_varlen_backward(*arguments)]


def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k: _MaybeTensor,
    v: _MaybeTensor,
    seqlens_k: _MaybeTensor,
    rotary_cos: _MaybeTensor,
    rotary_sin: _MaybeTensor,
    cache_batch_idx: _MaybeTensor,
    leftpad_k: _MaybeTensor,
    block_table: _MaybeTensor,
    alibi_slopes: _MaybeTensor,
    out: _MaybeTensor,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Any]:
    """out and softmax_lse of flash_attn_with_kvcache."""
    where = (seqlens_k, cache_batch_idx, leftpad_k, block_table, softmax_scale, is_causal)
    result = fa2.flash_attn_with_kvcache(
        *(q, kcache, vcache, k, v, rotary_cos, rotary_sin, *where),
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        rotary_interleaved=is_rotary_interleaved,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        return_softmax_lse=True,
        out=out,
    )
    return list(result)


def _refuse(generator: object) -> None:
    if generator is not None:
        kind = type(generator).__name__
        raise NotImplementedError(
            f"flash-attn's `generator` argument is no longer supported: must be None, got {kind}"
        )


def _written(out: _MaybeTensor, result: tuple[Any, ...]) -> list[Any]:
    return list(result) if out is None else [out.copy_(result[0]), *result[1:]]


def _place(given: _MaybeTensor, like: Tensor) -> Tensor:
    return torch.empty_like(like) if given is None else given
