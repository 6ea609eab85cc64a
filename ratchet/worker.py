"""One fresh process of a bench: takes a job on stdin, answers one JSON object a line on stdout.

Started by `bench` as `python -m flashmoe.ratchet.worker`. A kernel that kills the process takes one
case down with it, not the run.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import flashmoe
from flashmoe import device as devices
from flashmoe.plan import make_plan
from flashmoe.quiet import measure_quietly
from flashmoe.ratchet.slow import delayed
from flashmoe.ratchet.suite import Case, parse
from flashmoe.ratchet.telemetry import Watch
from flashmoe.ratchet.workload import Workload
from flashmoe.timing import measure, measure_limits

Emit = Callable[[dict[str, Any]], None]


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
    """`job`: device, cases (names), rounds, warmup, seed. `first` also checks correctness and
    measures the device's limits. Optional, by case: `slow`, percent by which our calls are delayed,
    and `options` of flash_attn_func. `yardstick`: why ours cannot run, and SDPA alone is timed."""
    device = torch.device(job["device"])
    cases = [parse(name) for name in job["cases"]]
    emit(
        {
            "event": "start",
            "package": str(Path(flashmoe.__file__).resolve().parent),
            "fingerprint": devices.fingerprint(device).to_json(),
            "limits": _limits(cases, device) if job["first"] else {},
        }
    )
    for case in cases:
        emit({"event": "begin", "case": case.name})
        emit({"event": "case", "case": case.name, **_measure(case, device, job)})


def _limits(cases: Sequence[Case], device: torch.device) -> dict[str, dict[str, float]]:
    """Limits by the dtypes of the cases. A CPU's are always float32's: most have no 16-bit matrix
    units, where torch's own 16-bit matmul is a hundred times slower than any kernel here."""
    dtypes = sorted({case.problem.dtype for case in cases})
    if device.type == "cpu":
        return dict.fromkeys(dtypes, asdict(measure_limits(device, torch.float32)))
    return {dtype: asdict(measure_limits(device, getattr(torch, dtype))) for dtype in dtypes}


def _measure(case: Case, device: torch.device, job: dict[str, Any]) -> dict[str, Any]:
    try:
        options = job.get("options", {}).get(case.name)
        workload = Workload(case, device, job["seed"], options)
        workload.sdpa()
        sdpa_backend = workload.sdpa_backend()
    except Exception as error:  # noqa: BLE001 - a failure is a result
        return _answer(sdpa_status="failed", reason=f"{type(error).__name__}: {error}")
    if reason := job.get("yardstick"):
        return _yardstick(workload, device, job, reason)
    error_share: float | None = None
    plans: list[dict[str, str]] = []
    try:
        plans = _plans(case, device, options or {})
        if job["first"]:
            correctness = workload.check()
            error_share = correctness.error if math.isfinite(correctness.error) else None
            if correctness.reason:
                return _answer(ours_status="wrong", reason=correctness.reason, plans=plans)
        ours = delayed(workload.ours, device, job.get("slow", {}).get(case.name, 0.0))
    except Exception as error:  # noqa: BLE001 - a failure is a result
        reason = f"{type(error).__name__}: {error}"
        return _answer(ours_status="failed", reason=reason, plans=plans)
    watch = Watch(device)
    measured, disturbed = measure_quietly(
        {"ours": ours, "sdpa": workload.sdpa},
        device,
        rounds=job["rounds"],
        warmup=job["warmup"],
        seed=job["seed"],
        after_round=watch.look,
    )
    answer = _answer(plans=plans, error=error_share)
    answer["sdpa_backend"] = sdpa_backend
    answer["telemetry"] = watch.seen()
    answer["disturbed"] = disturbed or watch.throttled_share()
    for side, measurement in measured.items():
        # Six digits: a clock tells less, and files stay small.
        samples = [float(f"{x:.6g}") for x in measurement.samples]
        answer[side] = {
            "status": measurement.status,
            "reason": measurement.reason,
            "samples": samples,
        }
    return answer


def _yardstick(
    workload: Workload, device: torch.device, job: dict[str, Any], reason: str
) -> dict[str, Any]:
    """SDPA alone, where ours cannot run for `reason`."""
    rounds, warmup, seed = (job[name] for name in ("rounds", "warmup", "seed"))
    measured = measure({"sdpa": workload.sdpa}, device, rounds=rounds, warmup=warmup, seed=seed)[
        "sdpa"
    ]
    answer = _answer(ours_status="failed", reason=reason)
    answer["sdpa"]["samples"] = list(measured.samples)
    return {**answer, "sdpa_backend": workload.sdpa_backend()}


def _answer(
    ours_status: str = "ok",
    sdpa_status: str = "ok",
    reason: str = "",
    plans: Sequence[dict[str, str]] = (),
    error: float | None = None,
) -> dict[str, Any]:
    sides = {"ours": ours_status, "sdpa": sdpa_status}
    answer: dict[str, Any] = {
        side: {"status": status, "reason": reason if status != "ok" else "", "samples": []}
        for side, status in sides.items()
    }
    answer |= {"plans": list(plans), "error": error}
    return {**answer, "sdpa_backend": "", "disturbed": 0.0, "telemetry": None}


def _plans(case: Case, device: torch.device, options: Mapping[str, str]) -> list[dict[str, str]]:
    """What the calls run. The forward of a call that trains has to tell softmax_lse."""
    made = [make_plan(p, device, **options, need_lse=case.backward) for p in case.problems]
    return [
        {
            "direction": problem.direction,
            "backend": plan.backend,
            "tile": str(plan.tile or ""),
            "source": plan.source,
        }
        for problem, plan in zip(case.problems, made, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
