"""Measuring: what becomes of a case that is wrong, fails or kills its process."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashmoe.measure import timing
from flashmoe.measure.fingerprint import Fingerprint
from flashmoe.measure.timing import Limits, Measurement
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.measuring import processes, worker, workload
from flashmoe.ratchet.measuring.processes import Source
from flashmoe.ratchet.measuring.run import Settings, bench
from flashmoe.ratchet.measuring.suite import parse
from flashmoe.ratchet.results import files
from flashmoe.ratchet.results.values import CaseResult
from flashmoe.ratchet.sota import providers
from flashmoe.spec.call import Call

GOOD, BAD = "fwd-b1-h2-s40-d16-float32", "fwd-b1-h4k2-s33-d24-float32-causal"
NAMES = ("out", "dq", "dk", "dv")
SETTINGS = Settings(
    "cpu",
    rounds=4,
    visits=2,
    warmup=1,
    least=3,
    most=3,
    precision=1.0,
    budget=1e9,
    seed=7,
    suite="",
)
FINGERPRINT = json.dumps(dict.fromkeys(Fingerprint.__dataclass_fields__, "x"))

FAKE = """
import json, os, signal, sys, time
job = json.load(sys.stdin)
def emit(**answer): print(json.dumps(answer), flush=True)
emit(event="start", package="/elsewhere/flashmoe", fingerprint=FINGERPRINT, limits={})
for name in job["cases"]:
    emit(event="begin", case=name)
    if name == BAD:
        print("something native went wrong", file=sys.stderr, flush=True)
        DIE
    rounds = job["rounds_of"].get(name, job["rounds"] + MORE * job["first"] * (name == BAD))
    times = [1e-3 * (1 + NOISE * (job["seed"] % 5))] * rounds
    ours = {"status": "ok", "reason": "", "samples": times}
    sdpa = {"status": "ok", "reason": "", "samples": [1e-3] * rounds}
    emit(event="case", case=name, ours=ours, sdpa=sdpa, plans=[], error=None,
         sdpa_backend="math", disturbed=DISTURBED, telemetry=None)
