"""A recorded grid of tiles (benchmarks/record_grid.py), replayed as a simulated device.

A sample of a tile is the median of the tile's recorded ratio to the default times a recorded sample
of the default, times a residual that was drawn from what the tile itself showed: time and noise are
the recorded ones, and samples of one round share the drift of the recorded round.

    python tests/autotune/autotune_replay.py tests/autotune/grid-nvidia-h200.json.xz

prints, over 20 seeds, what the tuner chooses and evaluates, and what plain Optuna finds with as
many evaluations.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import optuna
from optuna.storages import InMemoryStorage

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.search.record import Record
from flashmoe.autotune.search.search import FINALISTS, Walk
from flashmoe.autotune.search.space import AXES, Space
from flashmoe.autotune.search.storage import open_study
from flashmoe.autotune.verdict import final
from flashmoe.machine.device import Arch
from flashmoe.measure.timing import Measurement
from flashmoe.spec.mask import causal_if
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile
from flashmoe.tiles import grid as tile_grid

SCHEMA = 2
# Of a grid's tiles, how many a search may evaluate.
SHARE = 0.25
PLAIN = {"TPE": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}


@dataclass(frozen=True)
class Grid:
    """One problem's recorded grid."""

    problem: Problem
    default: Tile
    # Seconds by candidate name; and of the default, in the same rounds.
    samples: Mapping[str, tuple[float, ...]]
    anchors: Mapping[str, tuple[float, ...]]
    # What spans the grid where it is not all that the tuner would try.
    axes: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def ratio(self) -> dict[str, float]:
        """The truth: every candidate's time over the default's, by medians over all its rounds."""
        return {n: median(self.samples[n]) / median(self.anchors[n]) for n in self.samples}

    @cached_property
    def residuals(self) -> dict[str, list[float]]:
        """What a round's ratio deviates from the truth by."""
        return {
            name: [x / a / self.ratio[name] for x, a in zip(xs, self.anchors[name], strict=True)]
            for name, xs in self.samples.items()
        }

    @cached_property
    def tiles(self) -> list[Tile]:
        return [Tile.parse(name) for name in self.samples if ":" in name]

    @property
    def best(self) -> float:
        """The ratio of the best tile."""
        return min(self.ratio[str(tile)] for tile in self.tiles)


def load(path: Path) -> list[Grid]:
    data = json.loads(lzma.decompress(path.read_bytes()))
    assert data["schema"] == SCHEMA
    # Where the time ran out, the last problem lacks tiles, perhaps its best ones.
    return [_grid(row) for row in data["problems"] if row["complete"]]


def _grid(row: Mapping[str, Any]) -> Grid:
    samples: dict[str, tuple[float, ...]] = {}
    anchors: dict[str, tuple[float, ...]] = {}
    for batch in row["batches"]:
        for name, microseconds in batch["tiles_us"].items():
            samples[name] = tuple(x * 1e-6 for x in microseconds)
            anchors[name] = tuple(x * 1e-6 for x in batch["anchor_us"])
    problem, default = Problem.from_json(row["problem"]), Tile.parse(row["default"])
    return Grid(problem, default, samples, anchors, row["axes"])


class ReplayBench:
    """A Bench over a Grid, with a clock of its own: `overhead` seconds are added to every sample,
    `compile_seconds` to every first check."""

    compiles_ahead = False
    compilers = 1
    fresh_seconds = 0.0
    process = 0

    def __init__(
        self, grid: Grid, seed: int, overhead: float = 5e-4, compile_seconds: float = 0.3
    ) -> None:
        self.grid = grid
        self._rng = random.Random(seed)
        self._overhead = overhead
        self._compile_seconds = compile_seconds
        self._clock = 0.0
        self.evaluated: list[str] = []
        self.samples_taken = 0

    def precompile(self, candidates: Sequence[Candidate]) -> None:
        pass

    def compiled(self, candidate: Candidate, until: float) -> bool:
        return True

    def prepare(self, candidate: Candidate) -> Measurement:
        name = str(candidate)
        if name not in self.evaluated:
            self.evaluated.append(name)
            self._clock += self._compile_seconds
        return Measurement("ok", (self._compile_seconds,))

    def verify(self, candidate: Candidate) -> Measurement:
        return Measurement("ok", (0.0,))

    def measure(
        self,
        candidates: Mapping[str, Candidate],
        *,
        rounds: int,
        warmup: int,
        max_seconds: float | None = None,
    ) -> dict[str, Measurement]:
        end = None if max_seconds is None else self._clock + max_seconds
        taken: dict[str, list[float]] = {name: [] for name in candidates}
        paces = self.grid.samples[str(self.grid.default)]
        recorded = {name: str(candidate) for name, candidate in candidates.items()}
        for _ in range(rounds + warmup):
            # One recorded sample of the default sets the pace of the round.
            pace = self._rng.choice(paces)
            for name, tile in recorded.items():
                residual = self._rng.choice(self.grid.residuals[tile])
                seconds = pace * self.grid.ratio[tile] * residual
                self._clock += seconds + self._overhead
                self.samples_taken += 1
                taken[name].append(seconds)
            if end is not None and self._clock >= end and len(taken[name]) > warmup:
                break
        return {name: Measurement("ok", tuple(x[warmup:])) for name, x in taken.items()}

    def refresh(self, candidates: Mapping[str, Candidate]) -> None:
        self.measure(candidates, rounds=1, warmup=0)

    def now(self) -> float:
        return self._clock

    def wait(self, seconds: float) -> None:
        self._clock += seconds

    def close(self) -> None:
        pass


