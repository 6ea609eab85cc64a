"""A case as two calls on the same random data, ours and SDPA's, and whether ours is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import flashmoe
from flashmoe.measure.reference import attention_reference, error_bound
from flashmoe.ratchet.measuring.suite import Case
from flashmoe.spec.mask import Mask

# Torch's own, whatever torch.nn.functional calls so by now: users put ours there. Not by the
# library's name for it, which older builds lack.
torch_sdpa = torch._C._nn.scaled_dot_product_attention

_Results = tuple[Tensor, ...]
_Inputs = tuple[Tensor, Tensor, Tensor]
# Elements of one materialized score matrix while checking: 0.25 GiB in float64.
_MAX_SCORES = 1 << 25
# Below so many elements the same-dtype computation is made in so many orders.
_FEW, _ORDERS = 1 << 20, 8


@dataclass(frozen=True, slots=True)
class Correctness:
    """Largest absolute errors against the reference as a share of what is allowed, over all
    results; `reason` says what is wrong, empty when nothing is."""

    error: float
    reason: str = ""


class Workload:
    """Inputs of one case and the calls on them. Standard normal data, in each side's own layout:
    (batch, seqlen, heads, head_dim) for ours, (batch, heads, seqlen, head_dim) for SDPA."""

    def __init__(
        self, case: Case, device: torch.device, seed: int, options: Mapping[str, str] | None = None
    ) -> None:
        """`options` of flash_attn_func: backend and tile, where others than the planned ones are
        to run."""
        p = case.problem
        self._case = case
        self._options: dict[str, Any] = dict(options or {})
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, p.dtype)

        def randn(seqlen: int, heads: int) -> Tensor:
            shape = (p.batch, seqlen, heads, p.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self._inputs = (
            randn(p.seqlen_q, p.heads_q),
            randn(p.seqlen_kv, p.heads_kv),
            randn(p.seqlen_kv, p.heads_kv),
        )
        self._dout = randn(p.seqlen_q, p.heads_q) if case.backward else None
        q, k, v = (x.transpose(1, 2).contiguous() for x in self._inputs)
        self._sdpa_inputs = (q, k, v)
        self._yardstick: _Inputs = self._sdpa_inputs
        if case.yardstick != p:
            keys = case.yardstick.seqlen_kv
            self._yardstick = (q, k[:, :, :keys].clone(), v[:, :, :keys].clone())
        self._sdpa_dout = None if self._dout is None else self._dout.transpose(1, 2).contiguous()
        for x in (*self._inputs, *self._sdpa_inputs, *self._yardstick):
            x.requires_grad_(case.backward)

    def ours(self) -> _Results:
        """out, and dq, dk, dv with the backward."""
        arguments = _mask_arguments(self._case.problem.mask) | self._options
        out = flashmoe.flash_attn_func(*self._inputs, **arguments)
        assert isinstance(out, Tensor)
        return self._with_gradients(out, self._inputs, self._dout)

    def sdpa(self) -> _Results:
        """The yardstick, in SDPA's layout."""
        p, inputs = self._case.yardstick, self._yardstick
        out = torch_sdpa(*inputs, is_causal=p.mask.is_causal, enable_gqa=p.heads_q != p.heads_kv)
        return self._with_gradients(out, inputs, self._sdpa_dout)

    def other(
        self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], heads_first: bool
    ) -> Callable[[], _Results]:
        """Another implementation on the same data, `heads_first` in SDPA's layout and otherwise in
        ours. Results are (batch, seqlen, heads, head_dim), as `ours` returns them."""
        inputs, dout = self._inputs, self._dout
        if heads_first:
            inputs, dout = self._sdpa_inputs, self._sdpa_dout

        def call() -> _Results:
            results = self._with_gradients(attend(*inputs), inputs, dout)
            return tuple(x.transpose(1, 2) for x in results) if heads_first else results

        return call

    def sdpa_backend(self) -> str:
        """Which of its own backends SDPA runs on these inputs, by the function it asks itself."""
        p = self._case.yardstick
        chosen = torch._fused_sdp_choice(
            *self._yardstick, is_causal=p.mask.is_causal, enable_gqa=p.heads_q != p.heads_kv
        )
        return str(SDPBackend(chosen).name).lower()

    def check(self) -> Correctness:
        """Our results against the reference, with twice the error of the same computation in the
        case's dtype allowed, plus the rounding of the result."""
        names = ("out", "dq", "dk", "dv")
        results = [x.detach() for x in self.ours()]
        judges = [_Judge(name, x.dtype) for name, x in zip(names, results, strict=False)]
        exact = torch.float64 if self._case.problem.dtype == "float32" else torch.float32
        for batch, kv_heads, heads in self._slices():
            q, k, v = self._inputs
            inputs = (q[batch, :, heads], k[batch, :, kv_heads], v[batch, :, kv_heads])
            dout = None if self._dout is None else self._dout[batch, :, heads]
            exactly = self._reference(inputs, dout, exact)
            where = (heads, heads, kv_heads, kv_heads)
            for order in self._orders():
                same_dtype = self._reference(inputs, dout, inputs[0].dtype, order)
                for i, judge in enumerate(judges):
                    judge.see(
                        results[i][batch, :, where[i]], exactly[i].detach(), same_dtype[i].detach()
                    )
        reasons = [reason for judge in judges if (reason := judge.reason())]
        return Correctness(max(judge.share for judge in judges), "; ".join(reasons))

    def _with_gradients(self, out: Tensor, inputs: _Inputs, dout: Tensor | None) -> _Results:
        return (out,) if dout is None else (out, *torch.autograd.grad(out, inputs, dout))

    def _orders(self) -> list[Tensor]:
        """Orders of head_dim in which the same-dtype computation is made. The largest error of few
        elements is a matter of luck; other orders of summation tell what rounding does to them."""
        head_dim, device = self._case.problem.head_dim, self._inputs[0].device
        generator = torch.Generator().manual_seed(0)
        orders = [torch.arange(head_dim)]
        while self._inputs[0].numel() < _FEW and len(orders) < _ORDERS:
            orders.append(torch.randperm(head_dim, generator=generator))
        return [order.to(device) for order in orders]

    def _reference(
        self,
        inputs: _Inputs,
        dout: Tensor | None,
        dtype: torch.dtype,
        order: Tensor | None = None,
    ) -> _Results:
        q, k, v = (x.detach().to(dtype).requires_grad_(dout is not None) for x in inputs)
        scores = (q, k) if order is None else (q[..., order], k[..., order])
        out, _ = attention_reference(*scores, v, mask=self._case.problem.mask, dtype=dtype)
        return self._with_gradients(out, (q, k, v), None if dout is None else dout.to(dtype))

    def _slices(self) -> Iterator[tuple[slice, slice, slice]]:
        """(batch, kv heads, query heads) pieces whose scores fit in memory."""
        p = self._case.problem
        group = p.heads_q // p.heads_kv
        scores = p.heads_q * p.seqlen_q * p.seqlen_kv
        if scores <= _MAX_SCORES:
            step = _MAX_SCORES // scores
            for start in range(0, p.batch, step):
                yield slice(start, start + step), slice(None), slice(None)
            return
        for b in range(p.batch):
            for h in range(p.heads_kv):
                yield slice(b, b + 1), slice(h, h + 1), slice(h * group, (h + 1) * group)


