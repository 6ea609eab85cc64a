"""One fresh process of a bench: takes a job on stdin, answers one JSON object a line on stdout.

Started by `bench` as `python -m flashmoe.ratchet.measuring.worker`. A kernel that kills the process
takes one case down with it, not the run.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import flashmoe
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.quiet import measure_quietly
from flashmoe.measure.timing import Limits, measure, measure_limits
from flashmoe.ratchet.gate.stats import rounds_wanted
from flashmoe.ratchet.measuring.processes import answer
from flashmoe.ratchet.measuring.slow import delayed
from flashmoe.ratchet.measuring.suite import Case, parse
from flashmoe.ratchet.measuring.telemetry import Watch
from flashmoe.ratchet.measuring.workload import Workload

Emit = Callable[[dict[str, Any]], None]

# What the rounds of a process may leave uncertain of its figure, as a logarithm: 36 processes of an
# H200 differed by 0.1 to 0.7 %. A kernel of 10 us scattered by 8 % from round to round.
_ROUNDS_ERROR = 0.004
_MOST_ROUNDS = 10  # times those asked for


def main() -> int:
    # Whatever a library prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer, allow_nan=False) + "\n")
        answers.flush()

    job = json.load(sys.stdin)
    try:
        run(job, emit)
    except Exception as error:  # noqa: BLE001 - a failure is a result
        traceback.print_exc()
        emit({"event": "error", "reason": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def run(job: dict[str, Any], emit: Emit) -> None:
    """`job`: device, cases (names), rounds, visits, warmup, seed. `first` also checks correctness
    and measures the device's limits, and one that `adapts` takes more rounds where they scatter;
    `rounds_of` has, by case, how many those were. Optional, by case: `slow`, percent by which our
    calls are delayed, and `options` of flash_attn_func. `yardstick`: why ours cannot run, and SDPA
    alone is timed."""
    device = torch.device(job["device"])
    cases = [parse(name) for name in job["cases"]]
    limits = limits_of(cases, device) if job["first"] else {}
    emit(
        {
            "event": "start",
            "package": str(Path(flashmoe.__file__).resolve().parent),
            "fingerprint": fingerprint(device).to_json(),
            "limits": {dtype: asdict(rates) for dtype, rates in limits.items()},
        }
    )
    # Between two visits to a case come all the others: what disturbs a machine for a moment then
    # hits a few rounds of each case instead of all rounds of one.
    waiting = deque((case, "begin", _measure(case, device, job)) for case in cases)
    while waiting:
        case, event, steps = waiting.popleft()
        emit({"event": event, "case": case.name})
        if (told := next(steps)) is None:
            waiting.append((case, "again", steps))
        else:
            emit({"event": "case", "case": case.name, **told})


def limits_of(cases: Sequence[Case], device: torch.device) -> dict[str, Limits]:
    """Limits by the dtypes of the cases; a CPU's do not depend on them."""
    dtypes = sorted({case.problem.dtype for case in cases})
    if device.type == "cpu":
        return dict.fromkeys(dtypes, measure_limits(device, torch.float32))
    return {dtype: measure_limits(device, getattr(torch, dtype)) for dtype in dtypes}


def _measure(
    case: Case, device: torch.device, job: dict[str, Any]
) -> Iterator[dict[str, Any] | None]:
    """One visit to the case at each step: None while others are left, at last the answer."""
    try:
        options = job.get("options", {}).get(case.name)
        workload = Workload(case, device, job["seed"], options)
        workload.sdpa()
        sdpa_backend = workload.sdpa_backend()
    except Exception as error:  # noqa: BLE001 - a failure is a result
        yield answer(sdpa_status="failed", reason=f"{type(error).__name__}: {error}")
        return
    if reason := job.get("yardstick"):
        yield _yardstick(workload, device, job, reason)
        return
    error_share: float | None = None
    plans: list[dict[str, str]] = []
    try:
        workload.ours()  # first: an older build cannot plan what it does not have
        plans = _plans(case, device, options or {})
        if job["first"]:
            correctness = workload.check()
            error_share = correctness.error if math.isfinite(correctness.error) else None
            if correctness.reason:
                yield answer(ours_status="wrong", reason=correctness.reason, plans=plans)
                return
        ours = delayed(workload.ours, device, job.get("slow", {}).get(case.name, 0.0))
    except NotImplementedError as error:
        yield answer(ours_status="unsupported", reason=f"{case.kind}: {error}", plans=plans)
        return
    except Exception as error:  # noqa: BLE001 - a failure is a result
        reason = f"{case.kind}: {type(error).__name__}: {error}"
        yield answer(ours_status="failed", reason=reason, plans=plans)
        return
    watch = Watch(device)
    told = answer(plans=plans, error=error_share) | {"sdpa_backend": sdpa_backend}
    taken, disturbed = 0, 0.0
    wanted = job["rounds_of"].get(case.name, job["rounds"])
    decides = job["adapts"] and case.name not in job["rounds_of"]
    visits = deque(_visits(wanted, job["visits"]))
    while visits:
        rounds = visits.popleft()
        measured, share = measure_quietly(
            {"ours": ours, "sdpa": workload.sdpa},
            device,
            rounds=rounds,
            warmup=job["warmup"],
            seed=job["seed"] + taken,
            after_round=watch.look,
        )
        taken += rounds
        disturbed += share * rounds
        for side, measurement in measured.items():
            # Six digits: a clock tells less, and files stay small.
            told[side]["samples"] += [float(f"{x:.6g}") for x in measurement.samples]
            told[side] |= {"status": measurement.status, "reason": measurement.reason}
        if any(m.status != "ok" for m in measured.values()):
            break
        if not visits and decides:
            decides = False
            samples = told["ours"]["samples"], told["sdpa"]["samples"]
            more = min(rounds_wanted(*samples, _ROUNDS_ERROR), _MOST_ROUNDS * taken) - taken
            if more > 0:
                visits.append(more)
        if visits:
            yield None
    told["telemetry"] = watch.seen()
    told["disturbed"] = disturbed / taken or watch.throttled_share()
    yield told


def _visits(rounds: int, visits: int) -> list[int]:
    """How many of the rounds each visit takes, as evenly as can be; none takes no round."""
    visits = min(visits, rounds)
    return [rounds * (i + 1) // visits - rounds * i // visits for i in range(visits)]


def _yardstick(
    workload: Workload, device: torch.device, job: dict[str, Any], reason: str
) -> dict[str, Any]:
    """SDPA alone, where ours cannot run for `reason`."""
    rounds, warmup, seed = (job[name] for name in ("rounds", "warmup", "seed"))
    measured = measure({"sdpa": workload.sdpa}, device, rounds=rounds, warmup=warmup, seed=seed)[
        "sdpa"
    ]
    told = answer("failed", reason=reason)
    told["sdpa"]["samples"] = list(measured.samples)
    return {**told, "sdpa_backend": workload.sdpa_backend()}


def _plans(case: Case, device: torch.device, options: Mapping[str, str]) -> list[dict[str, str]]:
    """What the calls run. The forward of a call that trains has to tell softmax_lse."""
    # In the words of the build that is measured, which may be older than this harness. No plan
    # depends on lengths.
    problems = [
        flashmoe.Problem.from_json(replace(problem, lengths=()).to_json())
        for problem in case.problems
    ]
    made = [
        flashmoe.make_plan(problem, device, **options, need_lse=case.backward)
        for problem in problems
    ]
    return [
        {
            "direction": problem.direction,
            "backend": plan.backend,
            "tile": str(plan.tile or ""),
            "source": plan.source,
        }
        for problem, plan in zip(problems, made, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
