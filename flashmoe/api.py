"""What users call: flash-attn's functions, and torch's."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from flashmoe.backends.sdpa import is_slower_under, torch_sdpa
from flashmoe.frontend import flops  # noqa: F401 - registers what torch's counter reads
from flashmoe.frontend.attend import (
    PLAIN,
    attend,
    attend_dropping,
    forget_calls,
    functorch_active,
    is_plain,
)
from flashmoe.frontend.dense import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from flashmoe.frontend.kvcache import flash_attn_with_kvcache
from flashmoe.frontend.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flashmoe.planning.plan import reload_databases
from flashmoe.spec.problem import DTYPE_BYTES, MAX_HEAD_DIM
from flashmoe.spec.terms import is_normal, terms_of

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "forget_plans",
    "scaled_dot_product_attention",
]

# What stands for ordinary tensors while torch.export traces.
_TRACED = PLAIN | {FakeTensor, FunctionalTensor}


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
    head_dim); is_causal is aligned top-left: query i sees keys j <= i. attn_mask broadcasts to
    (batch, heads_q, seqlen_q, seqlen_kv): bool, True where a query sees a key, or added to scores.
    A row that sees no key is 0, where torch's kernels differ: 0 or NaN.

    Under an attn_mask on a GPU ours run where they are faster: boolean ones of many scores, on
    Hopper. What our kernels do not compute goes to torch's own, too: an attn_mask beside is_causal
    (an error there), or of a dtype that is neither bool nor float32 nor query's, a scale that
    flash_attn_func refuses, other ranks, dtypes and head dimensions, value's head_dim differing
    from query's, a causal query longer than its keys, subclasses of Tensor (nested, distributed,
    fake), and what runs under torch.func's transforms, forward-mode AD, make_fx or torch.jit.trace.
    """
    if (
        not 0.0 <= dropout_p < 1.0
        or not _ours(query, key, value, scale, is_causal, enable_gqa)
        or not (attn_mask is None or _is_our_mask(attn_mask, query, key, is_causal))
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
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    asked = (None if scale is None else float(scale), is_causal)
    terms = terms_of(0.0, None, None, dropout_p, attn_mask=attn_mask)
    out = (attend if dropout_p == 0.0 else attend_dropping)(q, k, v, asked, terms)
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
        plain = all(type(x) in _TRACED for x in (query, key, value)) and not functorch_active()
    else:
        plain = is_plain(query, key, value) and not torch._C._is_tracing()
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


def _is_our_mask(attn_mask: Tensor, query: Tensor, key: Tensor, is_causal: bool) -> bool:
    if is_causal or type(attn_mask) not in _TRACED:
        return False
    if attn_mask.is_nested or attn_mask.layout != torch.strided or attn_mask.dim() > 4:
        return False
    full = (*query.shape[:3], key.shape[2])
    return (
        is_slower_under(attn_mask, math.prod(full))
        and attn_mask.dtype in (torch.bool, torch.float32, query.dtype)
        and attn_mask.device == query.device
        and all(n in (1, m) for n, m in zip(attn_mask.shape[::-1], full[::-1], strict=False))
    )


def _is_our_scale(scale: object) -> bool:
    if isinstance(scale, Tensor):
        # Its value is not known while torch.compile traces.
        if torch.compiler.is_compiling() or type(scale) not in PLAIN or scale.dim():
            return False
        scale = scale.item()
    return isinstance(scale, (int, float, numbers.Real)) and is_normal(scale)


def forget_plans() -> None:
    """Plan every call anew: after a tuner wrote its database, which is read again, or after the
    environment changed."""
    forget_calls()
    reload_databases()