LAST
"""


def fake(folder: Path, name: str = "this", **changes: str) -> Source:
    """A worker that ends by `DIE` when it comes to case BAD, with times that differ by NOISE from
    one seed to the next."""
    values = {"FINGERPRINT": FINGERPRINT, "DIE": "pass", "NOISE": "0", "LAST": "pass"}
    values |= {"DISTURBED": "0", "MORE": "0"}
    text = FAKE
    for key, value in {**values, **changes, "BAD": repr(BAD)}.items():
        text = text.replace(key, value)
    script = folder / f"{name}.py"
    script.write_text(text)
    return Source(name, (sys.executable, str(script)))


def measured(
    *sources: Source, names: tuple[str, ...] = (GOOD, BAD), settings: Settings = SETTINGS
) -> list[dict[str, CaseResult]]:
    lines: list[str] = []
    cases = [parse(name) for name in names]
    runs = bench(cases, settings, "command", lines.append, sources=sources)
    return [run.by_name() for run in runs]


def processes_of(cases: dict[str, CaseResult]) -> dict[str, int]:
    return {name: len(case.ours.samples) for name, case in cases.items()}


def test_a_killed_process_costs_one_case(tmp_path: Path) -> None:
    (cases,) = measured(fake(tmp_path, DIE="os.kill(os.getpid(), signal.SIGSEGV)"))
    assert cases[BAD].ours.status == "failed"
    assert cases[BAD].reason == (
        "failed: the process was killed by SIGSEGV: something native went wrong"
    )
    assert cases[GOOD].ok
    assert [len(process) for process in cases[GOOD].ours.samples] == [4, 4, 4]


def test_a_process_killed_on_a_later_visit_costs_the_case_it_was_at(tmp_path: Path) -> None:
    die = 'emit(event="begin", case=OTHER); emit(event="again", case=name); os._exit(3)'
    (cases,) = measured(fake(tmp_path, DIE=die.replace("OTHER", repr(GOOD))), names=(BAD, GOOD))
    assert "ended with exit code 3" in cases[BAD].reason
    assert cases[GOOD].ok


def test_an_exit_within_a_case_costs_that_case(tmp_path: Path) -> None:
    (cases,) = measured(fake(tmp_path, DIE="os._exit(3)"))
    assert "ended with exit code 3: something native" in cases[BAD].reason


@pytest.mark.parametrize(
    ("last", "how"),
    [
        ("os._exit(3)", "ended with exit code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("os.kill(os.getpid(), 40)", "was killed by signal 40"),
        ("print('{\"event\": \"ca', end='', flush=True); os._exit(3)", "ended with exit code 3"),
    ],
)
def test_a_process_that_dies_after_its_last_case_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], last: str, how: str
) -> None:
    (cases,) = measured(fake(tmp_path, LAST=last))
    assert cases[GOOD].ok
    assert cases[BAD].ok
    note = f"note: a worker {how}: something native went wrong, after it had measured everything"
    assert capsys.readouterr().err.splitlines() == [note] * SETTINGS.least


@pytest.mark.parametrize("how", ["os._exit(3)", "os._exit(0)"])
def test_half_a_line_is_no_answer(tmp_path: Path, how: str) -> None:
    (cases,) = measured(fake(tmp_path, DIE=f"print('{{\"event\"', end='', flush=True); {how}"))
    assert cases[BAD].reason.startswith("failed: the process ended ")
    assert cases[GOOD].ok


def test_a_process_that_forgets_cases_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a worker ended before it had measured everything"):
        measured(fake(tmp_path, DIE="continue"), names=(BAD, GOOD))


def test_a_case_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_SILENCE", 0.5)
    (cases,) = measured(fake(tmp_path, DIE="signal.pause()"))
    assert cases[BAD].ours.status == "timeout"
    assert "the process said nothing for 0 seconds" in cases[BAD].reason
    assert cases[GOOD].ok


def test_a_worker_of_another_commit_may_tell_more_but_not_less(tmp_path: Path) -> None:
    told = json.loads(FINGERPRINT)
    (cases,) = measured(fake(tmp_path, FINGERPRINT=json.dumps({**told, "ecc": "on"})))
    assert cases[GOOD].ok
    del told["torch"]
    with pytest.raises(UserError, match="this: its worker tells no torch of the machine"):
        measured(fake(tmp_path, FINGERPRINT=json.dumps(told)))


def test_a_worker_that_cannot_start_is_the_users_to_know(tmp_path: Path) -> None:
    absent = Source("this", (sys.executable, str(tmp_path / "absent.py")))
    with pytest.raises(UserError, match=r"a worker ended with exit code 2: .*No such file"):
        measured(absent)


def test_a_change_of_kernels_meanwhile_is_noticed(tmp_path: Path) -> None:
    other = FINGERPRINT.replace('"kernels": "x"', '"kernels": "y" if job["first"] else "x"')
    with pytest.raises(UserError, match=r"changed meanwhile \(kernels: 'y' here, 'x' there\)"):
        measured(fake(tmp_path, FINGERPRINT=other))


def test_processes_see_the_cases_in_different_orders() -> None:
    cases = [parse(f"fwd-b{b}-h2-s40-d16-float32") for b in range(1, 9)]
    jobs = [SETTINGS.job(process, cases, {}) for process in range(3)]
    orders = [job["cases"] for job in jobs]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert [job["first"] for job in jobs] == [True, False, False]


def test_every_process_takes_the_rounds_that_the_first_found_needed(tmp_path: Path) -> None:
    sources = fake(tmp_path, "base", MORE="3"), fake(tmp_path, "head", MORE="5")
    runs = measured(*sources)
    for side in ("ours", "sdpa"):
        rounds = [[len(x) for x in getattr(cases[BAD], side).samples] for cases in runs]
        # Whichever source came first.
        assert rounds in ([[7, 7, 7]] * 2, [[9, 9, 9]] * 2)
    assert [len(x) for x in runs[0][GOOD].ours.samples] == [4, 4, 4]


def test_more_processes_are_asked_until_the_interval_is_narrow(tmp_path: Path) -> None:
    adaptive = replace(SETTINGS, most=12)
    (quiet,) = measured(fake(tmp_path), settings=adaptive)
    assert processes_of(quiet) == {GOOD: 3, BAD: 3}
    (noisy,) = measured(fake(tmp_path, NOISE="0.02 * (name == BAD)"), settings=adaptive)
    assert processes_of(noisy) == {GOOD: 3, BAD: 12}
    (settled,) = measured(fake(tmp_path, NOISE="0.02"), settings=replace(adaptive, precision=4))
    assert 3 < processes_of(settled)[BAD] < 12


def test_the_budget_ends_it_but_not_before_the_least(tmp_path: Path) -> None:
    hasty = replace(SETTINGS, most=12, budget=1e-9)
    (cases,) = measured(fake(tmp_path, NOISE="0.02"), settings=hasty)
    assert processes_of(cases) == {GOOD: 3, BAD: 3}


def test_disturbed_processes_are_replaced(tmp_path: Path) -> None:
    worker = fake(tmp_path, DISTURBED="0.5 * (job['seed'] in (8, 9)) + 0.1", NOISE="0.1")
    (cases,) = measured(worker)
    # Seeds 7, 10 and 11 of 7 to 11; times tell which.
    assert cases[GOOD].disturbed == 0.1
    assert [p[0] for p in cases[GOOD].ours.samples] == pytest.approx([1.2e-3, 1.0e-3, 1.1e-3])


def test_where_nothing_is_quiet_the_least_disturbed_count(tmp_path: Path) -> None:
    worker = fake(tmp_path, DISTURBED="0.3 + 0.1 * (job['seed'] % 5)", NOISE="0.1")
    (cases,) = measured(worker)
    # Six processes, seeds 7 to 12; 10, 11 and (7 or 12) are disturbed least.
    assert processes_of(cases)[GOOD] == 3
    assert [p[0] for p in cases[GOOD].ours.samples] == pytest.approx([1.0e-3, 1.1e-3, 1.2e-3])


def test_sides_take_turns_in_random_order(tmp_path: Path) -> None:
    a, b = fake(tmp_path, "a"), fake(tmp_path, "b", NOISE="0.5 * (name == BAD)")
    sources = replace(a, commit="aaa"), replace(b, commit="bbb")
    heard: list[str] = []
    settings = replace(SETTINGS, least=8, most=8)
    runs = bench([parse(GOOD)], settings, "c", heard.append, sources=sources)
    assert [run.commit for run in runs] == ["aaa", "bbb"]
    assert runs[0].run != runs[1].run
    pairs = [(x[0], y[0]) for x, y in zip(heard[::2], heard[1::2], strict=True)]
    assert set(pairs) == {("a", "b"), ("b", "a")}
    assert all(x.startswith(f"{x[0]}, process {n // 2 + 1}: ") for n, x in enumerate(heard))


def test_sides_are_measured_equally_often(tmp_path: Path) -> None:
    a, b = fake(tmp_path, "a"), fake(tmp_path, "b", NOISE="0.02 * (name == BAD)")
    quiet, noisy = measured(a, b, settings=replace(SETTINGS, most=9))
    assert processes_of(quiet) == processes_of(noisy) == {GOOD: 3, BAD: 9}


def test_a_side_that_imports_another_build_is_noticed(tmp_path: Path) -> None:
    source = replace(fake(tmp_path), folder=str(tmp_path))
    with pytest.raises(UserError, match="this: /elsewhere/flashmoe was imported, not the one in"):
        measured(source)


def test_on_a_gpu_the_next_worker_starts_ahead(tmp_path: Path) -> None:
    (cases,) = measured(fake(tmp_path), settings=replace(SETTINGS, device="cuda"))
    assert processes_of(cases) == {GOOD: 3, BAD: 3}


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"warmup": -1}, {"processes": 0}])
def test_bad_settings(bad: dict[str, int]) -> None:
    name = next(iter(bad))
    field = {"processes": "least"}.get(name, name)
    with pytest.raises(UserError, match=f"{name} must be at least"):
        replace(SETTINGS, **{field: bad[name]})
    for field in ("precision", "budget"):
        with pytest.raises(UserError, match=f"{field} must be positive, got 0"):
            replace(SETTINGS, **{field: 0})


@pytest.fixture(autouse=True)
def _no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process: they take longer than what is tested here."""
    monkeypatch.setattr(timing, "measure_limits", lambda *_: Limits(1e12, 1e11))


