"""Calls whose v has a head_dim of its own, by kernels that have one for all: with columns of 0 up
to the larger one, which add nothing to a score and nothing to a gradient."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flashmoe.backends.base import Run, RunBackward
from flashmoe.spec.call import Call, Saved


def padded(x: Tensor, head_dim: int) -> Tensor:
    """x, or a copy with columns of 0 behind its own. Differentiable."""
    missing = head_dim - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def cut(x: Tensor, head_dim: int) -> Tensor:
    """The first columns, contiguous. Differentiable."""
    return x[..., :head_dim].contiguous()


def padded_call(call: Call) -> Call:
    """With the larger head_dim for q, k and v."""
    head_dim = max(call.q.shape[-1], call.v.shape[-1])
    q, k, v = (padded(x, head_dim) for x in call[:3])
    return call._replace(q=q, k=k, v=v)


def run_padded(run: Run) -> Run:
    """`run` for calls of two head dimensions."""

    def run_of_two(call: Call) -> tuple[Tensor, Tensor | None]:
        out, lse = run(padded_call(call))
        return cut(out, call.v.shape[-1]), lse

    return run_of_two


def run_backward_padded(run: RunBackward) -> RunBackward:
    """`run` for calls of two head dimensions."""

    def run_of_two(call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        wide = padded_call(call)
        dout, out = (padded(x, wide.v.shape[-1]) for x in saved[:2])
        gradients = run(wide, saved._replace(dout=dout, out=out))
        dq, dk, dv = (cut(x, y.shape[-1]) for x, y in zip(gradients, call[:3], strict=True))
        return dq, dk, dv

    return run_of_two
