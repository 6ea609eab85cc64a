"""Checked access to JSON: what is missing or of the wrong kind is a ValueError that names it."""

from __future__ import annotations

import sys
from typing import Any


def get(data: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """data[key], which must be of `kind`; a bool is no number."""
    if not isinstance(data, dict):
        raise ValueError(f"expected an object with {key!r}, got {type(data).__name__}")
    if key not in data:
        raise ValueError(f"{key} is missing")
    value = data[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in names)
        raise ValueError(f"{key} must be {wanted}, got {type(value).__name__}")
    return value


def finite(data: Any, key: str) -> float:
    """data[key] as a finite number."""
    value = get(data, key, (int, float))
    if not is_finite(value):
        raise ValueError(f"{key} must be finite, got {shown(value)}")
    return float(value)


def positive(data: Any, key: str) -> float:
    """data[key] as a finite positive number."""
    value = get(data, key, (int, float))
    if not is_finite(value) or value <= 0:
        raise ValueError(f"{key} must be finite and positive, got {shown(value)}")
    return float(value)


def items(data: Any, key: str, kind: type) -> tuple[Any, ...]:
    """data[key], a list of nothing but `kind`."""
    values = get(data, key, list)
    for i, value in enumerate(values):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{key}[{i}] must be {kind.__name__}, got {type(value).__name__}")
    return tuple(values)


def is_finite(x: Any) -> bool:
    """Whether `x` is a number that a float holds; JSON's integers may have any size."""
    number = isinstance(x, (int, float)) and not isinstance(x, bool)
    return number and abs(x) <= sys.float_info.max


def shown(x: Any) -> str:
    """For a message: no number has so many digits that they say something."""
    text = repr(x)
    return text if len(text) <= 40 else f"{text[:20]}… ({len(text)} digits)"
