"""torch.library registration: what torch.compile, autograd and opcheck see of our kernels."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashmoe import _extension
from flashmoe.backends.base import Run, RunBackward
from flashmoe.planning.plan import planned
from flashmoe.spec import shapes
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

_extension.load()

# A FRAGMENT, because the extension has defined the namespace. Lives as long as the process: what it
# registered goes with it. custom_op would not do: its autograd kernel drops forward-mode tangents
# of tensors that require no gradient.
_library = torch.library.Library("flashmoe", "FRAGMENT")  # type: ignore[no-untyped-call]


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


for _kernel_op in ("fwd_cpu", "fwd_cuda"):
    torch.library.register_fake(f"flashmoe::{_kernel_op}", _fake_forward)


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

    @functools.cached_property
    def forward(self) -> Run:
        run: Run = planned(
            self._problem, self._device, self._backend, self._tile, need_lse=True
        ).run
        return run

    def backward(self) -> RunBackward:
        repeats = self._deterministic or torch.are_deterministic_algorithms_enabled()
        run = self._backwards.get(repeats)
        if run is None:
            problem = replace(self._problem, direction="bwd")
            run = planned(problem, self._device, self._backend, deterministic=repeats).run
            self._backwards[repeats] = run
        return run

    @property
    def arguments(self) -> tuple[int, int, str, bool]:
        """Those of the op `attention_backward` after the scale."""
        mask = self._problem.mask
        return mask.left, mask.right, self._backend or "", self._deterministic


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _run(*arguments, need_lse=True)
    assert lse is not None, "need_lse chose a backend that does not return softmax_lse"
    return out, lse


def _attention_without_lse(*arguments: Any) -> Tensor:
    return _run(*arguments, need_lse=False)[0]


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    backend: str,
    tile: str,
    _deterministic: bool = False,  # every forward is
    *,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    problem = Problem.of(q, k, Mask(window_left, window_right))
    if shapes.recorder is not None:
        shapes.recorder[problem] += 1
    run: Run = planned(problem, q.device, backend, tile, need_lse).run
    with _without_autocast(q):
        return run(Call(q, k, v, softmax_scale))


def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dlse: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    backend: str,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem.of(q, k, Mask(window_left, window_right))
    run = Training(problem, q.device, backend, None, deterministic).backward()
    # .backward() may be called inside an autocast block, which would round a float32 gradient's
    # matmuls to 16 bits.
    with _without_autocast(q):
        return run(Call(q, k, v, softmax_scale), Saved(dout, out, softmax_lse, dlse))


_FORWARD = (
    "Tensor q, Tensor k, Tensor v, float softmax_scale, int window_left, int window_right, "
    "str backend, str tile, bool deterministic=False"
)
for _schema in (
    f"attention({_FORWARD}) -> (Tensor out, Tensor softmax_lse)",
    f"attention_without_lse({_FORWARD}) -> Tensor",
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor? dlse, float softmax_scale, int window_left, int window_right, str backend, "
    "bool deterministic=False) -> "
    "(Tensor dq, Tensor dk, Tensor dv)",
):
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]

attention = torch.ops.flashmoe.attention.default
"""(q, k, v, softmax_scale, window_left, window_right, backend, tile, deterministic=False) -> out,
softmax_lse; differentiable in q, k and v. The plan is made at run time, by the first
call for a problem, so a compiled graph follows the tuned database. Empty `backend` and `tile` do
not override. With `deterministic` the gradients are the same bits every time."""

attention_without_lse = torch.ops.flashmoe.attention_without_lse.default
"""out alone, so that backends that do not return softmax_lse may run; `attention` where a gradient
is asked for."""

attention_backward = torch.ops.flashmoe.attention_backward.default
"""(dout, q, k, v, out, softmax_lse, dlse, softmax_scale, window_left, window_right, backend,
deterministic=False) -> dq, dk, dv, contiguous, shaped and typed as q, k, v. dlse, the gradient of
softmax_lse, may be None. Not differentiable."""


def _without_autocast(q: Tensor) -> contextlib.AbstractContextManager[object]:
    """Nothing where autocast is off, for entering its context costs microseconds."""
    device_type = q.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _fake_attention_without_lse(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _fake_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _below_autograd(op: torch._ops.OpOverload, keyset: Any, *arguments: Any) -> Any:
    """The op's kernel for the device, past autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def _wants_gradient(*tensors: Tensor) -> bool:
    """Also refuses what there is no formula for: nothing may come out as a gradient of 0."""
    # A module's global, which says without a call that no dual level is open.
    if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise NotImplementedError(
            "forward-mode AD (torch.func.jvp, jacfwd, forward_ad) is not supported by flashmoe's "
            "attention, got a tensor with a tangent"
        )
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return False
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "torch.func.grad, vjp and jacrev are not supported by flashmoe's attention; "
            "torch.autograd.grad and flashmoe.scaled_dot_product_attention are"
        )
    return True


