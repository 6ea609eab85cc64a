"""What a call's arguments must be: errors name the argument, what it got and what is allowed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashmoe.backends import BACKENDS
from flashmoe.frontend.lengths import validate_lengths
from flashmoe.spec.call import DENSE, NO_TERMS, Sequences, Terms
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import DTYPE_BYTES, MAX_HEAD_DIM
from flashmoe.spec.terms import NORMAL, check_number, check_terms, is_normal
from flashmoe.tiles import Tile


class Asked(NamedTuple):
    """The arguments of a call beside its tensors, as users give them."""

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int | None, int | None] = (-1, -1)
    deterministic: bool = False
    return_lse: bool = False
    backend: str | None = None
    tile: Tile | str | None = None
    num_splits: int = 0


def mask_of(causal: bool, window_size: object) -> Mask:
    """The Mask of flash-attn's two arguments. Raises for what they cannot be."""
    if not isinstance(causal, (bool, int, np.bool_)):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    if window_size is None:
        window_size = (None, None)
    if (
        not isinstance(window_size, (tuple, list))
        or len(window_size) != 2
        or not all(x is None or isinstance(x, (int, np.integer)) for x in window_size)
        or any(isinstance(x, bool) for x in window_size)
    ):
        raise TypeError(
            "window_size must be (left, right), two integers or None for no limit, "
            f"got {window_size!r}"
        )
    left, right = (-1 if x is None else int(x) for x in window_size)
    if not (-1 <= left < 2**63 and -1 <= right < 2**63):
        raise ValueError(
            f"window_size must be of limits of at least 0, or -1 for none, got {window_size!r}"
        )
    return Mask(left, 0 if causal else right)


def unpacked(name: str, x: Tensor, shape: str) -> tuple[Tensor, ...]:
    """The tensors along the third dimension from the right, as many as `shape` says of it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    sizes = shape.strip("()").split(", ")
    if x.is_nested or x.dim() != len(sizes) or x.shape[-3] != int(sizes[-3]):
        kind = "a nested tensor" if x.is_nested else f"shape {tuple(x.shape)}"
        raise ValueError(f"{name} must be {shape}, got {kind}")
    return x.unbind(-3)


def validate_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise for what is no dense tensor."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.is_nested or x.layout != torch.strided:
            kind = "a nested tensor" if x.is_nested else str(x.layout)
            raise NotImplementedError(f"{name} must be a dense tensor, got {kind}")


def validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asked: Asked,
    terms: Terms = NO_TERMS,
    sequences: Sequences = DENSE,
) -> tuple[float, Mask]:
    """The softmax scale and the mask to use. Raises for what no kernel may see."""
    validate_tensors(q, k, v)
    softmax_scale, backend, tile = asked.softmax_scale, asked.backend, asked.tile
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if tile is not None and not isinstance(tile, (str, Tile)):
        raise TypeError(f"tile must be a Tile, its text form or None, got {tile!r}")
    _validate_dimensions(q, k, v, sequences)
    if str(q.dtype).removeprefix("torch.") not in DTYPE_BYTES:
        raise TypeError(f"q must be {', '.join(DTYPE_BYTES)}, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if q.device.type not in ("cpu", "cuda"):
        raise ValueError(f"q must be on a cpu or cuda device, got {q.device}")
    heads_q, head_dim = q.shape[-2:]
    for name, size in (("head_dim", head_dim), ("v's head_dim", v.shape[-1])):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must be from 1 to {MAX_HEAD_DIM}, got {size}")
    if sequences is DENSE:
        batch = q.shape[0]
        if k.shape[0] != batch or k.shape[3] != head_dim:
            raise ValueError(
                f"k must be (batch={batch}, seqlen_kv, heads_kv, head_dim={head_dim}), "
                f"got shape {tuple(k.shape)}"
            )
    else:
        if k.shape[-1] != head_dim:
            raise ValueError(f"k must have q's head_dim {head_dim}, got shape {tuple(k.shape)}")
        validate_lengths(sequences, q, k)
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"v must have k's shape {tuple(k.shape)} but for head_dim, got {tuple(v.shape)}"
        )
    heads_kv = k.shape[-2]
    if heads_kv == 0 or heads_q == 0 or heads_q % heads_kv:
        raise ValueError(
            f"q's heads must be a positive multiple of k's ({heads_kv}), got {heads_q}"
        )
    if terms is not NO_TERMS:
        cu_seqlens_q = sequences.cu_seqlens_q
        check_terms(terms, q, q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1)
        if terms.attn_mask is not None:
            _validate_mask(terms.attn_mask, q, k, sequences)
    if softmax_scale is None:
        softmax_scale = head_dim**-0.5
    else:
        check_number("softmax_scale", softmax_scale)
        if not is_normal(softmax_scale):
            raise ValueError(f"softmax_scale must be {NORMAL}, got {softmax_scale}")
    return float(softmax_scale), mask_of(asked.causal, asked.window_size)


def _validate_dimensions(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> None:
    dense = "(batch, seqlen, heads, head_dim)"
    of_q = of_k = dense
    if sequences.cu_seqlens_q is not None:
        of_q = "(total_q, heads, head_dim)"
    if sequences.cu_seqlens_k is not None:
        of_k = "(total_k, heads, head_dim)"
    elif sequences.block_table is not None:
        of_k = "(num_pages, page_size, heads, head_dim)"
    for name, x, shape in (("q", q, of_q), ("k", k, of_k), ("v", v, of_k)):
        dims = shape.count(",") + 1
        if x.dim() != dims:
            raise ValueError(
                f"{name} must have {dims} dimensions {shape}, got shape {tuple(x.shape)}"
            )


def _validate_mask(attn_mask: Tensor, q: Tensor, k: Tensor, sequences: Sequences) -> None:
    if sequences is not DENSE:
        raise NotImplementedError("attn_mask must be None for packed sequences and caches")
    if attn_mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(
            f"attn_mask must be bool, float32 or of q's dtype {q.dtype}, got {attn_mask.dtype}"
        )
    batch, seqlen_q, heads, _ = q.shape
    full = (batch, heads, seqlen_q, k.shape[1])
    shape = tuple(attn_mask.shape)
    wanted = full[4 - len(shape) :] if len(shape) <= 4 else ()
    if len(shape) > 4 or any(n not in (1, m) for n, m in zip(shape, wanted, strict=True)):
        raise ValueError(
            "attn_mask must broadcast to (batch, heads_q, seqlen_q, seqlen_kv), here "
            f"{full}, got shape {shape}"
        )
