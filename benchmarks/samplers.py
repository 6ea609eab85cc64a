"""Which sampler finds the best tile with the fewest tried: the tuner's model, the order of the
predicted times, and Optuna's own, on recorded grids (tests/autotune/grid-*.json.xz).

    python benchmarks/samplers.py tests/autotune/grid-nvidia-h200.json.xz

A sampler proposes tiles in batches of six, as the tuner does: what is proposed is told when the
batch is complete. A tile's value is the median of eight recorded rounds, drawn by the seed; every
sampler begins with the default. Optuna's see a tile as its position on each axis, and the free
tile nearest to what they propose is tried. The regret is the time of the best of the three that
measured best (as many as come into the tuner's final) over the grid's best, minus 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import optuna
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "autotune"))

from autotune_replay import HOPPER, Grid, load

from flashmoe.autotune.search.model import Model
from flashmoe.autotune.search.search import BATCH, FINALISTS
from flashmoe.autotune.search.space import Space
from flashmoe.prediction.costs import tile_microseconds
from flashmoe.tiles import Tile

TRIED = (20, 40, 80)
ROUNDS = 8

# Proposes the next tile: of what is known and in flight.
Values = dict[Tile, float]
Propose = Callable[[Values, Sequence[Tile]], Tile]


def predicted(grid: Grid) -> Values:
    """Logarithms of the predicted times over the default's, as the tuner has them."""

    def microseconds(tile: Tile) -> float | None:
        return tile_microseconds(tile, grid.problem.head_dim, grid.problem, HOPPER)

    base = microseconds(grid.default)
    times = {tile: microseconds(tile) for tile in grid.tiles if tile.backend == "cuda"}
    return {tile: float(np.log(us / base)) for tile, us in times.items() if us and base}


def model(grid: Grid, space: Space, seed: int, prior: Values) -> Propose:
    """The tuner's."""
    known_so_far = Model(space, (), prior)

    def propose(known: Values, in_flight: Sequence[Tile]) -> Tile:
        tile = known_so_far.promising(known, in_flight, {*known, *in_flight})
        assert tile is not None
        return tile

    return propose


def ordered(grid: Grid, space: Space, seed: int, prior: Values) -> Propose:
    """Those that are predicted to be fastest first; in any order where nothing is predicted."""
    rng = random.Random(seed)
    order = sorted(space.tiles, key=lambda tile: (prior.get(tile, 0.0), rng.random()))
    return lambda known, in_flight: next(t for t in order if t not in known and t not in in_flight)


def neighbours(grid: Grid, space: Space, seed: int, prior: Values) -> Propose:
    """A free tile one step from the fastest that has one; half of a batch at random."""
    by_chance = ordered(grid, space, seed, {})

    def one_step(a: Tile, b: Tile) -> bool:
        steps = np.abs(np.subtract(space.position(a), space.position(b)))
        return a.kernel == b.kernel and steps.sum() == 1

    def propose(known: Values, in_flight: Sequence[Tile]) -> Tile:
        if len(in_flight) % 2 == 0:
            for best in sorted(known, key=known.__getitem__):
                for tile in space.tiles:
                    if one_step(tile, best) and tile not in known and tile not in in_flight:
                        return tile
        return by_chance(known, in_flight)

    return propose


class Nearest(BaseSampler):
    """What `inner` proposes, moved to the nearest free position."""

    def __init__(self, inner: BaseSampler, positions: np.ndarray[Any, Any], seed: int) -> None:
        self.inner = inner
        self.rng = np.random.default_rng(seed)
        self.positions = positions
        self.free = np.ones(len(positions), dtype=bool)
        self.axes = {
            str(axis): IntDistribution(0, int(high))
            for axis, high in enumerate(positions.max(axis=0))
            if high > 0
        }

    def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
        return self.axes

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        inner = self.inner
        space = inner.infer_relative_search_space(study, trial)
        found = inner.sample_relative(study, trial, space)
        for name, axis in self.axes.items():
            if name not in found:
                found[name] = inner.sample_independent(study, trial, name, axis)
        axes = [int(name) for name in self.axes]
        away = np.abs(self.positions[:, axes] - [found[name] for name in self.axes]).sum(axis=1)
        away = away + 0.5 * self.rng.random(len(away))  # of equally near ones any
        index = int(np.argmin(np.where(self.free, away, np.inf)))
        return {name: int(self.positions[index, int(name)]) for name in self.axes}

    def sample_independent(self, *_: Any) -> Any:
        raise AssertionError

    def before_trial(self, study: Any, trial: Any) -> None:
        self.inner.before_trial(study, trial)


