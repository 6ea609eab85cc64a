"""A slower tile that was compiled in: a genuine slowdown of a real kernel, for `selftest`."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.measure.stats import paired_ratio
from flashmoe.measure.timing import measure
from flashmoe.planning.plan import make_plan
from flashmoe.ratchet.measuring.suite import Case
from flashmoe.ratchet.measuring.workload import Workload

# Of a Hopper kernel's thousands of tiles a cache may hold hundreds.
_MOST_TILES = 24
# Far slower proves nothing.
_MOST = 3.0
_ROUNDS = 15
# Of the interval that has to lie above what is asked for: the tile that only seems to is the first
# that a minimum over many tiles picks.
_CONFIDENCE = 0.99


@dataclass(frozen=True, slots=True)
class Worse:
    """`factor`: how many times as long as with the planned tile, roughly (one process)."""

    backend: str
    tile: str
    factor: float


def worse_tile(case: Case, device: torch.device, least: float) -> Worse | None:
    """The tile of the planned backend that runs without being compiled first and is slower by the
    smallest factor that is certainly above `least`; None where there is none. Of a forward: no
    argument of ours names a backward's tile."""
    if "fwd" not in case.directions:
        return None
    plan = make_plan(case.problem, device, need_lse=case.backward)
    backend, here = BACKENDS[plan.backend], arch(device)
    searched = [*backend.tiles(case.problem, here), *backend.compiled_in(case.problem, here)]
    tiles = [
        tile
        for tile in dict.fromkeys(searched)
        if tile != plan.tile
        and tile.backend == plan.backend
        and not backend.rejects(tile, case.problem, here)
        and backend.ready(tile, case.problem, here)
    ]
    if len(tiles) > _MOST_TILES:
        tiles = random.Random(0).sample(tiles, _MOST_TILES)
    workload = Workload(case, device, seed=0)
    calls = {"": workload.ours}
    for tile in map(str, tiles):
        calls[tile] = workload.with_options({"backend": plan.backend, "tile": tile})
    measured = measure(calls, device, rounds=_ROUNDS, warmup=2)
    default = measured.pop("")
    if default.status != "ok":
        return None
    factors = {
        name: paired_ratio(m.samples, default.samples, _CONFIDENCE)
        for name, m in measured.items()
        if m.status == "ok"
    }
    slower = {n: x.value for n, x in factors.items() if least < x.low and x.value < _MOST}
    if not slower:
        return None
    name = min(slower, key=lambda tile: slower[tile])
    return Worse(plan.backend, name, slower[name])
