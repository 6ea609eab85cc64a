"""Why a problem runs what it runs: candidates, their predicted and measured times, the choice."""

from __future__ import annotations

from statistics import median

import torch

from flashmoe.backends import BACKENDS
from flashmoe.machine.device import Arch, arch
from flashmoe.planning import plan
from flashmoe.spec.problem import Problem

_LISTED = 12


def lines(problem: Problem, device: torch.device) -> list[str]:
    """What to print. Raises NotImplementedError where nothing runs the problem."""
    chosen = plan.make_plan(problem, device)
    here = arch(device)
    measured = _measured(problem, here)
    found = plan.candidates(problem, device)
    listed = [(c.backend, c.tile, c.microseconds) for c in found]
    if (chosen.backend, chosen.tile) not in [(b, t) for b, t, _ in listed]:
        predicted = BACKENDS[chosen.backend].predicted(chosen.tile, problem, here)
        listed.insert(0, (chosen.backend, chosen.tile, predicted))
    table = []
    for backend, tile, predicted in listed:
        mark = "*" if (backend, tile) == (chosen.backend, chosen.tile) else " "
        name = str(tile or backend)
        table.append(f"{mark} {_us(predicted)}  {_us(measured.get(name))}  {backend:8} {name}")
    out = [f"{problem.label} on {here.name}", f"  {'predicted':>12}  {'measured':>12}"]
    out += [line for i, line in enumerate(table) if i < _LISTED or line[0] == "*"]
    if len(table) > _LISTED:
        out.append(f"  and {len(table) - _LISTED} more")
    for name in BACKENDS:
        if why := plan.why_not(name, problem, device):
            out.append(f"  not {name}: {why}")
    return [*out, f"* {_why(chosen.source)}"]


def _us(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.1f} us':>12}"


def _why(source: str) -> str:
    kind, _, rest = source.partition(":")
    why = {
        "predicted": "is predicted to take the least time, or within 1 % of it and listed before",
        "heuristic": "is the first backend that runs it; nothing is predicted on this device",
        "environment": "is what FLASHMOE_BACKEND and FLASHMOE_TILE ask for",
    }.get(kind, f"was the fastest measured, says the {source}")
    return f"{why} ({rest.strip()})" if rest and kind in ("predicted", "heuristic") else why


def _measured(problem: Problem, here: Arch) -> dict[str, float]:
    """Microseconds by candidate name, where the tuner measured just this problem with these
    kernels."""
    for known in plan.databases(here):
        entry = known.entries.get(problem.bucket)
        if entry is not None and entry.problem == problem:
            return {name: median(times) * 1e6 for name, times in entry.samples.items() if times}
    return {}
