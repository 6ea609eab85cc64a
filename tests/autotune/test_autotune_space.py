from __future__ import annotations

import random

import numpy as np
import optuna
import pytest
import torch
from autotune_simulated import GRID, PROBLEM
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.autotune.running.candidate import Candidate, legality, searched_backends
from flashmoe.autotune.search import model
from flashmoe.autotune.search.sampler import SAMPLERS, TileSampler
from flashmoe.autotune.search.space import Space
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import Arch
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile, grid

RAGGED = [
    *(t for t in grid("sm80", block_m=(64, 128), block_n=(32, 64, 128), num_stages=(1, 2))),
    Tile("sm80", 256, 64, 1, 8),
    Tile("triton", 128, 64, 3, 8),
    Tile("triton", 64, 128, 2, 4, tma=True),
    Tile("triton", 64, 128, 2, 4),
]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_model_knows_after_any_steps_what_it_would_know_at_once(data: st.DataObject) -> None:
    """Against the formulas of a Gaussian process, points coming and going."""
    space = Space(RAGGED)
    strangers = [Tile("sm80", 96, 48), Tile("triton", 32, 16, 3, 8)]
    points = st.tuples(st.sampled_from([*RAGGED, *strangers]), st.integers(0, 2))
    seen = model._Seen(space)
    everything = seen._positions(space.tiles)
    for _ in range(3):
        now = data.draw(st.lists(points, max_size=8, unique=True))
        seen.update(now)
        seen.update(more := [*now, *data.draw(st.lists(points, max_size=3))])
        more = list(dict.fromkeys(more))
        here = seen._positions([tile for tile, _ in more])
        task = np.array([task for _, task in more], dtype=np.int64)
        gram = model._kernel(here, here) * model._between(task, task)
        gram += model._NOISE * np.eye(len(more))
        cross = model._kernel(everything, here) * model._between(np.zeros(1, np.int64), task)
        told = data.draw(st.integers(0, len(more)))
        values = np.linspace(-1.0, 2.0, told)
        explained = np.einsum("ij,ij->i", cross, cross @ np.linalg.inv(gram))
        mean = cross[:, :told] @ np.linalg.solve(gram[:told, :told], values)
        np.testing.assert_allclose(seen.explained, explained, atol=1e-8)
        np.testing.assert_allclose(seen.mean(more[:told], values), mean, atol=1e-8)


def asked(name: str, tiles: list[Tile], first: list[Tile], count: int) -> list[Tile]:
    """What a study asks for, one tile after the other, told values that grow."""
    space = Space(tiles)
    taken: list[Tile] = []
    study = optuna.create_study(sampler=TileSampler(name, space, first, lambda: taken, seed=3))
    for number in range(count):
        trial = study.ask()
        taken.append(space.suggest(trial))
        assert space.tile_of(trial.params) == taken[-1]
        study.tell(trial, number + 1.0)
    return taken


@pytest.mark.parametrize("tiles", [GRID, RAGGED], ids=["product", "ragged"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_asks_for_every_legal_tile_once(name: str, tiles: list[Tile]) -> None:
    found = asked(name, tiles, [], len(tiles))
    assert len(found) == len(set(found)) == len(tiles)
    assert set(found) == set(tiles)


def test_known_good_tiles_come_first() -> None:
    first = [RAGGED[5], RAGGED[-1], RAGGED[0]]
    assert asked("brute", RAGGED, first, 4)[:3] == first


def test_what_is_predicted_is_where_the_model_begins() -> None:
    """Without predictions the best known tile's neighbours promise the most."""
    space = Space(GRID)
    prior = dict.fromkeys(GRID, 0.5) | {GRID[7]: -0.5}
    known = {GRID[20]: 1.0, GRID[21]: 1.0}
    assert model.promising(space, known, [], (), known, prior) == GRID[7]
    # What was measured tells how times deviate from predictions, which the others then do, too.
    assert model.promising(space, known | {GRID[7]: 1.4}, [], (), {GRID[7], *known}, prior)
    assert asked("model", GRID, [], 1) != [GRID[7]]
    taken: list[Tile] = []
    for name in SAMPLERS:
        sampler = TileSampler(name, space, [], lambda: taken, 3, (), prior)
        study = optuna.create_study(sampler=sampler)
        assert space.suggest(study.ask()) == GRID[7]


def test_neighbours_are_one_step_along_one_axis() -> None:
    steps = set(Space(GRID).neighbours(Tile("cpu", 32, 128)))
    assert steps == {
        ("block_m", Tile("cpu", 64, 128)),
        ("block_n", Tile("cpu", 32, 64)),
        ("block_n", Tile("cpu", 32, 256)),
    }


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


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_every_tile_that_is_considered_is_legal_or_has_its_reason(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    h200 = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
    problem = Problem(1, 8, 8, 1024, 1024, 128, "bfloat16")
    monkeypatch.setattr("flashmoe.autotune.running.candidate.arch", lambda _: h200)
    monkeypatch.setattr("flashmoe.backends.jit.unavailable", lambda: "")
    monkeypatch.setattr(
        "flashmoe.backends.cuda._compiled_in", lambda *_: [Tile.parse("sm90:128x128-stages2-q1")]
    )
    found = legality(problem, torch.device("cuda"), [backend])
    tiles = BACKENDS[backend].tiles(problem, h200)
    assert found.legal == len(set(tiles))
    assert found.considered == found.legal + sum(found.reasons.values())
    assert "" not in found.reasons
    reasons = BACKENDS[backend].reasons(problem, h200)  # type: ignore[attr-defined]
    for tile in random.Random(0).sample(list(reasons), 60):
        broken = tile.violations(h200, problem)
        assert reasons[tile] == (broken[0] if broken else "")
