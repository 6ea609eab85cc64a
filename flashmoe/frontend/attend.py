"""From a user's call to its kernel: validated once per kind of call, later only looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashmoe.backends.base import Run
from flashmoe.backends.padding import cut, padded
from flashmoe.backends.sdpa import attend_by_sdpa
from flashmoe.frontend import ops, repeated
from flashmoe.frontend.eager import EagerAttention, PlainAttention
from flashmoe.frontend.gradients import Training, refuse_gradients
from flashmoe.frontend.lengths import check_lengths
from flashmoe.frontend.node import attention_under_node
from flashmoe.frontend.probabilities import signed_weights
from flashmoe.frontend.validation import Asked, mask_of, validate, validate_tensors
from flashmoe.machine.environment import variable
from flashmoe.planning.plan import planned
from flashmoe.spec import shapes
from flashmoe.spec.call import DENSE, NO_TERMS, Call, Sequences, Terms
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import Problem
from flashmoe.spec.terms import as_kernels_take

Result = Tensor | tuple[Tensor, Tensor, Tensor | None]
_Call = Callable[[Tensor, Tensor, Tensor, Terms, Sequences], Result]

# Ready-made calls by everything that a plan and validation depend on. Bounded: a program with
# endlessly many shapes only loses the head start.
_calls: dict[Any, _Call] = {}
MAX_CALLS = 4096

# What holds numbers in memory of its own. A subclass may be anything else.
PLAIN = frozenset({Tensor, torch.nn.Parameter})

_AUTOCAST_DTYPES = frozenset({torch.float16, torch.bfloat16})

# Looked up once: every call needs them.
any_autocast_enabled = torch._C._is_any_autocast_enabled
are_deterministic_algorithms_enabled = torch.are_deterministic_algorithms_enabled
functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack


def window_of(causal: bool, window_size: object) -> tuple[int, int]:
    """A window that has a hash, of whatever users give."""
    mask = mask_of(causal, window_size)
    return mask.left, mask.right


def new_rng_state(device: torch.device) -> Tensor:
    """Terms.rng_state from torch's generator of `device`, drawn as any random number is: a CUDA
    graph replays with new ones, a checkpoint repeats it, and so does torch.manual_seed."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def is_plain(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> bool:
    """Whether these are ordinary tensors, and no transform of torch.func, no dual level and no
    dispatch mode (fake tensors, make_fx) is active."""
    return (
        type(q) in PLAIN
        and type(k) in PLAIN
        and type(v) in PLAIN
        and (not others or all(type(x) in PLAIN for x in others))
        and not functorch_active()
        and forward_ad._current_level < 0
        and not _dispatch_modes()
    )


def kinds_of(tensors: Iterable[Tensor | None]) -> list[Any] | None:
    """What validation depends on, of each; None where one is no ordinary tensor."""
    kinds: list[Any] = []
    for x in tensors:
        if x is None:
            kinds.append(None)
        elif type(x) in PLAIN:
            kinds += x.shape, x.dtype, x.device, x.is_contiguous()
        else:
            return None
    return kinds


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asked: tuple[Any, ...],
    terms: Terms = NO_TERMS,
    sequences: Sequences = DENSE,
    lengths: tuple[Tensor, ...] | None = None,
) -> Result:
    """Attention of what a user gave, with out of v's head_dim. `asked` are the fields of Asked: a
    tuple with names takes longer to make than any look-up. `lengths` may be the tensors of
    `sequences`, each of them once; which they are, asked and their number say."""
    is_compiling = torch.compiler.is_compiling()
    kind: Any = None
    tensors: tuple[Tensor, ...] = (q, k, v)
    call: _Call | None
    if not is_compiling and terms is NO_TERMS and shapes.recorder is None:
        if sequences is DENSE:
            kind = asked, torch.is_grad_enabled()
        elif lengths is not None:
            kind = asked, torch.is_grad_enabled(), sequences[6:], len(lengths)
            tensors = (q, k, v, *lengths)
        call = repeated.found(kind, tensors)
        if call is not None:
            return call(q, k, v, terms, sequences)
    by_op = is_compiling or not is_plain(q, k, v)
    kinds: list[Any] | None = []
    if not by_op and (terms is not NO_TERMS or sequences is not DENSE):
        kinds = kinds_of(sequences[:6] if terms is NO_TERMS else (*terms.tensors, *sequences[:6]))
        by_op = kinds is None
    if by_op:
        validate_tensors(q, k, v)
    if by_op or any_autocast_enabled():
        kind = None
        q, k, v, terms = _autocast(q, k, v, terms)
    if by_op:
        return _attend_op(q, k, v, Asked(*asked), terms, sequences)
    try:
        key: Any = (
            q.shape,
            k.shape,
            v.shape,
            q.dtype,
            k.dtype,
            v.dtype,
            q.device,
            k.device,
            v.device,
            _wants_gradient(q, k, v, terms),
            asked,
        )
        if kinds and terms is NO_TERMS:
            key = (key, sequences[6:], *kinds)
        elif kinds:
            key = (key, terms.numbers, sequences[6:], *kinds)
        call = _calls.get(key)
    except (TypeError, RuntimeError):  # only what is not allowed has no shape or no hash
        validate(q, k, v, Asked(*asked), terms, sequences)
        raise
    if call is None and torch._C._is_tracing():  # whose sizes are tensors, so no key is known
        return _attend_op(q, k, v, Asked(*asked), terms, sequences)
    if shapes.recorder is not None:
        scale, mask = validate(q, k, v, Asked(*asked), terms, sequences)
        shapes.record(Call(*_padded(q, k, v), scale, terms, sequences), mask)
    if call is None:
        call = _prepare(q, k, v, Asked(*asked), terms, sequences)
        if len(_calls) >= MAX_CALLS:
            _calls.clear()
        _calls[key] = call
    if kind is not None:
        repeated.remember(kind, tensors, call)
    return call(q, k, v, terms, sequences)


