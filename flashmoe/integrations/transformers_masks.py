"""transformers' masks as what kernels take: limits, lengths and packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from flashmoe.spec.mask import FULL, Mask


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
        """As transformers asks of a mask: no mask of padding, which would have two."""
        return 4

    @property
    def limits(self) -> Mask:
        return Mask(self.left, self.right)


class _Pattern(NamedTuple):
    left: int = -1
    right: int = -1
    sequence_ids: Tensor | None = None  # (batch, seqlen), rising
    is_remapped: bool = False


def _tighter(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


def _both(a: _Pattern, b: _Pattern) -> _Pattern | None:
    if a.sequence_ids is not None and b.sequence_ids is not None:
        return None
    ids = b.sequence_ids if a.sequence_ids is None else a.sequence_ids
    is_remapped = a.is_remapped or b.is_remapped
    return _Pattern(_tighter(a.left, b.left), _tighter(a.right, b.right), ids, is_remapped)


def _pattern_of(function: Callable[..., Any]) -> _Pattern | None:
    """What one of transformers' mask functions says; None of those that it composes otherwise, and
    of a user's."""
    if function is masking_utils.causal_mask_function:
        return _Pattern(right=0)
    if function is masking_utils.bidirectional_mask_function:
        return _Pattern()
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    held = dict(zip(function.__code__.co_freevars, cells, strict=True))
    maker = function.__qualname__.partition(".")[0]
    if maker == "sliding_window_overlay":
        return _Pattern(left=held["sliding_window"] - 1)
    if maker == "sliding_window_bidirectional_overlay":
        return _Pattern(held["sliding_window"], held["sliding_window"])
    if maker == "packed_sequence_mask_function":
        return _Pattern(sequence_ids=held["packed_sequence_mask"])
    if maker == "remap_positions_for_packed_sequence":
        inner = _pattern_of(held["mask_function"])
        return None if inner is None else inner._replace(is_remapped=True)
    if maker == "and_masks":
        together: _Pattern | None = _Pattern()
        for part in map(_pattern_of, held["mask_functions"]):
            together = None if part is None or together is None else _both(together, part)
        return together
    return None


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | KeyMask | None = None,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> KeyMask | Tensor | None:
    """The mask function of transformers' AttentionMaskInterface. Of what is more than limits,
    padding and packed sequences the boolean (batch, 1, q_length, kv_length) tensor."""
    if isinstance(attention_mask, KeyMask):  # made before the compiled step of a generation
        return attention_mask
    last = q_offset + q_length - kv_offset
    causal = mask_function is masking_utils.causal_mask_function
    full = mask_function is masking_utils.bidirectional_mask_function
    if attention_mask is None and (full or (causal and type(last) is int and last == kv_length)):
        # No value to look at, so that a compiled graph stays whole.
        return None if full and allow_is_bidirectional_skip else KeyMask(right=0 if causal else -1)
    found = _looked_at(
        (batch_size, q_length, kv_length), last, kv_offset, mask_function, attention_mask, device
    )
    if found is not None:
        return None if found == KeyMask() and allow_is_bidirectional_skip else found
    dense: Tensor | None = masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **others | {"allow_is_causal_skip": False},
    )
    return dense


@torch.compiler.disable(reason="flashmoe looks at the mask's values, once for all layers")
def _looked_at(
    sizes: tuple[int, int, int],
    last: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    device: torch.device | str,
) -> KeyMask | None:
    """The KeyMask of all that; None where there is none. `last` is how many keys there are up to
    the last query's; behind them lies what a static cache has not filled yet."""
    batch, seqlen_q, seqlen_kv = sizes
    pattern = _pattern_of(mask_function)
    if pattern is None:
        return None
    left, right, sequence_ids, is_remapped = pattern
    if sequence_ids is not None:
        if attention_mask is not None or not seqlen_q == seqlen_kv == sequence_ids.shape[1]:
            return None
        return _of_sequences(left, right, sequence_ids)
    if is_remapped:
        return None
    keys = None
    if attention_mask is not None:
        keys = masking_utils.prepare_padding_mask(attention_mask, seqlen_kv, kv_offset)
        keys = keys[:, kv_offset : kv_offset + seqlen_kv].bool()
    if left < 0 and right < 0:  # who sees all keys is level with none
        last = seqlen_kv
    elif keys is None and isinstance(last, Tensor) and not torch.is_grad_enabled():
        return KeyMask(left, right, Lengths(last.to(torch.int32).expand(batch).contiguous()))
    last = int(last)
    if last > seqlen_kv or (last < seqlen_q and (left >= 0 or right >= 0)):
        return None
    if keys is None:
        keys = torch.ones(batch, seqlen_kv, dtype=torch.bool, device=device)
    return of_keys(left, right, keys, seqlen_q, last)


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
    if without_holes and (level or not is_limited) and seqlen_q < seqlen_kv:
        if not torch.is_grad_enabled():
            lengths = Lengths(seqused.to(torch.int32), leftpad.to(torch.int32))
            return KeyMask(left, right, lengths)
    if not is_limited:
        # These need not be the keys' own queries: none is left out.
        cu_seqlens_q, longest_q = _cumulated(torch.full_like(count, seqlen_q))
        rows_q = None
    else:
        queries = keys[:, last - seqlen_q : last]
        cu_seqlens_q, longest_q = _cumulated(queries.sum(1))
        rows_q = queries.flatten().nonzero().squeeze(1)
    cu_seqlens_k, longest_k = _cumulated(count)
    rows_k = keys.flatten().nonzero().squeeze(1)
    return KeyMask(
        left,
        right,
        packing=Packing(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, rows_q, rows_k),
    )


def _cumulated(lengths: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens, and the longest length."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), int(lengths.max())


def _of_sequences(left: int, right: int, sequence_ids: Tensor) -> KeyMask:
    """Where a row of the batch starts a sequence starts, too."""
    if not sequence_ids[:, -1].any():
        return KeyMask(left, right)
    starts = F.pad(sequence_ids.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero().squeeze(1)
    lengths = F.pad(starts, (0, 1), value=sequence_ids.numel()).diff()
    cu_seqlens, longest = _cumulated(lengths)
    return KeyMask(left, right, packing=Packing(cu_seqlens, cu_seqlens, longest, longest))


def visible(mask: KeyMask, batch: int, seqlen_q: int, seqlen_kv: int, device: Any) -> Tensor:
    """The mask as a boolean tensor that broadcasts to (batch, 1, seqlen_q, seqlen_kv)."""
    if mask.packing is not None:
        sequence_q, i = _places(*mask.packing[::2], batch * seqlen_q, -1)
        sequence_k, j = _places(*mask.packing[1::2], batch * seqlen_kv, -2)
        i, j = i.view(batch, 1, seqlen_q, 1), j.view(batch, 1, 1, seqlen_kv)
        same = sequence_q.view(i.shape) == sequence_k.view(j.shape)
        return same & ~mask.limits.hides(i, j, 0, 0)
    i = torch.arange(seqlen_q, device=device).view(-1, 1)
    j = torch.arange(seqlen_kv, device=device)
    if mask.lengths is None:
        return ~mask.limits.hides(i, j, seqlen_q, seqlen_kv)
    seqused_k, leftpad_k = (None if x is None else x.view(-1, 1, 1, 1) for x in mask.lengths)
    seen = ~mask.limits.hides(i, j, seqlen_q, seqused_k) & (j < seqused_k)
    return seen if leftpad_k is None else seen & (j >= leftpad_k)


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
