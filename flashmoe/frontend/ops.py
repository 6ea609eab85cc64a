"""torch.library registration: what torch.compile, autograd and opcheck see of our kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashmoe import _extension
from flashmoe.backends.base import Run, RunBackward
from flashmoe.frontend.lengths import check_lengths
from flashmoe.planning.plan import planned
from flashmoe.spec import shapes
from flashmoe.spec.call import DENSE, NO_TERMS, Call, Saved, Sequences, Terms
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

_extension.load()

# A FRAGMENT, because the extension has defined the namespace. Lives as long as the process: what it
# registered goes with it. custom_op would not do: its autograd kernel drops forward-mode tangents
# of tensors that require no gradient.
_library = torch.library.Library("flashmoe", "FRAGMENT")  # type: ignore[no-untyped-call]


class Arguments(NamedTuple):
    """Those of the ops `attention` and `attention_packed`, which have the first 12, and all."""

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float
    window_left: int
    window_right: int
    backend: str
    tile: str
    deterministic: bool = False
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    block_table: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    @property
    def call(self) -> Call:
        return Call(*self[:4], Terms(*self[9:12]), Sequences(*self[12:]))

    @property
    def mask(self) -> Mask:
        return Mask(self.window_left, self.window_right)


# Where the op's arguments have what gets a gradient beside q, k and v.
_SINKS = Arguments._fields.index("sinks")
# From here on they are those of the backward's op, too.
_SHARED = Arguments._fields.index("deterministic")


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
    out, lse = _run(Arguments(*arguments), need_lse=True)
    assert lse is not None, "need_lse chose a backend that does not return softmax_lse"
    return out, lse


def _attention_without_lse(*arguments: Any) -> Tensor:
    return _run(Arguments(*arguments), need_lse=False)[0]


def _run(arguments: Arguments, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    call = arguments.call
    check_lengths(call)
    problem = Problem.of_call(call, arguments.mask)
    if shapes.recorder is not None:
        shapes.recorder[problem] += 1
    device = call.q.device
    run: Run = planned(problem, device, arguments.backend, arguments.tile, need_lse).run
    with _without_autocast(call.q):
        return run(call)


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
    *shared: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = Arguments(q, k, v, softmax_scale, window_left, window_right, backend, "", *shared)
    call = arguments.call
    problem = Problem.of_call(call, arguments.mask)
    run = Training(problem, q.device, backend, None, arguments.deterministic).backward()
    # .backward() may be called inside an autocast block, which would round a float32 gradient's
    # matmuls to 16 bits.
    with _without_autocast(q):
        return run(call, Saved(dout, out, softmax_lse, dlse))


_TERMS = (
    "bool deterministic=False, float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None"
)
_SEQUENCES = (
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_k=None, "
    "Tensor? leftpad_k=None, Tensor? cache_batch_idx=None, Tensor? block_table=None, "
    "SymInt max_seqlen_q=0, SymInt max_seqlen_k=0"
)
_FORWARD = (
    "Tensor q, Tensor k, Tensor v, float softmax_scale, int window_left, int window_right, "
    f"str backend, str tile, {_TERMS}"
)
_BACKWARD = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor? dlse, "
    f"float softmax_scale, int window_left, int window_right, str backend, {_TERMS}"
)
for _schema in (
    f"attention({_FORWARD}) -> (Tensor out, Tensor softmax_lse)",
    f"attention_without_lse({_FORWARD}) -> Tensor",
    f"attention_backward({_BACKWARD}) -> (Tensor dq, Tensor dk, Tensor dv)",
    f"attention_packed({_FORWARD}, {_SEQUENCES}) -> (Tensor out, Tensor softmax_lse)",
    f"attention_packed_backward({_BACKWARD}, {_SEQUENCES}) -> (Tensor dq, Tensor dk, Tensor dv)",
):
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]

attention = torch.ops.flashmoe.attention.default
"""(q, k, v, softmax_scale, window_left, window_right, backend, tile, deterministic=False,
softcap=0.0, alibi_slopes=None, sinks=None) -> out, softmax_lse; differentiable in q, k, v and
sinks. The plan is made at run time, by the first call for a problem, so a compiled graph follows
the tuned database. Empty `backend` and `tile` do not override. With `deterministic` the gradients
are the same bits every time. Slopes and sinks as spec/call.py, Terms, says."""

attention_without_lse = torch.ops.flashmoe.attention_without_lse.default
"""out alone, so that backends that do not return softmax_lse may run; `attention` where a gradient
is asked for."""

attention_backward = torch.ops.flashmoe.attention_backward.default
"""(dout, q, k, v, out, softmax_lse, dlse, softmax_scale, window_left, window_right, backend,
deterministic=False, softcap=0.0, alibi_slopes=None, sinks=None) -> dq, dk, dv, contiguous, shaped
and typed as q, k, v. dlse, the gradient of softmax_lse, may be None. Not differentiable."""

attention_packed = torch.ops.flashmoe.attention_packed.default
"""`attention` of sequences whose lengths are read on the device: the arguments of `attention`, then
the fields of spec/call.py, Sequences, by their names. Differentiable where k and v are packed."""

attention_packed_backward = torch.ops.flashmoe.attention_packed_backward.default
"""`attention_backward` of `attention_packed`."""


def _without_autocast(q: Tensor) -> contextlib.AbstractContextManager[object]:
    """Nothing where autocast is off, for entering its context costs microseconds."""
    device_type = q.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    # (batch, heads, seqlen), or (heads, total).
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


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


def _wants_gradient(*arguments: Any) -> bool:
    """Also refuses what there is no formula for: nothing may come out as a gradient of 0."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
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


