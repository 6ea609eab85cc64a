"""What becomes of a search whose budget is short, or whose compilers are slow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from autotune_simulated import DEFAULT, PROBLEM, SimulatedBench, bowl, simulate_kernel
from optuna.storages import BaseStorage, InMemoryStorage

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.schedule.budget import tune
from flashmoe.autotune.schedule.place import Options, Place
from flashmoe.autotune.schedule.result import Result, Watch
from flashmoe.autotune.schedule.suite import SUITES, Group, grouped
from flashmoe.autotune.search.trials import BUDGET_REACHED
from flashmoe.backends import BACKENDS
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.planning.database import Entry
from flashmoe.tiles import Tile

CPU = torch.device("cpu")
HERE = fingerprint(CPU)
BEST = Tile("cpu", 192, 256)
# As a GPU's: hundreds of tiles, each of which wants a compiler.
WIDE = [Tile("cpu", 32 + 16 * m, 32 + 16 * n) for m in range(24) for n in range(24)]
OTHER = dataclasses.replace(PROBLEM, heads_q=16, heads_kv=16)


@pytest.fixture(autouse=True)
def _simulated_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_kernel(monkeypatch, [*WIDE, DEFAULT])


def run(
    bench: SimulatedBench,
    budget: float,
    groups: list[Group] | None = None,
    storage: BaseStorage | None = None,
    stored: Mapping[str, Entry] | None = None,
) -> list[Result]:
    place = Place(CPU, HERE, stored or {}, storage=storage or InMemoryStorage())
    groups = groups or [Group((PROBLEM,), (1.0,))]
    return list(tune(groups, place, Options(budget=budget), Watch(), bench.now, lambda _: bench))


def slow_compilers(compilers: int = 15) -> SimulatedBench:
    return SimulatedBench(
        bowl(BEST),
        compiles_ahead=True,
        compile_seconds=4.0,
        compilers=compilers,
        fresh=2.0,
        prepare_seconds=0.05,
    )


def tried(result: Result) -> int:
    assert result.search is not None
    return result.search.tried


def test_each_of_two_problems_gets_its_share() -> None:
    bench = slow_compilers()
    groups = [Group((p,), (1.0,)) for p in (PROBLEM, OTHER)]
    first, second = run(bench, 50.0, groups)[:2]
    assert min(tried(first), tried(second)) >= 40
    assert bench.clock <= 55.0


def test_a_compiler_that_is_stuck_costs_no_more_than_its_tile() -> None:
    free, stuck = slow_compilers(), slow_compilers()
    (result,) = run(free, 60.0)
    stuck.stuck = [free.submitted[5]]
    (hindered,) = run(stuck, 60.0)
    assert tried(hindered) >= 0.8 * tried(result)
    assert stuck.clock <= 66.0


def test_tiles_that_want_more_compiling_than_there_is_time_are_chosen_not_walked() -> None:
    (result,) = run(slow_compilers(), 60.0)
    assert result.search is not None
    assert result.search.sampler == "model"


def test_a_search_that_was_cut_short_goes_on_when_there_is_more_time() -> None:
    storage = InMemoryStorage()
    bench = slow_compilers()
    (short,) = run(bench, 30.0, storage=storage)
    assert short.search is not None
    assert short.search.ended == BUDGET_REACHED
    entry = short.entry(HERE, "")
    stored = {PROBLEM.bucket: entry}
    assert entry.search["tried"] == tried(short)
    # The same command again confirms what is there.
    (same,) = run(slow_compilers(), 30.0, storage=storage, stored=stored)
    assert same.status == "confirmed"
    (longer,) = run(slow_compilers(), 200.0, storage=storage, stored=stored)
    assert longer.search is not None
    assert longer.search.study == short.search.study
    assert len(longer.search.trials) == tried(short) + tried(longer)
    assert tried(longer) > 0
    assert longer.search.ended != BUDGET_REACHED
    assert longer.store
    assert longer.entry(HERE, "").search["seconds"] > entry.search["seconds"]


def test_a_search_of_hardly_any_tile_goes_on() -> None:
    storage = InMemoryStorage()
    (starved,) = run(slow_compilers(compilers=3), 9.0, storage=storage)
    assert tried(starved) < 12
    stored = {PROBLEM.bucket: starved.entry(HERE, "")}
    (again,) = run(slow_compilers(compilers=3), 9.0, storage=storage, stored=stored)
    assert again.status != "confirmed"
    assert again.search is not None
    assert len(again.search.trials) > tried(starved)


def test_what_is_compiled_in_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(BACKENDS["cpu"]), "compiled_in", lambda *_: WIDE[300:303])
    (result,) = run(slow_compilers(), 60.0)
    assert result.search is not None
    assert [trial.tile for trial in result.search.trials][:4] == [DEFAULT, *WIDE[300:303]]


def test_what_one_problem_breaks_the_next_does_not_feel() -> None:
    class Broken(SimulatedBench):
        def refresh(self, candidates: Mapping[str, Candidate]) -> None:
            raise RuntimeError("out of memory")

    groups = [Group((p,), (1.0,)) for p in (PROBLEM, OTHER)]
    broken, bench = Broken(bowl(BEST)), SimulatedBench(bowl(BEST))
    place = Place(CPU, HERE)
    first, second = tune(
        groups,
        place,
        Options(budget=60.0, trials=10),
        Watch(),
        bench.now,
        lambda group: broken if group.main == PROBLEM else bench,
    )
    assert (first.status, first.reason) == ("unmeasured", "RuntimeError: out of memory")
    assert second.best is not None


def test_the_weights_of_a_group_belong_to_its_study() -> None:
    storage = InMemoryStorage()
    near = dataclasses.replace(PROBLEM, seqlen_q=1000, seqlen_kv=1000)
    names, stored = [], {}
    for weights in ((9.0, 1.0), (1.0, 9.0), (2.0, 18.0)):
        group = Group((PROBLEM, near), weights)
        (result,) = run(SimulatedBench(bowl(BEST)), 60.0, [group], storage, stored)
        names.append(result.search.study if result.search else result.status)
        stored = {PROBLEM.bucket: result.entry(HERE, "")} if result.search else stored
    assert names[0] != names[1]
    assert names[2] == "confirmed"


def test_a_bucket_of_many_lengths_has_a_name_that_databases_take() -> None:
    problems = tuple(
        dataclasses.replace(PROBLEM, seqlen_q=n, seqlen_kv=n) for n in range(600, 1020, 20)
    )
    group = Group(problems, (1.0,) * len(problems))
    (result,) = run(SimulatedBench(bowl(BEST)), 20.0, [group])
    assert result.search is not None
    assert len(result.search.study) < 200


def test_the_next_best_tile_follows_one_that_is_wrong_at_odd_sizes() -> None:
    storage = InMemoryStorage()
    right = Tile("cpu", 320, 320)

    def seconds(candidate: Candidate) -> float:
        return {str(BEST): 0.7e-3, str(right): 0.85e-3}.get(str(candidate), 1e-3)

    monkeyed = [BEST, right, DEFAULT]
    bench = SimulatedBench(seconds, ragged={str(BEST): "row 7 is off"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(BACKENDS["cpu"]), "tiles", lambda *_: monkeyed)
        (result,) = run(bench, 60.0, storage=storage)
        assert result.best == Candidate.of_tile(right)
        assert [(t.tile, t.status) for t in result.rejected()] == [(BEST, "wrong")]
        entry = result.entry(HERE, "")
        assert str(BEST) not in entry.lookup()
        assert str(right) in entry.lookup()
        # The study knows, so it is not trusted again.
        other = dataclasses.replace(HERE, driver="another")
        (again,) = tune(
            [Group((PROBLEM,), (1.0,))],
            Place(CPU, other, {}, storage=storage),
            Options(budget=60.0),
            Watch(),
            bench.now,
            lambda _: bench,
        )
        assert [(t.tile, t.status, t.reason) for t in again.rejected()] == [
            (BEST, "wrong", "row 7 is off")
        ]


@pytest.mark.parametrize("late", [0.0, 0.3])
def test_the_default_suite_of_a_gpu_is_done_within_two_minutes(late: float) -> None:
    """Forward, training and decode at the costs of an H200 and an empty cache, also where every
    process starts late: each has a result."""

    class Gpu(SimulatedBench):
        def refresh(self, candidates: Mapping[str, Candidate]) -> None:
            super().refresh(candidates)
            self.clock += late  # which fresh_seconds knows nothing of

    bench = Gpu(
        bowl(BEST),
        compiles_ahead=True,
        compile_seconds=2.5,
        compilers=15,
        fresh=1.5,
        prepare_seconds=0.08,
        verify_seconds=0.1,
    )
    groups = grouped((problem, 1.0) for problem in SUITES["cuda"])
    results = run(bench, Options().budget, groups)
    last = {result.problem: result for result in results}
    assert {problem.direction for problem in last} == {"fwd", "bwd"}
    assert any(problem.seqlen_q == 1 for problem in last)
    assert not [r.problem.label for r in last.values() if r.best is None or r.starved]
    # A backward has no tiles on a CPU: here it takes its start and its final.
    searched = [r for r in last.values() if r.search and r.search.space]
    assert len(searched) >= 9
    assert min(map(tried, searched)) >= 12
    assert bench.clock <= 120.0
