"""Masks of keys as what kernels take: limits, lengths and packed sequences; and the calls."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import flashmoe
from flashmoe.spec.mask import Mask


class Lengths(NamedTuple):
    """Keys of each sequence from leftpad_k to before seqused_k, (batch,) int32."""

    seqused_k: Tensor
    leftpad_k: Tensor | None = None


class Packing(NamedTuple):
    """Sequences one behind the other: cu_seqlens (sequences + 1,) int32, and of the batch * seqlen
    rows those that are in them, in their order; None where these are the first."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    rows_q: Tensor | None = None
    rows_k: Tensor | None = None


class KeyMask(NamedTuple):
    """Which keys a query sees: the limits of spec/mask.py, aligned at the last key of a sequence.
    Travels through a model where other implementations have their mask's tensor."""

    left: int = -1
    right: int = -1
    lengths: Lengths | None = None
    packing: Packing | None = None

    @property
    def ndim(self) -> int:
        """transformers takes a mask of two dimensions for one of padding, which this is not."""
        return 4


class Terms(NamedTuple):
    """By the names that flashmoe's functions have for them."""

    softmax_scale: float | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None
    dropout_p: float = 0.0


def of_keys(
    left: int, right: int, keys: Tensor, seqlen_q: int, last: int | None = None
) -> KeyMask | None:
    """The KeyMask of which keys (batch, seqlen_kv) may be seen at all, of which the first `last`.
    Where there are limits, the queries are the last keys up to there. None where there is none: a
    window counts keys between others that are hidden."""
    seqlen_kv = keys.shape[1]
    last = seqlen_kv if last is None else last
    place = torch.arange(seqlen_kv, device=keys.device)
    keys = keys & (place < last)
    leftpad = torch.where(keys, place, seqlen_kv).amin(1)
    seqused = torch.where(keys, place + 1, 0).amax(1)
    count = keys.sum(1)
    every, without_holes, level = torch.stack(
        [keys.all(), (seqused - leftpad == count).all(), (seqused == last).all()]
    ).tolist()
    if every:
        return KeyMask(left, right)
    has_window, is_limited = left >= 0 or right > 0, left >= 0 or right >= 0
    if has_window and not without_holes:
        return None
    # Lengths copy nothing; packed sequences compute nothing for padding, and have gradients.
    has_lengths = without_holes and (level or not is_limited)
    if has_lengths and seqlen_q < seqlen_kv and not torch.is_grad_enabled():
        return KeyMask(left, right, Lengths(seqused.to(torch.int32), leftpad.to(torch.int32)))
    if not is_limited:
        # These need not be the keys' own queries: none is left out.
        cu_seqlens_q, longest_q = cumulated(torch.full_like(count, seqlen_q))
        rows_q = None
    else:
        queries = keys[:, last - seqlen_q : last]
        cu_seqlens_q, longest_q = cumulated(queries.sum(1))
        rows_q = queries.flatten().nonzero().squeeze(1)
    cu_seqlens_k, longest_k = cumulated(count)
    rows_k = keys.flatten().nonzero().squeeze(1)
    packing = Packing(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, rows_q, rows_k)
    return KeyMask(left, right, packing=packing)


