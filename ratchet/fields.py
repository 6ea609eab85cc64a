"""Checked access to JSON: what is missing or of the wrong kind is a ValueError that names it."""

from __future__ import annotations

import math
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


def positive(data: Any, key: str) -> float:
    """data[key] as a finite positive number."""
    value = get(data, key, (int, float))
    if not 0 < value < math.inf:
        raise ValueError(f"{key} must be finite and positive, got {value!r}")
    return float(value)


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)
