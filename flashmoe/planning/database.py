"""The tuned database: which plan won for each problem bucket, in one JSON file per device model.

A bucket (Problem.bucket) is exact in direction, dtype, mask, head_dims and group size; batch *
heads_q, seqlen_q and seqlen_kv are rounded up to powers of two.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import filelock

from flashmoe.machine.cache import cache_dir, make_folder, set_aside
from flashmoe.machine.device import slug
from flashmoe.machine.files import require_writable, write_whole
from flashmoe.spec.problem import Problem

SCHEMA = 4
# Earlier ones lacked fields that have defaults, and named a kept default by its tile.
_READABLE = (1, 2, 3, SCHEMA)
_FIRST_WITH_JUDGED = 4
SDPA = "sdpa"
# The backend of an entry whose search kept the default: that of today, whatever it was then.
DEFAULT = "default"


class DamagedDatabase(UserWarning):
    """A database file could not be read; the message names it and where it was moved."""


class NewerDatabase(UserWarning):
    """A database file is a newer flashmoe's; the message names it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tuned result: `backend` and `tile` (text form, empty for a backend without tiles) won
    `problem`; backend DEFAULT, without a tile, where nothing beat the default.

    `default` names what ran untuned then, and `judged` is the hash of the kernels with which the
    winner was compared with it: an entry of other kernels says nothing about these. All else is
    optional, and not written where there is none.

    `samples` are the final's raw seconds by candidate name, paired by round; `seconds` and the
    speed-ups over the default and over SDPA are [value, low, high]. `runner_up` names the second of
    the final. `tile_with_lse` is the best tile where the winner has none: for calls that need
    softmax_lse, training's among them. `over_default` is the time over the default's of everything
    that was measured, for lookups between buckets and for searches of related problems. `study` and
    `storage` tell where the trials are.

    `verified` names what passed the check of odd sizes and guarded memory, which the search alone
    does not make. `search` tells how many tiles were tried of how many, in how many seconds over
    all runs, and why the last one ended. `group` holds the problems that share this bucket with
    their shares of the weight, empty for `problem` alone.
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
    runner_up: str = ""
    seconds: tuple[float, float, float] | None = None
    over_default: Mapping[str, float] = field(default_factory=dict)
    study: str = ""
    storage: str = ""
    verified: tuple[str, ...] | None = None
    search: Mapping[str, Any] = field(default_factory=dict)
    group: tuple[tuple[Problem, float], ...] = ()
    judged: str = ""

    @property
    def kept(self) -> bool:
        """Whether the default won."""
        return self.backend == DEFAULT

    @property
    def best_tile(self) -> str:
        """The fastest tile when it was measured; empty where none was."""
        default = self.default if self.kept and self.default != SDPA else ""
        return self.tile or default or self.tile_with_lse

    def to_json(self) -> dict[str, Any]:
        bare = Entry(self.problem, self.backend, self.tile, self.default)
        empty = {f.name for f in fields(self) if getattr(self, f.name) == getattr(bare, f.name)}
        data = asdict(self) | {"problem": self.problem.to_json()}
        return {k: v for k, v in data.items() if k in _REQUIRED or k not in empty}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        """Raises ValueError, KeyError, TypeError, AttributeError or OverflowError."""
        data = dict(data)
        for name in _TEXTS & data.keys():
            if not isinstance(data[name], str):
                raise ValueError(f"{name} must be text, got {data[name]!r}")
        data["problem"] = Problem.from_json(data["problem"])
        data["samples"] = {k: tuple(map(float, v)) for k, v in data.get("samples", {}).items()}
        for name in ("speedup_default", "speedup_sdpa", "seconds"):
            if data.get(name) is not None:
                value, low, high = data[name]
                data[name] = (float(value), float(low), float(high))
        over_default = data.get("over_default", {})
        data["over_default"] = {str(k): float(v) for k, v in over_default.items()}
        if data.get("verified") is not None:
            data["verified"] = tuple(map(str, data["verified"]))
        for name in ("fingerprint", "search"):
            data[name] = dict(data.get(name, {}))
        data["group"] = tuple((Problem.from_json(p), float(w)) for p, w in data.get("group", ()))
        return cls(**data)

    def lookup(self) -> dict[str, float]:
        """What other buckets may take over: times over the default's of what is known to be right
        at odd sizes, too."""
        return {
            name: ratio
            for name, ratio in self.over_default.items()
            # Entries before schema 3, and shipped ones, do not say.
            if self.verified is None or name in self.verified or name == SDPA
        }