def run_worker(*names: str, first: bool = True, **more: Any) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    job = {"cases": names, "device": "cpu", "rounds": 2, "visits": 2, "warmup": 0, "seed": 0}
    job |= {"first": first, "rounds_of": {}, "adapts": False, **more}
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
        "bwd-b2-h4k2-s33x65-d24-float32-causal-softcap-alibi-sink",
        "bwd-b4-h2-s64-d24-float32-window-7-0-packed",
        "fwd-b8-h2-s64-d24-float32-sink-packed",
        "fwd-b2-h4k2-s3x170-d16-float32-causal-softcap-paged",
        "fwd-b3-h4k2-s1x70-d16-bfloat16-cache",
        "fwd-b4-h4k2-s16x70-d16-float32-window-20-0-packed-paged",
        "fwdbwd-b1-h2-s40-d16-bfloat16",
    ],
)
def test_a_case_is_checked_and_timed(name: str) -> None:
    (answer,) = run_worker(name)
    assert answer["ours"]["status"] == answer["sdpa"]["status"] == "ok", answer
    assert len(answer["ours"]["samples"]) == len(answer["sdpa"]["samples"]) == 2
    assert 0 <= answer["error"] <= 1
    assert [plan["direction"] for plan in answer["plans"]] == list(parse(name).directions)
    assert all(plan["backend"] for plan in answer["plans"])
    assert answer["sdpa_backend"] in ("flash_attention", "math")
    assert answer["telemetry"] is None


