"""flash_attn.bert_padding: padded batches to packed ones and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of x."""
    return x.index_select(0, indices)


def index_first_axis_residual(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `indices` of x, and x."""
    return x.index_select(0, indices), x


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) with `values` in the rows `indices`, and 0 in the others."""
    rows = values.new_zeros(first_axis_dim, *values.shape[1:])
    return rows.index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Of hidden_states (batch, seqlen, ...) the rows where attention_mask (batch, seqlen) is 1, one
    behind the other, and those of unused_mask, which have room but do not count.

    Returns hidden_states (total, ...), indices (total,), cu_seqlens (batch + 1,), the longest
    length, and how many of each sequence attention_mask has (batch,).
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    used = attention_mask.sum(-1, dtype=torch.int32)
    return rows, indices, _cumulated(lengths), int(lengths.max()), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """unpad_input where a row holds several sequences: attention_mask_in_length (batch, seqlen)
    begins with their lengths, followed by 0."""
    columns = torch.arange(attention_mask_in_length.shape[1], device=hidden_states.device)
    indices = (columns < attention_mask_in_length.sum(-1, keepdim=True)).flatten().nonzero()
    indices = indices.flatten()
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, _cumulated(lengths), int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """unpad_input's rows (total, ...) back as (batch, seqlen, ...), 0 elsewhere."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.view(batch, seqlen, *rows.shape[1:])


def _cumulated(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
