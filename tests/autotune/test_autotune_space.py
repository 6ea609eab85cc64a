from __future__ import annotations

import math
import random
import statistics

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
def test_the_model_promises_the_largest_expected_improvement(data: st.DataObject) -> None:
    """Against the formulas of a Gaussian process, tile by tile."""
    space = Space(RAGGED)
    strangers = [Tile("sm80", 96, 48), Tile("triton", 32, 16, 3, 8)]
    times = st.floats(0.5, 2.0)
    known = data.draw(st.dictionaries(st.sampled_from(RAGGED), times, min_size=4, max_size=8))
    other = st.dictionaries(st.sampled_from([*RAGGED, *strangers]), times, max_size=6)
    related = data.draw(st.lists(other, max_size=2))
    prior = data.draw(st.dictionaries(st.sampled_from(RAGGED), st.floats(-1.0, 1.0)))
    rest = [tile for tile in RAGGED if tile not in known]
    in_flight = data.draw(st.lists(st.sampled_from(rest), max_size=2, unique=True))
    logs = [{t: math.log(x) - prior.get(t, 0.0) for t, x in known.items()}]
    logs += [{t: math.log(x) for t, x in found.items()} for found in related]
    points = [
        (t, n, x - sum(f.values()) / len(f)) for n, f in enumerate(logs) for t, x in f.items()
    ]
    level = sum(logs[0].values()) / len(logs[0])
    y = np.array([x for *_, x in points])
    spread = max(float(y.std()), 1e-3)

    def covariance(a: tuple[Tile, int], b: tuple[Tile, int]) -> float:
        one, two = (np.array([space.position(t)], dtype=np.float64) for t in (a[0], b[0]))
        return float(model._kernel(one, two)[0, 0]) * (1.0 if a[1] == b[1] else model._RELATED)

    def gram(keys: list[tuple[Tile, int]]) -> np.ndarray:  # type: ignore[type-arg]
        return np.array([[covariance(a, b) + (a == b) * model._NOISE for b in keys] for a in keys])

    keys = [(t, n) for t, n, _ in points]
    every = [*keys, *((t, 0) for t in in_flight)]
    of_known, of_every = np.linalg.inv(gram(keys)), np.linalg.inv(gram(every))

    def mean(tile: Tile) -> float:
        across = np.array([covariance((tile, 0), key) for key in keys])
        return float(across @ of_known @ y) + level + prior.get(tile, 0.0)

    best = min([*map(math.log, known.values()), *map(mean, in_flight)])

    def improvement(tile: Tile) -> float:
        across = np.array([covariance((tile, 0), key) for key in every])
        deviation = spread * math.sqrt(max(1.0 - float(across @ of_every @ across), 1e-9))
        z = (best - mean(tile)) / deviation
        density = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        return deviation * (z * statistics.NormalDist().cdf(z) + density)

    taken = {*known, *in_flight}
    chosen = model.Model(space, related, prior).promising(known, in_flight, taken)
    gains = {tile: improvement(tile) for tile in RAGGED if tile not in taken}
    assert chosen is not None
    assert gains[chosen] == pytest.approx(max(gains.values()), rel=1e-6, abs=1e-9)


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
    predicted = model.Model(space, (), prior)
    assert predicted.promising(known, [], known) == GRID[7]
    # The measured times say how far predictions are off; the same is expected of other tiles.
    assert predicted.promising(known | {GRID[7]: 1.4}, [], {GRID[7], *known})
    assert asked("model", GRID, [], 1) != [GRID[7]]
    taken: list[Tile] = []
    for name in SAMPLERS:
        sampler = TileSampler(name, space, [], lambda: taken, 3, (), prior)
        study = optuna.create_study(sampler=sampler)
        assert space.suggest(study.ask()) == GRID[7]


def test_neighbours_are_one_step_along_one_axis() -> None:
    space = Space(GRID)
    here = space.position(Tile("cpu", 32, 128))
    steps = {t for t in GRID if math.dist(space.position(t), here) == 1}
    assert steps == {Tile("cpu", 64, 128), Tile("cpu", 32, 64), Tile("cpu", 32, 256)}


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