@pytest.mark.parametrize(
    ("rounds", "visits", "each"), [(5, 2, [2, 3]), (2, 9, [1, 1]), (3, 1, [3])]
)
def test_a_case_is_visited_again_when_the_others_had_their_turn(
    monkeypatch: pytest.MonkeyPatch, rounds: int, visits: int, each: list[int]
) -> None:
    taken: list[int] = []

    def measure(calls: object, device: object, *, rounds: int, **_: Any) -> Any:
        taken.append(rounds)
        times = tuple(float(len(taken)) for _ in range(rounds))
        return {side: Measurement("ok", times) for side in ("ours", "sdpa")}, 0.25 * len(taken)

    monkeypatch.setattr(worker, "measure_quietly", measure)
    answers: list[dict[str, Any]] = []
    job = {"cases": [GOOD, BAD], "device": "cpu", "warmup": 0, "seed": 0, "first": False}
    job |= {"rounds_of": {}, "adapts": False}
    worker.run({**job, "rounds": rounds, "visits": visits}, answers.append)
    assert taken == [x for x in each for _ in range(2)]
    begun = [(a["event"], a["case"]) for a in answers if a["event"] in ("begin", "again")]
    events = ["begin", *["again"] * (len(each) - 1)]
    assert begun == [(event, case) for event in events for case in (GOOD, BAD)]
    good, bad = (a for a in answers if a["event"] == "case")
    for answer, first in ((good, 1), (bad, 2)):
        visit = [first + 2 * i for i in range(len(each))]
        samples = [float(v) for v, n in zip(visit, each, strict=True) for _ in range(n)]
        assert answer["ours"]["samples"] == answer["sdpa"]["samples"] == samples
        share = sum(0.25 * v * n for v, n in zip(visit, each, strict=True)) / rounds
        assert answer["disturbed"] == pytest.approx(share)


def test_rounds_that_scatter_are_followed_by_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def measure(calls: object, device: object, *, rounds: int, **_: Any) -> Any:
        ours = tuple(np.exp(0.02 * rng.standard_normal(rounds)))
        return {"ours": Measurement("ok", ours), "sdpa": Measurement("ok", (1.0,) * rounds)}, 0.0

    monkeypatch.setattr(worker, "measure_quietly", measure)

    def taken(**more: Any) -> int:
        (answer,) = run_worker(GOOD, **{"rounds": 20, "visits": 1, "adapts": True, **more})
        assert len(answer["ours"]["samples"]) == len(answer["sdpa"]["samples"])
        return len(answer["ours"]["samples"])

    assert 20 < taken() <= 100  # about 39: twenty rounds tell the spread to a third
    assert taken(adapts=False) == 20
    assert taken(rounds_of={GOOD: 31}) == 31
    assert taken(rounds=2) <= 20
    assert taken(rounds=200) == 200


def test_options_choose_what_runs() -> None:
    options = {GOOD: {"backend": "sdpa"}}
    (answer,) = run_worker(GOOD, options=options)
    assert answer["ours"]["status"] == "ok", answer
    assert answer["plans"][0]["backend"] == "sdpa"


