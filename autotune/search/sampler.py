"""Optuna's samplers, confined to legal tiles that nobody tried yet."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    GridSampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from flashmoe.autotune.search.model import promising
from flashmoe.autotune.search.space import Space
from flashmoe.tiles import Tile

# A TPE that starts learning after so many trials; Optuna's 10 are a quarter of a small space.
_STARTUP_TRIALS = 6
# Of the model's proposals, one in so many does not believe what related problems showed: where this
# one is of another kind, they would keep the search where its best tile is not.
_DOUBT_EVERY = 6


class ModelSampler(RandomSampler):
    """The tuner's own: not asked for parameters, but for the tile that `promising` names."""


class ExhaustiveSampler(RandomSampler):
    """Any order will do where every tile is asked for once. Optuna 5.0's BruteForceSampler raises
    ValueError once a trial's process died between two of its parameters."""


_MAKERS: dict[str, Callable[[Space, int], BaseSampler]] = {
    "model": lambda space, seed: ModelSampler(seed=seed),
    "brute": lambda space, seed: ExhaustiveSampler(seed=seed),
    "tpe": lambda space, seed: TPESampler(
        seed=seed, n_startup_trials=_STARTUP_TRIALS, multivariate=True, group=True
    ),
    "random": lambda space, seed: RandomSampler(seed=seed),
    "gp": lambda space, seed: GPSampler(seed=seed, n_startup_trials=_STARTUP_TRIALS),
    "grid": lambda space, seed: GridSampler(space.grid(), seed=seed),
}
SAMPLERS = tuple(_MAKERS)


class TileSampler(BaseSampler):
    """Asks the sampler `name` and takes the nearest tile of `space` that is not in `taken()`.

    What is suggested is therefore legal and new, whatever the sampler proposes; a proposal of the
    best tile so far becomes a step away from it. The tiles `first` come before any proposal.
    `related` are times over the default's in other problems, which `model` learns from.
    """

    def __init__(
        self,
        name: str,
        space: Space,
        first: Sequence[Tile],
        taken: Callable[[], Collection[Tile]],
        seed: int,
        related: Sequence[Mapping[Tile, float]] = (),
    ) -> None:
        self._related = related
        with warnings.catch_warnings():
            # GP and TPE's group are marked experimental.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._inner = _MAKERS[name](space, seed)
        self.name = type(self._inner).__name__
        self._space = space
        self._first = list(first)
        self._taken = taken
        self._rng = random.Random(seed)

    def reseed_rng(self) -> None:
        self._inner.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._space.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        taken = self._taken()
        tile = next((tile for tile in self._first if tile not in taken), None)
        if tile is None and isinstance(self._inner, ModelSampler):
            tile = self._model(study, trial, taken)
        if tile is None:
            proposal = self._propose(study, trial)
            tile = self._space.nearest(proposal, taken, self._rng)
        return self._space.params(tile)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        # Grid stops the study here once it is through, which only
        # study.optimize allows; the others only keep constraints, of which there are none.
        pass

    def _model(self, study: Study, trial: FrozenTrial, taken: Collection[Tile]) -> Tile | None:
        """The most promising free tile; None where nothing is known or nothing is free."""
        known: dict[Tile, float] = {}
        in_flight: list[Tile] = []
        for other in study.get_trials(deepcopy=False):
            tile = self._space.tile_of(other.params)
            if tile is None or other.number == trial.number:
                continue
            if other.value is not None:
                known[tile] = other.value
            elif other.state == TrialState.RUNNING:
                in_flight.append(tile)
        if not (known or self._related):
            return None
        asked = len(known) + len(in_flight)
        believes = not known or asked % _DOUBT_EVERY < _DOUBT_EVERY - 1
        related = self._related if believes else ()
        return promising(self._space, known, in_flight, related, taken)

    def _propose(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        """The inner sampler's parameters, those that it relates to each other first."""
        inner_space = self._inner.infer_relative_search_space(study, trial)
        proposal = dict(self._inner.sample_relative(study, trial, inner_space))
        distributions = self._space.distributions()
        # As stored: before_trial may have noted something there.
        partial = copy.copy(study._storage.get_trial(trial._trial_id))
        for name in self._space.names(proposal):
            if name not in proposal:
                partial.params = {k: v for k, v in proposal.items() if k in distributions}
                partial.distributions = {k: distributions[k] for k in partial.params}
                proposal[name] = self._inner.sample_independent(
                    study, partial, name, distributions[name]
                )
        return proposal
