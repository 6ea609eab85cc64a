"""Which backend and tile run a problem: override, then tuned databases, then heuristic."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flashmoe import _extension
from flashmoe.backends import BACKENDS
from flashmoe.backends.base import BATCH_INVARIANT, SplitsKeys
from flashmoe.machine.cache import NoCacheFolder
from flashmoe.machine.device import Arch, arch
from flashmoe.machine.environment import variable
from flashmoe.planning import database
from flashmoe.prediction import costs
from flashmoe.prediction.predict import fastest
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

# From here on, Triton's tensor-core instructions outweigh its launch where the cuda kernel has only
# mma.sync: at 3e10 FLOP a forward takes about 0.1 ms on an H200, which is what one launch costs the
# host (85 to 130 us, the cuda kernel 15 us).
_TRITON_FLOPS = 3e10
# Below so many queries a block of rows is mostly empty, and kernels that do not split the keys
# leave most of a GPU idle: at (16, 32 heads over 8, 1 x 8192, 128) sm80 takes 0.74 ms on an H200,
# SDPA 0.13.
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


class Candidate(NamedTuple):
    """What may run an untuned problem, and the time that this is predicted to take."""

    backend: str
    tile: Tile | None
    microseconds: float | None = None


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
    do not return softmax_lse. Raises ValueError for an override that cannot run, saying why.
    """
    chosen = _override(problem, device, backend, tile)
    if chosen is not None:
        if need_lse and chosen.backend == "sdpa":
            raise ValueError("backend must be one that returns softmax_lse here, got 'sdpa'")
        return chosen
    here = arch(device)
    passed_over = ""
    for known in databases(here):
        stored = _stored(known, problem, device, need_lse)
        if isinstance(stored, Plan):
            return stored
        passed_over = passed_over or stored
    untuned = heuristic(problem, device, need_lse)
    for known in () if untuned.source == "predicted" else databases(here):
        if problem.bucket not in known.entries:
            for plan in _between(known, problem, need_lse):
                if not _refusal(plan, problem, device):
                    return plan
    if passed_over:
        return replace(untuned, source=f"{untuned.source}: {passed_over}")
    return untuned


class Planned(NamedTuple):
    """A plan, and the call of its kernel: a Run, or a RunBackward, by the problem's direction."""

    plan: Plan
    run: Callable[..., Any]


@functools.lru_cache(maxsize=4096)
def planned(
    problem: Problem,
    device: torch.device,
    backend: str | None = None,
    tile: Tile | str | None = None,
    need_lse: bool = False,
    deterministic: bool = False,
    num_splits: int = 0,
) -> Planned:
    """What `make_plan` says, bound to its kernel, until `api.forget_plans`: planning takes tens of
    microseconds, and hundreds where it searches a database for neighbours.

    `deterministic` gradients are the same bits every time; a sequence's attention to a cache is the
    same bits whatever else is in the batch, unless `num_splits`, which backends that split keys
    take, depends on that."""
    is_cached = problem.direction == "fwd" and problem.layout not in ("dense", "packed")
    # What runs a sequence then must not depend on how many there are, and how long others are.
    alike = replace(problem, batch=1, seqlen_q=1) if deterministic and is_cached else problem
    plan = make_plan(alike, device, backend, tile, need_lse)
    if problem.direction == "bwd":
        if deterministic:
            plan = repeatable(plan, problem, device)
        run = BACKENDS[plan.backend].bind_backward(problem, plan.tile, deterministic)
        return Planned(plan, run)
    chosen = BACKENDS[plan.backend]
    if isinstance(chosen, SplitsKeys):
        num_splits = num_splits or (BATCH_INVARIANT if deterministic else 0)
        return Planned(plan, chosen.bind_split(problem, plan.tile, num_splits))
    return Planned(plan, chosen.bind(problem, plan.tile))


