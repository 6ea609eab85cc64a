"""What users call. Validates once per kind of call, then goes straight to the planned kernel."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from flashmoe.backends.base import Run
from flashmoe.backends.sdpa import attend_by_sdpa, torch_sdpa
from flashmoe.frontend import ops
from flashmoe.frontend.validation import is_normal, mask_of, validate, validate_tensors
from flashmoe.machine.environment import variable
from flashmoe.planning.plan import planned, reload_databases
from flashmoe.spec import shapes
from flashmoe.spec.call import Call
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import DTYPE_BYTES, MAX_HEAD_DIM, Problem
from flashmoe.tiles import Tile

_Result = Tensor | tuple[Tensor, Tensor, None]
_Call = Callable[[Tensor, Tensor, Tensor], _Result]

# Ready-made calls by everything that a plan and validation depend on. Bounded: a program with
# endlessly many shapes only loses the head start.
_calls: dict[Any, _Call] = {}
_MAX_CALLS = 4096

# What holds numbers in memory of its own. A subclass may be anything else.
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
# What stands for them while torch.export traces.
_TRACED = _PLAIN | {FakeTensor, FunctionalTensor}

# Kept at hand: each call asks them.
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str | None = None,
    tile: Tile | str | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """softmax(softmax_scale * Q K^T) V, with flash-attn's signature, layout and meaning.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), float32, float16 or bfloat16; head_dim a multiple
            of 8, at most 256. Any strides; without a contiguous last dimension it is copied.
        k, v: (batch, seqlen_kv, heads_kv, head_dim); heads_q must be a multiple of heads_kv, and
            query head h uses head h // (heads_q // heads_kv).
        softmax_scale: positive and at most 2.3e38; default 1 / sqrt(head_dim).
        causal: query i sees key j when j <= i + seqlen_kv - seqlen_q (aligned bottom-right).
        window_size: (left, right); query i sees key j when
            -left <= j - (i + seqlen_kv - seqlen_q) <= right. -1 or None: no limit on that side.
            With `causal`, right is 0.
        deterministic: the same gradients bit by bit every time, as under
            `torch.use_deterministic_algorithms(True)`. Otherwise dQ may be added up in any order on
            Hopper, which is faster. `backend="sdpa"`, whose gradients are torch's own, refuses it
            where gradients are asked for.
        return_attn_probs: also return softmax_lse; (out, softmax_lse, None) as flash-attn does.
        backend, tile: run these instead of the planned ones (see `python -m flashmoe`).

    Returns:
        out, shaped and typed as q, contiguous. softmax_lse is (batch, heads_q, seqlen_q) float32,
        natural logarithm, differentiable. A row that sees no key has out 0 and softmax_lse
        -inf.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what is allowed.
        NotImplementedError: dropout_p, softcap, alibi_slopes other than the default; nested
            tensors; forward-mode AD, torch.func.grad and its kin; double backward.

    Source: FlashAttention-2 (arXiv:2307.08691).
    """
    if dropout_p != 0.0:
        raise NotImplementedError(f"dropout_p must be 0.0 (not supported yet), got {dropout_p}")
    if type(window_size) is not tuple:
        mask = mask_of(causal, window_size)
        window_size = mask.left, mask.right
    if softcap != 0.0:
        raise NotImplementedError(f"softcap must be 0.0 (not supported yet), got {softcap}")
    if alibi_slopes is not None:
        raise NotImplementedError("alibi_slopes must be None (not supported yet)")
    asked = Asked(
        softmax_scale, causal, window_size, deterministic, return_attn_probs, backend, tile
    )
    return _attend(q, k, v, asked)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention's signature, layout and meaning; may take
    its place there.

    query (batch, heads_q, seqlen_q, head_dim), key and value (batch, heads_kv, seqlen_kv,
    head_dim); is_causal is aligned top-left: query i sees keys j <= i. What our kernels do not
    compute goes to torch's own: an attn_mask, dropout, a scale that flash_attn_func refuses, other
    ranks, dtypes and head dimensions, value's head_dim differing from query's, a causal query
    longer than its keys, subclasses of Tensor (nested, distributed, fake), and what runs under
    torch.func's transforms, forward-mode AD, make_fx or torch.jit.trace.
    """
    if (
        attn_mask is not None
        or dropout_p != 0.0
        or not _ours(query, key, value, scale, is_causal, enable_gqa)
    ):
        return torch_sdpa(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if is_causal and query.shape[2] < key.shape[2]:
        # Top-left: no query sees a key past seqlen_q, and over the rest both alignments agree.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    out = _attend(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        Asked(None if scale is None else float(scale), is_causal),
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def _ours(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    if torch.compiler.is_compiling():
        # Its own tracing is no hindrance.
        plain = all(type(x) in _TRACED for x in (query, key, value)) and not _functorch_active()
    else:
        plain = _plain(query, key, value) and not torch._C._is_tracing()
    if not plain or query.is_nested or key.is_nested or value.is_nested:
        return False
    if scale is not None and not _is_our_scale(scale):
        return False
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        return False
    if is_causal and query.shape[2] > key.shape[2]:
        return False
    same_heads = query.shape[1] == key.shape[1]
    grouped = enable_gqa and key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0
    head_dim = query.shape[3]
    return (
        (same_heads or grouped)
        and query.shape[1] > 0
        and query.shape[0] == key.shape[0]
        and head_dim == key.shape[3]
        and head_dim % 8 == 0
        and 0 < head_dim <= MAX_HEAD_DIM
        and query.dtype == key.dtype == value.dtype
        and str(query.dtype).removeprefix("torch.") in DTYPE_BYTES
        and query.device == key.device == value.device
        and query.device.type in ("cpu", "cuda")
    )


def _plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v are ordinary tensors, and no transform of torch.func, no dual level and no
    dispatch mode (fake tensors, make_fx) is active."""
    return (
        type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and not _functorch_active()
        and forward_ad._current_level < 0
        and not _dispatch_modes()
    )


def _wants_gradient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _is_our_scale(scale: object) -> bool:
    if isinstance(scale, Tensor):
        # Its value is not known while torch.compile traces.
        if torch.compiler.is_compiling() or type(scale) not in _PLAIN or scale.dim():
            return False
        scale = scale.item()
    return isinstance(scale, (int, float, numbers.Real)) and is_normal(scale)


class Asked(NamedTuple):
    """The arguments of a call beside its tensors, as users give them."""

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int | None, int | None] = (-1, -1)
    deterministic: bool = False
    return_lse: bool = False
    backend: str | None = None
    tile: Tile | str | None = None


def _attend(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> _Result:
    by_op = torch.compiler.is_compiling() or not _plain(q, k, v)
    if by_op:
        validate_tensors(q, k, v)
    # is_cuda, because q.device.type costs a microsecond.
    device_type = "cuda" if q.is_cuda else "cpu"
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        # As torch does it: float64 is left alone.
        q, k, v = (
            x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (q, k, v)
        )
    if by_op:
        return _attend_op(q, k, v, asked)
    try:
        wants = _wants_gradient(q, k, v)
        key = (
            q.shape,
            k.shape,
            v.shape,
            q.dtype,
            k.dtype,
            v.dtype,
            q.device,
            k.device,
            v.device,
            wants,
            asked,
        )
        call = _calls.get(key)
    except (TypeError, RuntimeError):  # only what is not allowed has no shape or no hash
        _validated(q, k, v, asked)
        raise
    if call is None and torch._C._is_tracing():  # whose sizes are tensors, so no key is known
        return _attend_op(q, k, v, asked)
    if shapes.recorder is not None:
        _, mask = _validated(q, k, v, asked)
        shapes.recorder[Problem.of(q, k, mask)] += 1
    if call is None:
        call = _prepare(q, k, v, asked)
        if len(_calls) >= _MAX_CALLS:
            _calls.clear()
        _calls[key] = call
    return call(q, k, v)


def _validated(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> tuple[float, Mask]:
    """The scale and the mask to use. Raises for what no kernel may see."""
    scale = validate(q, k, v, asked.softmax_scale, asked.backend, asked.tile)
    return scale, mask_of(asked.causal, asked.window_size)


def _asks_for_sdpa(asked: Asked) -> bool:
    override = asked.backend or (None if asked.tile else variable("FLASHMOE_BACKEND"))
    return override == "sdpa" and not asked.tile and not asked.return_lse


def _by_sdpa(call: Call, mask: Mask, asked: Asked) -> _Call | None:
    """SDPA, which asked for by name brings its own backward; None where it cannot run this."""
    q, k, v, scale = call[:4]
    mask = mask.reduced(q.shape[1], k.shape[1])
    if mask.is_local or (mask.is_causal and q.shape[1] != k.shape[1]):
        return None
    if asked.deterministic and _wants_gradient(q, k, v):
        raise ValueError("deterministic must be False with backend 'sdpa', got True")
    return lambda q, k, v: attend_by_sdpa(Call(q, k, v, scale), mask.is_causal)


def _attend_op(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> _Result:
    """Through the differentiable, traceable op. The plan is the op's own business, at run time."""
    scale, mask = _validated(q, k, v, asked)
    if _asks_for_sdpa(asked) and (call := _by_sdpa(Call(q, k, v, scale), mask, asked)) is not None:
        return call(q, k, v)
    overrides = asked.backend or "", str(asked.tile or ""), bool(asked.deterministic)
    arguments = (q, k, v, scale, mask.left, mask.right, *overrides)
    if asked.return_lse:
        out, lse = ops.attention(*arguments)
        return out, lse, None
    return ops.attention_without_lse(*arguments)  # type: ignore[no-any-return]


def _prepare(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> _Call:
    """The call for all later tensors like these, with nothing left to decide."""
    scale, mask = _validated(q, k, v, asked)
    problem = Problem.of(q, k, mask)
    if _wants_gradient(q, k, v):
        if _asks_for_sdpa(asked):
            by_sdpa = _by_sdpa(Call(q, k, v, scale), mask, asked)
            if by_sdpa is not None:
                return by_sdpa
        backend, tile, deterministic = asked.backend, asked.tile, bool(asked.deterministic)
        training = ops.Training(problem, q.device, backend, tile, deterministic)
        return _with_gradient(scale, training, asked.return_lse)
    run: Run = planned(problem, q.device, asked.backend, asked.tile, asked.return_lse).run

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(Call(q, k, v, scale))[0]

    def call_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        out, lse = run(Call(q, k, v, scale))
        assert lse is not None
        return out, lse, None

    return call_with_lse if asked.return_lse else call


def _with_gradient(scale: float, training: ops.Training, return_lse: bool) -> _Call:
    attend: Callable[..., tuple[Tensor, Tensor]] = ops.EagerAttention.apply

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, scale, training)[0]

    def call_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        out, lse = attend(q, k, v, scale, training)
        return out, lse, None

    return call_with_lse if return_lse else call


def forget_plans() -> None:
    """Plan every call anew: after a tuner wrote its database, which is read again, or after the
    environment changed."""
    _calls.clear()
    reload_databases()
