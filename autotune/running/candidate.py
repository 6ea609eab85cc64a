"""What may run a problem: a backend with a tile, and which of them can."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from flashmoe.backends import BACKENDS
from flashmoe.backends.base import Enumerates
from flashmoe.machine.device import arch
from flashmoe.planning.plan import Plan, heuristic, why_not
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a problem: a backend, with a tile unless it has none."""

    backend: str
    tile: Tile | None = None

    def __str__(self) -> str:
        return self.backend if self.tile is None else str(self.tile)

    @classmethod
    def of_tile(cls, tile: Tile) -> Candidate:
        return cls(tile.backend, tile)

    @classmethod
    def of_plan(cls, plan: Plan) -> Candidate:
        return cls(plan.backend, plan.tile)


SDPA = Candidate("sdpa")


def known_tile(name: str) -> Tile | None:
    """A stored tile; None where there is none, as for SDPA, and for one of another version."""
    try:
        return Tile.parse(name)
    except ValueError:
        return None


def default_candidate(problem: Problem, device: torch.device) -> Candidate:
    """What runs `problem` untuned. Raises NotImplementedError when nothing does."""
    return Candidate.of_plan(heuristic(problem, device))


def searched_backends(problem: Problem, device: torch.device, backend: str | None) -> list[str]:
    """The backends whose tiles are searched: `backend`, or every one that runs `problem` here but
    Triton on a CPU, interpreted, or for sequences one by one where another runs them together."""
    names = [
        name
        for name in ([backend] if backend else BACKENDS)
        if not why_not(name, problem, device) and BACKENDS[name].tiles(problem, arch(device))
    ]
    slow = device.type == "cpu" or (problem.layout != "dense" and len(names) > 1)
    return [name for name in names if backend or name != "triton" or not slow]


def space(problem: Problem, device: torch.device, backends: Sequence[str]) -> list[Tile]:
    """The tiles that these backends may try, and the default of each."""
    here = arch(device)
    tried = [tile for name in backends for tile in BACKENDS[name].tiles(problem, here)]
    defaults = [BACKENDS[name].default_tile(problem, here) for name in backends]
    return [*dict.fromkeys([*tried, *filter(None, defaults)])]


@dataclass(frozen=True, slots=True)
class Legality:
    """How many tiles of how many may be tried, and how often each reason kept one out."""

    legal: int
    considered: int
    reasons: Mapping[str, int]

    def __str__(self) -> str:
        text = f"{self.legal} of {self.considered} tiles are legal"
        if not self.reasons:
            return text
        most = sorted(self.reasons.items(), key=lambda pair: -pair[1])
        return f"{text} ({'; '.join(f'{count} out: {reason}' for reason, count in most)})"


def legality(problem: Problem, device: torch.device, backends: Sequence[str]) -> Legality:
    """What is left of the tiles that these backends consider."""
    here = arch(device)
    reasons: Counter[str] = Counter()
    for name in backends:
        backend = BACKENDS[name]
        if isinstance(backend, Enumerates):
            reasons.update(map(_kind, backend.reasons(problem, here).values()))
        else:
            reasons[""] += len(backend.tiles(problem, here))
    considered, legal = reasons.total(), reasons.pop("", 0)
    return Legality(legal, considered, reasons)


@functools.cache
def _kind(reason: str) -> str:
    """A reason without the numbers that differ from tile to tile."""
    reason = re.sub(r",? got .*|\d+ a thread, | of \d+ bytes", "", reason)
    return re.sub(r"\b\d+\b", "N", reason) if reason.startswith("registers:") else reason


def runs(candidate: Candidate, problem: Problem, device: torch.device) -> bool:
    """Whether a candidate that was stored elsewhere or earlier is legal here."""
    name = candidate.backend
    if name not in BACKENDS or why_not(name, problem, device):
        return False
    return not BACKENDS[name].rejects(candidate.tile, problem, arch(device))
