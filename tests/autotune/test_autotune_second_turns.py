"""Second turns: of problems that the budget left too little for."""

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
from flashmoe.autotune.search.trials import BUDGET_REACHED, Search
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


def test_a_search_that_was_cut_short_has_no_second_turn() -> None:
    """However much is left in the end."""
    bench = SimulatedBench(bowl(BEST), prepare_seconds=3.0)
    groups = grouped((problem, 1.0) for problem in SUITES["cpu"])
    options = Options(budget=160.0)
    results = list(tune(groups, Place(CPU, HERE), options, Watch(), bench.now, lambda _: bench))
    assert len(results) == len(groups)
    assert any(result.search and result.search.ended == BUDGET_REACHED for result in results)
    assert bench.clock < 0.8 * options.budget


def test_both_turns_are_told_as_one() -> None:
    search = Search((), (), "model", 9, tried=3, seconds=1.0)
    first = Result(PROBLEM, "kept", "too few rounds", elapsed=3.0, search=search, starved=True)
    again = dataclasses.replace(first, status="tuned", elapsed=2.0, starved=False)
    both = again.after(first)
    assert (both.status, both.elapsed) == ("tuned", 5.0)
    assert both.search == dataclasses.replace(search, tried=6, seconds=2.0)