def optunas(make: Callable[..., BaseSampler], start: int = 0) -> Any:
    """One of Optuna's samplers, after the first `start` in the order that is predicted."""

    def begin(grid: Grid, space: Space, seed: int, prior: Values) -> Propose:
        positions = np.array([space.position(tile) for tile in space.tiles])
        sampler = Nearest(make(seed=seed), positions, seed)
        study = optuna.create_study(sampler=sampler)
        trials: dict[Tile, optuna.Trial] = {}
        first = ordered(grid, space, seed, prior)

        def propose(known: Values, in_flight: Sequence[Tile]) -> Tile:
            for tile, value in known.items():
                if tile not in trials:
                    study.enqueue_trial(params(tile))
                    trials[tile] = study.ask(sampler.axes)
                if trials[tile].number >= 0 and not done(study, trials[tile]):
                    study.tell(trials[tile], value)
            if start > len(known) + len(in_flight):
                study.enqueue_trial(params(first(known, in_flight)))
            trial = study.ask(sampler.axes)
            tile = at[tuple(trial.params[name] for name in sampler.axes)]
            trials[tile] = trial
            sampler.free[space.tiles.index(tile)] = False
            return tile

        def params(tile: Tile) -> dict[str, int]:
            sampler.free[space.tiles.index(tile)] = False
            return {name: space.position(tile)[int(name)] for name in sampler.axes}

        at = {
            tuple(space.position(tile)[int(name)] for name in sampler.axes): tile
            for tile in space.tiles
        }
        return propose

    return begin


def done(study: optuna.Study, trial: optuna.Trial) -> bool:
    found: TrialState = study._storage.get_trial(trial._trial_id).state
    return found.is_finished()


TPE = partial(TPESampler, multivariate=True, group=True)
# Whether it knows predictions, and what it is.
SAMPLERS: dict[str, tuple[bool, Any]] = {
    "model, predicted": (True, model),
    "predicted order": (True, ordered),
    "TPE after 20 in predicted order": (True, optunas(TPE, 20)),
    "GP after 20 in predicted order": (True, optunas(partial(GPSampler, n_startup_trials=1), 20)),
    "model": (False, model),
    "GP": (False, optunas(GPSampler)),
    "TPE, multivariate": (False, optunas(TPE)),
    "neighbours of the best": (False, neighbours),
    "random": (False, optunas(RandomSampler)),
}


def values(grid: Grid, tiles: Sequence[Tile], rng: random.Random) -> Iterator[tuple[Tile, float]]:
    for tile in tiles:
        residuals = grid.residuals[str(tile)]
        yield tile, grid.ratio[str(tile)] * median(rng.choice(residuals) for _ in range(ROUNDS))


def regrets(grid: Grid, begin: Any, prior: Values, seed: int, cold: bool) -> list[float]:
    """After each of TRIED; `cold` begins with any tile."""
    rng = random.Random(seed)
    propose = begin(grid, Space(grid.tiles), seed, prior)
    known = dict(values(grid, [rng.choice(grid.tiles) if cold else grid.default], rng))
    found = []
    for tried in TRIED:
        tried = min(tried, len(grid.tiles))
        while len(known) < tried:
            batch: list[Tile] = []
            while len(batch) < min(BATCH, tried - len(known)):
                batch.append(propose(known, batch))
            known |= values(grid, batch, rng)
        final = sorted(known, key=known.__getitem__)[:FINALISTS]
        found.append(min(grid.ratio[str(tile)] for tile in final) / grid.best - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grids", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--cold", action="store_true", help="begin with any tile, not the default")
    parser.add_argument("--samplers", nargs="*", default=list(SAMPLERS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    grids = [grid for path in arguments.grids for grid in load(path)]
    priors = [predicted(grid) for grid in grids]
    print(f"{len(grids)} grids, {arguments.seeds} seeds")
    print("| sampler |", " | ".join(f"{n}: mean, worst, within 1 %" for n in TRIED), "|")
    print("|---" * (len(TRIED) + 1) + "|")
    for name in arguments.samplers:
        knows, begin = SAMPLERS[name]
        # [grid][seed][tried]
        found = np.array(
            [
                [
                    regrets(g, begin, p if knows else {}, s, arguments.cold)
                    for s in range(arguments.seeds)
                ]
                for g, p in zip(grids, priors, strict=True)
            ]
        )
        cells = []
        for at in range(len(TRIED)):
            here = found[:, :, at]
            spread = here.mean(axis=0).std(ddof=1) if arguments.seeds > 1 else 0.0
            near = fmean((here <= 0.01).mean(axis=1)) * len(grids)
            cells.append(
                f"{here.mean():.2%} ±{spread:.2%}, {here.max():.1%}, {near:.1f} of {len(grids)}"
            )
        print("|", name, "|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
