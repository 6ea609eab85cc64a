"""Call: what one call carries to a kernel beside its problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Call(NamedTuple):
    """q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen_kv, heads_kv, head_dim), with
    any strides."""

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float


class Saved(NamedTuple):
    """What the backward of a Call needs beside it: the gradient of out, and the forward's out and
    softmax_lse (batch, heads_q, seqlen_q), float32, natural logarithm. dlse is the gradient of
    softmax_lse, contiguous; None where that has none."""

    dout: Tensor
    out: Tensor
    softmax_lse: Tensor
    dlse: Tensor | None = None
