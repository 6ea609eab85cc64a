from __future__ import annotations

import numpy as np
import pytest

from flashmoe.autotune.running.candidate import SDPA, Candidate
from flashmoe.autotune.verdict.decide import AGAIN, MIN_GAIN, MIN_ROUNDS, decide, noise_floor
from flashmoe.tiles import Tile

DEFAULT, A, B, C = (
    Candidate.of_tile(Tile("cpu", m, n)) for m, n in ((64, 128), (128, 128), (192, 256), (256, 64))
)


def samples(
    true: dict[Candidate, float],
    rounds: int = 60,
    noise: float = 0.01,
    seed: int = 0,
    *,
    processes: int = 2,
    effect: float = 0.0,
) -> dict[str, np.ndarray]:
    """A final of so many `rounds`, all `processes` together. Noise only ever adds time to a round;
    a process is at odds with the next by `effect` for every candidate by itself."""
    rng = np.random.default_rng(seed)
    levels = {str(c): s * np.exp(effect * rng.standard_normal(processes)) for c, s in true.items()}
    levels[AGAIN] = levels[str(DEFAULT)]
    each = -(-rounds // processes)
    return {
        name: level[:, None] * (1 + abs(noise * rng.standard_normal((processes, each))))
        for name, level in levels.items()
    }


def test_a_faster_tile_wins() -> None:
    decision = decide(samples({DEFAULT: 1.0, A: 0.95}), DEFAULT, DEFAULT, [DEFAULT, A])
    assert decision.winner == A
    assert decision.changed
    assert "1.05" in decision.reason


def changed(true: dict[Candidate, float], finals: int, **conditions: float) -> list[Candidate]:
    """What replaced the default in so many simulated finals."""
    decisions = (
        decide(samples(true, seed=seed, **conditions), DEFAULT, DEFAULT, list(true))  # type: ignore[arg-type]
        for seed in range(finals)
    )
    return [decision.winner for decision in decisions if decision.changed]


# What a process does to a tile, and a round to a time.
EFFECTS, NOISE = (0.0, 0.0005, 0.001, 0.002), (0.002, 0.02)
EQUAL = {DEFAULT: 1.0, A: 1.0, B: 1.0, C: 1.0, SDPA: 1.0}
FASTER = {**dict.fromkeys(EQUAL, 1.02), A: 1.0}


@pytest.mark.parametrize("effect", EFFECTS)
def test_what_processes_differ_by_changes_nothing(effect: float) -> None:
    """Where rounds of two processes count as if independent, 0, 9, 31 and 42 of 100 do."""
    assert len(changed(EQUAL, 100, rounds=300, noise=0.005, effect=effect)) <= 1


@pytest.mark.parametrize("effect", EFFECTS)
def test_a_gain_of_two_percent_is_found(effect: float) -> None:
    assert changed(FASTER, 50, rounds=300, noise=0.005, effect=effect).count(A) >= 47


@pytest.mark.long
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("effect", EFFECTS[2:])
@pytest.mark.parametrize("processes", [1, 2])
def test_finals_are_seldom_wrong_and_seldom_miss(
    processes: int, effect: float, noise: float
) -> None:
    conditions = {"rounds": 300, "processes": processes, "effect": effect, "noise": noise}
    assert len(changed(EQUAL, 500, **conditions)) <= 5
    assert changed(FASTER, 200, **conditions).count(A) >= 190


def test_what_differs_by_less_than_half_a_percent_is_not_different() -> None:
    """Not even where many processes prove it."""
    for gain, wins in ((0.9 * MIN_GAIN, False), (1.5 * MIN_GAIN, True)):
        taken = samples({DEFAULT: 1 + gain, A: 1.0}, rounds=1600, noise=0.001, processes=16)
        assert decide(taken, DEFAULT, DEFAULT, [A]).changed is wins


def test_one_process_that_is_at_odds_with_the_other_changes_nothing() -> None:
    taken = samples({DEFAULT: 1.0, A: 1.0}, rounds=300, noise=0.002)
    taken[str(A)][0] *= 0.96
    assert not decide(taken, DEFAULT, DEFAULT, [A]).changed


@pytest.mark.parametrize("seed", range(20))
def test_a_slower_tile_never_wins(seed: int) -> None:
    true = {DEFAULT: 1.0, A: 1.01, B: 1.02, C: 1.05}
    taken = samples(true, noise=0.05, seed=seed, rounds=MIN_ROUNDS)
    assert decide(taken, DEFAULT, DEFAULT, [A, B, C]).winner == DEFAULT


def test_a_gain_within_the_noise_floor_is_a_tie() -> None:
    taken = samples({DEFAULT: 1.0, A: 0.98}, noise=0.0)
    assert decide(taken, DEFAULT, DEFAULT, [A]).winner == A
    # The default against itself differs by as much as the gain: then the gain proves nothing.
    taken[AGAIN] = 0.97 * taken[AGAIN]
    assert noise_floor(taken, DEFAULT) > 1 / 0.97 - 1
    assert decide(taken, DEFAULT, DEFAULT, [A]).winner == DEFAULT


def test_the_noise_floor_counts_in_both_directions() -> None:
    taken = samples({DEFAULT: 1.0}, noise=0.0)
    taken[AGAIN] = 1.03 * taken[AGAIN]
    assert noise_floor(taken, DEFAULT) > 0.03


def test_few_rounds_change_nothing() -> None:
    true = {DEFAULT: 1.0, A: 0.5}
    few = decide(samples(true, rounds=MIN_ROUNDS - 1, processes=1), DEFAULT, DEFAULT, [A])
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
