"""The search on recorded grids: how near the best it comes with a quarter of the evaluations."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import optuna
import pytest
from autotune_replay import Grid, Outcome, load, ours, plain, synthetic

RECORDED = {path.stem: path for path in sorted(Path(__file__).parent.glob("grid-nvidia-*.json"))}
SEEDS = range(20)
SHARE = 0.25


def grids(which: str) -> list[Grid]:
    if which == "synthetic":
        return synthetic()
    if which not in RECORDED:
        pytest.skip("no grid was recorded yet (benchmarks/record_grid.py)")
    return load(RECORDED[which])


def one_run(found: list[Grid], seed: int) -> list[Outcome]:
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


@pytest.mark.parametrize("which", ["synthetic", *(RECORDED or ["recorded"])])
def test_a_quarter_of_the_grid_finds_the_best(which: str) -> None:
    found = grids(which)
    runs = [one_run(found, seed) for seed in SEEDS]
    for number, grid in enumerate(found):
        mine = [run[number] for run in runs]
        assert max(outcome.tiles for outcome in mine) <= SHARE * len(grid.tiles)
        assert median(outcome.over_best for outcome in mine) <= 1.01, grid.problem.label
    # Never worse than the default: what the final cannot tell apart stays as it was.
    assert max(outcome.over_default for run in runs for outcome in run) <= 1.0
    _agreement(runs)
    _beside(
        found, [median(x.over_best for x in (run[n] for run in runs)) for n in range(len(found))]
    )


def _agreement(runs: list[list[Outcome]]) -> None:
    """Two independent runs choose tiles within 1 % of one another in 95 % of problems."""
    pairs = [
        abs(a.over_default / b.over_default - 1) <= 0.01
        for one, two in zip(runs[::2], runs[1::2], strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    assert sum(pairs) >= 0.95 * len(pairs)


def _beside(found: list[Grid], mine: list[float]) -> None:
    """Plain Optuna with as many evaluations is not nearer to the best."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for make in (optuna.samplers.TPESampler, optuna.samplers.RandomSampler):
        theirs = [
            median(
                plain(grid, seed, int(SHARE * len(grid.tiles)), make(seed=seed)).over_best
                for seed in SEEDS
            )
            for grid in found
        ]
        assert sum(mine) <= sum(theirs)