# An H200, as far as legality goes.
HOPPER = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)


def synthetic(seed: int = 0) -> list[Grid]:
    """SYNTHETIC grids: the legal Triton tiles of six problems, with made-up times. Effects of every
    axis and of pairs of axes, most of them shared by all problems, and a little of each tile's own;
    noise of 1 % with a tail. They say nothing about a GPU."""
    rng = random.Random(seed)
    axes = {
        "block_m": (64, 128),
        "block_n": (32, 64, 128),
        "num_stages": (2, 3, 4),
        "num_warps": (4, 8),
        "tma": (False, True),
    }
    everything = tile_grid("triton", **axes)
    pairs = [(a, b) for a in axes for b in axes if a < b]

    def effects(scale: float) -> dict[Any, float]:
        found: dict[Any, float] = {
            (axis, value): rng.gauss(0, scale) for axis, values in axes.items() for value in values
        }
        for a, b in pairs:
            for x in axes[a]:
                for y in axes[b]:
                    found[a, x, b, y] = rng.gauss(0, scale / 2)
        return found

    def total(found: Mapping[Any, float], tile: Tile) -> float:
        single = sum(found[axis, getattr(tile, axis)] for axis in axes)
        return single + sum(found[a, getattr(tile, a), b, getattr(tile, b)] for a, b in pairs)

    shared = effects(0.08)
    grids = []
    for head_dim, seqlen, causal in (
        (64, 512, False), (64, 4096, True), (128, 1024, False), (128, 4096, False),
        (128, 4096, True), (64, 8192, False),
    ):  # fmt: skip
        problem = Problem(2, 16, 16, seqlen, seqlen, head_dim, "bfloat16", mask=causal_if(causal))
        own = effects(0.02)
        legal = [tile for tile in everything if not tile.violations(HOPPER, problem)]
        times = {
            tile: 1e-3 * math.exp(total(shared, tile) + total(own, tile) + rng.gauss(0, 0.01))
            for tile in legal
        }
        # The default is decent: at the upper third.
        default = sorted(legal, key=lambda tile: times[tile])[len(legal) // 3]
        samples = {}
        anchors = {}
        for tile in legal:
            drift = [1 + rng.gauss(0, 0.01) for _ in range(32)]
            samples[str(tile)] = tuple(times[tile] * d * _noise(rng) for d in drift)
            anchors[str(tile)] = tuple(times[default] * d * _noise(rng) for d in drift)
        grids.append(Grid(problem, default, samples, anchors))
    return grids


def _noise(rng: random.Random) -> float:
    return 1 + abs(rng.gauss(0, 0.01)) + (0.1 if rng.random() < 0.02 else 0.0)


@dataclass(frozen=True)
class Outcome:
    """What a search chose, as a ratio to the default's true time and to the best tile's, and what
    it evaluated: tiles, and samples of all kinds."""

    chosen: Tile
    over_default: float
    over_best: float
    tiles: int
    samples: int
    # Time over the default's of every tile that was tried.
    values: Mapping[Tile, float]


def ours(
    grid: Grid,
    seed: int,
    trials: int,
    first: Sequence[Tile] = (),
    sampler: str | None = None,
    related: Sequence[Mapping[Tile, float]] = (),
    prior: Mapping[Tile, float] | None = None,
) -> Outcome:
    """The tuner: search and final, as tune() runs them."""
    bench = ReplayBench(grid, seed)
    space = Space(grid.tiles)
    anchor = Candidate.of_tile(grid.default)
    record = Record(open_study(InMemoryStorage(), "replay", {}), space)
    known = [grid.default, *(tile for tile in first if tile in grid.tiles)]
    found = Walk(
        space,
        bench,
        anchor,
        known,
        record,
        seconds=1e6,
        trials=trials,
        seed=seed,
        sampler=sampler,
        related=related,
        prior=prior,
    ).run()
    held = final.hold(bench, anchor, None, found.contenders[:FINALISTS], 2e6)
    tile = held.decision.winner.tile
    assert tile is not None
    values = {t.tile: t.ratio.value for t in found.trials if t.ratio}
    return _outcome(grid, tile, bench, values)


def plain(grid: Grid, seed: int, trials: int, sampler: optuna.samplers.BaseSampler) -> Outcome:
    """study.optimize as one would write it: a categorical an axis, illegal combinations pruned (and
    not counted), the median of 15 samples, the best trial taken at its word."""
    bench = ReplayBench(grid, seed)
    legal = set(grid.tiles)
    values = {axis: sorted({getattr(t, axis) for t in legal}) for axis in ("kernel", *AXES)}
    fixed = {axis: found.pop() for axis, found in values.items() if len(found) == 1}

    def tile_of(params: Mapping[str, Any]) -> Tile:
        return Tile(**fixed, **params)

    def objective(trial: optuna.Trial) -> float:
        choices = {axis: found for axis, found in values.items() if found}
        tile = tile_of({axis: trial.suggest_categorical(axis, x) for axis, x in choices.items()})
        if tile not in legal:
            raise optuna.TrialPruned
        candidate = Candidate.of_tile(tile)
        bench.prepare(candidate)
        if len(bench.evaluated) >= trials:
            trial.study.stop()
        return median(bench.measure({"one": candidate}, rounds=15, warmup=1)["one"].samples)

    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=10 * trials)
    return _outcome(grid, tile_of(study.best_trial.params), bench)


