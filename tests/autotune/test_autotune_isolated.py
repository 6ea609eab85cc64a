"""What candidates break in their process, they break alone."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import torch
from autotune_faulty import CRASHES, CRASHES_LATER, HANGS, LOSES, WRONG

from flashmoe.autotune.running import isolated
from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.running.isolated import IsolatedBench, Processes
from flashmoe.autotune.running.process import Child, ChildFailed, _main
from flashmoe.autotune.running.runner import GroupRunner
from flashmoe.autotune.schedule import helper
from flashmoe.autotune.schedule.budget import tune
from flashmoe.autotune.schedule.place import Options, Place
from flashmoe.autotune.schedule.result import Watch
from flashmoe.autotune.schedule.suite import Group, grouped
from flashmoe.autotune.search.storage import open_storage
from flashmoe.backends import BACKENDS
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.timing import Measurement
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

CPU = torch.device("cpu")
PROBLEM = Problem(1, 2, 2, 256, 256, 16, "float32")
GOOD = Candidate.of_tile(Tile("cpu", 128, 128))


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = Processes(CPU, "autotune_faulty:FaultySession")
    yield made
    made.close()


@pytest.fixture
def one_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process is started ahead: each takes seconds."""
    monkeypatch.setattr(isolated, "PROCESSES", 1)


def test_a_run_survives_every_misbehaving_tile_and_names_it(processes: Processes) -> None:
    (result,) = tune(
        [Group((PROBLEM,), (1.0,))],
        Place(CPU, fingerprint(CPU)),
        Options(budget=600.0),
        Watch(),
        time.perf_counter,
        lambda group: IsolatedBench(group, processes, seed=0, patience=2.0),
    )
    told = {trial.tile: (trial.status, trial.reason) for trial in result.rejected()}
    assert set(told) == {WRONG, CRASHES, HANGS, LOSES, CRASHES_LATER}
    assert told[WRONG][0] == "wrong"
    assert "out is off by" in told[WRONG][1]
    assert told[CRASHES] == ("failed", "the process died of SIGSEGV")
    assert told[CRASHES_LATER] == ("failed", "the process died of SIGSEGV")
    assert told[HANGS] == ("timeout", "no answer for 2 s")
    assert told[LOSES] == ("failed", "RuntimeError: an illegal memory access")
    assert result.best is not None
    assert result.best.tile not in told
    assert result.search is not None
    assert {t.tile for t in result.search.trials if t.status == "ok"} >= {GOOD.tile}
    assert result.seconds is not None


def test_a_target_that_cannot_be_made_says_why() -> None:
    child = Child("autotune_faulty:Refusing", ("x",))
    try:
        with pytest.raises(ValueError, match="not here"):
            child.wait_until_up(60.0)
        with pytest.raises(ChildFailed, match="the process exited"):
            child.request("anything", patience=10.0)
    finally:
        child.close()


def test_a_process_whose_parent_is_gone_ends_in_silence() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    _main(theirs.detach(), -1)


class FixedRunner:
    """Every sample of a problem takes its batch in seconds."""

    def __init__(self, problem: Problem, status: str = "ok") -> None:
        self.seconds = float(problem.batch)
        self.status = status

    def reference(self) -> None:
        pass

    def prepare(self, candidate: Candidate) -> Measurement:
        return Measurement(self.status, (self.seconds,), "" if self.status == "ok" else "reason")

    verify = prepare

    def measure(self, candidates, *, rounds, warmup, max_seconds=None, before_sample=None):  # type: ignore[no-untyped-def]
        return {name: Measurement("ok", (self.seconds,) * rounds) for name in candidates}


def test_a_group_is_measured_as_the_weighted_sum_of_its_problems() -> None:
    small, large = PROBLEM, dataclasses.replace(PROBLEM, batch=4)
    group = GroupRunner([FixedRunner(small), FixedRunner(large)], [3.0, 2.0])
    measured = group.measure({"a": GOOD, "b": GOOD}, rounds=4, warmup=1)
    assert measured["a"].samples == (3 * 1 + 2 * 4,) * 4
    assert group.prepare(GOOD) == Measurement("ok", (5.0,))
    half = GroupRunner([FixedRunner(small), FixedRunner(large, "wrong")], [1.0, 1.0])
    assert half.prepare(GOOD).status == "wrong"


def test_problems_are_grouped_by_bucket_with_the_heaviest_in_front() -> None:
    near = dataclasses.replace(PROBLEM, seqlen_q=200, seqlen_kv=200)
    far = dataclasses.replace(PROBLEM, head_dim=32)
    groups = grouped([(near, 9.0), (far, 1.0), (PROBLEM, 1.0), (near, 1.0)])
    assert [group.problems for group in groups] == [(near, PROBLEM), (far,)]
    assert groups[0].weights == (10.0, 1.0)
    assert groups[0].main == near


def test_a_helper_searches_and_decides_nothing(tmp_path: Path) -> None:
    where = str(tmp_path / "x.journal")
    place = Place(CPU, fingerprint(CPU))
    groups = [Group((PROBLEM,), (1.0,))]
    (child,) = helper.start(groups, place, [CPU], where, Options(trials=2), patience=60.0)
    try:
        child.receive(120.0)
    finally:
        child.close()
    (study,) = optuna.get_all_study_summaries(open_storage(where))
    assert study.study_name.startswith(f"flashmoe/{PROBLEM.label}/")
    assert study.n_trials == 2
    assert "finished" not in study.user_attrs


