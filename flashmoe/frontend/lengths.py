"""Lengths of packed batches and caches: what they must be, and with FLASHMOE_CHECK=1 their values.

Kernels read them on the device, where what they say is clamped to the tensors; the host does not
wait for them but to check them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from flashmoe.machine.environment import variable
from flashmoe.spec.call import Call, Sequences


class LengthsError(ValueError, RuntimeError):
    """Lengths whose values are wrong; a RuntimeError, too, as flash-attn raises."""


def validate_lengths(sequences: Sequences, q: Tensor, k: Tensor) -> None:
    """Raise for lengths whose type, dtype, device or shape is wrong; q and k have the right number
    of dimensions."""
    for name, x in zip(sequences._fields, sequences[:6], strict=False):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(x).__name__}")
        if x.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, cache_batch_idx, block_table, *_ = sequences
    if cu_seqlens_q is None:
        batch = q.shape[0]
    elif cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 1:
        shape = tuple(cu_seqlens_q.shape)
        raise ValueError(f"cu_seqlens_q must be (batch + 1,), got shape {shape}")
    else:
        batch = cu_seqlens_q.shape[0] - 1
    for name, y, size in (
        ("cu_seqlens_k", cu_seqlens_k, batch + 1),
        ("seqused_k", seqused_k, batch),
        ("leftpad_k", leftpad_k, batch),
        ("cache_batch_idx", cache_batch_idx, batch),
    ):
        if y is not None and (y.dim() != 1 or y.shape[0] != size):
            many = "batch + 1" if name.startswith("cu") else "batch"
            raise ValueError(
                f"{name} must be ({many},), here ({size},), got shape {tuple(y.shape)}"
            )
    if block_table is not None:
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(
                f"block_table must be (batch={batch}, pages), got shape {tuple(block_table.shape)}"
            )
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx must be None with a block_table, got a tensor")
    elif cu_seqlens_k is None and cache_batch_idx is None and k.shape[0] != batch:
        raise ValueError(
            f"k must have q's batch ({batch}) without cache_batch_idx, got {k.shape[0]}"
        )


def check_lengths(call: Call) -> None:
    """With FLASHMOE_CHECK=1, raise LengthsError for lengths that do not fit the tensors. Waits for
    the device."""
    if variable("FLASHMOE_CHECK") != "1":
        return
    q, k, sequences = call.q, call.k, call.sequences
    cu_seqlens_q, cu_seqlens_k, used, leftpad, batch_idx, table, max_q, max_k = sequences
    for name, cu_seqlens, x, longest in (
        ("q", cu_seqlens_q, q, max_q),
        ("k", cu_seqlens_k, k, max_k),
    ):
        if cu_seqlens is not None:
            _check_cumulative(name, cu_seqlens, x.shape[0], longest)
    room = k.shape[-3]
    if table is not None:
        room *= table.shape[1]
    if used is not None:
        most = torch.full_like(used, room) if cu_seqlens_k is None else cu_seqlens_k.diff()
        room_in = "the keys that each sequence has room for"
        if table is not None:
            room_in += " in the pages of block_table"
        _check_each("seqused_k", used, most, room_in)
    if leftpad is not None:
        most = torch.full_like(leftpad, room) if used is None else used
        _check_each("leftpad_k", leftpad, most, "each sequence's keys")
    if batch_idx is not None:
        last = torch.full_like(batch_idx, k.shape[0] - 1)
        _check_each("cache_batch_idx", batch_idx, last, "the last of k's batch")
    if table is not None:
        # Of each sequence, as many as hold its keys.
        page = torch.arange(table.shape[1], device=table.device) * k.shape[1]
        needed = page < (used.unsqueeze(1) if used is not None else room)
        pages = table.masked_fill(~needed, 0)
        _check_each("block_table", pages, torch.full_like(pages, k.shape[0] - 1), "the last page")


def _check_cumulative(name: str, cu_seqlens: Tensor, rows: int, longest: int) -> None:
    ends = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(ends)]
    if ends[0] != 0:
        raise LengthsError(f"cu_seqlens_{name} must start at 0, got {ends[0]}")
    if min(lengths, default=0) < 0:
        at = lengths.index(min(lengths))
        raise LengthsError(
            f"cu_seqlens_{name} must not decrease, got {ends[at + 1]} behind {ends[at]} at {at + 1}"
        )
    if ends[-1] > rows:
        raise LengthsError(f"cu_seqlens_{name} must end at most at {rows}, got {ends[-1]}")
    if max(lengths, default=0) > longest:
        raise LengthsError(
            f"max_seqlen_{name} must be at least the longest sequence's {max(lengths)}, "
            f"got {longest}"
        )


def _check_each(name: str, x: Tensor, most: Tensor, meaning: str) -> None:
    wrong = ((x < 0) | (x > most)).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise LengthsError(
            f"{name} must be from 0 to {meaning} ({int(most[at])}), got {int(x[at])} "
            f"at {', '.join(map(str, at))}"
        )
