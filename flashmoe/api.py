"""What users call. Validates once per kind of call, then goes straight to the planned kernel."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe import ops, shapes
from flashmoe.backends import BACKENDS
from flashmoe.plan import make_plan, remembered_plan
from flashmoe.problem import DTYPE_BYTES, MAX_HEAD_DIM
from flashmoe.tiles import Tile

_Result = Tensor | tuple[Tensor, Tensor, None]
_Call = Callable[[Tensor, Tensor, Tensor], _Result]

# Ready-made calls by everything that a plan and validation depend on. Bounded: a program with
# endlessly many shapes only loses the head start.
_calls: dict[Any, _Call] = {}
_MAX_CALLS = 4096

# Kernels take softmax_scale as float32: below its smallest normal number it may become 0.
_MIN_SCALE, _MAX_SCALE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
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
        softmax_scale: finite and positive; default 1 / sqrt(head_dim).
        causal: query i sees key j when j <= i + seqlen_kv - seqlen_q (aligned bottom-right).
        deterministic: gradients are bitwise repeatable with every backend of today, so this changes
            nothing; it is there for flash-attn's signature. Only `backend="sdpa"`, whose gradients
            are torch's own, refuses it.
        return_attn_probs: also return softmax_lse; (out, softmax_lse, None) as flash-attn does.
        backend, tile: run these instead of the planned ones (see `python -m flashmoe`).

    Returns:
        out, shaped and typed as q. softmax_lse is (batch, heads_q, seqlen_q) float32, natural
        logarithm, not differentiable. A row that sees no key has out 0 and softmax_lse -inf.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what is allowed.
        NotImplementedError: dropout_p, window_size, softcap, alibi_slopes other than the default.

    Source: FlashAttention-2 (arXiv:2307.08691).
    """
    if dropout_p != 0.0:
        raise NotImplementedError(f"dropout_p must be 0.0 (not supported yet), got {dropout_p}")
    if window_size[0] != -1 or window_size[1] != -1:
        raise NotImplementedError(
            f"window_size must be (-1, -1) (not supported yet), got {window_size}"
        )
    if softcap != 0.0:
        raise NotImplementedError(f"softcap must be 0.0 (not supported yet), got {softcap}")
    if alibi_slopes is not None:
        raise NotImplementedError("alibi_slopes must be None (not supported yet)")
    return _attend(q, k, v, softmax_scale, causal, deterministic, return_attn_probs, backend, tile)


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
    """torch.nn.functional.scaled_dot_product_attention's signature, layout and meaning.

    query (batch, heads_q, seqlen_q, head_dim), key and value (batch, heads_kv, seqlen_kv,
    head_dim); is_causal is aligned top-left: query i sees keys j <= i. What our kernels do not
    compute goes to torch's own: an attn_mask, dropout, a scale that is not finite and positive in
    float32, other ranks, dtypes and head dimensions, value's head_dim differing from query's, and a
    causal query longer than its keys.
    """
    if (
        attn_mask is not None
        or dropout_p != 0.0
        or (scale is not None and not _MIN_SCALE <= scale <= _MAX_SCALE)
        or not _ours(query, key, value, is_causal, enable_gqa)
    ):
        return F.scaled_dot_product_attention(
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
        scale,
        is_causal,
        False,
        False,
        None,
        None,
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def _ours(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> bool:
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


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    return_lse: bool,
    backend: str | None,
    tile: Tile | str | None,
) -> _Result:
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        _validate(q, k, v, softmax_scale)
    # is_cuda, because q.device.type costs a microsecond.
    device_type = "cuda" if q.is_cuda else "cpu"
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = (x.to(dtype) if x.is_floating_point() else x for x in (q, k, v))
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    ):
        return _attend_op(q, k, v, softmax_scale, causal, deterministic, return_lse, backend, tile)
    key = (
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        k.dtype,
        v.dtype,
        q.device,
        softmax_scale,
        causal,
        return_lse,
        backend,
        tile,
    )
    call = _calls.get(key)
    if shapes.recorder is not None:
        _validate(q, k, v, softmax_scale)
        shapes.recorder[ops.problem_of(q, k, bool(causal) and q.shape[1] > 1)] += 1
    if call is None:
        call = _prepare(q, k, v, softmax_scale, causal, return_lse, backend, tile)
        if len(_calls) >= _MAX_CALLS:
            _calls.clear()
        _calls[key] = call
    return call(q, k, v)


def _attend_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    return_lse: bool,
    backend: str | None,
    tile: Tile | str | None,
) -> _Result:
    """Through the differentiable, traceable op. The plan is the op's own business, at run time."""
    scale = _validate(q, k, v, softmax_scale)
    override = backend or (None if tile else os.environ.get("FLASHMOE_BACKEND"))
    if override == "sdpa" and not return_lse and not (causal and q.shape[1] != k.shape[1]):
        # Asked for by name, SDPA brings its own backward.
        if deterministic:
            raise ValueError("deterministic must be False with backend 'sdpa', got True")
        return BACKENDS["sdpa"].forward(q, k, v, scale, bool(causal), None)[0]
    out, lse = ops.attention(q, k, v, scale, bool(causal), backend or "", str(tile or ""))
    return (out, lse.detach(), None) if return_lse else out


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    causal: bool,
    return_lse: bool,
    backend: str | None,
    tile: Tile | str | None,
) -> _Call:
    """The call for all later tensors like these, with nothing left to decide."""
    scale = _validate(q, k, v, softmax_scale)
    causal = bool(causal) and q.shape[1] > 1  # the last query sees every key
    problem = ops.problem_of(q, k, causal)
    plan = make_plan(problem, q.device, backend, tile, need_lse=return_lse)
    forward = BACKENDS[plan.backend].bind(plan.tile, problem)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return forward(q, k, v, scale, causal)[0]

    def call_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        out, lse = forward(q, k, v, scale, causal)
        assert lse is not None
        return out, lse, None

    return call_with_lse if return_lse else call


def forget_plans() -> None:
    """Plan every call anew: after a tuner wrote its database, or the environment changed."""
    _calls.clear()
    remembered_plan.cache_clear()


def _validate(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> float:
    """Raise for what no kernel may see; return the softmax scale to use."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, seqlen, heads, head_dim), "
                f"got shape {tuple(x.shape)}"
            )
    if str(q.dtype).removeprefix("torch.") not in DTYPE_BYTES:
        raise TypeError(f"q must be {', '.join(DTYPE_BYTES)}, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if q.device.type not in ("cpu", "cuda"):
        raise ValueError(f"q must be on a cpu or cuda device, got {q.device}")
    batch, _, heads_q, head_dim = q.shape
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be a multiple of 8 and at most {MAX_HEAD_DIM}, got {head_dim}"
        )
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(
            f"k must be (batch={batch}, seqlen_kv, heads_kv, head_dim={head_dim}), "
            f"got shape {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    heads_kv = k.shape[2]
    if heads_kv == 0 or heads_q == 0 or heads_q % heads_kv:
        raise ValueError(
            f"q's heads must be a positive multiple of k's ({heads_kv}), got {heads_q}"
        )
    if softmax_scale is None:
        return float(head_dim**-0.5)
    if not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale must be a number, got {type(softmax_scale).__name__}")
    if not _MIN_SCALE <= softmax_scale <= _MAX_SCALE:
        raise ValueError(
            f"softmax_scale must be finite and positive in float32, got {softmax_scale}"
        )
    return float(softmax_scale)