def one_run(found: Sequence[Grid], seed: int) -> list[Outcome]:
    """The problems one after the other, each learning from those before it, as tune() does."""
    outcomes: list[Outcome] = []
    for grid in found:
        outcomes.append(
            ours(
                grid,
                seed,
                int(SHARE * len(grid.tiles)),
                first=[outcome.chosen for outcome in outcomes[::-1]],
                related=[outcome.values for outcome in outcomes[:-5:-1]],
            )
        )
    return outcomes


def beside(
    found: Sequence[Grid], runs: Sequence[Sequence[Outcome]], seeds: Sequence[int]
) -> dict[str, list[float]]:
    """For each of PLAIN how far from the best it ends, the median over `seeds`, with as many
    evaluations as the longest of our `runs` made; illegal tiles cost it nothing."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    most = [max(run[number].tiles for run in runs) for number in range(len(found))]
    return {
        name: [
            median(plain(grid, seed, trials, make(seed=seed)).over_best for seed in seeds)
            for grid, trials in zip(found, most, strict=True)
        ]
        for name, make in PLAIN.items()
    }


def _outcome(
    grid: Grid, tile: Tile, bench: ReplayBench, values: Mapping[Tile, float] | None = None
) -> Outcome:
    ratio = grid.ratio[str(tile)]
    # The default was recorded as a candidate, too: next to itself it is not quite 1.
    over_default = ratio / grid.ratio[str(grid.default)]
    return Outcome(
        tile,
        over_default,
        ratio / grid.best,
        len(bench.evaluated),
        bench.samples_taken,
        values or {},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    found, seeds = load(arguments.grid), range(arguments.seeds)
    runs = [one_run(found, seed) for seed in seeds]
    theirs = beside(found, runs, seeds)
    titles = ("problem", "tiles", "evaluated", "over the best", "over the default", *PLAIN)
    print("|", " | ".join(titles), "|")
    print("|---" * len(titles) + "|")
    for number, grid in enumerate(found):
        mine = [run[number] for run in runs]
        tiles = [outcome.tiles for outcome in mine]
        over_best = [outcome.over_best for outcome in mine]
        cells = (
            grid.problem.label,
            len(grid.tiles),
            f"{median(tiles):.0f}, at most {max(tiles)}",
            f"{median(over_best):.4f}, at most {max(over_best):.4f}",
            f"{median(outcome.over_default for outcome in mine):.4f}",
            *(f"{theirs[name][number]:.4f}" for name in PLAIN),
        )
        print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
