"""A KV cache with flash-attn's signature: append to it, and attend to it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flashmoe.frontend import ops, repeated
from flashmoe.frontend.append import append, room_of, validate_new, validate_rotary
from flashmoe.frontend.attend import attend, is_plain, window_of
from flashmoe.frontend.validation import Asked, validate, validate_tensors
from flashmoe.frontend.varlen import longest_of, written_to
from flashmoe.spec.call import Sequences
from flashmoe.spec.terms import terms_of
from flashmoe.tiles import Tile


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
    tile: Tile | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of queries to a cache of keys, after new keys and values were appended to it, with
    flash-attn's signature.

    The host never waits for the device, so lengths may change between replays of a CUDA graph.
    FLASHMOE_CHECK=1 reads and checks them. There are no gradients.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim); with cu_seqlens_q (total_q, heads_q, head_dim).
        k_cache, v_cache: (batch_cache, seqlen_cache, heads_kv, head_dim); with a block_table
            (num_pages, page_size, heads_kv, head_dim), pages of any size. Written in place.
        k, v: (batch, seqlen_new, heads_kv, head_dim), or none: written to the cache at positions
            cache_seqlens + i of each sequence. With cu_seqlens_k_new (total_new, heads_kv,
            head_dim). What has no place there (past the end, no page or batch of that number) is
            not written.
        rotary_cos, rotary_sin: (seqlen_rotary, rotary_dim / 2), at least as many rows as a sequence
            has room for keys: k is rotated by row cache_seqlens + i, and so is q where the call is
            causal or has a window; otherwise all of q by row cache_seqlens. They need k.
        cache_seqlens: how many keys each sequence has before k is appended: an int, or (batch,)
            int32. Without k, None is all that there is room for.
        cache_batch_idx: (batch,), int32: which batch of the cache, or row of the block_table, each
            sequence has.
        cache_leftpad: (batch,), int32: so many keys of each sequence, the first ones, are not seen.
        block_table: (batch, pages), int32, with cache_batch_idx of any number of rows: which page
            holds each page_size keys of a sequence.
        softmax_scale, causal, window_size, softcap, alibi_slopes, sinks: as in flash_attn_func; the
            last query is level with the last key, appended ones included.
        rotary_interleaved: rotate columns 0 and 1, 2 and 3, … (GPT-J); else columns i and i +
            rotary_dim / 2 (GPT-NeoX).
        num_splits: over how many thread blocks the decode kernel splits a sequence's keys, at most
            (never more than it has steps, or 4095); 0 for as many as fill the GPU. Results differ
            by rounding. Other kernels do not split keys.
        return_softmax_lse: also return softmax_lse.
        page_table, seqused_k: FlashAttention-3's names of block_table and cache_seqlens.
        cu_seqlens_q, max_seqlen_q: (batch + 1,), int32, and a bound of the lengths, as in
            flash_attn_varlen_func: queries of prefill and decode in one call.
        cu_seqlens_k_new: the same of k and v.
        deterministic: a sequence's results are the same bits whatever else is in the batch, also
            under `torch.use_deterministic_algorithms(True)`: its keys are split by its own length,
            or num_splits ways where that is given, and what runs is chosen for one query of one
            sequence. Slower for many queries or a small batch.
        out: as the result, which is written to it.
        backend, tile: as in flash_attn_func.

    Returns:
        out, as q with v_cache's head_dim, contiguous. softmax_lse is (batch, heads_q, seqlen_q), or
        (heads_q, total_q) with cu_seqlens_q; float32.

    Raises: as flash_attn_func.
    """
    if type(window_size) is not tuple:
        window_size = window_of(causal, window_size)
    if type(num_splits) is not int:
        num_splits = _integer("num_splits", num_splits)
    if num_splits < 0:
        raise ValueError(f"num_splits must be an integer of at least 0, got {num_splits!r}")
    if page_table is not None:
        block_table = _only("block_table", block_table, "page_table", page_table)
    if seqused_k is not None:
        cache_seqlens = _only("cache_seqlens", cache_seqlens, "seqused_k", seqused_k)
    if block_table is not None and cache_batch_idx is not None:
        block_table, cache_batch_idx = _table_of_batch(block_table, cache_batch_idx), None
    if torch.is_grad_enabled():
        _refuse_gradients(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, sinks=sinks)
    lengths = _lengths_of(cache_seqlens, q, k_cache, cu_seqlens_q, block_table)
    longest = 0
    if cu_seqlens_q is not None:
        longest = longest_of(
            "max_seqlen_q", q.shape[0] if max_seqlen_q is None else max_seqlen_q, q
        )
    elif max_seqlen_q is not None:
        raise ValueError("max_seqlen_q must be None without cu_seqlens_q")
    where = cu_seqlens_q, None, lengths, cache_leftpad, cache_batch_idx, block_table
    sequences = Sequences._make((*where, longest, 0))
    terms = terms_of(softcap, alibi_slopes, sinks)
    asked = (
        softmax_scale,
        causal,
        window_size,
        deterministic or torch.are_deterministic_algorithms_enabled(),
        return_softmax_lse,
        backend,
        tile,
        num_splits,
    )
    if k is not None or v is not None or rotary_cos is not None or rotary_sin is not None:
        new = k, v, rotary_cos, rotary_sin, cu_seqlens_k_new
        maybe = (*new, *terms.tensors, *sequences[:6])
        given = (q, k_cache, v_cache, *[x for x in maybe if x is not None])
        length = None if lengths is cache_seqlens else cache_seqlens
        kind = ("append", asked, softcap, length, tuple([x is None for x in maybe]))
        is_compiling = torch.compiler.is_compiling()
        rotate_by_row = None if is_compiling else repeated.found(kind, given)
        by_op = False
        if rotate_by_row is None:
            by_op = is_compiling or not is_plain(*given)
            _, mask = validate(q, k_cache, v_cache, Asked(*asked), terms, sequences)
            validate_new(q, k_cache, v_cache, k, v, cache_seqlens, cu_seqlens_k_new, sequences)
            if rotary_cos is not None or rotary_sin is not None:
                validate_rotary(rotary_cos, rotary_sin, q, k_cache, block_table)
            rotate_by_row = not mask.is_full
            if not by_op:
                repeated.remember(kind, given, rotate_by_row)
        assert k is not None, "validated"
        assert v is not None, "validated"
        rotated, lengths = (ops.append if by_op else append)(
            q,
            k,
            v,
            k_cache,
            v_cache,
            lengths.contiguous(),
            _contiguous(cu_seqlens_q),
            _contiguous(cu_seqlens_k_new),
            _contiguous(cache_batch_idx),
            _contiguous(block_table),
            rotary_cos,
            rotary_sin,
            bool(rotary_interleaved),
            rotate_by_row,
        )
        q = q if rotary_cos is None else rotated
        where = cu_seqlens_q, None, lengths, cache_leftpad, cache_batch_idx, block_table
        sequences = Sequences._make((*where, longest, 0))
    tensors: tuple[Tensor, ...] | None = None
    if cache_leftpad is None and cache_batch_idx is None:
        if block_table is None:
            tensors = (lengths,) if cu_seqlens_q is None else None
        elif cu_seqlens_q is None:
            tensors = lengths, block_table
        else:
            tensors = cu_seqlens_q, lengths, block_table
    result = attend(q, k_cache, v_cache, asked, terms, sequences, tensors)
    if out is not None:
        result = written_to(out, result)
    return result if isinstance(result, Tensor) else result[:2]