def repeatable(plan: Plan, problem: Problem, device: torch.device) -> Plan:
    """`plan`, or where its gradients are not the same bits every time one whose are.

    Raises ValueError when there is none."""
    if BACKENDS[plan.backend].repeats(plan.tile, problem):
        return plan
    for name, backend in BACKENDS.items():
        if not why_not(name, problem, device):
            tile = backend.default_tile(problem, arch(device))
            if backend.repeats(tile, problem):
                return Plan(name, tile, "deterministic")
    raise ValueError(
        f"deterministic must be False for {problem.label} here: no backend that can run it repeats "
        "its gradients bit by bit, got True"
    )


def heuristic(problem: Problem, device: torch.device, need_lse: bool = False) -> Plan:
    """The plan for `problem` when nothing was tuned and nothing is overridden: the first of
    `candidates`. Raises NotImplementedError when there is none."""
    for first in candidates(problem, device, need_lse):
        source = "heuristic" if first.microseconds is None else "predicted"
        return Plan(first.backend, first.tile, source)
    reasons = "; ".join(f"{name}: {why_not(name, problem, device)}" for name in BACKENDS)
    raise NotImplementedError(f"no backend runs {problem.label} on {device}: {reasons}")


def candidates(problem: Problem, device: torch.device, need_lse: bool = False) -> list[Candidate]:
    """What may run an untuned `problem`, in the order in which it is chosen: what is predicted to
    be fastest (the first listed of what takes about as long), then backends of which nothing is
    predicted, in the order of preference."""
    here = arch(device)
    known: dict[Candidate, float] = {}
    unknown: list[Candidate] = []
    for name in _preference(problem, here):
        if (need_lse and name == "sdpa") or why_not(name, problem, device):
            continue
        backend = BACKENDS[name]
        tiles = [] if _decodes(problem) else backend.untuned_tiles(problem, here)
        times = [(tile, backend.predicted(tile, problem, here)) for tile in tiles]
        found = {Candidate(name, tile, time): time for tile, time in times if time is not None}
        known |= found
        if not found:
            unknown.append(Candidate(name, backend.default_tile(problem, here)))
    first = fastest(known) if known else None
    return [*sorted(known, key=lambda c: (c != first, known[c])), *unknown]


def reload_databases() -> None:
    """Forget the databases read so far, so that the next plan sees what a tuner wrote."""
    databases.cache_clear()
    planned.cache_clear()
    costs.forget()


def _preference(problem: Problem, here: Arch) -> list[str]:
    """Backends in the order in which an untuned problem tries them."""
    if here.kind == "cpu":
        names = [name for name in BACKENDS if name != "triton"]  # interpreted, for tests only
        sdpa_first = _cpu_decodes(problem) or _multiplies_bfloat16(problem, here)
        return sorted(names, key=lambda name: name != "sdpa") if sdpa_first else names
    # In float32 only triton's forward is left, at 16 to 49 % of SDPA's speed in five problems of
    # 128 to 2048 tokens, causal or not, head_dim 64 and 128 (H100, benchmarks/results/
    # tuned-nvidia-h100.json).
    if problem.direction == "fwd" and problem.dtype == "float32":
        return sorted(BACKENDS, key=lambda name: name != "sdpa")
    if problem.direction == "fwd" and _decodes(problem):
        return sorted(BACKENDS, key=lambda name: (name != "decode", name != "sdpa"))
    if (
        here.capability >= (9, 0)
        and problem.flops >= _TRITON_FLOPS
        and not _has_sm90(problem, here)
    ):
        return sorted(BACKENDS, key=lambda name: name != "triton")
    return list(BACKENDS)


def _decodes(problem: Problem) -> bool:
    return problem.seqlen_q < _DECODE_SEQLEN_Q < problem.seqlen_kv


def _multiplies_bfloat16(problem: Problem, here: Arch) -> bool:
    """Whether SDPA has instructions for this forward that our kernel has not: it was 1.25 to 4
    times as fast in 17 problems of 32 to 2048 tokens, head_dim 40 to 256, causal or not, one
    query among them (Sapphire Rapids, 2 cores)."""
    return here.amx and problem.direction == "fwd" and problem.dtype == "bfloat16"


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
    """Whether the cuda backend has a Hopper kernel for it."""
    cuda = BACKENDS["cuda"]
    tiles = [] if cuda.unsupported(problem, here) else cuda.untuned_tiles(problem, here)
    return any(tile is not None and tile.kernel.startswith("sm90") for tile in tiles)