_TEXTS = {f.name for f in fields(Entry) if f.type == "str"}
_REQUIRED = {"problem", "backend", "tile", "default"}


def between(entries: Mapping[str, Entry], problem: Problem) -> tuple[list[str], str]:
    """What is known for a problem whose bucket has no entry: candidates (tiles, or sdpa) that were
    measured in both neighbouring buckets and are faster than the default in both, the best first
    (least worst share of the default's time); and which buckets these are.

    Neighbours are the nearest buckets with an entry below and above along one axis, all else
    equal: both sequence lengths together, seqlen_kv, seqlen_q, or batch * heads_q; the first axis
    that has both decides. A problem beyond all entries has no neighbours: nothing is extrapolated.
    """
    for axes in (("q", "k"), ("k",), ("q",), ("bh",)):
        below, above = _neighbours(entries, problem, axes)
        if below is None or above is None:
            continue
        a, b = entries[below].lookup(), entries[above].lookup()
        worst = {name: max(a[name], b[name]) for name in a if name in b}
        faster = sorted((x for x in worst.items() if x[1] < 1.0), key=lambda x: x[1])
        return [name for name, _ in faster], f"between {below} and {above}"
    return [], ""


def _neighbours(
    entries: Mapping[str, Entry], problem: Problem, axes: tuple[str, ...]
) -> tuple[str | None, str | None]:
    here = problem.bucket_sizes
    kind = problem.bucket_kind
    below: tuple[float, str] | None = None
    above: tuple[float, str] | None = None
    for bucket, entry in entries.items():
        there = entry.problem.bucket_sizes
        if entry.problem.bucket_kind != kind:
            continue
        if any(there[axis] != here[axis] for axis in here if axis not in axes):
            continue
        ratios = {there[axis] / max(here[axis], 1) for axis in axes}
        if len(ratios) != 1:
            continue
        (ratio,) = ratios
        if ratio < 1 and (below is None or ratio > below[0]):
            below = ratio, bucket
        if ratio > 1 and (above is None or ratio < above[0]):
            above = ratio, bucket
    return below and below[1], above and above[1]


def nearest(entries: Mapping[str, Entry], problem: Problem) -> list[Entry]:
    """Entries of the same direction, dtype and head dimensions, the nearest bucket first: what a
    search may try first."""

    def steps(entry: Entry) -> float:
        here, there = problem.bucket_sizes, entry.problem.bucket_sizes
        sizes = sum(abs(math.log2(max(here[a], 1) / max(there[a], 1))) for a in here)
        other = entry.problem
        group = problem.heads_q * other.heads_kv != other.heads_q * problem.heads_kv
        kind: int = sum(
            getattr(problem, x) != getattr(other, x) for x in ("mask", "terms", "layout")
        )
        return sizes + kind + group

    related = [
        entry
        for entry in entries.values()
        if entry.problem.direction == problem.direction
        and entry.problem.dtype == problem.dtype
        and entry.problem.dims == problem.dims
    ]
    return sorted(related, key=steps)


def user_path(device_name: str) -> Path:
    """Where the tuner stores results for a device model."""
    return cache_dir() / "tuned" / f"{slug(device_name)}.json"


