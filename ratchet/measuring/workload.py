"""A case as two calls on random data, ours and SDPA's, and whether ours is right."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import flashmoe
from flashmoe.measure.check import Checker, Correctness
from flashmoe.measure.inputs import Inputs, make_inputs
from flashmoe.ratchet.measuring.suite import Case
from flashmoe.spec.call import Call, Sequences, Terms

# Torch's own, whatever torch.nn.functional calls so by now: users put ours there. Not by the
# library's name for it, which older builds lack.
torch_sdpa = torch._C._nn.scaled_dot_product_attention

_Results = tuple[Tensor, ...]
# (sequence, head of k) pairs that are checked: on a GPU all of them in most cases.
_PAIRS = {"cpu": 8, "cuda": 64}


class Workload:
    """One case's data and the calls on them. Each call returns (out,), or (out, dq, dk, dv) where
    the case has a backward."""

    def __init__(
        self, case: Case, device: torch.device, seed: int, options: Mapping[str, str] | None = None
    ) -> None:
        """`options`: backend and tile of our function, where others than the planned ones are to
        run."""
        self._case, self._options = case, dict(options or {})
        self._inputs = make_inputs(case.problems[-1], device, seed)
        if (made := self._inputs.call.terms.names) != case.problem.terms:
            raise ValueError(f"{case.name} needs inputs with its terms, which are made with {made}")
        p, yardstick = case.yardstick, self._inputs
        if p != case.problem:
            direction = case.problems[-1].direction
            yardstick = make_inputs(replace(p, direction=direction), device, seed)
        self._yardstick = _transposed(yardstick)
        grouped = p.heads_q != p.heads_kv
        self._sdpa: dict[str, Any] = {"is_causal": p.mask.is_causal, "enable_gqa": grouped}

    @functools.cached_property
    def ours(self) -> Callable[[], _Results]:
        """Our function, as users call it. Raises NotImplementedError where the build that is
        measured has nothing like it."""
        return self.with_options(self._options)

    def with_options(self, options: Mapping[str, str]) -> Callable[[], _Results]:
        name, keywords = self._arguments()
        function = getattr(flashmoe, name, None)
        if function is None:
            raise NotImplementedError(f"flashmoe has no {name}")
        if unknown := sorted(set(keywords) - set(inspect.signature(function).parameters)):
            raise NotImplementedError(f"{name} has no argument {', '.join(unknown)}")
        return self.other(functools.partial(function, **keywords, **options), heads_first=False)

    @property
    def call(self) -> Call:
        return self._inputs.call

    def fill_gaps(self) -> None:
        """Zeros where a cache holds no keys, and NaN is."""
        if self.call.sequences.seqused_k is not None:
            for x in self.call[1:3]:
                x.nan_to_num_(0.0)

    @functools.cached_property
    def sdpa(self) -> Callable[[], _Results]:
        """The yardstick."""
        return self._timed(functools.partial(torch_sdpa, **self._sdpa), *self._yardstick)

    def other(self, attend: Callable[..., Any], heads_first: bool) -> Callable[[], _Results]:
        """Another implementation on the same data, `heads_first` in SDPA's layout. Results are as
        `ours` returns them."""
        if not heads_first:
            return self._timed(attend, *self._inputs.call[:3], self._inputs.dout)
        call = self._timed(attend, *_transposed(self._inputs))
        return lambda: tuple(x.transpose(1, 2) for x in call())

    def sdpa_backend(self) -> str:
        """Which of its own backends SDPA runs on these inputs, by the function it asks itself."""
        chosen = torch._fused_sdp_choice(*self._yardstick[:3], **self._sdpa)
        return str(SDPBackend(chosen).name).lower()

    def check(self) -> Correctness:
        """Our results against the reference (measure/check.py); `reason` begins with the case's
        kind."""
        results = dict(zip(("out", "dq", "dk", "dv"), self.ours(), strict=False))
        found = Checker(self._inputs, pairs=_PAIRS[self._yardstick[0].device.type]).check(results)
        return replace(found, reason=found.reason and f"{self._case.kind}: {found.reason}")

    def _timed(
        self, attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None
    ) -> Callable[[], _Results]:
        """What is timed of `attend`: all of it, or only the backward of a forward that ran here."""
        inputs = (q, k, v)
        if dout is None:
            return lambda: (attend(*inputs),)
        for x in inputs:
            x.requires_grad_()
        kept = None if "fwd" in self._case.directions else attend(*inputs)

        def call() -> _Results:
            out = attend(*inputs) if kept is None else kept
            gradients = torch.autograd.grad(out, inputs, dout, retain_graph=kept is not None)
            return (out.detach(), *gradients)

        return call

    def _arguments(self) -> tuple[str, dict[str, Any]]:
        """Which function of flashmoe computes the case, and its arguments besides q, k and v: only
        those that the case needs, for older builds have fewer."""
        mask, call = self._case.problem.mask, self._inputs.call
        arguments = _given(call.terms) | _given(call.sequences)
        if mask.is_local:
            arguments["window_size"] = (mask.left, mask.right)
        elif mask.is_causal:
            arguments["causal"] = True
        layout = call.sequences.layout
        if layout in ("dense", "packed"):
            return f"flash_attn_{'varlen_' if layout == 'packed' else ''}func", arguments
        arguments["cache_seqlens"] = arguments.pop("seqused_k")
        return "flash_attn_with_kvcache", arguments


def _transposed(inputs: Inputs) -> tuple[Any, ...]:
    """q, k, v and dout, (batch, heads, seqlen, head_dim) and contiguous."""
    tensors = (*inputs.call[:3], inputs.dout)
    return tuple(x if x is None else x.transpose(1, 2).contiguous() for x in tensors)


def _given(fields: Terms | Sequences) -> dict[str, Any]:
    """Those that are not left at their default, None or 0."""
    return {name: x for name, x in fields._asdict().items() if isinstance(x, Tensor) or x}