def test_a_compiler_is_waited_for_no_longer_than_there_is_time(processes: Processes) -> None:
    compilers = processes.compilers
    assert compilers.wait_for(PROBLEM, GOOD, time.perf_counter())  # never asked for
    compilers.submit(PROBLEM, GOOD)
    # A process takes longer than this to start.
    assert not compilers.wait_for(PROBLEM, GOOD, time.perf_counter())
    assert compilers.wait_for(PROBLEM, GOOD, time.perf_counter() + 60.0)
    assert compilers.seconds is not None
    assert not compilers.late(PROBLEM, GOOD)
    assert compilers.wait_for(PROBLEM, GOOD, time.perf_counter())


def test_a_compiler_that_hangs_is_ended_and_its_tile_named(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.compilers, "_patience", 0.5)
    bench = IsolatedBench(Group((PROBLEM,), (1.0,)), processes, seed=0, patience=5.0)
    hangs = Candidate.of_tile(HANGS)
    for candidate in (hangs, GOOD):
        processes.compilers.submit(PROBLEM, candidate)
    assert bench.compiled(GOOD, time.perf_counter() + 60.0)
    assert bench.compiled(hangs, time.perf_counter() + 60.0)
    prepared = bench.prepare(hangs)
    assert (prepared.status, prepared.reason) == ("timeout", "compiling took longer than 0 s")
    assert bench.prepare(GOOD).status == "ok"
    bench.close()


def test_a_helper_that_fails_says_so(tmp_path: Path) -> None:
    place = Place(CPU, fingerprint(CPU))
    groups = [Group((PROBLEM,), (1.0,))]
    where = str(tmp_path / "missing" / "x.journal" / "below-a-file")
    (tmp_path / "missing").write_text("")
    (child,) = helper.start(groups, place, [CPU], where, Options(trials=2), patience=60.0)
    try:
        assert child.answers_within(120.0)
        child.wait_until_up(60.0)
        assert child.answers_within(120.0)
        assert "--storage must be" in helper.failure(child)
    finally:
        child.close()


def test_what_is_compiled_waits_for_no_compiler(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, missing = Tile("cpu", 64, 64), Tile("cpu", 32, 32)
    backend = type(BACKENDS["cpu"])
    monkeypatch.setattr(backend, "precompile", lambda *_: None, raising=False)
    monkeypatch.setattr(backend, "is_compiled", lambda _, tile, __: tile == there, raising=False)
    submitted: list[Candidate] = []
    monkeypatch.setattr(processes.compilers, "submit", lambda _, c: submitted.append(c))
    bench = IsolatedBench(Group((PROBLEM,), (1.0,)), processes, seed=0, patience=60.0)
    bench.compiles_ahead = True
    bench.precompile([Candidate.of_tile(there), Candidate.of_tile(missing)])
    assert submitted == [Candidate.of_tile(missing)]
    bench.close()


def test_a_fresh_process_is_as_dear_as_what_has_to_be_waited_for(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, one_spare: None
) -> None:
    bench = IsolatedBench(Group((PROBLEM,), (1.0,)), processes, seed=0, patience=60.0)
    processes.device = torch.device("cuda")  # whose next process starts ahead
    session = "autotune_faulty:FaultySession"
    monkeypatch.setattr(processes, "_start", lambda: Child(session, (CPU,)))
    monkeypatch.setattr(processes.compilers, "warm_up", lambda: None)
    processes.warm_up()
    assert bench.fresh_seconds > processes.opening.seconds > 0
    taken = processes.take(fresh=True)
    assert taken.up
    # That it was not up when it was wanted told how long one takes.
    assert processes.wait_seconds > 0.1
    taken.close()
    bench.close()


def test_no_problem_pays_for_the_start_of_the_processes(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, one_spare: None
) -> None:
    processes.device = torch.device("cuda")
    started: list[Child] = []

    def start() -> Child:
        started.append(Child("autotune_faulty:FaultySession", (CPU,)))
        return started[-1]

    monkeypatch.setattr(processes, "_start", start)
    monkeypatch.setattr(processes.compilers, "warm_up", lambda: None)
    asked: list[Problem] = []
    monkeypatch.setattr(
        "flashmoe.autotune.running.isolated.searched_backends",
        lambda problem, *_: asked.append(problem),
    )
    monkeypatch.setattr("flashmoe.autotune.running.isolated.default_candidate", lambda *_: GOOD)
    monkeypatch.setattr("flashmoe.autotune.running.isolated.runs", lambda *_: False)
    processes.warm_up()
    processes.get_ready([Group((PROBLEM,), (1.0,))], None, patience=60.0)
    assert asked == [PROBLEM]
    # What a final's process takes was found out, too.
    assert processes.opening.seconds > 0
    assert started[0].up
    assert processes.take(fresh=False) is started[0]
    started[0].close()


def test_a_process_is_as_nice_as_it_shall_be() -> None:
    child = Child("autotune_faulty:Niceness", nice=7)
    try:
        assert child.request("value", patience=60.0) == os.nice(0) + 7
    finally:
        child.close()


def test_a_first_process_that_cannot_start_is_no_end_of_the_run(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, one_spare: None
) -> None:
    processes.device = torch.device("cuda")
    refusing = Child("autotune_faulty:Refusing", ())
    others = (Child("autotune_faulty:FaultySession", (CPU,)) for _ in range(2))
    started = iter([refusing, *others])
    monkeypatch.setattr(processes, "_start", lambda: next(started))
    monkeypatch.setattr(processes.compilers, "warm_up", lambda: None)
    monkeypatch.setattr("flashmoe.autotune.running.isolated.searched_backends", lambda *_: [])
    processes.warm_up()
    processes.get_ready([Group((PROBLEM,), (1.0,))], None, patience=60.0)
    assert refusing._process.poll() is not None
    child = processes.take(fresh=False)
    assert child.up
    child.close()