def attend_dropping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asked: tuple[Any, ...],
    terms: Terms,
    sequences: Sequences = DENSE,
) -> Result:
    """`attend` with dropout, whose state is drawn here unless it is given, and which comes with
    S_dmask where softmax_lse is asked for."""
    validate_tensors(q, k, v)
    if terms.rng_state is None:
        terms = terms._replace(rng_state=new_rng_state(q.device))
    result = attend(q, k, v, asked, terms, sequences)
    if isinstance(result, Tensor):
        return result
    scale, mask = validate(q, k, v, Asked(*asked), terms, sequences)
    terms, sequences = _as_kernels_take(terms, sequences)
    with torch.no_grad():
        call = Call(q.detach(), k.detach(), v.detach(), scale, terms, sequences)
        return *result[:2], signed_weights(call, mask)


def forget_calls() -> None:
    """Decide anew at the next calls."""
    _calls.clear()
    repeated.forget()


def _wants_gradient(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> bool:
    if not torch.is_grad_enabled():
        return False
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return True
    return terms is not NO_TERMS and any(x is not None and x.requires_grad for x in terms.tensors)


def _autocast(
    q: Tensor, k: Tensor, v: Tensor, terms: Terms
) -> tuple[Tensor, Tensor, Tensor, Terms]:
    """In the dtype of autocast, where that is on for q's device."""
    device_type = "cuda" if q.is_cuda else "cpu"
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        # As torch does it: float64 is left alone.
        q, k, v = (
            x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (q, k, v)
        )
        if terms.attn_mask is not None and terms.attn_mask.dtype in _AUTOCAST_DTYPES:
            terms = terms._replace(attn_mask=terms.attn_mask.to(q.dtype))
    return q, k, v, terms


def _as_kernels_take(terms: Terms, sequences: Sequences) -> tuple[Terms, Sequences]:
    """In the dtypes and strides that flashmoe/spec says."""
    if terms is not NO_TERMS:
        terms = as_kernels_take(terms)
    if sequences is not DENSE:
        lengths = (None if x is None else x.contiguous() for x in sequences[:6])
        sequences = Sequences._make((*lengths, *sequences[6:]))
    return terms, sequences


def _padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With columns of 0 up to the multiples of 8 that kernels take: they add nothing to a score,
    and are cut from out."""
    q, k, v = (padded(x, -(-x.shape[-1] // 8) * 8) for x in (q, k, v))
    return q, k, v


def _is_padded(q: Tensor, v: Tensor) -> bool:
    return q.shape[-1] % 8 != 0 or v.shape[-1] % 8 != 0


def _cut(result: Result, head_dim: int) -> Result:
    if isinstance(result, Tensor):
        return cut(result, head_dim)
    return cut(result[0], head_dim), *result[1:]


def _asks_for_sdpa(asked: Asked, terms: Terms, sequences: Sequences) -> bool:
    if asked.tile or asked.return_lse or terms is not NO_TERMS or sequences is not DENSE:
        return False
    return (asked.backend or variable("FLASHMOE_BACKEND")) == "sdpa"


def _by_sdpa(call: Call, mask: Mask, asked: Asked) -> _Call | None:
    """SDPA, which asked for by name brings its own backward; None where it cannot run this."""
    q, k, v, scale = call[:4]
    mask = mask.reduced(q.shape[1], k.shape[1])
    if mask.is_local or (mask.is_causal and q.shape[1] != k.shape[1]):
        return None
    if asked.deterministic and _wants_gradient(q, k, v, NO_TERMS):
        raise ValueError("deterministic must be False with backend 'sdpa', got True")
    return lambda q, k, v, *_: attend_by_sdpa(Call(q, k, v, scale), mask.is_causal)


def _attend_op(
    q: Tensor, k: Tensor, v: Tensor, asked: Asked, terms: Terms, sequences: Sequences
) -> Result:
    """Through the differentiable, traceable op. The plan is the op's own business, at run time."""
    scale, mask = validate(q, k, v, asked, terms, sequences)
    if _is_padded(q, v):
        asked = asked._replace(softmax_scale=scale)
        return _cut(_attend_op(*_padded(q, k, v), asked, terms, sequences), v.shape[-1])
    if _asks_for_sdpa(asked, terms, sequences):
        by_sdpa = _by_sdpa(Call(q, k, v, scale), mask, asked)
        if by_sdpa is not None:
            return by_sdpa(q, k, v, terms, sequences)
    terms, sequences = _as_kernels_take(terms, sequences)
    overrides = asked.backend or "", str(asked.tile or ""), bool(asked.deterministic)
    arguments = (q, k, v, scale, mask.left, mask.right, *overrides, *terms)
    if sequences is DENSE and not asked.return_lse:
        return ops.attention_without_lse(*arguments)  # type: ignore[no-any-return]
    if sequences is DENSE:
        out, lse = ops.attention(*arguments)
    elif asked.num_splits == 0:
        out, lse = ops.attention_packed(*arguments, *sequences)
    else:
        out, lse = ops.attention_split(*arguments, *sequences, asked.num_splits)
    return (out, lse, None) if asked.return_lse else out


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, asked: Asked, terms: Terms, sequences: Sequences
) -> _Call:
    """The call for all later tensors like these, with nothing left to decide."""
    scale, mask = validate(q, k, v, asked, terms, sequences)
    if _is_padded(q, v):
        head_dim_v, asked = v.shape[-1], asked._replace(softmax_scale=scale)
        padded_call = _prepare(*_padded(q, k, v), asked, terms, sequences)
        return lambda q, k, v, terms, sequences: _cut(
            padded_call(*_padded(q, k, v), terms, sequences), head_dim_v
        )
    call, lengths = _with_gradient, sequences[:6]
    if not _wants_gradient(q, k, v, terms):
        call = _without_gradient
    prepared = call(Call(q, k, v, scale, terms, sequences), mask, asked)
    checks = sequences is not DENSE and variable("FLASHMOE_CHECK") == "1"
    if terms is NO_TERMS and not checks and all(x is None or x.is_contiguous() for x in lengths):
        return prepared

    def taken(q: Tensor, k: Tensor, v: Tensor, terms: Terms, sequences: Sequences) -> Result:
        terms, sequences = _as_kernels_take(terms, sequences)
        if checks:
            check_lengths(Call(q, k, v, scale, terms, sequences))
        return prepared(q, k, v, terms, sequences)

    return taken


