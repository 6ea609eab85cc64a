from __future__ import annotations

import random

import pytest

from flashmoe.autotune.candidate import SDPA, Candidate
from flashmoe.autotune.decide import AGAIN, MIN_ROUNDS, decide, noise_floor
from flashmoe.tiles import Tile

DEFAULT, A, B, C = (
    Candidate.of_tile(Tile("cpu", m, n)) for m, n in ((64, 128), (128, 128), (192, 256), (256, 64))
)


def samples(
    true: dict[Candidate, float], rounds: int = 60, noise: float = 0.01, seed: int = 0
) -> dict[str, list[float]]:
    rng = random.Random(seed)

    def take(seconds: float) -> list[float]:
        return [seconds * (1 + abs(rng.gauss(0, noise))) for _ in range(rounds)]

    return {AGAIN: take(true[DEFAULT]), **{str(c): take(t) for c, t in true.items()}}


def test_a_faster_tile_wins() -> None:
    decision = decide(samples({DEFAULT: 1.0, A: 0.95}), DEFAULT, DEFAULT, [DEFAULT, A])
    assert decision.winner == A
    assert decision.changed
    assert "1.05" in decision.reason


def test_noise_alone_changes_nothing() -> None:
    equal = {DEFAULT: 1.0, A: 1.0, B: 1.0, C: 1.0, SDPA: 1.0}
    changed = [
        seed
        for seed in range(60)
        if decide(samples(equal, seed=seed), DEFAULT, DEFAULT, [A, B, C, SDPA]).changed
    ]
    assert len(changed) <= 1


@pytest.mark.parametrize("seed", range(20))
def test_a_slower_tile_never_wins(seed: int) -> None:
    true = {DEFAULT: 1.0, A: 1.01, B: 1.02, C: 1.05}
    taken = samples(true, noise=0.05, seed=seed, rounds=MIN_ROUNDS)
    assert decide(taken, DEFAULT, DEFAULT, [A, B, C]).winner == DEFAULT


def test_a_gain_within_the_noise_floor_is_a_tie() -> None:
    taken = samples({DEFAULT: 1.0, A: 0.98}, noise=0.0)
    assert decide(taken, DEFAULT, DEFAULT, [A]).winner == A
    # The default against itself differs by as much as the gain: then the gain proves nothing.
    taken[AGAIN] = [0.97] * len(taken[AGAIN])
    assert noise_floor(taken, DEFAULT) == pytest.approx(1 / 0.97 - 1)
    assert decide(taken, DEFAULT, DEFAULT, [A]).winner == DEFAULT


def test_the_noise_floor_counts_in_both_directions() -> None:
    taken = samples({DEFAULT: 1.0}, noise=0.0)
    taken[AGAIN] = [1.03] * len(taken[AGAIN])
    assert noise_floor(taken, DEFAULT) == pytest.approx(0.03)


def test_few_rounds_change_nothing() -> None:
    true = {DEFAULT: 1.0, A: 0.5}
    few = decide(samples(true, rounds=MIN_ROUNDS - 1), DEFAULT, DEFAULT, [A])
    assert few.winner == DEFAULT
    assert "too few" in few.reason
    assert decide(samples(true, rounds=MIN_ROUNDS), DEFAULT, DEFAULT, [A]).winner == A


def test_sdpa_wins_only_if_it_beats_every_tile() -> None:
    true = {DEFAULT: 1.0, A: 0.9, SDPA: 0.9}
    assert decide(samples(true), DEFAULT, DEFAULT, [A, SDPA]).winner == A
    assert decide(samples({**true, SDPA: 0.8}), DEFAULT, DEFAULT, [A, SDPA]).winner == SDPA


def test_what_is_stored_stays_until_beaten() -> None:
    true = {DEFAULT: 1.0, A: 0.9, B: 0.9, SDPA: 1.2}
    assert decide(samples(true), A, DEFAULT, [DEFAULT, B, SDPA]).winner == A
    assert decide(samples({**true, B: 0.8}), A, DEFAULT, [DEFAULT, B, SDPA]).winner == B


def test_the_default_takes_over_from_a_stored_tile_that_became_slower() -> None:
    decision = decide(samples({DEFAULT: 1.0, A: 1.2}), A, DEFAULT, [DEFAULT, A])
    assert (decision.winner, decision.base) == (DEFAULT, A)


def test_nothing_to_compare_keeps_the_base() -> None:
    decision = decide(samples({DEFAULT: 1.0}), DEFAULT, DEFAULT, [DEFAULT])
    assert not decision.changed


def test_sdpa_as_winner_tells_the_best_tile_too() -> None:
    true = {DEFAULT: 1.0, A: 0.9, SDPA: 0.8}
    for base in (DEFAULT, SDPA):
        decision = decide(samples(true), base, DEFAULT, [DEFAULT, A, SDPA])
        assert (decision.winner, decision.tile) == (SDPA, A)
    tie = decide(samples({**true, A: 1.0}), SDPA, DEFAULT, [DEFAULT, A, SDPA])
    assert (tie.winner, tie.tile) == (SDPA, DEFAULT)


def test_without_a_default_the_fastest_tile_is_the_best_tile() -> None:
    taken = samples({A: 1.2, B: 1.1, SDPA: 1.0, DEFAULT: 9.0})
    taken[AGAIN] = taken[str(SDPA)]
    decision = decide(taken, SDPA, SDPA, [A, B, SDPA])
    assert (decision.winner, decision.tile) == (SDPA, B)
