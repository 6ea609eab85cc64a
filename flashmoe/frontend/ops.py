"""torch.library registration: what torch.compile, autograd and opcheck see of our kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashmoe import _extension
from flashmoe.backends.base import Run
from flashmoe.frontend.append import append as append_keys
from flashmoe.frontend.gradients import (
    Training,
    mask_gradient,
    refuse_gradients,
    saved_of,
    sinks_gradient,
    without_autocast,
)
from flashmoe.frontend.lengths import check_lengths
from flashmoe.planning.plan import planned
from flashmoe.spec import shapes
from flashmoe.spec.call import DENSE, NO_TERMS, Call, Saved, Sequences, Terms
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import Problem

_extension.load()

# A FRAGMENT, because the extension has defined the namespace. Lives as long as the process: what it
# registered goes with it. custom_op would not do: its autograd kernel drops forward-mode tangents
# of tensors that require no gradient.
_library = torch.library.Library("flashmoe", "FRAGMENT")  # type: ignore[no-untyped-call]


class Arguments(NamedTuple):
    """Those of the ops: what `attention` has, then the fields of Terms, which it has as well, those
    of Sequences, which `attention_packed` has as well, and num_splits, which is
    `attention_split`'s."""

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float
    window_left: int
    window_right: int
    backend: str
    tile: str
    deterministic: bool = False
    terms: Terms = NO_TERMS
    sequences: Sequences = DENSE
    num_splits: int = 0

    @classmethod
    def of(cls, *given: Any) -> Arguments:
        """Of an op's arguments, one behind the other."""
        return cls(*given[:_OWN])._replace(
            terms=Terms(*given[_OWN:_TERMS_END]),
            sequences=Sequences(*given[_TERMS_END:_SEQUENCES_END]),
            num_splits=given[_SEQUENCES_END] if len(given) > _SEQUENCES_END else 0,
        )

    @property
    def call(self) -> Call:
        return Call(*self[:4], self.terms, self.sequences)

    @property
    def mask(self) -> Mask:
        return Mask(self.window_left, self.window_right)


# Where in an op's arguments its own end, and those of Terms and Sequences.
_OWN = Arguments._fields.index("terms")
_TERMS_END = _OWN + len(Terms._fields)
_SEQUENCES_END = _TERMS_END + len(Sequences._fields)
# Where they have what gets a gradient beside q, k and v.
_SINKS = _OWN + Terms._fields.index("sinks")
_MASK = _OWN + Terms._fields.index("attn_mask")
# The one that the backward's ops do not have.
_TILE = Arguments._fields.index("tile")


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _run(Arguments.of(*arguments), need_lse=True)
    assert lse is not None, "need_lse chose a backend that does not return softmax_lse"
    return out, lse


def _attention_without_lse(*arguments: Any) -> Tensor:
    return _run(Arguments.of(*arguments), need_lse=False)[0]


def _run(arguments: Arguments, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    call = arguments.call
    check_lengths(call)
    problem = Problem.of_call(call, arguments.mask)
    shapes.record(call, arguments.mask)
    overrides = arguments.backend, arguments.tile, need_lse, arguments.deterministic
    run: Run = planned(problem, call.q.device, *overrides, arguments.num_splits).run
    with without_autocast(call.q):
        return run(call)


def saved_call(*given: Any) -> tuple[Arguments, Saved]:
    """What the backward ops are given, which have no tile."""
    dout, q, k, v, out, lse, dlse, *how = given
    of_forward = [q, k, v, *how]
    of_forward.insert(_TILE, "")
    return Arguments.of(*of_forward), Saved(dout, out, lse, dlse)


def _attention_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments, saved = saved_call(*given)
    call = arguments.call
    problem = Problem.of_call(call, arguments.mask)
    training = Training(problem, call.q.device, arguments.backend, None, arguments.deterministic)
    return training.gradients(call, saved)


def _attention_mask_backward(*given: Any) -> Tensor:
    arguments, saved = saved_call(*given)
    return mask_gradient(arguments.call, saved, arguments.mask)


_TYPES = {"NoneType": "Tensor?", "float": "float", "int": "SymInt"}


def _arguments_of(fields: tuple[object, ...]) -> str:
    """The fields of Terms or Sequences, by their defaults."""
    names = type(fields)._fields  # type: ignore[attr-defined]
    given = zip(names, fields, strict=True)
    return ", ".join(f"{_TYPES[type(x).__name__]} {name}={x}" for name, x in given)


_TERMS = f"bool deterministic=False, {_arguments_of(NO_TERMS)}"
_SEQUENCES = _arguments_of(DENSE)
_HOW = "float softmax_scale, int window_left, int window_right, str backend"
_FORWARD = f"Tensor q, Tensor k, Tensor v, {_HOW}, str tile, {_TERMS}"
_BACKWARD = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor? dlse, "
    f"{_HOW}, {_TERMS}"
)
for _schema in (
    f"attention({_FORWARD}) -> (Tensor out, Tensor softmax_lse)",
    f"attention_without_lse({_FORWARD}) -> Tensor",
    f"attention_backward({_BACKWARD}) -> (Tensor dq, Tensor dk, Tensor dv)",
    f"attention_mask_backward({_BACKWARD}) -> Tensor",
    f"attention_packed({_FORWARD}, {_SEQUENCES}) -> (Tensor out, Tensor softmax_lse)",
    f"attention_split({_FORWARD}, {_SEQUENCES}, int num_splits=0) -> "
    "(Tensor out, Tensor softmax_lse)",
    f"attention_packed_backward({_BACKWARD}, {_SEQUENCES}) -> (Tensor dq, Tensor dk, Tensor dv)",
    "append(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor seqused_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k_new, Tensor? cache_batch_idx, "
    "Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, "
    "bool rotate_by_row) -> (Tensor q_rotated, Tensor seqused_k_after)",
):
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]

