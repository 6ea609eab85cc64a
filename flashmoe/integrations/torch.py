"""torch itself: `patch_sdpa()` for any version, `register()` for its own hook from 2.11 on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

import flashmoe
from flashmoe.frontend.validation import Asked
from flashmoe.frontend.varlen import packed_sequences
from flashmoe.integrations import pair
from flashmoe.spec.call import DENSE, NO_TERMS, Saved
from flashmoe.spec.terms import terms_of

NAME = "flashmoe"

_replaced: list[Any] = []


def patch_sdpa() -> None:
    """Put flashmoe.scaled_dot_product_attention in the place of
    torch.nn.functional.scaled_dot_product_attention, whose signature and meaning it has, is_causal
    aligned top-left included. It calls torch's own by another name, so nothing calls itself. What
    was imported by `from torch.nn.functional import ...` before stays as it was."""
    if F.scaled_dot_product_attention is not flashmoe.scaled_dot_product_attention:
        _replaced.append(F.scaled_dot_product_attention)
        F.scaled_dot_product_attention = flashmoe.scaled_dot_product_attention


def unpatch_sdpa() -> None:
    """Undo `patch_sdpa`. Raises RuntimeError where somebody patched the function after it."""
    if not _replaced:
        return
    if F.scaled_dot_product_attention is not flashmoe.scaled_dot_product_attention:
        raise RuntimeError(
            "torch.nn.functional.scaled_dot_product_attention must be flashmoe's to be put back, "
            f"got {F.scaled_dot_product_attention!r}: undo what was patched later first"
        )
    F.scaled_dot_product_attention = _replaced.pop()


def register() -> None:
    """Make `torch.nn.attention.activate_flash_attention_impl("flashmoe")` known to torch; once
    active, scaled_dot_product_attention's flash backend on CUDA and varlen_attn, on the CPU too,
    run flashmoe, forward and backward, also under torch.compile and sdpa_kernel.

    What torch's own flash backend can do and flashmoe cannot raises NotImplementedError, naming the
    argument: return_debug_mask. Raises NotImplementedError for a torch older than 2.11.
    """
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise NotImplementedError(
            "torch.nn.attention.register_flash_attention_impl must exist, as it does from torch "
            f"2.11 on, got torch {torch.__version__}; use patch_sdpa()"
        )
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_activate)


def unregister() -> None:
    """Undo `register`, and the activation with it."""
    from torch.nn.attention import _registry

    if _registry.current_flash_attention_impl() == NAME:
        _registry.restore_flash_attention_impl()
    _registry._FLASH_ATTENTION_IMPLS.pop(NAME, None)


@dataclass
class _Active:
    """What torch holds while the implementation is active."""

    libraries: list[Library] = field(default_factory=list)

    def remove(self) -> None:
        for library in self.libraries:
            library._destroy()  # type: ignore[no-untyped-call]
        self.libraries.clear()


def _activate() -> _Active:
    active = _Active()
    for device in ("CUDA", "CPU"):
        library = Library("aten", "IMPL", device)  # type: ignore[no-untyped-call]
        for name, kernel in _KERNELS.items():
            library.impl(name, kernel, device)  # type: ignore[no-untyped-call]
        active.libraries.append(library)
    return active


def _refuse(return_debug_mask: bool, num_splits: int | None) -> None:
    if return_debug_mask:
        raise NotImplementedError("return_debug_mask must be False, got True")
    if num_splits not in (None, 0, 1):
        raise NotImplementedError(f"num_splits must be None, 0 or 1, got {num_splits}")


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """aten::_flash_attention_forward: (batch, seqlen, heads, head_dim), or (total, heads, head_dim)
    with cum_seq_q."""
    _refuse(return_debug_mask, num_splits)
    asked = Asked(scale, is_causal, (window_size_left, window_size_right))
    sequences = DENSE
    if cum_seq_q is not None:
        lengths = (cum_seq_q, cum_seq_k, max_q, max_k)
        sequences = packed_sequences(query, key, *lengths, seqused_k, block_table)
    elif seqused_k is not None or block_table is not None:
        raise NotImplementedError("seqused_k and block_table must be None without cum_seq_q")
    terms = terms_of(0.0, alibi_slopes, None, dropout_p)
    out, lse, _, state = pair.forward(query, key, value, asked, terms, sequences)
    # rng_state, unused and debug_attn_mask.
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return _laid_out_as(query, out), lse, state.view(torch.uint64), unused, query.new_empty(0)


def _forward_to(out: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """aten::_flash_attention_forward_no_dropout_inplace."""
    result, lse, *_ = _forward(*arguments, **options)
    out.copy_(result)
    return lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten::_flash_attention_backward."""
    asked = Asked(scale, is_causal, (window_size_left, window_size_right))
    sequences = DENSE
    if cum_seq_q is not None:
        sequences = packed_sequences(query, key, cum_seq_q, cum_seq_k, max_q, max_k)
    terms, saved = NO_TERMS, Saved(grad_out, out, logsumexp)
    if dropout_p:
        terms = terms._replace(dropout_p=dropout_p, rng_state=rng_state.view(torch.int64))
    dq, dk, dv = pair.backward(query, key, value, saved, asked, terms, sequences)
    return _laid_out_as(query, dq), _laid_out_as(key, dk), _laid_out_as(value, dv)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention: (batch, heads, seqlen, head_dim)."""
    max_q, max_k = query.shape[2], key.shape[2]
    dense: Any = (None, None, max_q, max_k, dropout_p, is_causal, return_debug_mask)
    out, lse, *state = _forward(*_swapped(query, key, value), *dense, scale=scale)
    return out.transpose(1, 2), lse, None, None, max_q, max_k, state[0], state[1], state[2]


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_backward."""
    dout, q, k, v, out = _swapped(grad_out, query, key, value, out)
    packed = (None, None, max_q, max_k)
    state = (philox_seed, philox_offset)
    arguments = (dout, q, k, v, out, logsumexp, *packed, dropout_p, is_causal, *state)
    return _swapped(*_backward(*arguments, scale=scale))


def _laid_out_as(given: Tensor, x: Tensor) -> Tensor:
    """x, in memory as torch's own kernels lay it out: what is compiled counts on it."""
    wanted = torch.empty_like(given)
    if x.shape != given.shape or x.stride() == wanted.stride():
        return x
    return wanted.copy_(x)


def _swapped(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


_KERNELS = {
    "_flash_attention_forward": _forward,
    "_flash_attention_forward_no_dropout_inplace": _forward_to,
    "_flash_attention_backward": _backward,
    "_scaled_dot_product_flash_attention": _sdpa,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
}
