from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from autotune_simulated import DEFAULT, GRID, PROBLEM, SimulatedBench, bowl, simulate_kernel
from optuna.storages import InMemoryStorage

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.schedule.budget import tune
from flashmoe.autotune.schedule.place import Options, Place
from flashmoe.autotune.schedule.result import Result, Watch
from flashmoe.autotune.schedule.suite import SUITES, Group, grouped
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.planning.database import Entry
from flashmoe.tiles import Tile

CPU = torch.device("cpu")
BEST = Tile("cpu", 192, 256)
HERE = fingerprint(CPU)
GROUP = Group((PROBLEM,), (1.0,))


@pytest.fixture(autouse=True)
def _simulated_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_kernel(monkeypatch, GRID)


def run(
    bench: SimulatedBench,
    stored: Mapping[str, Entry] | None = None,
    **options: Any,
) -> Result:
    (result,) = tune(
        [GROUP],
        Place(CPU, HERE, stored or {}),
        Options(**options),
        Watch(),
        bench.now,
        lambda group: bench,
    )
    return result


def entry(tile: Tile | None, **changes: Any) -> dict[str, Entry]:
    known = {**HERE.to_json(), **changes}
    backend = "sdpa" if tile is None else "cpu"
    name = "" if tile is None else str(tile)
    return {PROBLEM.bucket: Entry(PROBLEM, backend, name, str(DEFAULT), fingerprint=known)}


@pytest.mark.parametrize("seed", range(5))
def test_the_best_tile_is_found_and_told_with_its_evidence(seed: int) -> None:
    result = run(SimulatedBench(bowl(BEST, step=0.05), seed=seed), seed=seed)
    assert result.status == "tuned"
    assert result.best == Candidate.of_tile(BEST)
    assert result.default == Candidate.of_tile(DEFAULT)
    assert result.store
    assert result.speedup_default is not None
    assert result.speedup_default.low > 1
    assert result.speedup_sdpa is not None
    assert result.speedup_sdpa.value == pytest.approx(3, rel=0.02)
    assert result.seconds is not None
    assert result.seconds.value == pytest.approx(1e-3, rel=0.3)
    written = result.entry(HERE, "command")
    assert (written.backend, written.tile, written.problem) == ("cpu", str(BEST), PROBLEM)
    assert set(written.samples) >= {str(BEST), str(DEFAULT), "sdpa"}


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_keeps_the_default(seed: int) -> None:
    result = run(SimulatedBench(lambda _: 1e-3, noise=0.03, seed=seed), seed=seed)
    assert result.best == Candidate.of_tile(DEFAULT)
    assert result.status == "kept"
    assert result.store


@pytest.mark.parametrize("seed", range(5))
def test_a_default_that_is_the_best_stays(seed: int) -> None:
    result = run(SimulatedBench(bowl(DEFAULT), noise=0.05, seed=seed), seed=seed)
    assert result.best == Candidate.of_tile(DEFAULT)


def test_sdpa_is_chosen_when_it_is_faster_than_every_tile() -> None:
    def seconds(candidate: Candidate) -> float:
        return 0.5e-3 if candidate.tile is None else bowl(BEST, step=0.05)(candidate)

    result = run(SimulatedBench(seconds))
    assert result.best == Candidate("sdpa")
    written = result.entry(HERE, "")
    assert written.tile == ""
    # A call that needs softmax_lse, which SDPA does not tell, still gets the best tile.
    assert written.tile_with_lse == str(BEST)


def test_a_stored_winner_is_confirmed_without_a_search() -> None:
    bench = SimulatedBench(bowl(BEST))
    result = run(bench, entry(BEST))
    assert result.status == "confirmed"
    assert result.best == Candidate.of_tile(BEST)
    assert not result.store
    assert result.search is None
    assert set(bench.timed) == {str(DEFAULT), str(BEST), "sdpa"}


def test_a_stored_winner_that_no_longer_wins_is_searched_again() -> None:
    result = run(SimulatedBench(bowl(BEST, step=0.05)), entry(Tile("cpu", 32, 32)))
    assert result.status == "tuned"
    assert result.best == Candidate.of_tile(BEST)
    assert result.store


