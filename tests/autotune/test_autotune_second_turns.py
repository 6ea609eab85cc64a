"""Second turns: what the budget keeps back or leaves over, and who gets it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch
from autotune_simulated import DEFAULT, GRID, PROBLEM, SimulatedBench, bowl, simulate_kernel

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


@pytest.fixture(autouse=True)
def _simulated_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_kernel(monkeypatch, GRID)


def slow_first(bench: SimulatedBench, seconds: float) -> Callable[[Group], SimulatedBench]:
    """Makes `bench`, the first time so much slower than anyone could know."""
    late = iter([seconds])

    def make_bench(group: Group) -> SimulatedBench:
        bench.clock += next(late, 0.0)
        return bench

    return make_bench


def test_a_problem_that_was_starved_is_decided_with_what_the_others_leave() -> None:
    bench = SimulatedBench(bowl(BEST))
    groups = grouped((problem, 1.0) for problem in SUITES["cpu"])
    options = Options(budget=20.0, trials=2)
    make_bench = slow_first(bench, 6.0)
    results = list(tune(groups, Place(CPU, HERE), options, Watch(), bench.now, make_bench))
    assert [result.starved for result in results] == [True] + [False] * len(groups)
    assert not results[0].store
    assert (results[-1].problem, results[-1].store) == (results[0].problem, True)
    assert bench.clock <= 22.0


class SlowStart(SimulatedBench):
    """Whose fresh process number `slow` takes `late` seconds more than anyone could know."""

    slow, late = 0, 0.0

    def refresh(self, candidates: Mapping[str, Candidate]) -> None:
        if self.fresh_processes == self.slow:
            self.clock += self.late
        super().refresh(candidates)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("trials", [None, 6])
def test_a_final_that_was_starved_is_held_again(force: bool, trials: int | None) -> None:
    bench = SlowStart(bowl(BEST))
    bench.late = 20.0
    options = Options(budget=60.0, trials=trials, force=force)
    groups = grouped((problem, 1.0) for problem in SUITES["cpu"])
    name, known = str(DEFAULT), HERE.to_json()
    stored = {p.bucket: Entry(p, "cpu", name, name, fingerprint=known) for p in SUITES["cpu"]}
    place = Place(CPU, HERE, stored if force else {})
    results = list(tune(groups, place, options, Watch(), bench.now, lambda _: bench))
    first, second = (r for r in results if r.problem == results[0].problem)
    assert (first.starved, first.store) == (True, False)
    assert not second.starved
    # The same search, which went on.
    assert first.search is not None
    assert second.search is not None
    assert second.search.study == first.search.study
    assert second.best is not None
    assert second.store == (second.status == "tuned" or not force)
    if trials is None:
        assert second.best.tile == BEST
    assert bench.clock <= 66.0


def test_a_final_that_comes_up_late_is_held_all_the_same() -> None:
    bench = SlowStart(bowl(BEST))
    bench.late = 10.0
    options = Options(budget=10.0, trials=2)
    group = Group((SUITES["cpu"][0],), (1.0,))
    (result,) = tune([group], Place(CPU, HERE), options, Watch(), bench.now, lambda _: bench)
    assert not result.starved
    assert 10.0 < bench.clock <= 10.6


def test_the_starved_come_before_all_others_however_little_is_left() -> None:
    bench = SlowStart(bowl(BEST, floor=5e-4))
    bench.late = 6.0
    groups = grouped((problem, 1.0) for problem in SUITES["cpu"][:2])
    options = Options(budget=100.0, trials=2)
    # Of the ten seconds that there are, less than a tenth of the budget.
    results = list(
        tune(groups, Place(CPU, HERE), options, Watch(), bench.now, lambda _: bench, spent=90.0)
    )
    assert [result.starved for result in results] == [True, False, False]
    assert results[2].problem == results[0].problem


def uneven(
    bench: SimulatedBench, seconds: float = 1.0
) -> tuple[list[Group], Callable[[Group], SimulatedBench]]:
    """Two problems, and their bench: the first one's tiles take too long to check for its share,
    the second one leaves most of its own."""
    groups = sorted(grouped((problem, 1.0) for problem in SUITES["cpu"][:2]), key=lambda g: g.cost)

    def make_bench(group: Group) -> SimulatedBench:
        bench.prepared.clear()
        bench.prepare_seconds = seconds if group is groups[0] else 0.0
        return bench

    return groups, make_bench


def test_a_second_turn_that_is_starved_leaves_the_first_ones_result() -> None:
    bench = SlowStart(bowl(BEST))
    bench.slow, bench.late = 4, 1000.0  # two for each turn
    groups, make_bench = uneven(bench)
    options = Options(budget=40.0)
    results = list(tune(groups, Place(CPU, HERE), options, Watch(), bench.now, make_bench))
    assert bench.clock > 1000.0
    assert [result.problem for result in results] == [group.main for group in groups]
    assert not any(result.starved for result in results)


@pytest.mark.parametrize(("fresh", "turns"), [(0.5, 3), (5.0, 2)])
def test_no_second_turn_that_its_own_start_would_take(fresh: float, turns: int) -> None:
    bench = SimulatedBench(bowl(BEST), fresh=fresh)
    groups, make_bench = uneven(bench)
    options = Options(budget=40.0)
    results = list(tune(groups, Place(CPU, HERE), options, Watch(), bench.now, make_bench))
    assert len(results) == turns
    # Or a second turn would have been worth its while.
    assert turns == 3 or bench.clock < 0.9 * options.budget


def test_what_pays_for_no_second_turn_is_not_kept_back() -> None:
    bench = SimulatedBench(bowl(DEFAULT), fresh=2.0, prepare_seconds=3.0)
    groups = grouped((problem, 1.0) for problem in SUITES["cpu"])
    options = Options(budget=60.0)
    results = list(tune(groups, Place(CPU, HERE), options, Watch(), bench.now, lambda _: bench))
    assert len(results) == len(groups)
    assert 57.0 < bench.clock < 66.0


def test_what_is_kept_back_goes_to_searches_that_were_cut_short() -> None:
    # The default wins, which nobody has yet to try.
    bench = SimulatedBench(bowl(DEFAULT), prepare_seconds=3.0)
    groups = grouped((problem, 1.0) for problem in SUITES["cpu"])
    # What is left of these eighty seconds in the end is less than a tenth of the budget.
    results = list(
        tune(
            groups,
            Place(CPU, HERE),
            Options(budget=160.0),
            Watch(),
            bench.now,
            lambda _: bench,
            spent=80.0,
        )
    )
    assert len(results) > len(groups)
    again = results[len(groups)]
    (first,) = (r for r in results[: len(groups)] if r.problem == again.problem)
    assert first.search is not None
    assert first.search.cut_short
    assert again.search is not None
    assert len(again.search.trials) > len(first.search.trials)


def test_a_starved_problem_that_is_stored_is_confirmed_in_its_second_turn() -> None:
    bench = SimulatedBench(bowl(BEST))
    groups = sorted(grouped((p, 1.0) for p in SUITES["cpu"][:3]), key=lambda group: group.cost)
    stored = {
        p.bucket: Entry(
            p,
            "cpu",
            str(BEST),
            str(DEFAULT),
            fingerprint=HERE.to_json(),
            search={"tried": 9, "of": 99, "seconds": 5.0, "ended": "no better tile for long"},
        )
        for p in SUITES["cpu"][:3]
    }
    place, options = Place(CPU, HERE, stored), Options(budget=45.0)
    make_bench = slow_first(bench, 20.0)
    results = list(tune(groups, place, options, Watch(), bench.now, make_bench))
    assert [result.starved for result in results] == [True, False, False, False]
    assert results[-1].problem == results[0].problem
    assert [result.status for result in results[1:]] == ["confirmed"] * 3
    assert not any(result.store for result in results)


def test_a_second_turn_tries_what_won_next_door_and_tells_both_turns_as_one() -> None:
    bench = SimulatedBench(bowl(BEST))
    groups, make_bench = uneven(bench, seconds=2.0)
    options = Options(budget=40.0, sampler="brute", seed=1)
    results = list(tune(groups, Place(CPU, HERE), options, Watch(), bench.now, make_bench))
    first, other, again = results
    assert other.best is not None
    assert other.best.tile == BEST
    assert first.search is not None
    assert again.search is not None
    count = len(first.search.trials)
    assert BEST not in [trial.tile for trial in first.search.trials]
    assert again.search.trials[count].tile == BEST
    assert (again.problem, again.status) == (first.problem, "tuned")
    assert again.best == other.best
    assert again.search.tried == len(again.search.trials) > count
    assert again.elapsed > first.elapsed


def test_a_second_turn_that_changes_nothing_leaves_a_problem_tuned() -> None:
    best = Candidate.of_tile(BEST)
    first = Result(PROBLEM, "tuned", "is faster", best=best, elapsed=3.0)
    again = Result(PROBLEM, "kept", "nothing beats it", best=best, elapsed=2.0)
    assert again.after(first) == dataclasses.replace(first, elapsed=5.0)
    other = dataclasses.replace(again, status="tuned", best=Candidate.of_tile(DEFAULT))
    assert other.after(first) == dataclasses.replace(other, elapsed=5.0)