@dataclass(frozen=True, slots=True)
class Database:
    """A tuned database as plans see it: the entries of today's kernels by bucket, and the buckets
    of the others."""

    source: str
    entries: Mapping[str, database.Entry]
    outdated: frozenset[str]


@functools.cache
def databases(here: Arch) -> tuple[Database, ...]:
    """The user's and the shipped one."""
    kernels = _extension.kernel_hash(here.kind)
    found = []
    for source, path_of in (("user", database.user_path), ("shipped", database.shipped_path)):
        every = _loaded(path_of, here.name)
        current = {bucket: entry for bucket, entry in every.items() if entry.judged == kernels}
        outdated = frozenset(every.keys() - current.keys())
        found.append(Database(f"{source} database", current, outdated))
    return tuple(found)


def _loaded(path_of: Callable[[str], Path], device_name: str) -> dict[str, database.Entry]:
    """A call does not fail for a file that only makes it faster."""
    try:
        path = path_of(device_name)
    except NoCacheFolder:
        return {}  # nor can a tuner have written one
    try:
        return database.load(path)
    except OSError as error:
        warnings.warn(f"{path} could not be read ({error}); it is not used", stacklevel=2)
        return {}


def _stored(known: Database, problem: Problem, device: torch.device, need_lse: bool) -> Plan | str:
    """The plan that a tuned entry holds for this use; without one, what to tell about that."""
    entry = known.entries.get(problem.bucket)
    if entry is None:
        outdated = problem.bucket in known.outdated
        return f"the entry of the {known.source} is of other kernels" if outdated else ""
    without_tile = need_lse and (entry.kept or entry.backend == database.SDPA)
    text = entry.tile_with_lse if without_tile else entry.tile
    if entry.kept and not text:
        return replace(heuristic(problem, device, need_lse), source=known.source)
    if without_tile and not text:
        return ""
    try:
        tile = Tile.parse(text) if text else None
    except ValueError as error:
        warnings.warn(
            f"{known.source}: entry {entry.problem.bucket} is skipped: {error}",
            database.DamagedDatabase,
            stacklevel=2,
        )
        return ""
    plan = Plan(tile.backend if tile and without_tile else entry.backend, tile, known.source)
    if why := _refusal(plan, problem, device):
        return f"{plan.tile or plan.backend} of the {known.source}: {why}"
    return plan


def _refusal(plan: Plan, problem: Problem, device: torch.device) -> str:
    """Why a stored plan does not run here and now; empty when it does."""
    if plan.backend not in BACKENDS:
        return "no such backend"
    if why := why_not(plan.backend, problem, device):
        return why
    backend, here = BACKENDS[plan.backend], arch(device)
    # Nobody waits for a compiler who did not ask to. Asked first, for `rejects` may look whether
    # there is a compiler, which takes long.
    if not backend.ready(plan.tile, problem, here):
        return "not compiled here"
    return backend.rejects(plan.tile, problem, here)


def _between(known: Database, problem: Problem, need_lse: bool) -> Iterator[Plan]:
    """Plans that were measured to be faster than the default on both sides of this problem."""
    names, buckets = database.between(known.entries, problem)
    for name in names:
        if name == database.SDPA:
            if not need_lse:
                yield Plan(name, None, f"{known.source}, {buckets}")
            continue
        try:
            tile = Tile.parse(name)
        except ValueError:
            continue  # of another version; the others are as good as they were
        yield Plan(tile.backend, tile, f"{known.source}, {buckets}")


def _override(
    problem: Problem, device: torch.device, backend: str | None, tile: Tile | str | None
) -> Plan | None:
    source = "argument"
    if not backend and not tile:
        backend, tile = variable("FLASHMOE_BACKEND"), variable("FLASHMOE_TILE")
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