def refuse_gradients(terms: Terms, sequences: Sequences) -> None:
    """Raise for what has no gradient in a call that asks for some."""
    if terms.alibi_slopes is not None and terms.alibi_slopes.requires_grad:
        raise NotImplementedError("alibi_slopes must not require a gradient: it has none")
    if sequences.layout not in ("dense", "packed"):
        raise NotImplementedError(
            "keys in a cache or in pages (block_table) have no gradients here; torch.no_grad() "
            "says that none are wanted"
        )


def _saved(dout: Tensor | None, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Saved:
    """With gradients of which autograd gives one or both, and as they come. What a row that sees
    nothing has for a softmax_lse of -inf may be no number, and reaches nothing."""
    if dout is None:
        dout = torch.zeros_like(out)
    if dlse is not None:
        dlse = dlse.masked_fill(lse == float("-inf"), 0.0).contiguous()
    return Saved(dout, out, lse, dlse)


def _sinks_gradient(call: Call, saved: Saved) -> Tensor:
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


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, forward: Any, backward: Any, keyset: Any, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = _below_autograd(forward, keyset, *arguments)
        are_tensors = [isinstance(x, Tensor) for x in arguments]
        ctx.save_for_backward(out, lse, *(x for x in arguments if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
        ctx.are_tensors, ctx.op = are_tensors, backward
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        gradients: list[Tensor | None] = [None] * len(ctx.others)
        if dout is not None or dlse is not None:
            out, lse, *tensors = ctx.saved_tensors
            given = iter(tensors)
            arguments = Arguments(
                *(
                    next(given) if is_tensor else x
                    for is_tensor, x in zip(ctx.are_tensors, ctx.others, strict=True)
                )
            )
            saved = _saved(dout, out, lse, dlse)
            gradients[:3] = ctx.op(
                *(saved.dout, *arguments[:3], *saved[1:], *arguments[3:7]),
                *arguments[_SHARED : len(ctx.others)],
            )
            if len(gradients) > _SINKS and ctx.needs_input_grad[3 + _SINKS]:
                gradients[_SINKS] = _sinks_gradient(arguments.call, saved)
        return None, None, None, *gradients


class EagerAttention(torch.autograd.Function):
    """(q, k, v, softmax_scale, Training, sinks, Terms, Sequences) -> out, softmax_lse: what the op
    `attention` computes, without the dispatcher, which takes longer than a small problem. For
    ordinary tensors, where nothing is traced or transformed. `sinks` are those of the Terms."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        training: Training,
        sinks: Tensor | None = None,
        terms: Terms = NO_TERMS,
        sequences: Sequences = DENSE,
    ) -> tuple[Tensor, Tensor]:
        out, lse = training.forward(Call(q, k, v, softmax_scale, terms, sequences))
        assert lse is not None, "need_lse chose a backend that does not return softmax_lse"
        if terms is NO_TERMS and sequences is DENSE:
            ctx.save_for_backward(q, k, v, out, lse)
        else:  # what is changed in place before the backward is an error
            ctx.save_for_backward(q, k, v, out, lse, *terms[1:], *sequences[:3])
        ctx.others = softmax_scale, training, terms, sequences
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return (None,) * 8
        q, k, v, out, lse, *_ = ctx.saved_tensors
        scale, training, terms, sequences = ctx.others
        saved = _saved(dout, out, lse, dlse)
        call = Call(q, k, v, scale, terms, sequences)
        if torch.is_grad_enabled():  # by create_graph: the op refuses a second derivative
            arguments = (*saved[1:], scale, *training.arguments, *terms)
            if sequences is DENSE:
                gradients = attention_backward(saved.dout, q, k, v, *arguments)
            else:
                gradients = attention_packed_backward(saved.dout, q, k, v, *arguments, *sequences)
        else:
            with _without_autocast(q):
                gradients = training.backward()(call, saved)
        dsinks = None
        if terms.sinks is not None and ctx.needs_input_grad[5]:
            dsinks = _sinks_gradient(call, saved)
        return *gradients, None, None, dsinks, None, None


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, keyset: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _below_autograd(op, keyset, *arguments)
        return dq, dk, dv

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            "double backward is not supported by flashmoe's attention; "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) with torch's own is"
        )


def _forward_autograd(
    op: torch._ops.OpOverload, forward: torch._ops.OpOverload, backward: torch._ops.OpOverload
) -> Callable[..., Any]:
    """The autograd kernel of `op`, which is `forward`, or its first result."""

    def autograd(keyset: Any, *arguments: Any) -> Any:
        if not _wants_gradient(*arguments):
            return _below_autograd(op, keyset, *arguments)
        call = Arguments(*arguments).call
        refuse_gradients(call.terms, call.sequences)
        found = _Attention.apply(forward, backward, keyset, *arguments)  # type: ignore[no-untyped-call]
        return found if op is forward else found[0]

    return autograd


def _backward_autograd(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def autograd(keyset: Any, *arguments: Any) -> Any:
        if _wants_gradient(*arguments):
            return _AttentionBackward.apply(op, keyset, *arguments)  # type: ignore[no-untyped-call]
        return _below_autograd(op, keyset, *arguments)

    return autograd


for _kernel_op in ("fwd_cpu", "fwd_cuda"):
    torch.library.register_fake(f"flashmoe::{_kernel_op}", _fake_forward)

for _op, _kernel, _fake, _autograd in (
    (
        attention,
        _attention,
        _fake_forward,
        _forward_autograd(attention, attention, attention_backward),
    ),
    (
        attention_without_lse,
        _attention_without_lse,
        _fake_attention_without_lse,
        _forward_autograd(attention_without_lse, attention, attention_backward),
    ),
    (
        attention_packed,
        _attention,
        _fake_forward,
        _forward_autograd(attention_packed, attention_packed, attention_packed_backward),
    ),
    (
        attention_backward,
        _attention_backward,
        _fake_attention_backward,
        _backward_autograd(attention_backward),
    ),
    (
        attention_packed_backward,
        _attention_backward,
        _fake_attention_backward,
        _backward_autograd(attention_packed_backward),
    ),
):
    _name = _op._schema.name
    torch.library.register_kernel(_name, ("cpu", "cuda"), _kernel, lib=_library)
    torch.library.register_fake(_name, _fake, lib=_library)
    _library.impl(  # type: ignore[no-untyped-call]
        _name.removeprefix("flashmoe::"), _autograd, "Autograd", with_keyset=True
    )
