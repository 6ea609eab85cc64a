from __future__ import annotations

import optuna
import pytest
from autotune_simulated import GRID, PROBLEM

from flashmoe.autotune.space import Candidate, Space, searched_backends
from flashmoe.tiles import Tile, grid

RAGGED = [
    *(t for t in grid("sm80", block_m=(64, 128), block_n=(32, 64, 128), num_stages=(1, 2))),
    Tile("sm80", 256, 64, 1, 8),
    Tile("triton", 128, 64, 3, 8),
    Tile("triton", 64, 128, 2, 4, tma=True),
    Tile("triton", 64, 128, 2, 4),
]


@pytest.mark.parametrize("tiles", [GRID, RAGGED], ids=["product", "ragged"])
def test_params_name_the_tile_that_suggest_returns(tiles: list[Tile]) -> None:
    space = Space(tiles)
    study = optuna.create_study()
    for tile in tiles:
        study.enqueue_trial(space.params(tile))
        trial = study.ask()
        assert space.suggest(trial) == tile
        study.tell(trial, 1.0)


def test_whatever_is_suggested_is_in_the_space() -> None:
    space = Space(RAGGED)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    seen = set()
    for _ in range(300):
        trial = study.ask()
        seen.add(space.suggest(trial))
        study.tell(trial, 1.0)
    assert seen == set(RAGGED)


def test_parameters_carry_the_names_and_values_of_the_field() -> None:
    assert Space(RAGGED).params(RAGGED[-1]) == {
        "kernel": "triton",
        "triton.block_m": 64,
        "triton.block_n": 128,
        "triton.num_stages": 2,
        "triton.num_warps": 4,
        "triton.tma": False,
    }
    # An axis without a choice is no parameter.
    assert Space(GRID).params(Tile("cpu", 96, 512)) == {"cpu.block_m": 96, "cpu.block_n": 512}


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tile"):
        Space([])


def test_candidates_are_named_as_on_the_command_line() -> None:
    assert str(Candidate.of_tile(Tile("sm80", 128, 64, 2, 4))) == "sm80:128x64-stages2-warps4"
    assert Candidate.of_tile(Tile("sm80", 128, 64, 2, 4)).backend == "cuda"
    assert str(Candidate("sdpa")) == "sdpa"


def test_only_backends_with_tiles_are_searched() -> None:
    import torch

    assert searched_backends(PROBLEM, torch.device("cpu"), None) == ["cpu"]
    assert searched_backends(PROBLEM, torch.device("cpu"), "cuda") == []
