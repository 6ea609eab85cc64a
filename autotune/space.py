"""What may be tried for a problem: candidates, and the legal tiles as Optuna parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import optuna
import torch

from flashmoe.backends import BACKENDS
from flashmoe.device import arch
from flashmoe.plan import Plan, heuristic, why_not
from flashmoe.problem import Problem
from flashmoe.tiles import Tile

# All of a tile: tiles that no parameter tells apart could not all be suggested.
AXES = tuple(field.name for field in fields(Tile) if field.name != "kernel")


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


def default_candidate(problem: Problem, device: torch.device) -> Candidate:
    """What runs `problem` untuned. Raises NotImplementedError when nothing does."""
    return Candidate.of_plan(heuristic(problem, device))


def searched_backends(problem: Problem, device: torch.device, backend: str | None) -> list[str]:
    """The backends whose tiles are searched: `backend`, or every one that runs `problem` here,
    except Triton's interpreter, which is never fast."""
    names = [backend] if backend else list(BACKENDS)
    return [
        name
        for name in names
        if not why_not(name, problem, device)
        and (backend or not (name == "triton" and device.type == "cpu"))
        and BACKENDS[name].tiles(problem, arch(device))
    ]


def runs(candidate: Candidate, problem: Problem, device: torch.device) -> bool:
    """Whether a candidate that was stored elsewhere or earlier is legal here."""
    name = candidate.backend
    if name not in BACKENDS or why_not(name, problem, device):
        return False
    return not BACKENDS[name].rejects(candidate.tile, problem, arch(device))


class Space:
    """A set of legal tiles, as Optuna parameters.

    Every axis of a kernel is one categorical parameter over the values it takes in the set, named
    `KERNEL.AXIS` (`sm80.block_m`), so that samplers see the structure. A combination outside the
    set stands for the nearest tile in it: whatever a sampler suggests is legal.
    """

    def __init__(self, tiles: Iterable[Tile]) -> None:
        self.tiles = list(dict.fromkeys(tiles))
        if not self.tiles:
            raise ValueError("tiles must hold at least one tile, got none")
        self._kernels = sorted({tile.kernel for tile in self.tiles})
        self._of_kernel = {k: [t for t in self.tiles if t.kernel == k] for k in self._kernels}
        self._values: dict[tuple[str, str], list[int]] = {
            (kernel, axis): sorted({getattr(tile, axis) for tile in tiles_of})
            for kernel, tiles_of in self._of_kernel.items()
            for axis in AXES
        }

    def __len__(self) -> int:
        return len(self.tiles)

    def suggest(self, trial: optuna.Trial) -> Tile:
        """The tile that the study's sampler asks for."""
        kernel = self._kernels[0]
        if len(self._kernels) > 1:
            kernel = trial.suggest_categorical("kernel", self._kernels)
        wanted = {
            axis: values[0]
            if len(values) == 1
            else trial.suggest_categorical(f"{kernel}.{axis}", values)
            for axis in AXES
            for values in [self._values[kernel, axis]]
        }
        return min(self._of_kernel[kernel], key=lambda tile: self._steps(kernel, tile, wanted))

    def params(self, tile: Tile) -> dict[str, str | int]:
        """The parameters that suggest() turns into `tile`, for study.enqueue_trial."""
        params: dict[str, str | int] = {} if len(self._kernels) == 1 else {"kernel": tile.kernel}
        for axis in AXES:
            if len(self._values[tile.kernel, axis]) > 1:
                params[f"{tile.kernel}.{axis}"] = getattr(tile, axis)
        return params

    def _steps(self, kernel: str, tile: Tile, wanted: dict[str, int]) -> int:
        """How many steps along the axes lie between `tile` and `wanted`."""
        return sum(
            abs(values.index(getattr(tile, axis)) - values.index(wanted[axis]))
            for axis in AXES
            for values in [self._values[kernel, axis]]
        )