attention = torch.ops.flashmoe.attention.default
"""(q, k, v, softmax_scale, window_left, window_right, backend, tile, deterministic=False, then the
fields of Terms by their names) -> out, softmax_lse; differentiable in q, k, v, sinks and attn_mask.
The plan is made at run time, by the first call for a problem, so a compiled graph follows the tuned
database. Empty `backend` and `tile` do not override. With `deterministic` the gradients are the
same bits every time."""

attention_without_lse = torch.ops.flashmoe.attention_without_lse.default
"""out alone, so that backends that do not return softmax_lse may run; `attention` where a gradient
is asked for."""

attention_backward = torch.ops.flashmoe.attention_backward.default
"""(dout, q, k, v, out, softmax_lse, dlse, softmax_scale, window_left, window_right, backend,
deterministic=False, then the fields of Terms) -> dq, dk, dv, contiguous, shaped and typed as q, k,
v. dlse, the gradient of softmax_lse, may be None. Not differentiable."""

attention_mask_backward = torch.ops.flashmoe.attention_mask_backward.default
"""Of the same arguments the gradient of attn_mask, shaped and typed as it is."""

attention_packed = torch.ops.flashmoe.attention_packed.default
"""`attention` of sequences whose lengths are read on the device: the arguments of `attention`, then
the fields of spec/call.py, Sequences, by their names. Differentiable where k and v are packed."""

attention_split = torch.ops.flashmoe.attention_split.default
"""`attention_packed` whose keys a backend that splits them splits num_splits ways."""

attention_packed_backward = torch.ops.flashmoe.attention_packed_backward.default
"""`attention_backward` of `attention_packed`."""

append = torch.ops.flashmoe.append.default
"""frontend/append.py's function of that name, for what traces or transforms calls."""


def _fake_append(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seqused_k: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    rotary_cos = rest[4]
    rotated = q.new_empty(0 if rotary_cos is None else q.shape)
    return rotated, seqused_k.new_empty(seqused_k.shape)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    # (batch, heads, seqlen), or (heads, total).
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return _fake_attention_without_lse(q, k, v), q.new_empty(shape, dtype=torch.float32)


def _fake_attention_without_lse(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _fake_attention_mask_backward(*arguments: Any) -> Tensor:
    mask = saved_call(*arguments)[0].terms.attn_mask
    assert mask is not None, "attn_mask"
    return mask.new_empty(mask.shape)


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
            arguments = tuple(
                next(given) if is_tensor else x
                for is_tensor, x in zip(ctx.are_tensors, ctx.others, strict=True)
            )
            saved = saved_of(dout, out, lse, dlse)
            how = arguments[3:_TILE] + arguments[_TILE + 1 :]
            of_op = (saved.dout, *arguments[:3], *saved[1:], *how)
            gradients[:3] = ctx.op(*of_op)
            if len(gradients) > _SINKS and ctx.needs_input_grad[3 + _SINKS]:
                gradients[_SINKS] = sinks_gradient(Arguments.of(*arguments).call, saved)
            if len(gradients) > _MASK and ctx.needs_input_grad[3 + _MASK]:
                gradients[_MASK] = attention_mask_backward(*of_op)
        return None, None, None, *gradients


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, keyset: Any, *arguments: Any) -> Any:
        return _below_autograd(op, keyset, *arguments)

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
        call = Arguments.of(*arguments).call
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


_FORWARD_OPS = (
    *("fwd_cpu", "fwd_cpu_dense", "fwd_cuda", "fwd_cuda_dense", "fwd_cuda_packed"),
    *("decode_cuda", "decode_cuda_dense", "decode_cuda_cache"),
)
for _kernel_op in _FORWARD_OPS:
    torch.library.register_fake(f"flashmoe::{_kernel_op}", _fake_forward)
torch.library.register_fake("flashmoe::append_cuda", _fake_append)
for _kernel_op in (*_FORWARD_OPS, "append_cuda"):
    # They are not differentiable, and torch's kernel that says so takes each call's time.
    _library.impl(_kernel_op, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
torch.library.register_kernel("flashmoe::append", ("cpu", "cuda"), append_keys, lib=_library)
torch.library.register_fake("flashmoe::append", _fake_append, lib=_library)

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
        attention_split,
        _attention,
        _fake_forward,
        _forward_autograd(attention_split, attention_split, attention_packed_backward),
    ),
    (
        attention_backward,
        _attention_backward,
        _fake_attention_backward,
        _backward_autograd(attention_backward),
    ),
    (
        attention_mask_backward,
        _attention_mask_backward,
        _fake_attention_mask_backward,
        _backward_autograd(attention_mask_backward),
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