def cumulated(lengths: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens, and the longest length."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), int(lengths.max())


def visible(mask: KeyMask, batch: int, seqlen_q: int, seqlen_kv: int, device: Any) -> Tensor:
    """The mask as a boolean tensor that broadcasts to (batch, 1, seqlen_q, seqlen_kv)."""
    hides: Callable[..., Tensor] = Mask(mask.left, mask.right).hides
    if mask.packing is not None:
        sequence_q, i = _places(*mask.packing[::2], batch * seqlen_q, -1)
        sequence_k, j = _places(*mask.packing[1::2], batch * seqlen_kv, -2)
        i, j = i.view(batch, 1, seqlen_q, 1), j.view(batch, 1, 1, seqlen_kv)
        same = sequence_q.view(i.shape) == sequence_k.view(j.shape)
        return same & ~hides(i, j, 0, 0)
    i = torch.arange(seqlen_q, device=device).view(-1, 1)
    j = torch.arange(seqlen_kv, device=device)
    if mask.lengths is None:
        return ~hides(i, j, seqlen_q, seqlen_kv)
    seqused_k = mask.lengths.seqused_k.view(-1, 1, 1, 1)
    seen = ~hides(i, j, seqlen_q, seqused_k) & (j < seqused_k)
    if mask.lengths.leftpad_k is None:
        return seen
    return seen & (j >= mask.lengths.leftpad_k.view(-1, 1, 1, 1))


def _places(
    cu_seqlens: Tensor, _longest: int, rows: Tensor | None, count: int, nowhere: int
) -> tuple[Tensor, Tensor]:
    """Of each of `count` rows its sequence's number, `nowhere` outside of them, and how far behind
    its sequence's last row it is: 0, -1, ..."""
    lengths = cu_seqlens.diff().long()
    number = torch.repeat_interleave(lengths)
    behind = torch.arange(len(number), device=number.device) - (cu_seqlens[1:].long()[number] - 1)
    if rows is None:
        rows = torch.arange(len(number), device=number.device)
    return (
        torch.full((count,), nowhere, device=rows.device).index_copy(0, rows, number),
        torch.zeros(count, dtype=torch.long, device=rows.device).index_copy(0, rows, behind),
    )


@functools.cache
def warn_of_torch(module: str, why: str) -> None:
    """Once for each."""
    warnings.warn(
        f"{module} asks flashmoe for attention with {why}: computed by torch", stacklevel=3
    )


def by_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: KeyMask, deterministic: bool, terms: Terms
) -> Tensor:
    """q (batch, seqlen_q, heads_q, head_dim), k (batch, seqlen_kv, heads_kv, head_dim), v (batch,
    seqlen_kv, heads_kv, head_dim_v) -> (batch, seqlen_q, heads_q, head_dim_v). What is not in a
    sequence gets 0."""
    left, right, lengths, packing = mask
    options: dict[str, Any] = terms._asdict() | {"window_size": (left, right)}
    out: Any
    if lengths is not None:
        assert not options.pop("dropout_p"), "a cache has no dropout"
        seqused_k, leftpad_k = lengths
        options |= {"cache_seqlens": seqused_k, "cache_leftpad": leftpad_k}
        out = flashmoe.flash_attn_with_kvcache(q, k, v, **options)
    elif packing is None:
        out = flashmoe.flash_attn_func(q, k, v, deterministic=deterministic, **options)
    else:
        sizes = q.shape[:2]
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        if packing.rows_q is not None:
            q = q.index_select(0, packing.rows_q)
        if packing.rows_k is not None:
            k, v = k.index_select(0, packing.rows_k), v.index_select(0, packing.rows_k)
        options["deterministic"] = deterministic
        out = flashmoe.flash_attn_varlen_func(q, k, v, *packing[:4], **options)
        if packing.rows_q is not None:
            rows = out.new_zeros(sizes.numel(), *out.shape[1:])
            out = rows.index_copy(0, packing.rows_q, out)
        out = out.view(*sizes, *out.shape[1:])
    assert isinstance(out, Tensor)
    return out


def by_masked_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyMask | Tensor,
    position_bias: Tensor | None,
    deterministic: bool,
    terms: Terms,
) -> Tensor:
    """`by_kernel` of a mask that broadcasts to (batch, heads_q, seqlen_q, seqlen_kv), boolean or
    additive, and a position_bias, which is added."""
    attn_mask = _tensor_of(q, k, mask, position_bias)
    options: dict[str, Any] = terms._asdict()
    out = flashmoe.flash_attn_func(
        q, k, v, attn_mask=attn_mask, deterministic=deterministic, **options
    )
    assert isinstance(out, Tensor)
    return out


def _tensor_of(
    q: Tensor, k: Tensor, mask: KeyMask | Tensor, position_bias: Tensor | None
) -> Tensor | None:
    """Both in one, boolean, float32 or of q's dtype."""
    seen: Tensor | None
    if isinstance(mask, Tensor):
        seen = mask
    elif mask == KeyMask():
        seen = None
    else:
        seen = visible(mask, q.shape[0], q.shape[1], k.shape[1], q.device)
    if position_bias is not None:
        seen = position_bias if seen is None else _added(position_bias, seen)
    if seen is None or seen.dtype in (torch.bool, torch.float32):
        return seen
    return seen.to(q.dtype)


def by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyMask | Tensor,
    position_bias: Tensor | None,
    terms: Terms,
) -> Tensor:
    """`by_kernel` with all scores in memory, also of a mask that broadcasts to (batch, heads_q,
    seqlen_q, seqlen_kv), boolean or additive, and a position_bias, which is added."""
    seen = _tensor_of(q, k, mask, position_bias)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    softmax_scale, softcap, sinks, dropout_p = terms
    if not softcap and sinks is None:
        if seen is not None and seen.dtype != torch.bool:
            seen = seen.to(q.dtype)
        grouped = q.shape[1] != k.shape[1]
        out = flashmoe.scaled_dot_product_attention(
            q, k, v, seen, dropout_p, scale=softmax_scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(2, 3)).float()
    scores = scores * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        scores = _added(scores, seen)
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], 3)
    weights = F.softmax(scores, 3)[..., : k.shape[2]]
    return (F.dropout(weights, dropout_p).to(v.dtype) @ v).transpose(1, 2)


def _added(scores: Tensor, mask: Tensor) -> Tensor:
    """The lowest number stands for a hidden key, as in transformers, so that a row that sees
    nothing has no NaN."""
    if mask.dtype != torch.bool:
        return scores + mask
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
