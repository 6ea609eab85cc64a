"""What was prepared for tensors is found again for others like them, by one call of C++.

A key of all that a call depends on takes Python longer to make and to look up than everything else
that the host does before the kernel. Most calls are like the last one with the same options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Check = Callable[..., bool]

MAX_KINDS = 1024
_STRIDED = torch.strided


def _check_of(*tensors: Tensor) -> _Check:
    """Whether others are like these: what Dynamo guards its graphs with."""
    guards = torch._C._dynamo.guards.TensorGuards
    check: _Check = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return check


def _has_checks() -> bool:
    """Whether this torch has those that we know. Without them nothing is found."""
    one, two = (torch.empty(n, device="cpu") for n in (1, 2))
    try:
        check = _check_of(one)
        return check(one) and not check(two)
    except (AttributeError, TypeError):
        return False


HAS_CHECKS = _has_checks()


class _Last(NamedTuple):
    prepared: Any
    is_like: _Check | None = None


_lasts: dict[Any, _Last] = {}


def found(kind: Any, tensors: tuple[Tensor, ...]) -> Any:
    """What was remembered of `kind`, all options and the number of tensors, if `tensors` are like
    those that it was remembered for, or else None. Like means the same types, dtypes, devices,
    shapes, strides and requires_grad, and under the same modes that the dispatcher knows: autocast,
    inference, tracing, transforms of torch.func, dispatch modes. `kind` has the grad mode."""
    if forward_ad._current_level >= 0:
        return None
    try:
        last = _lasts.get(kind)
        if last is None or last.is_like is None:
            return None
        # A check of a tensor without sizes or strides aborts the process.
        for x in tensors:
            if x.layout is not _STRIDED or x.is_nested:
                return None
    except (AttributeError, TypeError):  # no tensor, or without a hash, as validation says
        return None
    return last.prepared if last.is_like(*tensors) else None


def remember(kind: Any, tensors: tuple[Tensor, ...], prepared: Any) -> None:
    """For `found`, from the second time in turn on. `prepared` is not None, the same object for
    the same tensors, and right for others like them; no autocast is on."""
    last = _lasts.get(kind)
    if last is None or last.prepared is not prepared:
        if len(_lasts) >= MAX_KINDS:
            _lasts.clear()
        _lasts[kind] = _Last(prepared)
    elif HAS_CHECKS:
        _lasts[kind] = _Last(prepared, _check_of(*tensors))


def forget() -> None:
    _lasts.clear()