@pytest.mark.parametrize(
    "name",
    [
        *(GOOD, BAD, "fwdbwd-b1-h2-s40-d16-bfloat16", "bwd-b4-h4k2-s32-d24-float32-causal-packed"),
        "fwd-b2-h4k2-s3x170-d16-float32-causal-paged",
    ],
)
def test_a_wrong_result_is_found_and_named(name: str) -> None:
    case = parse(name)
    load = workload.Workload(case, torch.device("cpu"), 0)
    assert load.check().reason == ""
    right = tuple(x.detach() for x in load.ours())
    for i, result in enumerate(right):
        for where in (0, result.numel() - 1):
            wrong = [x.clone() for x in right]
            wrong[i].view(-1)[where] += 8.0
            load.__dict__["ours"] = lambda wrong=wrong: wrong
            assert load.check().reason.startswith(f"{case.kind}: {NAMES[i]} is off by")


@pytest.mark.parametrize(
    ("broken", "status", "reason"),
    [
        (lambda q, *_: q.clone(), "wrong", "out is off by"),
        (
            lambda q, *_: torch.full_like(q, float("nan")),
            "wrong",
            "out holds values that are not finite",
        ),
        (lambda *_: 1 / 0, "failed", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_result_is_never_timed(
    monkeypatch: pytest.MonkeyPatch, broken: Any, status: str, reason: str
) -> None:
    monkeypatch.setattr("flashmoe.flash_attn_func", broken)
    (answer,) = run_worker(GOOD)
    assert answer["ours"]["status"] == status
    assert answer["ours"]["reason"].startswith(f"forward: {reason}")
    assert answer["ours"]["samples"] == answer["sdpa"]["samples"] == []


def refuses(*_: object, **given: object) -> None:
    raise NotImplementedError(f"softcap must be 0.0, got {given['softcap']}")


@pytest.mark.parametrize(
    ("older", "name", "reason"),
    [
        (None, "bwd-b2-h2-s32-d16-float32-packed", "flashmoe has no flash_attn_varlen_func"),
        (lambda q, k, v: q, f"{GOOD}-softcap", "flash_attn_func has no argument softcap"),
        (lambda q, k, v, softcap: refuses(softcap=softcap), f"{GOOD}-softcap", "softcap must be"),
    ],
)
def test_what_an_older_build_lacks_is_unsupported(
    monkeypatch: pytest.MonkeyPatch, older: Any, name: str, reason: str
) -> None:
    """As `ab` finds it: no failure of that build."""
    if older is None:
        monkeypatch.delattr("flashmoe.flash_attn_varlen_func")
    else:
        monkeypatch.setattr("flashmoe.flash_attn_func", older)
    (answer,) = run_worker(name)
    assert answer["ours"]["status"] == "unsupported"
    assert answer["ours"]["reason"].startswith(f"{parse(name).kind}: {reason}")
    assert answer["plans"] == answer["ours"]["samples"] == []


def test_a_yardstick_that_fails_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "torch_sdpa", lambda *_, **__: 1 / 0)
    (answer,) = run_worker(GOOD)
    assert answer["sdpa"]["status"] == "failed"
    assert answer["ours"]["status"] == "ok"


def test_the_yardstick_is_torchs_own_whatever_bears_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """People give torch.nn.functional's name to ours."""
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention", lambda *_, **__: pytest.fail("not this")
    )
    (answer,) = run_worker(GOOD)
    assert answer["sdpa"]["status"] == "ok", answer
    case, q = parse(GOOD), torch.randn(1, 40, 2, 16)
    call = Call(q, q, q, 0.25)
    (attend,) = (p.make(case, call) for p in providers.PROVIDERS if p.name == "sdpa-math")
    attend(*(x.transpose(1, 2) for x in call[:3]))


def test_the_yardstick_alone(tmp_path: Path) -> None:
    """Where ours does not build, SDPA's times are on record all the same."""
    (answer,) = run_worker(GOOD, yardstick="the build failed")
    assert (answer["ours"]["status"], answer["ours"]["reason"]) == ("failed", "the build failed")
    assert len(answer["sdpa"]["samples"]) == 2
    settings = replace(SETTINGS, least=1, most=1)
    source = Source("this", job={"yardstick": "the build failed"})
    (results,) = bench([parse(GOOD)], settings, "command", lambda line: None, sources=(source,))
    files.save(results, tmp_path / "current.json")
    (case,) = files.load(tmp_path / "current.json").cases
    assert case.reason == "failed: the build failed"
    assert [len(process) for process in case.sdpa.samples] == [4]
    assert case.sdpa_backend