def _mask_arguments(mask: Mask) -> dict[str, Any]:
    """As flash_attn_func of any build takes it: older ones know no window."""
    if mask.is_local:
        return {"window_size": (mask.left, mask.right)}
    return {"causal": mask.is_causal}


class _Judge:
    """Collects one result's errors piece by piece."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self._name, self._dtype = name, dtype
        self._error = self._same_dtype_error = self._scale = 0.0

    @torch.no_grad()
    def see(self, actual: Tensor, reference: Tensor, same_dtype: Tensor) -> None:
        error = (actual.to(reference.dtype) - reference).abs().max().item()
        same = (same_dtype.to(reference.dtype) - reference).abs().max().item()
        # max() drops a NaN on its right, and NaN here is as wrong as it gets.
        self._error = max(self._error, math.inf if math.isnan(error) else error)
        self._same_dtype_error = max(self._same_dtype_error, same)
        self._scale = max(self._scale, reference.abs().max().item())

    @property
    def share(self) -> float:
        return self._error / error_bound(self._dtype, self._same_dtype_error, self._scale)

    def reason(self) -> str:
        if self.share <= 1:
            return ""
        if math.isinf(self._error):
            return f"{self._name} is not finite where the reference is"
        bound = error_bound(self._dtype, self._same_dtype_error, self._scale)
        return f"{self._name} is off by {self._error:.3g}, allowed is {bound:.3g}"