def shipped_path(device_name: str) -> Path:
    """Where the package ships results for a device model; need not exist."""
    return Path(__file__).parents[1] / "tuned" / f"{slug(device_name)}.json"


def load(path: Path) -> dict[str, Entry]:
    """Entries by bucket; empty when the file does not exist. A file that cannot be understood is
    set aside under another name, and a DamagedDatabase warning says so; one of a newer flashmoe is
    left alone, with a NewerDatabase warning."""
    try:
        return _parsed(path)
    except NewerDatabase as newer:
        warnings.warn(newer, stacklevel=2)
        return {}
    except _Damaged:
        pass
    try:
        with _lock(path):
            return _parsed_or_set_aside(path)
    except OSError as error:  # no place of ours: nobody may write there
        warnings.warn(f"{path} is damaged and stays where it is ({error})", DamagedDatabase, 2)
        return {}


class _Damaged(Exception):
    """A file that is no database; says why."""


def _lock(path: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(path.with_suffix(".lock"))


def _parsed(path: Path) -> dict[str, Entry]:
    """Raises _Damaged and NewerDatabase."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        return parse(content.decode())
    except NewerDatabase:
        raise NewerDatabase(f"{path} was written by a newer flashmoe and is not used") from None
    except ValueError as error:
        raise _Damaged(str(error)) from error


def _parsed_or_set_aside(path: Path) -> dict[str, Entry]:
    """Under the lock: by now another process may have set it aside, or written a good one."""
    try:
        return _parsed(path)
    except _Damaged as error:
        aside = set_aside(path)
        text = f"{path} is damaged ({error}); it was set aside as {aside.name}"
        warnings.warn(text, DamagedDatabase, stacklevel=3)
        return {}


def update(path: Path, entries: Mapping[str, Entry], *, replace: bool = True) -> int:
    """Merge `entries` into the file: under a lock and atomically, so that concurrent tuners lose
    nothing and a reader never sees half a file. Without `replace`, what is there stays. Returns how
    many entries were taken over; none leave the file as it is. Raises OSError where it cannot be
    written, and NewerDatabase for a file of a newer flashmoe."""
    make_folder(path.parent)
    with _lock(path):
        there = _parsed_or_set_aside(path)
        taken = {k: e for k, e in entries.items() if replace or k not in there}
        if taken:
            write_whole(path, text_of({**there, **taken}))
        else:
            require_writable(path)
    return len(taken)


def text_of(entries: Mapping[str, Entry]) -> str:
    """A database's text: JSON for people and diffs, a line a field, but lists of numbers on one."""
    data = {"schema": SCHEMA, "entries": {k: e.to_json() for k, e in sorted(entries.items())}}
    text = json.dumps(data, indent=1)
    return re.sub(r"\[[\d\s.,e+-]*\]", lambda m: " ".join(m[0].split()), text) + "\n"


def parse(text: str) -> dict[str, Entry]:
    """The entries of a database's text. Raises ValueError for any other text, NewerDatabase for
    that of a newer flashmoe."""
    try:
        data = json.loads(text)
        schema = data["schema"]
        if isinstance(schema, int) and schema > SCHEMA:
            raise NewerDatabase(f"schema {schema} is newer than {SCHEMA}, this flashmoe's")
        if schema not in _READABLE:
            raise ValueError(f"schema must be one of {_READABLE}, got {schema!r}")
        read = Entry.from_json if schema >= _FIRST_WITH_JUDGED else _older
        return {bucket: read(entry) for bucket, entry in data["entries"].items()}
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _older(data: dict[str, Any]) -> Entry:
    """An entry of a schema in which a kept default was named by its tile."""
    entry = Entry.from_json(data)
    judged = str(entry.fingerprint.get("kernels", ""))
    kept = entry.default == (entry.tile or entry.backend)
    backend, tile = (DEFAULT, "") if kept else (entry.backend, entry.tile)
    return replace(entry, backend=backend, tile=tile, judged=judged)
