"""Hugging Face transformers: `register()`, then `attn_implementation="flashmoe"`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flashmoe.backends.sdpa import is_slower_under
from flashmoe.integrations.keys import (
    KeyMask,
    Packing,
    Terms,
    by_kernel,
    by_masked_kernel,
    by_torch,
    of_keys,
    visible,
    warn_of_torch,
)
from flashmoe.integrations.transformers_masks import key_mask

NAME = "flashmoe"

# What models hand through to attention that says nothing about it.
_OF_OTHERS = frozenset(
    {
        "cache",
        "cache_position",
        "layer_idx",
        "logits_indices",
        "logits_processor_args",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "read_index",
        "return_dict",
        "seq_idx",
        "use_cache",
        "write_index",
    }
)

_check_and_adjust = PreTrainedModel._check_and_adjust_attn_implementation


@functools.wraps(_check_and_adjust)
def _check_and_adjust_but_ours(
    self: Any, attn_implementation: str | None, *more: Any, **options: Any
) -> Any:
    # transformers takes each name with "flash" in it for a package or a kernel of its hub to load,
    # and for models with sinks it puts a kernel of the hub in its place.
    if attn_implementation == NAME:
        return NAME
    return _check_and_adjust(self, attn_implementation, *more, **options)


def register() -> None:
    """Make `attn_implementation="flashmoe"` known to transformers, for `from_pretrained`,
    `from_config` and `set_attn_implementation`. Results are those of "eager"; rows of padding,
    which nothing should read, are 0.

    Masks that are not made of causality, windows, padding and packed sequences run as they are, and
    so do position biases. What has no kernel (attention dropout over the lengths of a cache) is
    computed by torch, which a warning says once.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, key_mask)
    PreTrainedModel._check_and_adjust_attn_implementation = _check_and_adjust_but_ours


def unregister() -> None:
    """Undo `register`. Models that were made with "flashmoe" no longer run."""
    AttentionInterface._global_mapping.pop(NAME, None)
    AttentionMaskInterface._global_mapping.pop(NAME, None)
    if PreTrainedModel._check_and_adjust_attn_implementation is _check_and_adjust_but_ours:
        PreTrainedModel._check_and_adjust_attn_implementation = _check_and_adjust


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: KeyMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    deterministic: bool | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' AttentionInterface.

    query (batch, heads_q, seqlen_q, head_dim), key (batch, heads_kv, seqlen_kv, head_dim), value
    (batch, heads_kv, seqlen_kv, head_dim_v) -> (batch, seqlen_q, heads_q, head_dim_v), None.

    An attention_mask is the law, as in eager attention, which looks at neither is_causal nor
    sliding_window: those speak where there is none, or one of padding only, (batch, seqlen_kv).
    cu_seq_lens_q and cu_seq_lens_k with max_length_q and max_length_k cut rows of the batch, seen
    as one, into sequences.

    Raises TypeError for an argument that it does not know, NotImplementedError for
    output_attentions.
    """
    if unknown := sorted(k for k, x in others.items() if k not in _OF_OTHERS and x is not None):
        raise TypeError(
            f"flashmoe's attention does not know {', '.join(unknown)} (of "
            f"{type(module).__name__}) and drops no argument: use attn_implementation='eager'"
        )
    if output_attentions:
        raise NotImplementedError(
            "output_attentions must be False with attn_implementation='flashmoe', which never "
            "holds the attention weights: use 'eager'"
        )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        mask = _mask_by_hints(q, k, attention_mask, is_causal, sliding_window)
    else:
        mask = attention_mask
    packing = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if any(x is not None for x in packing):
        mask = _packed(mask, *packing)
    terms = Terms(scaling, softcap or 0.0, s_aux, dropout)
    why = _why_by_torch(mask, dropout)
    of_keys_alone = mask if position_bias is None and isinstance(mask, KeyMask) else None
    if of_keys_alone is None and not why:
        widest = mask if position_bias is None else position_bias
        assert isinstance(widest, Tensor)
        if not is_slower_under(widest, q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]):
            why = "a bias, or a mask of few queries and keys, on a GPU"
    if why:
        warn_of_torch(type(module).__name__, why)
        return by_torch(q, k, v, mask, position_bias, terms), None
    if of_keys_alone is None:
        found = by_masked_kernel(q, k, v, mask, position_bias, bool(deterministic), terms)
        return found, None
    return by_kernel(q, k, v, of_keys_alone, bool(deterministic), terms), None


def _mask_by_hints(
    q: Tensor, k: Tensor, padding: Tensor | None, is_causal: bool, window: int | None
) -> KeyMask | Tensor:
    """Of a window of n keys, the query's own among them, n - 1 are on its left."""
    left = -1 if window is None else window - 1
    right = 0 if is_causal else left
    if padding is None:
        return KeyMask(left, right)
    keys = F.pad(padding.bool(), (0, k.shape[1] - padding.shape[1]))
    found = of_keys(left, right, keys, q.shape[1], padding.shape[1])
    if found is not None:
        return found
    limits = visible(KeyMask(left, right), 1, q.shape[1], k.shape[1], q.device)
    return limits & keys[:, None, None, :]


def _packed(
    mask: KeyMask | Tensor,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | None,
    max_length_k: int | None,
) -> KeyMask:
    if (
        cu_seq_lens_q is None
        or cu_seq_lens_k is None
        or max_length_q is None
        or max_length_k is None
    ):
        raise ValueError(
            "cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k must be given together"
        )
    if not isinstance(mask, KeyMask) or mask.lengths is not None:
        raise ValueError("attention_mask must be None where cu_seq_lens_q is given")
    cu_seqlens_q, cu_seqlens_k = cu_seq_lens_q.to(torch.int32), cu_seq_lens_k.to(torch.int32)
    packing = Packing(cu_seqlens_q, cu_seqlens_k, int(max_length_q), int(max_length_k))
    return mask._replace(packing=packing)


def _why_by_torch(mask: KeyMask | Tensor, dropout: float) -> str:
    """Why no kernel runs this; empty where one does."""
    if not isinstance(mask, KeyMask) or mask.lengths is None:
        return ""
    if dropout:
        return f"dropout={dropout} over lengths of a cache"
    if torch.is_grad_enabled():
        return "lengths of a cache that were found without gradients"
    return ""
