"""Measuring: what becomes of a case that is wrong, fails or kills its process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmoe.ratchet import bench as module
from flashmoe.ratchet import worker, workload
from flashmoe.ratchet.bench import Settings, bench
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.suite import parse

GOOD, BAD = "fwd-b1-h2-s40-d16-float32", "fwd-b1-h4k2-s33-d24-float32-causal"
NAMES = ("out", "dq", "dk", "dv")
SETTINGS = Settings("cpu", rounds=10, warmup=3, processes=3, seed=7, suite="")
FINGERPRINT = json.dumps(dict.fromkeys(module.Fingerprint.__dataclass_fields__, "x"))

FAKE = """
import json, os, signal, sys
job = json.load(sys.stdin)
def emit(**answer): print(json.dumps(answer), flush=True)
emit(event="start", fingerprint=FINGERPRINT, limits={})
for name in job["cases"]:
    emit(event="begin", case=name)
    if name == BAD:
        print("something native went wrong", file=sys.stderr, flush=True)
        DIE
    series = {"status": "ok", "reason": "", "samples": [1e-3] * job["rounds"]}
    emit(event="case", case=name, ours=series, sdpa=series, plans=[], error=None, disturbed=0)
"""


def fake_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, die: str) -> None:
    """Workers that end by `die` when they come to case BAD."""
    text = FAKE.replace("FINGERPRINT", FINGERPRINT).replace("BAD", repr(BAD)).replace("DIE", die)
    script = tmp_path / "worker.py"
    script.write_text(text)
    monkeypatch.setattr(module, "WORKER", (sys.executable, str(script)))


def measured(names: tuple[str, ...] = (GOOD, BAD)) -> dict[str, Any]:
    results = bench([parse(name) for name in names], SETTINGS, "command", lambda line: None)
    return results.by_name()


def test_a_killed_process_costs_one_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_worker(monkeypatch, tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")
    cases = measured()
    assert cases[BAD].ours.status == "failed"
    assert cases[BAD].reason == (
        "failed: the process was killed by SIGSEGV: something native went wrong"
    )
    assert cases[GOOD].ok
    assert [len(process) for process in cases[GOOD].ours.samples] == [4, 4, 4]


def test_an_exit_within_a_case_costs_that_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_worker(monkeypatch, tmp_path, "os._exit(3)")
    assert "ended with exit code 3: something native" in measured()[BAD].reason


def test_a_worker_that_cannot_start_is_the_users_to_know(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "WORKER", (sys.executable, str(tmp_path / "absent.py")))
    with pytest.raises(UserError, match=r"a worker ended with exit code 2: .*No such file"):
        measured()


def test_a_change_of_kernels_meanwhile_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_worker(monkeypatch, tmp_path, "pass")
    script = tmp_path / "worker.py"
    other = FINGERPRINT.replace('"kernels": "x"', '"kernels": "y" if job["first"] else "x"')
    script.write_text(script.read_text().replace(FINGERPRINT, other))
    with pytest.raises(UserError, match=r"changed meanwhile \(kernels: 'y' here, 'x' there\)"):
        measured()


def test_processes_see_the_cases_in_different_orders() -> None:
    cases = [parse(f"fwd-b{b}-h2-s40-d16-float32") for b in range(1, 9)]
    orders = [SETTINGS.job(process, cases)["cases"] for process in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert [SETTINGS.job(process, cases)["first"] for process in range(3)] == [True, False, False]


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"warmup": -1}, {"processes": 0}])
def test_bad_settings(bad: dict[str, int]) -> None:
    numbers = {"rounds": 1, "warmup": 0, "processes": 1, **bad}
    with pytest.raises(UserError, match=f"{next(iter(bad))} must be at least"):
        Settings("cpu", **numbers, seed=0, suite="quick")


def run_worker(*names: str, first: bool = True) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    job = {"cases": names, "device": "cpu", "rounds": 2, "warmup": 0, "seed": 0, "first": first}
    worker.run(job, answers.append)
    return [answer for answer in answers if answer["event"] == "case"]


@pytest.mark.parametrize(
    "name",
    [
        GOOD,
        BAD,
        "fwd-b2-h2-s17x65-d40-float32",
        "fwd-b1-h2-s40-d16-bfloat16",
        "fwd-b1-h2-s40-d16-float16-causal",
        "fwdbwd-b2-h4k2-s33-d24-float32-causal",
        "fwdbwd-b1-h2-s40-d16-bfloat16",
    ],
)
def test_a_case_is_checked_and_timed(name: str) -> None:
    (answer,) = run_worker(name)
    assert answer["ours"]["status"] == answer["sdpa"]["status"] == "ok", answer
    assert len(answer["ours"]["samples"]) == len(answer["sdpa"]["samples"]) == 2
    assert 0 <= answer["error"] <= 1
    directions = ["fwd", "bwd"] if name.startswith("fwdbwd") else ["fwd"]
    assert [plan["direction"] for plan in answer["plans"]] == directions
    assert all(plan["backend"] for plan in answer["plans"])


@pytest.mark.parametrize("name", [GOOD, BAD, "fwdbwd-b1-h2-s40-d16-bfloat16"])
def test_pieces_see_every_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """However the check cuts a case to fit in memory, one wrong element anywhere is found."""
    case = parse(name)
    for limit in (1 << 25, 1):
        monkeypatch.setattr(workload, "_MAX_SCORES", limit)
        load = workload.Workload(case, torch.device("cpu"), 0)
        assert load.check().reason == ""
        right = tuple(x.detach() for x in load.ours())
        for i, result in enumerate(right):
            for where in (0, result.numel() - 1):
                wrong = [x.clone() for x in right]
                wrong[i].view(-1)[where] += 8.0
                monkeypatch.setattr(load, "ours", lambda wrong=wrong: wrong, raising=False)
                assert f"{NAMES[i]} is off by" in load.check().reason


@pytest.mark.parametrize(
    ("broken", "status", "reason"),
    [
        (lambda q, *_, **__: q.clone(), "wrong", "out is off by"),
        (lambda q, *_, **__: torch.full_like(q, float("nan")), "wrong", "out is not finite"),
        (lambda *_, **__: 1 / 0, "failed", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_result_is_never_timed(
    monkeypatch: pytest.MonkeyPatch, broken: Any, status: str, reason: str
) -> None:
    monkeypatch.setattr("flashmoe.flash_attn_func", broken)
    (answer,) = run_worker(GOOD)
    assert answer["ours"]["status"] == status
    assert answer["ours"]["reason"].startswith(reason)
    assert answer["ours"]["samples"] == answer["sdpa"]["samples"] == []


def test_a_yardstick_that_fails_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", lambda *_, **__: 1 / 0)
    (answer,) = run_worker(GOOD)
    assert answer["sdpa"]["status"] == "failed"
    assert answer["ours"]["status"] == "ok"
