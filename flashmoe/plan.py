"""Which backend and tile run a problem: override, then tuned databases, then heuristic."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flashmoe import database
from flashmoe.backends import BACKENDS
from flashmoe.device import arch
from flashmoe.problem import Problem
from flashmoe.tiles import Arch, Tile

# From here on, Triton's tensor-core instructions outweigh its launch where the cuda kernel has only
# mma.sync: at 3e10 FLOP a forward takes about 0.1 ms on an H200, which is what one launch costs the
# host (85 to 130 us, the cuda kernel 15 us).
_TRITON_FLOPS = 3e10
# Below so many queries a block of rows is mostly empty, and no kernel of ours splits the keys over
# blocks yet: at (16, 32 heads over 8, 1 x 8192, 128) sm80 takes 0.74 ms on an H200, SDPA 0.13.
_DECODE_SEQLEN_Q = 16
# On a CPU our kernel loses only in float32 (of 16-bit keys SDPA makes float32 ones first) with one
# query head for each of K's (where more share a tile of K, we win), and for a query or two. On 2
# cores of an AMD EPYC (Zen 4), 8 heads, batch 1 and 4, both sides in the same layout (either), our
# time as a multiple of SDPA's at seqlen_kv 512 to 4096 was, in the median and from least to most:
# head_dim 64: 1 query 1.45 (0.93 to 2.14), 2: 1.17 (0.80 to 1.33), 4: 1.07 (0.83 to 1.44), 8: 0.99,
# 16: 0.81; head_dim 128: 1 query at 512 1.73 (0.93 to 2.26), above 0.93 (0.90 to 1.17), 2: 0.81;
# 2 heads of K: 1 query at most 0.90; bfloat16: 1 query at most 0.53, 2 to 8 in the median 0.92.
_CPU_DECODE_SEQLEN_Q = 2
_CPU_DECODE_HEAD_DIM = 64
_CPU_DECODE_SHORT_KV = 1024


@dataclass(frozen=True, slots=True)
class Plan:
    """backend and tile (None for a backend without tiles), and where the choice came from."""

    backend: str
    tile: Tile | None
    source: str


def why_not(backend: str, problem: Problem, device: torch.device) -> str:
    """Why `backend` cannot run `problem` on `device`; empty when it can."""
    candidate = BACKENDS[backend]
    return candidate.unavailable(device) or candidate.unsupported(problem, arch(device))


def make_plan(
    problem: Problem,
    device: torch.device,
    backend: str | None = None,
    tile: Tile | str | None = None,
    need_lse: bool = False,
) -> Plan:
    """The plan for `problem` on `device`.

    `backend` and `tile` override; so do the environment variables FLASHMOE_BACKEND and
    FLASHMOE_TILE, wherever they can run the problem's direction. `need_lse` excludes backends that
    do not tell softmax_lse. Raises ValueError for an override that cannot run, saying why.
    """
    chosen = _override(problem, device, backend, tile)
    if chosen is not None:
        if need_lse and chosen.backend == "sdpa":
            raise ValueError("backend must be one that returns softmax_lse here, got 'sdpa'")
        return chosen
    here = arch(device)
    for source, entries in _databases(here.name):
        stored = _stored(entries.get(problem.bucket), need_lse, source)
        if stored is not None and _runs(stored.backend, stored.tile, problem, device):
            if BACKENDS[stored.backend].ready(stored.tile, problem, here):
                return stored
            # Nobody waits for a compiler who did not ask to.
            source = f"heuristic: {stored.tile} of the {source} is not compiled yet"
            return replace(heuristic(problem, device, need_lse), source=source)
    for source, entries in _databases(here.name):
        if problem.bucket not in entries:
            for plan in _between(entries, problem, need_lse, source):
                if _runs(plan.backend, plan.tile, problem, device) and BACKENDS[plan.backend].ready(
                    plan.tile, problem, here
                ):
                    return plan
    return heuristic(problem, device, need_lse)


# What `make_plan` said, until `api.forget_plans`: planning takes tens of microseconds, and hundreds
# where it searches a database for neighbours.
remembered_plan = functools.lru_cache(maxsize=4096)(make_plan)


def heuristic(problem: Problem, device: torch.device, need_lse: bool = False) -> Plan:
    """The plan for `problem` when nothing was tuned and nothing is overridden: the first backend
    that runs it, with its default tile. Raises NotImplementedError when there is none."""
    for name in _preference(problem, arch(device)):
        if (need_lse and name == "sdpa") or why_not(name, problem, device):
            continue
        return Plan(name, BACKENDS[name].default_tile(problem, arch(device)), "heuristic")
    reasons = "; ".join(f"{name}: {why_not(name, problem, device)}" for name in BACKENDS)
    raise NotImplementedError(f"no backend runs {problem.label} on {device}: {reasons}")


def reload_databases() -> None:
    """Forget the databases read so far, so that the next plan sees what a tuner wrote."""
    _databases.cache_clear()
    remembered_plan.cache_clear()


def _preference(problem: Problem, here: Arch) -> list[str]:
    """Backends in the order in which an untuned problem tries them."""
    if here.kind == "cpu":
        names = [name for name in BACKENDS if name != "triton"]  # interpreted, for tests only
        return sorted(names, key=lambda name: name != "sdpa") if _cpu_decodes(problem) else names
    decodes = problem.seqlen_q < _DECODE_SEQLEN_Q < problem.seqlen_kv
    # In float32 only triton's forward is left, at 16 to 49 % of SDPA's speed in five problems of
    # 128 to 2048 tokens, causal or not, head_dim 64 and 128 (H100, benchmarks/results/
    # tuned-nvidia-h100.json).
    if problem.direction == "fwd" and (decodes or problem.dtype == "float32"):
        return sorted(BACKENDS, key=lambda name: name != "sdpa")
    if (
        here.capability >= (9, 0)
        and problem.flops >= _TRITON_FLOPS
        and not _has_sm90(problem, here)
    ):
        return sorted(BACKENDS, key=lambda name: name != "triton")
    return list(BACKENDS)


def _cpu_decodes(problem: Problem) -> bool:
    """Whether this is a forward that SDPA does faster on a CPU."""
    if (
        problem.direction != "fwd"
        or problem.dtype != "float32"
        or problem.heads_q != problem.heads_kv
        or problem.seqlen_kv <= _DECODE_SEQLEN_Q
    ):
        return False
    if problem.head_dim <= _CPU_DECODE_HEAD_DIM:
        return problem.seqlen_q <= _CPU_DECODE_SEQLEN_Q
    return problem.seqlen_q == 1 and problem.seqlen_kv <= _CPU_DECODE_SHORT_KV


def _has_sm90(problem: Problem, here: Arch) -> bool:
    cuda = BACKENDS["cuda"]
    if cuda.unsupported(problem, here):
        return False
    tile = cuda.default_tile(problem, here)
    return tile is not None and tile.kernel == "sm90"


@functools.cache
def _databases(device_name: str) -> tuple[tuple[str, dict[str, database.Entry]], ...]:
    return (
        ("user database", _loaded(database.user_path(device_name))),
        ("shipped database", _loaded(database.shipped_path(device_name))),
    )


def _loaded(path: Path) -> dict[str, database.Entry]:
    """A call does not fail for a file that only makes it faster."""
    try:
        return database.load(path)
    except OSError as error:
        warnings.warn(f"{path} could not be read ({error}); it is not used", stacklevel=2)
        return {}


def _stored(entry: database.Entry | None, need_lse: bool, source: str) -> Plan | None:
    """The plan that a tuned entry holds; None without one for this use."""
    if entry is None:
        return None
    without_lse = need_lse and entry.backend == "sdpa"
    text = entry.tile_with_lse if without_lse else entry.tile
    if without_lse and not text:
        return None
    try:
        tile = Tile.parse(text) if text else None
    except ValueError as error:
        warnings.warn(
            f"{source}: entry {entry.problem.bucket} is skipped: {error}",
            database.DamagedDatabase,
            stacklevel=2,
        )
        return None
    return Plan(tile.backend if tile and without_lse else entry.backend, tile, source)


def _between(
    entries: dict[str, database.Entry], problem: Problem, need_lse: bool, source: str
) -> Iterator[Plan]:
    """Plans that were measured to be faster than the default on both sides of this problem."""
    names, buckets = database.between(entries, problem)
    for name in names:
        if name == database.SDPA:
            if not need_lse:
                yield Plan(name, None, f"{source}, {buckets}")
            continue
        try:
            tile = Tile.parse(name)
        except ValueError:
            continue  # of another version; the others are as good as they were
        yield Plan(tile.backend, tile, f"{source}, {buckets}")


def _runs(backend: str, tile: Tile | None, problem: Problem, device: torch.device) -> bool:
    if backend not in BACKENDS or why_not(backend, problem, device):
        return False
    return not BACKENDS[backend].rejects(tile, problem, arch(device))


def _override(
    problem: Problem, device: torch.device, backend: str | None, tile: Tile | str | None
) -> Plan | None:
    source = "argument"
    if not backend and not tile:
        backend, tile = os.environ.get("FLASHMOE_BACKEND"), os.environ.get("FLASHMOE_TILE")
        source = "environment"
    if not backend and not tile:
        return None
    parsed = Tile.parse(tile) if isinstance(tile, str) and tile else None
    if isinstance(tile, Tile):
        parsed = tile
    name = backend or (parsed.backend if parsed else "")
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if problem.direction == "bwd":
        # An override names the forward's choice; its tile is no tile for the backward, and not
        # every backend has one.
        if why_not(name, problem, device):
            return None
        parsed = None
    if reason := why_not(name, problem, device):
        raise ValueError(f"backend {name!r} cannot run {problem.label} on {device}: {reason}")
    if parsed is None:
        return Plan(name, BACKENDS[name].default_tile(problem, arch(device)), source)
    if parsed.backend != name:
        raise ValueError(f"tile {parsed} belongs to backend {parsed.backend!r}, got {name!r}")
    if reason := BACKENDS[name].rejects(parsed, problem, arch(device)):
        raise ValueError(f"tile {parsed} cannot run {problem.label}: {reason}")
    return Plan(name, parsed, source)
