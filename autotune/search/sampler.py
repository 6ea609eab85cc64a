"""Chooses the next tile that a study tries: legal, and not tried before."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from flashmoe.autotune.search.model import Model
from flashmoe.autotune.search.space import Space
from flashmoe.tiles import Tile

# model: the tile that promises the most by what is known. brute: all tiles, in any order, those
# that are predicted to be fast first.
SAMPLERS = ("model", "brute")
# Of the model's proposals, one in so many does not believe what related problems showed: where this
# one is of another kind, they would keep the search where its best tile is not.
_DOUBT_EVERY = 6


@dataclass(eq=False)
class TileSampler(BaseSampler):
    """Asks for a tile of `space` that is not in `taken()`: first those of `first`, then by `name`,
    one of SAMPLERS. `prior` and `related` as Model takes them."""

    name: str
    space: Space
    first: Sequence[Tile]
    taken: Callable[[], Collection[Tile]]
    seed: int
    related: Sequence[Mapping[Tile, float]] = ()
    prior: Mapping[Tile, float] | None = None

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._models: dict[bool, Model] = {}

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self.space.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        taken = self.taken()
        tile = next((tile for tile in self.first if tile not in taken), None)
        if tile is None and self.name == "model":
            tile = self._model(study, trial, taken)
        if tile is None:
            free = [tile for tile in self.space.tiles if tile not in taken] or self.space.tiles
            prior = self.prior or {}
            tile = min(free, key=lambda tile: (prior.get(tile, 0.0), self._rng.random()))
        return self.space.params(tile)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        raise AssertionError(f"{param_name} is a parameter of another kernel")

    def _model(self, study: Study, trial: FrozenTrial, taken: Collection[Tile]) -> Tile | None:
        """The most promising free tile; None where nothing is known or nothing is free."""
        known: dict[Tile, float] = {}
        in_flight: list[Tile] = []
        for other in study.get_trials(deepcopy=False):
            tile = self.space.tile_of(other.params)
            if tile is None or other.number == trial.number:
                continue
            if other.value is not None:
                known[tile] = other.value
            elif other.state == TrialState.RUNNING:
                in_flight.append(tile)
        if not (known or self.related):
            return None
        asked = len(known) + len(in_flight)
        believes = not known or asked % _DOUBT_EVERY < _DOUBT_EVERY - 1
        if believes not in self._models:
            related = self.related if believes else ()
            self._models[believes] = Model(self.space, related, self.prior)
        return self._models[believes].promising(known, in_flight, taken)