def _saved(dout: Tensor | None, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Saved:
    """With gradients of which autograd gives one or both, and as they come. What a row that sees
    nothing has for a softmax_lse of -inf may be no number, and reaches nothing."""
    if dout is None:
        dout = torch.zeros_like(out)
    if dlse is not None:
        dlse = dlse.masked_fill(lse == float("-inf"), 0.0).contiguous()
    return Saved(dout, out, lse, dlse)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = _below_autograd(attention, keyset, *arguments)
        q, k, v, softmax_scale, left, right, backend, _, *deterministic = arguments
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = (softmax_scale, left, right, backend, *deterministic)
        ctx.others = (None,) * (len(arguments) - 3)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return None, None, None, None, *ctx.others
        q, k, v, out, lse = ctx.saved_tensors
        saved = _saved(dout, out, lse, dlse)
        dq, dk, dv = attention_backward(saved.dout, q, k, v, *saved[1:], *ctx.arguments)
        return None, dq, dk, dv, *ctx.others


class EagerAttention(torch.autograd.Function):
    """(q, k, v, softmax_scale, Training) -> out, softmax_lse: what the op `attention` computes,
    without the dispatcher, which takes longer than a small problem. For ordinary tensors, where
    nothing is traced or transformed."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, training: Training
    ) -> tuple[Tensor, Tensor]:
        out, lse = training.forward(Call(q, k, v, softmax_scale))
        assert lse is not None, "need_lse chose a backend that does not return softmax_lse"
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.softmax_scale, ctx.training = softmax_scale, training
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return (None,) * 5
        q, k, v, out, lse = ctx.saved_tensors
        saved, scale = _saved(dout, out, lse, dlse), ctx.softmax_scale
        if torch.is_grad_enabled():  # by create_graph: the op refuses a second derivative
            arguments = (*saved[1:], scale, *ctx.training.arguments)
            gradients = attention_backward(saved.dout, q, k, v, *arguments)
        else:
            with _without_autocast(q):
                gradients = ctx.training.backward()(Call(q, k, v, scale), saved)
        return *gradients, None, None


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _below_autograd(attention_backward, keyset, *arguments)
        return dq, dk, dv

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            "double backward is not supported by flashmoe's attention; "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) with torch's own is"
        )


def _autograd_attention(keyset: Any, *arguments: Any) -> Any:
    if _wants_gradient(*arguments[:3]):
        return _Attention.apply(keyset, *arguments)  # type: ignore[no-untyped-call]
    return _below_autograd(attention, keyset, *arguments)


def _autograd_attention_without_lse(keyset: Any, *arguments: Any) -> Any:
    if _wants_gradient(*arguments[:3]):
        return _Attention.apply(keyset, *arguments)[0]  # type: ignore[no-untyped-call]
    return _below_autograd(attention_without_lse, keyset, *arguments)


def _autograd_attention_backward(keyset: Any, *arguments: Any) -> Any:
    if _wants_gradient(*(x for x in arguments[:7] if x is not None)):
        return _AttentionBackward.apply(keyset, *arguments)  # type: ignore[no-untyped-call]
    return _below_autograd(attention_backward, keyset, *arguments)


for _name, _kernel, _fake, _autograd in (
    ("attention", _attention, _fake_forward, _autograd_attention),
    (
        "attention_without_lse",
        _attention_without_lse,
        _fake_attention_without_lse,
        _autograd_attention_without_lse,
    ),
    (
        "attention_backward",
        _attention_backward,
        _fake_attention_backward,
        _autograd_attention_backward,
    ),
):
    torch.library.register_kernel(f"flashmoe::{_name}", ("cpu", "cuda"), _kernel, lib=_library)
    torch.library.register_fake(f"flashmoe::{_name}", _fake, lib=_library)
    _library.impl(_name, _autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
