"""flash_attn.flash_attn_interface: FlashAttention-2's functions, and its forward/backward pair."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flashmoe
from flashmoe.frontend.validation import Asked
from flashmoe.frontend.varlen import packed_sequences
from flashmoe.integrations import pair
from flashmoe.spec.call import Saved
from flashmoe.spec.terms import terms_of

__all__ = [
    "USE_TRITON_ROCM",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

USE_TRITON_ROCM = False

# flash-attn has none of these.
_OURS_ALONE = ("backend", "tile", "rng_state")


def _by_its_name(name: str) -> Callable[..., Any]:
    """flashmoe's function with sinks by the name of s_aux, for which transformers looks in the
    signature, and without them silently drops a model's sinks. window_size may be what has two
    integers, a tensor too, as flash-attn takes it."""
    function = getattr(flashmoe, name)

    @functools.wraps(function)
    def call(*arguments: Any, s_aux: Tensor | None = None, **options: Any) -> Any:
        if s_aux is not None:
            options["sinks"] = s_aux
        window_size = options.get("window_size")
        if isinstance(window_size, Tensor):
            options["window_size"] = tuple(window_size.tolist())
        return function(*arguments, **options)

    signature = inspect.signature(function)
    shown = [p for p in signature.parameters.values() if p.name not in _OURS_ALONE]
    s_aux = inspect.Parameter("s_aux", inspect.Parameter.KEYWORD_ONLY, default=None)
    call.__signature__ = signature.replace(parameters=[*shown, s_aux])  # type: ignore[attr-defined]
    return call


flash_attn_func = _by_its_name("flash_attn_func")
flash_attn_kvpacked_func = _by_its_name("flash_attn_kvpacked_func")
flash_attn_qkvpacked_func = _by_its_name("flash_attn_qkvpacked_func")


class _WithoutBackward(torch.autograd.Function):
    """out, of tensors that ask for gradients. flash-attn takes such a call, too."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *_: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "keys in pages (block_table) have no gradients: the forward is all that there is"
        )


_varlen = _by_its_name("flash_attn_varlen_func")
_BLOCK_TABLE = list(inspect.signature(flashmoe.flash_attn_varlen_func).parameters).index(
    "block_table"
)


@functools.wraps(_varlen)
def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **options: Any) -> Any:
    has_table = len(arguments) > _BLOCK_TABLE - 3 or options.get("block_table") is not None
    wants = q.requires_grad or k.requires_grad or v.requires_grad
    if not (has_table and wants and torch.is_grad_enabled()):
        return _varlen(q, k, v, *arguments, **options)
    with torch.no_grad():
        result = _varlen(q, k, v, *arguments, **options)
    attach: Callable[..., Tensor] = _WithoutBackward.apply
    if isinstance(result, Tensor):
        return attach(result, q, k, v)
    return attach(result[0], q, k, v), *result[1:]


flash_attn_varlen_kvpacked_func = _by_its_name("flash_attn_varlen_kvpacked_func")
flash_attn_varlen_qkvpacked_func = _by_its_name("flash_attn_varlen_qkvpacked_func")
flash_attn_with_kvcache = _by_its_name("flash_attn_with_kvcache")

_Forward = tuple[Tensor, Tensor, Tensor | None, Tensor]


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """How many keys the returned probabilities have one maximum for: all of them."""
    return 2**31


def _refuse(**others: Any) -> None:
    for name, value in others.items():
        if value is not None and value is not False:
            allowed, got = ("False", "True") if value is True else ("None", type(value).__name__)
            raise NotImplementedError(f"{name} must be {allowed} (not supported yet), got {got}")


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> _Forward:
    """Returns out, softmax_lse, S_dmask (with return_softmax) and the state of dropout."""
    _refuse(return_softmax=return_softmax and not dropout_p)
    asked = Asked(softmax_scale, causal, (window_size_left, window_size_right))
    terms = terms_of(softcap, alibi_slopes, None, dropout_p)
    return pair.forward(q, k, v, asked, terms, return_weights=return_softmax)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> _Forward:
    """As _flash_attn_forward, of packed sequences. Rows outside of them are 0 in any case."""
    _refuse(return_softmax=return_softmax and not dropout_p, leftpad_k=leftpad_k)
    if num_splits > 1:
        raise NotImplementedError(f"num_splits > 1 is not supported, got {num_splits}")
    asked = Asked(softmax_scale, causal, (window_size_left, window_size_right))
    terms = terms_of(softcap, alibi_slopes, None, dropout_p)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    sequences = packed_sequences(q, k, *lengths, seqused_k, block_table)
    return pair.forward(q, k, v, asked, terms, sequences, return_softmax)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv; returns the rows' sums of dout * out (batch, heads, seqlen)."""
    asked = Asked(softmax_scale, causal, (window_size_left, window_size_right), deterministic)
    terms = terms_of(softcap, alibi_slopes, None, dropout_p, rng_state)
    found = pair.backward(q, k, v, Saved(dout, out, softmax_lse), asked, terms)
    return _written(found, (dq, dk, dv), dout, out)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """As _flash_attn_backward, of packed sequences; returns (heads, total)."""
    asked = Asked(softmax_scale, causal, (window_size_left, window_size_right), deterministic)
    terms = terms_of(softcap, alibi_slopes, None, dropout_p, rng_state)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    sequences = packed_sequences(q, k, *lengths)
    found = pair.backward(q, k, v, Saved(dout, out, softmax_lse), asked, terms, sequences)
    return _written(found, (dq, dk, dv), dout, out)


def _written(
    found: tuple[Tensor, ...], places: tuple[Tensor | None, ...], dout: Tensor, out: Tensor
) -> Tensor:
    for place, gradient in zip(places, found, strict=True):
        if place is not None:
            place.copy_(gradient)
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2)


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
