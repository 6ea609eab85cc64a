"""The Costs of every kernel on a GPU: measured on it, or on an H200 and scaled to another Hopper.

A table of Costs is a JSON file: Costs by a kernel's name, and a formula for the sm90 tiles that
nobody measured. The package ships what benchmarks/plane_fit.py made of times on an H200.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashmoe._extension import kernel_hash
from flashmoe.machine.cache import NoCacheFolder, cache_dir, set_aside
from flashmoe.machine.device import Arch, slug
from flashmoe.prediction import kernels
from flashmoe.prediction.predict import Costs, microseconds
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

SCHEMA = 1
_SHIPPED = Path(__file__).parent / "nvidia-h200.json"
_MEASURED = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448, 1_980_000, 4.917e12)
# What `alone` and `idle` are between.
_ALONE, _IDLE = (0.3, 1.0), (0.0, 0.8)


@dataclass(frozen=True)
class Table:
    """Costs by a kernel's name; the formula's rows, one for each of their fields; and how many
    times as fast as there the clock and the memory are."""

    costs: Mapping[str, Costs]
    formula: Sequence[Sequence[float]]
    clock: float = 1.0
    bandwidth: float = 1.0

    def named(self, name: str) -> Costs | None:
        """Costs of a kernel that was measured."""
        found = self.costs.get(name)
        return None if found is None else self.scaled(found)

    def of_tile(self, tile: Tile, head_dim: int) -> Costs | None:
        """Costs of a tile that is compiled for head_dim."""
        found = self.named(kernels.tile_name(tile, head_dim))
        if found is None and tile.kernel == "sm90":
            values = kernels.features(str(tile), head_dim)
            logs = [sum(a * b for a, b in zip(row, values, strict=True)) for row in self.formula]
            found = self.scaled(from_logs(logs))
        return found

    def scaled(self, costs: Costs) -> Costs:
        """As they are with this clock and memory."""
        return costs._replace(
            block=costs.block / self.clock,
            masked_block=costs.masked_block / self.clock,
            step=costs.step / self.clock,
            bytes_per_us=costs.bytes_per_us * self.bandwidth,
        )

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "costs": dict(self.costs), "formula": list(self.formula)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Table:
        """Raises ValueError, KeyError and TypeError for anything else."""
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, got {data['schema']!r}")
        costs = {name: Costs(*values) for name, values in data["costs"].items()}
        return cls(costs, data["formula"])


def to_logs(costs: Costs) -> list[float]:
    """Costs without bounds, as they are fitted: logarithms, and log odds of shares."""
    alone = (costs.alone - _ALONE[0]) / (_ALONE[1] - costs.alone)
    idle = (costs.idle - _IDLE[0]) / (_IDLE[1] - costs.idle)
    return [math.log(x) for x in costs._replace(alone=alone, idle=idle)]


def from_logs(logs: Sequence[float]) -> Costs:
    """The inverse of to_logs."""
    costs = Costs(*(math.exp(min(max(x, -30.0), 30.0)) for x in logs))
    return costs._replace(
        alone=_ALONE[0] + (_ALONE[1] - _ALONE[0]) / (1 + 1 / costs.alone),
        idle=_IDLE[0] + (_IDLE[1] - _IDLE[0]) / (1 + 1 / costs.idle),
    )


def user_path(device_name: str) -> Path:
    """Where `python -m flashmoe.autotune --calibrate` stores what it measured on a device model."""
    return cache_dir() / "tuned" / f"{slug(device_name)}.costs"


@functools.cache
def table(arch: Arch) -> Table | None:
    """The Costs of kernels on this GPU: those measured here with these kernels, else on Hopper
    those of an H200, scaled; None where nothing tells them."""
    if arch.kind != "cuda":
        return None
    return _calibrated(arch) or (shipped(arch) if arch.capability[0] == 9 else None)


def forget() -> None:
    """Read what is stored anew."""
    table.cache_clear()
    _tile_costs.cache_clear()
    tile_microseconds.cache_clear()


def shipped(arch: Arch) -> Table:
    """The Costs that were measured on an H200, scaled to this GPU's clock and bandwidth."""
    measured = Table.from_json(json.loads(_SHIPPED.read_text(encoding="utf-8")))
    if arch.name == _MEASURED.name:
        return measured
    return replace(
        measured,
        clock=arch.clock / _MEASURED.clock or 1.0,
        bandwidth=arch.bandwidth / _MEASURED.bandwidth or 1.0,
    )


def _calibrated(arch: Arch) -> Table | None:
    try:
        path = user_path(arch.name)
        content = path.read_text(encoding="utf-8")
    except (NoCacheFolder, FileNotFoundError):
        return None
    except OSError as error:
        warnings.warn(f"{path} could not be read ({error}); it is not used", stacklevel=2)
        return None
    try:
        data = json.loads(content)
        found, kernels_then = Table.from_json(data), data["kernels"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = set_aside(path).name
        warnings.warn(f"{path} is damaged ({error}); it was set aside as {aside}", stacklevel=2)
        return None
    return found if kernels_then == kernel_hash(arch.kind) else None


@functools.lru_cache(maxsize=65536)
def _tile_costs(tile: Tile, head_dim: int, arch: Arch) -> Costs | None:
    known = table(arch)
    return None if known is None else known.of_tile(tile, head_dim)


@functools.lru_cache(maxsize=65536)  # a plan needs each several times
def tile_microseconds(tile: Tile, head_dim: int, problem: Problem, arch: Arch) -> float | None:
    """The predicted time of a tile that is compiled for head_dim; None where nothing tells it."""
    costs = _tile_costs(tile, head_dim, arch)
    work = kernels.tile_work(tile, problem, arch.sm_count)
    return microseconds(work, costs) if costs and work else None


def sdpa_microseconds(problem: Problem, arch: Arch) -> dict[str, float]:
    """The predicted times of SDPA's kernels that run the problem; empty where nothing tells it."""
    known = table(arch)
    if known is None or problem.direction != "fwd" or problem.dtype == "float32":
        return {}
    named = {
        kernel: (work, known.named(kernels.sdpa_name(kernel, problem.padded_dim)))
        for kernel, work in kernels.sdpa_works(problem, arch.sm_count).items()
    }
    return {kernel: microseconds(work, costs) for kernel, (work, costs) in named.items() if costs}
