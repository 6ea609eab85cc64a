"""Packed batches with flash-attn's signature: sequences of any lengths, one behind the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flashmoe.frontend.attend import (
    PLAIN,
    Result,
    attend,
    attend_dropping,
    window_of,
)
from flashmoe.frontend.validation import unpacked
from flashmoe.spec.call import Sequences
from flashmoe.spec.terms import terms_of
from flashmoe.tiles import Tile


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    rng_state: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    tile: Tile | str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """flash_attn_func of each sequence of a packed batch, with flash-attn's signature.

    The host never waits for lengths: they stay on the device, where what they say is clamped to
    the tensors. FLASHMOE_CHECK=1 reads and checks them.

    Args:
        q: (total_q, heads_q, head_dim), the sequences one behind the other; dtypes, head counts and
            head dimensions as in flash_attn_func.
        k, v: (total_k, heads_kv, head_dim); with a block_table (num_pages, page_size, heads_kv,
            head_dim).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32, on q's device: sequence i is rows
            cu_seqlens[i] to cu_seqlens[i + 1] - 1, so they start at 0 and never decrease. A
            sequence may be empty; rows past the last one have out 0, softmax_lse -inf and
            gradients 0. cu_seqlens_k may be None with a block_table and seqused_k.
        max_seqlen_q, max_seqlen_k: no sequence is longer; an int or a tensor of one number. One
            on a GPU is not read: the rows of q or k are taken as the bound instead.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, sinks, rng_state,
            deterministic: as in flash_attn_func, of each sequence alone.
        return_attn_probs: also return softmax_lse; (out, softmax_lse, None) as flash-attn does.
        block_table: (batch, pages), int32: which page of k and v holds each page_size keys of a
            sequence. No gradients.
        seqused_k: (batch,), int32: only so many of each sequence's keys are used.
        out: as the result, which is written to it. No gradients.
        backend, tile: as in flash_attn_func.

    Returns:
        out (total_q, heads_q, head_dim_v), contiguous. softmax_lse is (heads_q, total_q) float32.

    Raises: as flash_attn_func.
    """
    if type(window_size) is not tuple:
        window_size = window_of(causal, window_size)
    asked = (softmax_scale, causal, window_size, deterministic, return_attn_probs, backend, tile)
    sequences = packed_sequences(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, block_table
    )
    terms = terms_of(softcap, alibi_slopes, sinks, dropout_p, rng_state)
    if dropout_p != 0.0:
        result = attend_dropping(q, k, v, asked, terms, sequences)
    else:
        lengths: tuple[Tensor, ...] | None = None
        if block_table is None and seqused_k is None and cu_seqlens_k is not None:
            lengths = (
                (cu_seqlens_q,) if cu_seqlens_q is cu_seqlens_k else (cu_seqlens_q, cu_seqlens_k)
            )
        result = attend(q, k, v, asked, terms, sequences, lengths)
    return result if out is None else written_to(out, result)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    backend: str | None = None,
    tile: Tile | str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """flash_attn_varlen_func of qkv (total, 3, heads, head_dim): its q, k and v, of lengths alike.

    They are read where they lie, and qkv gets one gradient. Arguments, result and errors are those
    of flash_attn_varlen_func.
    """
    q, k, v = unpacked("qkv", qkv, "(total, 3, heads, head_dim)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        sinks=sinks,
        backend=backend,
        tile=tile,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    backend: str | None = None,
    tile: Tile | str | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """flash_attn_varlen_func of q and kv (total_k, 2, heads_kv, head_dim): its k and v.

    They are read where they lie, and kv gets one gradient. Arguments, result and errors are those
    of flash_attn_varlen_func.
    """
    k, v = unpacked("kv", kv, "(total_k, 2, heads_kv, head_dim)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        sinks=sinks,
        backend=backend,
        tile=tile,
    )


def packed_sequences(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Sequences:
    """Of flash_attn_varlen_func's arguments. Raises for what is no tensor."""
    if not isinstance(cu_seqlens_q, Tensor):
        kind = type(cu_seqlens_q).__name__
        raise TypeError(f"cu_seqlens_q must be a torch.Tensor, got {kind}")
    if block_table is None:
        if not isinstance(cu_seqlens_k, Tensor):
            kind = type(cu_seqlens_k).__name__
            raise TypeError(f"cu_seqlens_k must be a torch.Tensor without block_table, got {kind}")
    elif seqused_k is not None:
        cu_seqlens_k = None
    elif not isinstance(cu_seqlens_k, Tensor):
        raise TypeError("cu_seqlens_k or seqused_k must be a torch.Tensor with block_table")
    else:
        seqused_k, cu_seqlens_k = _lengths("cu_seqlens_k", cu_seqlens_k), None
    # Of pages, the table's columns are the bound.
    longest_k = 0 if cu_seqlens_k is None else longest_of("max_seqlen_k", max_seqlen_k, k)
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_k, None, None, block_table
    return Sequences._make((*lengths, longest_of("max_seqlen_q", max_seqlen_q, q), longest_k))


def _lengths(name: str, cu_seqlens: Tensor) -> Tensor:
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise TypeError(
            f"{name} must be (batch + 1,) int32, got {cu_seqlens.dtype} of shape "
            f"{tuple(cu_seqlens.shape)}"
        )
    return cu_seqlens[1:] - cu_seqlens[:-1]


def longest_of(name: str, value: int | Tensor, packed: Tensor) -> int:
    """As an integer that is known without waiting for a device. Raises for what is no length."""
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_floating_point() or value.is_complex():
            raise TypeError(
                f"{name} must be an integer or a tensor of one integer, got {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )
        if torch.compiler.is_compiling() or value.is_cuda or type(value) not in PLAIN:
            return packed.shape[0]
        value = int(value)
    # While torch.compile traces, an int may be a symbol, which only looks like one.
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, np.integer, torch.SymInt)
    ):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value if isinstance(value, torch.SymInt) else int(value)


def written_to(out: Tensor, result: Result) -> Result:
    """`result`, whose attention is copied to what the user gave as `out`."""
    found = result if isinstance(result, Tensor) else result[0]
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor or None, got {type(out).__name__}")
    if out.dtype != found.dtype:
        raise TypeError(f"out must be {found.dtype}, got {out.dtype}")
    if out.shape != found.shape or out.device != found.device:
        raise ValueError(
            f"out must be {tuple(found.shape)} on {found.device}, got {tuple(out.shape)} on "
            f"{out.device}"
        )
    if found.requires_grad or (torch.is_grad_enabled() and out.requires_grad):
        raise NotImplementedError("out must be None where gradients are asked for")
    out.copy_(found)
    return out if isinstance(result, Tensor) else (out, *result[1:])
