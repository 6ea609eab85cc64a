"""The tuned database: which plan won for each problem bucket, in one JSON file per device model."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashmoe.cache import cache_dir, set_aside
from flashmoe.device import slug
from flashmoe.problem import Problem

SCHEMA = 1


class DamagedDatabase(UserWarning):
    """A database file could not be read; the message names it and where it was moved."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tuned result. `backend` and `tile` (text form, empty for a backend without tiles) won
    `problem`; samples are raw seconds by candidate name, paired by round; intervals are
    [ratio, low, high] of the winner's speed over the default's and over SDPA's. `tile_with_lse` is
    the best tile where the winner has none: for calls that need softmax_lse, training's among them.
    """

    problem: Problem
    backend: str
    tile: str
    default: str
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    speedup_default: tuple[float, float, float] | None = None
    speedup_sdpa: tuple[float, float, float] | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    tile_with_lse: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        data = dict(data)
        data["problem"] = Problem.from_json(data["problem"])
        data["samples"] = {k: tuple(map(float, v)) for k, v in data.get("samples", {}).items()}
        for name in ("speedup_default", "speedup_sdpa"):
            if data.get(name) is not None:
                value, low, high = data[name]
                data[name] = (float(value), float(low), float(high))
        return cls(**data)


def user_path(device_name: str) -> Path:
    """Where the tuner stores results for a device model."""
    return cache_dir() / "tuned" / f"{slug(device_name)}.json"


def shipped_path(device_name: str) -> Path:
    """Where the package ships results for a device model; need not exist."""
    return Path(__file__).parent / "tuned" / f"{slug(device_name)}.json"


def load(path: Path) -> dict[str, Entry]:
    """Entries by bucket; empty when the file does not exist. A file that cannot be understood is
    set aside under another name, and a DamagedDatabase warning says so."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    try:
        return _parse(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = set_aside(path)
        warnings.warn(
            f"{path} is damaged ({error}); it was set aside as {aside.name}",
            DamagedDatabase,
            stacklevel=2,
        )
        return {}


def update(path: Path, entries: Mapping[str, Entry]) -> None:
    """Merge `entries` into the file: under a lock and atomically, so that concurrent tuners lose
    nothing and a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        merged = {**load(path), **entries}
        data = {"schema": SCHEMA, "entries": {k: e.to_json() for k, e in sorted(merged.items())}}
        temporary = path.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        temporary.replace(path)


def _parse(text: str) -> dict[str, Entry]:
    data = json.loads(text)
    if data["schema"] != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {data['schema']!r}")
    return {bucket: Entry.from_json(entry) for bucket, entry in data["entries"].items()}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = path.with_suffix(".lock")
    with lock.open("w") as handle:
        if os.name == "posix":
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
