"""A slower tile that was compiled in: a genuine slowdown of a real kernel, for `selftest`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashmoe.backends import BACKENDS
from flashmoe.device import arch
from flashmoe.plan import make_plan
from flashmoe.ratchet.suite import Case
from flashmoe.ratchet.workload import Workload
from flashmoe.stats import paired_ratio
from flashmoe.timing import measure

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
    """The tile of the planned backend that is slower by the smallest factor that is certainly above
    `least`; None where there is none."""
    plan = make_plan(case.problem, device, need_lse=case.backward)
    tiles = [t for t in BACKENDS[plan.backend].tiles(case.problem, arch(device)) if t != plan.tile]
    planned = Workload(case, device, seed=0)
    calls = {"": planned.ours}
    for tile in tiles:
        options = {"backend": plan.backend, "tile": str(tile)}
        calls[str(tile)] = Workload(case, device, seed=0, options=options).ours
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