def _only(name: str, value: object, other: str, alias: Tensor) -> Tensor:
    if value is not None:
        raise ValueError(f"{name} and {other} are two names of one argument, got both")
    return alias


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _integer(name: str, value: object) -> int:
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)


def _table_of_batch(block_table: Tensor, cache_batch_idx: Tensor) -> Tensor:
    """The rows of the table that the sequences have; an index of none has the nearest."""
    for name, x, dims in (("block_table", block_table, 2), ("cache_batch_idx", cache_batch_idx, 1)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(x).__name__}")
        if x.dtype != torch.int32 or x.dim() != dims or x.device != block_table.device:
            raise ValueError(
                f"{name} must be int32 of {dims} dimensions on block_table's device, got {x.dtype} "
                f"of shape {tuple(x.shape)} on {x.device}"
            )
    rows = block_table.shape[0]
    if rows == 0 and cache_batch_idx.shape[0]:
        raise ValueError("block_table must have rows for cache_batch_idx, got shape (0, …)")
    return block_table.index_select(0, cache_batch_idx.clamp(0, max(rows - 1, 0)))


def _refuse_gradients(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise NotImplementedError(
                f"{name} must not require a gradient: flash_attn_with_kvcache has none; call it "
                "under torch.no_grad()"
            )


def _lengths_of(
    cache_seqlens: int | Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    cu_seqlens_q: Tensor | None,
    block_table: Tensor | None,
) -> Tensor:
    """(batch,) int32: the keys that each sequence has, where they were given as one number, too."""
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    validate_tensors(q, k_cache, k_cache)
    many = q if cu_seqlens_q is None else cu_seqlens_q
    if many.dim() == 0 or k_cache.dim() != 4:
        length = 0  # what validates the tensors says more
    elif cache_seqlens is None:
        length = room_of(k_cache, block_table)
    elif isinstance(cache_seqlens, (int, np.integer, torch.SymInt)):
        length = cache_seqlens
        room = room_of(k_cache, block_table)
        if not 0 <= length <= room:
            raise ValueError(f"cache_seqlens must be from 0 to {room}, got {length}")
    else:
        raise TypeError(
            f"cache_seqlens must be an integer, an int32 tensor or None, got {cache_seqlens!r}"
        )
    batch = 0 if many.dim() == 0 else many.shape[0] - (cu_seqlens_q is not None)
    return torch.full((max(batch, 0),), length, dtype=torch.int32, device=q.device)