def test_one_process_that_is_at_odds_with_the_others_changes_nothing() -> None:
    """In the first process the default is the faster one."""
    stored = Tile("cpu", 128, 256)

    class Odd(SimulatedBench):
        def measure(self, candidates, **options):  # type: ignore[no-untyped-def]
            self.seconds = bowl(stored if self.fresh_processes else DEFAULT, step=0.05)
            return super().measure(candidates, **options)

    bench = Odd(bowl(stored))
    result = run(bench, entry(stored))
    assert (result.status, bench.fresh_processes) == ("confirmed", 1)
    assert result.search is None


def test_force_searches_but_a_tie_keeps_what_is_stored() -> None:
    def seconds(candidate: Candidate) -> float:
        return 1e-3 if candidate.tile in (BEST, Tile("cpu", 256, 256)) else 2e-3

    stored = Tile("cpu", 256, 256)
    result = run(SimulatedBench(seconds), entry(stored), force=True)
    assert result.search is not None
    assert result.best == Candidate.of_tile(stored)
    assert (result.status, result.store) == ("kept", False)


def test_another_fingerprint_is_searched_and_renewed() -> None:
    result = run(SimulatedBench(bowl(BEST, step=0.05)), entry(BEST, kernels="0123"))
    assert result.search is not None
    assert (result.status, result.best) == ("kept", Candidate.of_tile(BEST))
    assert result.store


def test_another_power_limit_is_the_same_machine() -> None:
    assert run(SimulatedBench(bowl(BEST)), entry(BEST, driver="9")).status == "confirmed"


def test_another_problem_of_the_bucket_is_searched() -> None:
    stored = entry(BEST)
    other = dataclasses.replace(PROBLEM, seqlen_q=1000, seqlen_kv=1000)
    assert other.bucket == PROBLEM.bucket
    stored = {k: dataclasses.replace(e, problem=other) for k, e in stored.items()}
    assert run(SimulatedBench(bowl(BEST)), stored).search is not None


@pytest.mark.parametrize("tile", ["cpu:0x0", "nonsense", "triton:64x64-stages2-warps4"])
def test_a_stored_tile_that_cannot_run_is_replaced(tile: str) -> None:
    stored = {k: dataclasses.replace(e, tile=tile) for k, e in entry(BEST).items()}
    result = run(SimulatedBench(bowl(BEST, step=0.05)), stored)
    assert result.best == Candidate.of_tile(BEST)
    assert result.store


def test_a_wrong_winner_is_dropped_and_named() -> None:
    bench = SimulatedBench(bowl(BEST, step=0.05), wrong={str(BEST): "off by 1"})
    result = run(bench)
    assert result.best not in (Candidate.of_tile(BEST), None)
    assert [(t.tile, t.status, t.reason) for t in result.rejected()] == [
        (BEST, "wrong", "off by 1")
    ]


def test_a_finalist_that_fails_at_odd_sizes_is_dropped_and_named() -> None:
    bench = SimulatedBench(bowl(BEST, step=0.05), ragged={str(BEST): "reads past the end"})
    result = run(bench)
    assert result.best not in (Candidate.of_tile(BEST), None)
    assert [(t.tile, t.reason) for t in result.rejected()] == [(BEST, "reads past the end")]


def test_a_wrong_default_leaves_sdpa_to_beat() -> None:
    bench = SimulatedBench(bowl(BEST, step=0.05), wrong={str(DEFAULT): "off by 1"})
    result = run(bench)
    assert result.best == Candidate.of_tile(BEST)
    assert result.speedup_default is None
    assert DEFAULT in [trial.tile for trial in result.rejected()]


def test_when_every_tile_is_wrong_sdpa_remains() -> None:
    everything = {
        str(Tile("cpu", m, n)): "off" for m in range(512) for n in (32, 64, 128, 256, 512)
    }
    result = run(SimulatedBench(bowl(BEST), wrong=everything))
    assert result.best == Candidate("sdpa")


def test_a_budget_too_small_to_compare_is_told() -> None:
    result = run(SimulatedBench(bowl(BEST, floor=1.0)), budget=5.0)
    assert result.status == "unmeasured"
    assert "raise --budget" in result.reason
    with pytest.raises(ValueError, match="must be measured"):
        result.entry(HERE, "")


def test_a_first_call_that_is_slow_for_once_starves_nobody() -> None:
    class Slow(SimulatedBench):
        def measure(self, candidates, **options):  # type: ignore[no-untyped-def]
            if not self.timed:
                self.clock += 2.0
            return super().measure(candidates, **options)

    result = run(Slow(bowl(BEST, step=0.05)), budget=20.0)
    assert result.best == Candidate.of_tile(BEST)


