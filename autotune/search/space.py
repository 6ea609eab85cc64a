"""The legal tiles of a problem as Optuna parameters."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cached_property
from itertools import pairwise
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from flashmoe.tiles import Tile

# All of a tile: tiles that no parameter tells apart could not all be suggested.
AXES = tuple(field.name for field in fields(Tile) if field.name != "kernel")


class Space:
    """A set of legal tiles, as Optuna parameters.

    Every axis of a kernel is one parameter named `KERNEL.AXIS` (`sm80.block_m`), an integer from
    the least to the greatest value that it takes in the set: samplers see names and order. Which
    combinations exist only the sampler knows.
    """

    def __init__(self, tiles: Iterable[Tile]) -> None:
        self.tiles = list(dict.fromkeys(tiles))
        if not self.tiles:
            raise ValueError("tiles must hold at least one tile, got none")
        self._kernels = sorted({tile.kernel for tile in self.tiles})
        self._values: dict[str, list[int]] = {
            f"{kernel}.{axis}": sorted(
                {int(getattr(tile, axis)) for tile in self.tiles if tile.kernel == kernel}
            )
            for kernel in self._kernels
            for axis in AXES
        }
        # An axis without a choice is no parameter.
        self._values = {name: values for name, values in self._values.items() if len(values) > 1}
        self._axes = [a for a in AXES if any(name.endswith(f".{a}") for name in self._values)]
        self._positions: dict[Tile, list[int]] = {}
        self._of_params = {_key(self.params(tile)): tile for tile in self.tiles}

    def __len__(self) -> int:
        return len(self.tiles)

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter, those of kernels that are not chosen among them."""
        found: dict[str, BaseDistribution] = {}
        if len(self._kernels) > 1:
            found["kernel"] = CategoricalDistribution(self._kernels)
        for name, values in self._values.items():
            step = math.gcd(*(b - a for a, b in pairwise(values)))
            found[name] = IntDistribution(values[0], values[-1], step=step)
        return found

    def kernels(self) -> list[list[str]]:
        """The parameters of each kernel that has any."""
        found = [[n for n in self._values if n.startswith(f"{k}.")] for k in self._kernels]
        return [names for names in found if names]

    def names(self, chosen: Mapping[str, Any]) -> Iterator[str]:
        """The parameters of a tile in order. `chosen` may grow: once it holds the kernel, only
        that kernel's follow."""
        if len(self._kernels) > 1:
            yield "kernel"
        kernel = chosen.get("kernel", self._kernels[0])
        yield from (name for name in self._values if name.startswith(f"{kernel}."))

    def suggest(self, trial: optuna.Trial) -> Tile:
        """The tile that a study asks for, whose sampler is a TileSampler of this space."""
        params: dict[str, str | int] = {}
        for name in self.names(params):
            distribution = self.distributions[name]
            if isinstance(distribution, IntDistribution):
                params[name] = trial.suggest_int(
                    name, distribution.low, distribution.high, step=distribution.step
                )
            else:
                params[name] = trial.suggest_categorical(name, self._kernels)
        return self._of_params[_key(params)]

    def tile_of(self, params: Mapping[str, Any]) -> Tile | None:
        """The tile with these parameters; None without one in this space."""
        return self._of_params.get(_key(params))

    def params(self, tile: Tile) -> dict[str, str | int]:
        """The parameters that stand for `tile`."""
        params: dict[str, str | int] = {} if len(self._kernels) == 1 else {"kernel": tile.kernel}
        for axis in AXES:
            if f"{tile.kernel}.{axis}" in self._values:
                params[f"{tile.kernel}.{axis}"] = int(getattr(tile, axis))
        return params

    def position(self, tile: Tile) -> list[int]:
        """Which kernel, and where on each axis, in steps; values that this space lacks count as the
        next smaller one. Axes without a choice are left out."""
        if tile in self._positions:
            return self._positions[tile]
        found = [self._kernels.index(tile.kernel) if tile.kernel in self._kernels else -1]
        for axis in self._axes:
            values = self._values.get(f"{tile.kernel}.{axis}", [])
            found.append(max(bisect_right(values, int(getattr(tile, axis))) - 1, 0))
        self._positions[tile] = found
        return found


def _key(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items()))
