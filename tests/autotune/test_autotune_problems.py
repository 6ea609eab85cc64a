"""What the tuner tunes for real, on a CPU: backwards, packed batches, caches, windows and terms."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashmoe
from flashmoe.autotune.cli import arguments
from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.running.compilers import Compilers
from flashmoe.autotune.running.isolated import IsolatedBench, Session
from flashmoe.autotune.running.runner import DeviceRunner
from flashmoe.autotune.schedule.budget import tune
from flashmoe.autotune.schedule.place import Options, Place
from flashmoe.autotune.schedule.result import Result, Watch
from flashmoe.autotune.schedule.suite import SUITES, Group, grouped
from flashmoe.autotune.search.typical import Typical
from flashmoe.backends import BACKENDS
from flashmoe.backends.base import Run, RunBackward
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.planning.database import Entry
from flashmoe.spec import options, shapes
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of small problems wait for each other for longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class _Here:
    """A Child and its process, which is this one."""

    up = True

    def __init__(self) -> None:
        self._session = Session(lambda step: None, CPU)  # type: ignore[arg-type]

    def request(self, method: str, *arguments: Any, patience: float, **others: Any) -> Any:
        return getattr(self._session, method)(*arguments, **others)

    def close(self) -> None:
        pass


class _Processes:
    device = CPU
    wait_seconds = 0.0

    def __init__(self) -> None:
        self.opening = Typical()
        self.compilers = Compilers(lambda: pytest.fail("nothing is compiled"), 1)

    def take(self, *, fresh: bool) -> _Here:
        return _Here()

    def give_back(self, child: _Here) -> None:
        pass


def tuned(groups: list[Group], **wanted: Any) -> list[Result]:
    processes: Any = _Processes()
    results = tune(
        groups,
        Place(CPU, fingerprint(CPU)),
        Options(**{"budget": 600.0, "trials": 3, **wanted}),
        Watch(),
        time.perf_counter,
        lambda group: IsolatedBench(group, processes, seed=0, patience=60.0),
    )
    found = {result.problem: result for result in results}
    return [found[group.main] for group in groups]


def problem(words: str) -> Problem:
    parser = arguments.parser()
    given = options.given_options(parser.parse_args(words.split()))
    (found,) = options.problems_of(given, "cpu")
    return found


SMALL = "--heads 4 --kv-heads 2 --head-dim 16"
CASES = {
    "backward": "--seqlen 96 --causal --direction bwd",
    "packed backward": "--layout packed --lengths 60,9 --direction bwd --softcap --alibi --dropout",
    "packed": "--layout packed --lengths 60,30*2,9x20 --window 20,0 --sinks",
    "cache": "--batch 3 --seqlen 1 --seqlen-kv 200 --layout cache",
    "pages": "--layout paged --lengths 2x200,2x70*2 --causal --sinks",
    "packed pages": "--layout packed-paged --lengths 1x200,30x70 --causal",
    "window": "--seqlen 96 --window 20,3 --alibi",
}


@pytest.mark.parametrize("name", CASES)
def test_any_problem_is_tuned_on_a_cpu(name: str) -> None:
    group = Group((problem(f"{SMALL} {CASES[name]}"),), (1.0,))
    (result,) = tuned([group])
    assert result.status in ("tuned", "kept"), result.reason
    assert result.best is not None
    assert result.rejected() == []
    assert result.best.backend == "cpu"
    entry = result.entry(fingerprint(CPU), "")
    assert Entry.from_json(entry.to_json()) == entry
    assert result.search is not None
    assert result.search.tried > 0
    assert set(entry.verified or ()) >= {str(t.tile) for t in result.search.trials[:1]}


def harmed(run: Run) -> Run:
    def wrong(call: Call) -> tuple[Tensor, Tensor | None]:
        out, lse = run(call)
        return out * 1.01, lse

    return wrong


def harmed_backward(run: RunBackward) -> RunBackward:
    def wrong(call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = run(call, saved)
        return dq, dk * 1.01, dv

    return wrong


@pytest.mark.parametrize("name", CASES)
def test_what_computes_wrong_numbers_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem(f"{SMALL} {CASES[name]}")
    backward = asked.direction == "bwd"
    backend = BACKENDS["blocked" if backward else "cpu"]
    method, harm = ("bind_backward", harmed_backward) if backward else ("bind", harmed)
    right = getattr(backend, method)
    monkeypatch.setattr(backend, method, lambda *a, **k: harm(right(*a, **k)))  # type: ignore[operator]
    tile = None if backward else Tile("cpu", 64, 128)
    runner = DeviceRunner(asked, CPU, seed=0)
    for checked in (runner.prepare, runner.verify):
        found = checked(Candidate(backend.name, tile))
        assert found.status == "wrong"
        assert ("dk" if backward else "out") in found.reason


def test_a_forward_that_is_wrong_feeds_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BACKENDS["cpu"].bind
    monkeypatch.setattr(BACKENDS["cpu"], "bind", lambda *a: harmed(right(*a)))
    (result,) = tuned([Group((problem(f"{SMALL} --seqlen 96 --direction bwd"),), (1.0,))])
    assert result.status == "unmeasured"
    assert "the forward that runs untuned is wrong: out is off" in result.reason


def test_a_recorded_model_is_tuned_in_every_direction(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    q, kv = torch.randn(12, 4, 16, requires_grad=True), torch.randn(12, 2, 16)
    cu_seqlens = torch.tensor([0, 3, 9, 12], dtype=torch.int32)
    with flashmoe.record_problems(path):
        out = flashmoe.flash_attn_varlen_func(q, kv, kv, cu_seqlens, cu_seqlens, 6, 6)
        out.sum().backward()
        caches = [torch.zeros(3, 64, 2, 16) for _ in range(2)]
        with torch.no_grad():
            for step in range(20):
                lengths = torch.tensor([step, 40, 2 * step], dtype=torch.int32)
                one = torch.randn(3, 1, 4, 16)
                flashmoe.flash_attn_with_kvcache(one, *caches, cache_seqlens=lengths)
    groups = grouped(shapes.read(path))
    kinds = {(group.main.direction, group.main.layout): group for group in groups}
    assert set(kinds) == {("fwd", "packed"), ("bwd", "packed"), ("fwd", "cache")}
    serving = kinds["fwd", "cache"]
    assert len(serving.problems) == 8
    assert sum(serving.weights) == pytest.approx(20)
    assert all(result.status in ("tuned", "kept") for result in tuned(groups, trials=2))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_suites_cover_forward_training_and_decode(kind: str) -> None:
    suite = SUITES[kind]
    assert len({problem.bucket for problem in suite}) == len(suite)
    assert {"fwd", "bwd"} == {problem.direction for problem in suite}
    assert any(problem.layout in ("cache", "paged") for problem in suite)
    if kind == "cuda":
        dense = [p for p in suite if p.layout == "dense" and p.direction == "fwd"]
        assert any(p.seqlen_q < 64 and p.batch * p.heads_q > 10_000 for p in dense), "short"
        assert any(p.batch * p.heads_q < 8 for p in dense), "few heads"
        assert any(p.seqlen_q * 8 < p.seqlen_kv and not p.mask.is_full for p in dense), "chunked"
        assert any(p.seqlen_kv * 8 < p.seqlen_q for p in dense), "cross attention"
