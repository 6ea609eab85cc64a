"""transformers' mask functions, read: what they say of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from flashmoe.integrations.keys import KeyMask, Lengths, Packing, cumulated, of_keys


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
    found: KeyMask | None = _looked_at(
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


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="flashmoe looks at the mask's values, once for all layers"
)
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
    elif keys is None and right > 0 and last != seqlen_kv:
        return None  # a window to the right reaches what is not filled yet
    elif keys is None and isinstance(last, Tensor) and not torch.is_grad_enabled():
        return KeyMask(left, right, Lengths(last.to(torch.int32).expand(batch).contiguous()))
    last = int(last)
    if last > seqlen_kv or (last < seqlen_q and (left >= 0 or right >= 0)):
        return None
    if keys is None:
        keys = torch.ones(batch, seqlen_kv, dtype=torch.bool, device=device)
    return of_keys(left, right, keys, seqlen_q, last)


def _of_sequences(left: int, right: int, sequence_ids: Tensor) -> KeyMask:
    """Where a row of the batch starts a sequence starts, too."""
    if not sequence_ids[:, -1].any():
        return KeyMask(left, right)
    starts = F.pad(sequence_ids.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero().squeeze(1)
    lengths = F.pad(starts, (0, 1), value=sequence_ids.numel()).diff()
    cu_seqlens, longest = cumulated(lengths)
    return KeyMask(left, right, packing=Packing(cu_seqlens, cu_seqlens, longest, longest))
