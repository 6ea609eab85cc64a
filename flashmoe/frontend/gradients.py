"""What a backward needs beside its kernel: its plan, what the forward leaves, and what has no
gradient."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace

import torch
from torch import Tensor

from flashmoe import _extension
from flashmoe.backends import BACKENDS
from flashmoe.backends.base import Run, RunBackward
from flashmoe.backends.blocked import attention_backward
from flashmoe.frontend import node
from flashmoe.planning.plan import Plan, Planned, planned
from flashmoe.spec import shapes
from flashmoe.spec.call import Call, Saved, Sequences, Terms
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile


class Training:
    """A forward that returns softmax_lse, and its backward, for tensors of one kind, each planned
    when it is first asked for. `backend`, `tile` and `deterministic` as the op `attention` takes
    them."""

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        backend: str | None,
        tile: Tile | str | None,
        deterministic: bool,
    ) -> None:
        self._problem, self._device = problem, device
        self._backend, self._tile, self._deterministic = backend, tile, deterministic
        self._backwards: dict[bool, RunBackward] = {}
        # Of what frontend/node.py runs, once the backward is planned; 0 where Python has to.
        self.plan_number = 0.0

    @functools.cached_property
    def _forward(self) -> Planned:
        return planned(self._problem, self._device, self._backend, self._tile, need_lse=True)

    @functools.cached_property
    def forward(self) -> Run:
        run: Run = self._forward.run
        return run

    def backward(self) -> RunBackward:
        repeats = self._deterministic or torch.are_deterministic_algorithms_enabled()
        run = self._backwards.get(repeats)
        if run is None:
            problem = replace(self._problem, direction="bwd")
            found = planned(problem, self._device, self._backend, deterministic=repeats)
            run = self._backwards[repeats] = found.run
            if repeats == self._deterministic:
                self.plan_number = self._number(found.plan, problem)
        return run

    def _number(self, backward: Plan, problem: Problem) -> float:
        if not node.NODE_ON_GPUS or self._problem.features - {"window"}:
            return 0.0
        plan = self._forward.plan
        forward = BACKENDS[plan.backend].handle(self._problem, plan.tile)
        handle = BACKENDS[backward.backend].handle(problem, backward.tile, self._deterministic)
        if forward is None or handle is None or not node.has_node():
            return 0.0
        left, right, backend, deterministic = self.arguments
        return _extension.training_plan(left, right, forward, handle, deterministic, backend)

    def gradients(self, call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv. They may be asked for inside an autocast block, which would round a
        float32 gradient's matmuls to 16 bits."""
        shapes.record(call, self._problem.mask, "bwd")
        if not is_autocast(call.q):  # entering even an empty context costs host time
            return self.backward()(call, saved)
        with without_autocast(call.q):
            return self.backward()(call, saved)

    @property
    def mask(self) -> Mask:
        return self._problem.mask

    @property
    def arguments(self) -> tuple[int, int, str, bool]:
        """Those of the op `attention_backward` after the scale."""
        return self.mask.left, self.mask.right, self._backend or "", self._deterministic


def refuse_gradients(terms: Terms, sequences: Sequences) -> None:
    """Raise for what has no gradient, in a call that needs gradients."""
    if terms.alibi_slopes is not None and terms.alibi_slopes.requires_grad:
        raise NotImplementedError("alibi_slopes must not require a gradient: it has none")
    if sequences.layout not in ("dense", "packed"):
        raise NotImplementedError(
            "keys in a cache or in pages (block_table) have no gradients here; torch.no_grad() "
            "says that none are wanted"
        )


def saved_of(dout: Tensor | None, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Saved:
    """With gradients of which autograd gives one or both, and as they come. What a row that sees
    nothing has for a softmax_lse of -inf may be no number, and reaches nothing."""
    if dout is None:
        dout = torch.zeros_like(out)
    if dlse is not None:
        dlse = dlse.masked_fill(lse == float("-inf"), 0.0).contiguous()
    return Saved(dout, out, lse, dlse)


def sinks_gradient(call: Call, saved: Saved) -> Tensor:
    """(heads_q,): a sink is a score whose value is 0, so of its probability p it has the gradient
    p * (0 - (sum of out * dout - dlse)) in every row."""
    sinks = call.terms.sinks
    assert sinks is not None
    dout, out, lse, dlse = saved
    gain = torch.linalg.vecdot(dout.float(), out.float()).transpose(-1, -2)
    if dlse is not None:
        gain = gain - dlse
    hidden = lse == float("-inf")
    each = (gain * torch.exp(sinks.unsqueeze(-1) - lse)).masked_fill(hidden, 0.0)
    gradient: Tensor = -each.transpose(-1, -2).flatten(0, -2).sum(0)
    return gradient


def is_autocast(q: Tensor) -> bool:
    """Whether autocast is on for q's device. is_cuda, because q.device.type costs a microsecond."""
    return torch.is_autocast_enabled("cuda" if q.is_cuda else "cpu")


def mask_gradient(call: Call, saved: Saved, mask: Mask) -> Tensor:
    """Of attn_mask, shaped and typed as it is: the gradients of the scores, added up over what it
    is broadcast to. In torch operations, one block of rows at a time, so beside the gradient itself
    memory is linear in seqlen; time is that of another backward."""
    attn_mask = call.terms.attn_mask
    assert attn_mask is not None
    with without_autocast(call.q):
        return attention_backward(call, saved.dout, saved.dlse, mask, of_mask=True)[3]


def without_autocast(q: Tensor) -> contextlib.AbstractContextManager[object]:
    """Nothing where autocast is off, for entering its context costs microseconds."""
    if is_autocast(q):
        return torch.autocast("cuda" if q.is_cuda else "cpu", enabled=False)
    return contextlib.nullcontext()
