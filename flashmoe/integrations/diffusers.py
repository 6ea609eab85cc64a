"""Hugging Face diffusers: `register()`, then `model.set_attention_backend("flashmoe")`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_dispatch as dispatch
from torch import Tensor

import flashmoe
from flashmoe.integrations.keys import KeyMask, Terms, by_kernel, of_keys

NAME = "flashmoe"
_MEMBER = NAME.upper()

_Names: Any = dispatch.AttentionBackendName
_Registry: Any = dispatch._AttentionBackendRegistry


class _AnyName(set[str]):
    """diffusers drops arguments whose names a backend lacks. What is in here arrives, and is an
    error where it is unknown."""

    def __contains__(self, name: object) -> bool:
        return True


def register() -> None:
    """Make "flashmoe" known to diffusers, for `set_attention_backend` and `attention_backend`.
    Results are those of the "native" backend.

    Masks of keys, boolean and the same for all queries, become lengths; others are what
    flashmoe.scaled_dot_product_attention makes of them. Models whose processors do not ask
    diffusers' dispatcher but torch (Stable Diffusion 3 and older) are reached by
    flashmoe.integrations.torch.patch_sdpa().
    """
    if _MEMBER not in _Names.__members__:
        # An Enum has no public way to get a name from outside.
        member = str.__new__(_Names, NAME)
        member._name_, member._value_ = _MEMBER, NAME
        member._sort_order_ = len(_Names._member_names_)
        _Names._member_names_.append(_MEMBER)
        _Names._member_map_[_MEMBER] = _Names._value2member_map_[NAME] = member
    member = _Names(NAME)
    _Registry.register(member)(attention)
    _Registry._supported_arg_names[member] = _AnyName(_Registry._supported_arg_names[member])


def unregister() -> None:
    """Undo `register`. Models on which the backend was set need another, or
    `reset_attention_backend()`."""
    if _MEMBER not in _Names.__members__:
        return
    member = _Names(NAME)
    if _Registry._active_backend == member:
        _Registry.set_active_backend(_Names.NATIVE)
    for table in (_Registry._backends, _Registry._constraints, _Registry._supported_arg_names):
        table.pop(member, None)
    _Names._member_names_.remove(_MEMBER)
    del _Names._member_map_[_MEMBER], _Names._value2member_map_[NAME]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
    **unknown: Any,
) -> Tensor:
    """query (batch, seqlen_q, heads_q, head_dim), key and value (batch, seqlen_kv, heads_kv,
    head_dim) -> as query. is_causal is aligned top-left, as torch's.

    Raises TypeError for an argument that it does not know, NotImplementedError for context
    parallelism.
    """
    if given := sorted(name for name, x in unknown.items() if x is not None and x is not False):
        raise TypeError(f"flashmoe's attention does not know {', '.join(given)}")
    if _parallel_config is not None:
        raise NotImplementedError("context parallelism is not supported by flashmoe's backend")
    if attn_mask is not None and not is_causal and dropout_p == 0.0:
        keys = _keys_of(attn_mask, key)
        if keys is not None:
            mask = _key_mask(keys, query.shape[1])
            return by_kernel(query, key, value, mask, False, Terms(scale))
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = flashmoe.scaled_dot_product_attention(
        q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    return out.transpose(1, 2)


def _keys_of(mask: Tensor, key: Tensor) -> Tensor | None:
    """The mask as (batch, seqlen_kv), if it is one of keys."""
    batch, seqlen_kv = key.shape[:2]
    if mask.dtype != torch.bool or mask.shape[-1] != seqlen_kv:
        return None
    if mask.shape == (batch, seqlen_kv):
        return mask
    if mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[0] not in (1, batch):
        return None
    return mask[:, 0, 0].expand(batch, seqlen_kv)


_last: list[tuple[Any, Tensor, KeyMask]] = []


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="flashmoe looks at the mask's values, once for all blocks"
)
def _key_mask(keys: Tensor, seqlen_q: int) -> KeyMask:
    """A model's blocks hand the same mask over and over: what it says is read once. The tensor that
    is kept keeps its memory from being another's."""
    if keys.is_inference():  # which does not tell when it is changed
        return _read(keys, seqlen_q)
    memory = (keys.device, keys.data_ptr(), keys.shape, keys.stride(), keys._version)
    where = (*memory, seqlen_q, torch.is_grad_enabled())
    if not _last or _last[0][0] != where:
        _last[:] = [(where, keys, _read(keys, seqlen_q))]
    return _last[0][2]


def _read(keys: Tensor, seqlen_q: int) -> KeyMask:
    found = of_keys(-1, -1, keys, seqlen_q)
    assert found is not None, "only under a window may there be none"
    return found