def test_an_interrupt_tells_the_best_so_far() -> None:
    class Interrupted(SimulatedBench):
        def measure(self, candidates, **options):  # type: ignore[no-untyped-def]
            if len(self.timed) > 12:
                raise KeyboardInterrupt
            return super().measure(candidates, **options)

    bench = Interrupted(bowl(BEST))
    results = tune([GROUP], Place(CPU, HERE), Options(), Watch(), bench.now, lambda _: bench)
    result = next(results)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert result.status == "unmeasured"
    told = r"interrupted after \d+ tiles: best cpu:.* of the default, not confirmed"
    assert re.fullmatch(told, result.reason)


def test_inputs_that_do_not_fit_are_told() -> None:
    def make_bench(*_: Any) -> SimulatedBench:
        raise RuntimeError("not enough memory")

    (result,) = tune([GROUP], Place(CPU, HERE), Options(), Watch(), lambda: 0.0, make_bench)
    assert result.status == "unmeasured"
    assert "not enough memory" in result.reason


@pytest.mark.parametrize("budget", [6.0, 20.0])
def test_the_suite_keeps_its_budget(budget: float) -> None:
    clock = SimulatedBench(bowl(BEST, floor=0.01), prepare_seconds=0.05)

    def make_bench(*_: Any) -> SimulatedBench:
        return clock

    options = Options(budget=budget)
    groups = grouped((problem, 1.0) for problem in SUITES["cpu"])
    results = list(tune(groups, Place(CPU, HERE), options, Watch(), clock.now, make_bench))
    first = results[: len(groups)]
    assert {result.problem for result in first} == set(SUITES["cpu"])
    assert all(result.best for result in results)
    assert clock.clock <= budget * 1.1
    assert [r.problem.flops for r in first] == sorted(p.flops for p in SUITES["cpu"])


# Seconds that one step takes, in a budget of 20.
SLOW = {
    "a slow check": {"prepare_seconds": 1.5},
    "a slow compiler": {"compiles_ahead": True, "compile_seconds": 3.0},
    "a hopeless compiler": {"compiles_ahead": True, "compile_seconds": 100.0},
    "slow finalists": {"verify_seconds": 5.0},
    "slow processes": {"fresh": 9.0},
    "all of it": {
        "prepare_seconds": 0.5,
        "compiles_ahead": True,
        "compile_seconds": 2.0,
        "verify_seconds": 1.0,
        "fresh": 3.0,
    },
}


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("problems", [1, 4])
def test_no_stage_ignores_the_budget(slow: str, problems: int) -> None:
    clock = SimulatedBench(bowl(BEST, floor=0.03), **SLOW[slow])  # type: ignore[arg-type]
    groups = grouped((problem, 1.0) for problem in SUITES["cpu"][:problems])
    budget = 20.0 * problems
    results = list(
        tune(groups, Place(CPU, HERE), Options(budget=budget), Watch(), clock.now, lambda _: clock)
    )
    assert len(results) == problems
    assert clock.clock <= budget * 1.1
    assert all(result.best for result in results)


def test_what_other_workers_found_is_compiled_within_the_budget() -> None:
    storage = InMemoryStorage()
    first = SimulatedBench(bowl(BEST))
    place = Place(CPU, HERE, storage=storage)
    list(tune([GROUP], place, Options(helping=0.0), Watch(), first.now, lambda _: first))
    bench = SimulatedBench(bowl(BEST), compiles_ahead=True, compile_seconds=6.0)
    (result,) = tune([GROUP], place, Options(budget=20.0), Watch(), bench.now, lambda _: bench)
    assert bench.submitted
    assert bench.clock <= 22.0
    assert result.best is not None


def test_what_was_spent_before_counts() -> None:
    bench = SimulatedBench(bowl(BEST, floor=0.05))
    groups = grouped((problem, 1.0) for problem in SUITES["cpu"])
    place, options = Place(CPU, HERE), Options(budget=20.0)
    list(tune(groups, place, options, Watch(), bench.now, lambda _: bench, spent=10.0))
    assert bench.clock <= 11.0
    late = list(tune(groups, place, options, Watch(), bench.now, lambda _: bench, spent=20.0))
    assert {result.reason for result in late} == {
        "the budget was spent before its turn; raise --budget"
    }
