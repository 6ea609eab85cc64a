"""Call: what one call carries to a kernel beside its problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from flashmoe.spec.terms import NO_TERMS, Terms

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DENSE", "NO_TERMS", "Call", "Saved", "Sequences", "Terms"]


class Sequences(NamedTuple):
    """Lengths that kernels read on the device (csrc/common/sequence.h): int32, contiguous."""

    cu_seqlens_q: Tensor | None = None  # (batch + 1,): q is (total_q, heads_q, head_dim)
    cu_seqlens_k: Tensor | None = None  # (batch + 1,): k and v are (total_k, heads_kv, head_dim)
    seqused_k: Tensor | None = None  # (batch,)
    leftpad_k: Tensor | None = None  # (batch,)
    cache_batch_idx: Tensor | None = None  # (batch,)
    block_table: Tensor | None = None  # (batch, pages): k, v (num_pages, page_size, heads, dim)
    max_seqlen_q: int = 0  # upper bounds of packed lengths
    max_seqlen_k: int = 0

    @property
    def layout(self) -> str:
        """One of LAYOUTS in spec/problem.py."""
        if all(x is None for x in self[:6]):
            return "dense"
        if self.cu_seqlens_k is not None:
            return "packed"
        keys = "cache" if self.block_table is None else "paged"
        return keys if self.cu_seqlens_q is None else f"packed-{keys}"


DENSE = Sequences()


class Call(NamedTuple):
    """q (batch, seqlen_q, heads_q, head_dim), k (batch, seqlen_kv, heads_kv, head_dim), v the same
    of a head_dim_v, or as `sequences` says, with any strides."""

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float
    terms: Terms = NO_TERMS
    sequences: Sequences = DENSE


class Saved(NamedTuple):
    """What the backward of a Call needs beside it: the gradient of out, and the forward's out and
    softmax_lse (batch, heads_q, seqlen_q), float32, natural logarithm. dlse is the gradient of
    softmax_lse, contiguous; None where that has none."""

    dout: Tensor
    out: Tensor
    softmax_lse: Tensor
    dlse: Tensor | None = None