def _without_gradient(like: Call, mask: Mask, asked: Asked) -> _Call:
    problem, scale = Problem.of_call(like, mask), like.softmax_scale
    overrides = asked.backend, asked.tile, asked.return_lse, bool(asked.deterministic)
    run: Run = planned(problem, like.q.device, *overrides, asked.num_splits).run

    def call(q: Tensor, k: Tensor, v: Tensor, terms: Terms, sequences: Sequences) -> Tensor:
        return run(Call._make((q, k, v, scale, terms, sequences)))[0]

    def call_with_lse(
        q: Tensor, k: Tensor, v: Tensor, terms: Terms, sequences: Sequences
    ) -> tuple[Tensor, Tensor, None]:
        out, lse = run(Call._make((q, k, v, scale, terms, sequences)))
        assert lse is not None
        return out, lse, None

    return call_with_lse if asked.return_lse else call


def _with_gradient(like: Call, mask: Mask, asked: Asked) -> _Call:
    if _asks_for_sdpa(asked, like.terms, like.sequences):
        by_sdpa = _by_sdpa(like, mask, asked)
        if by_sdpa is not None:
            return by_sdpa
    refuse_gradients(like.terms, like.sequences)
    problem, scale = Problem.of_call(like, mask), like.softmax_scale
    overrides = asked.backend, asked.tile, bool(asked.deterministic)
    training = Training(problem, like.q.device, *overrides)
    attend_plain: Callable[..., Tensor] = PlainAttention.apply

    def call_under_node(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        number = training.plan_number
        if not number or are_deterministic_algorithms_enabled() or shapes.recorder is not None:
            return attend_plain(training, Call(q, k, v, scale), q, k, v)
        out: Tensor = attention_under_node(q, k, v, None, number, scale=scale)[0]
        return out

    def call_plain(q: Tensor, k: Tensor, v: Tensor, terms: Terms, sequences: Sequences) -> Tensor:
        return attend_plain(training, Call._make((q, k, v, scale, terms, sequences)), q, k, v)

    attend: Callable[..., tuple[Tensor, Tensor]] = EagerAttention.apply

    def call(
        q: Tensor, k: Tensor, v: Tensor, terms: Terms, sequences: Sequences
    ) -> tuple[Tensor, Tensor, None]:
        given = Call._make((q, k, v, scale, terms, sequences))
        out, lse = attend(training, given, q, k, v, terms.sinks, terms.attn_mask)
        return out, lse, None

    if asked.return_lse:
        return call
    if like.terms.sinks is not None or like.terms.attn_mask is not None:
        return lambda *arguments: call(*arguments)[0]
    if like.terms is NO_TERMS and like.sequences is DENSE:
        return call_under_node
    return call_plain
