"""Where the rows of each sequence are, read on the host. csrc/common/sequence.h says the same in
C++."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from flashmoe.spec.call import Call


class Sequence(NamedTuple):
    """One sequence: its rows, and where they begin in packed tensors (0 in dense ones). Keys in
    front of leftpad_k are not counted; k_begin is past them."""

    q_begin: int
    k_begin: int
    seqlen_q: int
    seqlen_kv: int


def sequences_of(call: Call) -> list[Sequence]:
    """Every sequence of `call`; what its lengths say is clamped to the tensors."""
    s = call.sequences
    batch = len(call.q) if s.cu_seqlens_q is None else len(s.cu_seqlens_q) - 1
    keys = _rows(call.k) if s.block_table is None else s.block_table.shape[1] * call.k.shape[1]
    found_q = _packed(s.cu_seqlens_q, batch, _rows(call.q), s.max_seqlen_q)
    found_k = _packed(s.cu_seqlens_k, batch, keys, s.max_seqlen_k)
    used = [keys] * batch if s.seqused_k is None else s.seqused_k.tolist()
    padding = [0] * batch if s.leftpad_k is None else s.leftpad_k.tolist()
    found = []
    for (q_begin, seqlen_q), (k_begin, most), length, pad in zip(
        found_q, found_k, used, padding, strict=True
    ):
        seqlen_kv = _clamped(length, most)
        skipped = _clamped(pad, seqlen_kv)
        found.append(Sequence(q_begin, k_begin + skipped, seqlen_q, seqlen_kv - skipped))
    return found


def rows_of_keys(call: Call, index: int, sequence: Sequence) -> Tensor:
    """Which rows of k.flatten(0, -3), batches or pages one behind the other, hold the keys of
    `sequence`, which is sequences_of(call)[index]."""
    import torch

    k, s = call.k, call.sequences
    keys = torch.arange(sequence.seqlen_kv, device=k.device) + sequence.k_begin
    if s.cu_seqlens_k is not None:
        return keys
    if not len(k):
        return keys[:0]
    if s.block_table is not None:
        pages = s.block_table[index].long().clamp(0, len(k) - 1)
        return pages[keys // k.shape[1]] * k.shape[1] + keys % k.shape[1]
    batch = index if s.cache_batch_idx is None else int(s.cache_batch_idx[index])
    return min(max(batch, 0), len(k) - 1) * k.shape[1] + keys


def _rows(x: Tensor) -> int:
    return x.shape[-3]


def _clamped(x: int, high: int) -> int:
    return min(max(x, 0), high)


def _packed(
    cu_seqlens: Tensor | None, batch: int, rows: int, longest: int
) -> list[tuple[int, int]]:
    """Where each sequence begins in `rows` rows, and its length."""
    if cu_seqlens is None:
        return [(0, rows)] * batch
    ends = [_clamped(x, rows) for x in cu_seqlens.tolist()]
    return [(begin, _clamped(end - begin, longest)) for begin, end in pairwise(ends)]
