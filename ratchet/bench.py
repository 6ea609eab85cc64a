"""`bench`: measures every case in several fresh processes and puts the samples together."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from flashmoe.device import Fingerprint
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.results import CaseResult, PlanUsed, Results, Series
from flashmoe.ratchet.suite import Case
from flashmoe.timing import Limits

Answer = dict[str, Any]
# A process's share of disturbed rounds (see `quiet`) from which another one is asked as well.
_DISTURBED = 0.2
# Processes asked at most, for each one wanted.
_MOST_PROCESSES = 2
WORKER = (sys.executable, "-m", "flashmoe.ratchet.worker")


@dataclass(frozen=True, slots=True)
class Settings:
    """`rounds` and `warmup` are totals of a case, spread evenly over `processes` (rounded up)."""

    device: str
    rounds: int
    warmup: int
    processes: int
    seed: int
    suite: str

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("warmup", 0), ("processes", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def job(self, process: int, cases: Sequence[Case]) -> dict[str, Any]:
        """What process number `process` is told to do, the cases in an order of its own."""
        names = [case.name for case in cases]
        random.Random(self.seed + process).shuffle(names)
        return {
            "device": self.device,
            "cases": names,
            "rounds": -(-self.rounds // self.processes),
            "warmup": -(-self.warmup // self.processes),
            "seed": self.seed + process,
            "first": process == 0,
        }


@dataclass(slots=True)
class _Collected:
    """One case's answers so far, a process after another."""

    case: Case
    answers: list[Answer] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        return any(a[side]["status"] != "ok" for a in self.answers for side in ("ours", "sdpa"))

    def quiet(self) -> int:
        """How many processes could measure this case without much disturbance."""
        return sum(answer["disturbed"] <= _DISTURBED for answer in self.answers)

    def result(self, processes: int) -> CaseResult:
        """From the `processes` least disturbed processes."""
        ours, sdpa = (self._status(side) for side in ("ours", "sdpa"))
        first = self.answers[0]
        disturbed = 0.0
        if ours.status == sdpa.status == "ok":
            # Stable: among the equally quiet the earlier ones.
            kept = sorted(self.answers, key=lambda answer: float(answer["disturbed"]))[:processes]
            disturbed = sum(answer["disturbed"] for answer in kept) / processes
            ours, sdpa = (
                Series("ok", tuple(tuple(answer[side]["samples"]) for answer in kept))
                for side in ("ours", "sdpa")
            )
        # Otherwise half a case is no figure: without a partner a sample means nothing.
        plans = tuple(PlanUsed(**plan) for plan in first["plans"])
        return CaseResult(self.case, ours, sdpa, plans, first["error"], round(disturbed, 4))

    def _status(self, side: str) -> Series:
        for answer in self.answers:
            if answer[side]["status"] != "ok":
                return Series(answer[side]["status"], (), answer[side]["reason"])
        return Series("ok")


def bench(
    cases: Sequence[Case],
    settings: Settings,
    command: str,
    progress: Callable[[str], None],
    debug: bool = False,
) -> Results:
    """Measure `cases`. `progress` hears a line before each case of each process. A case that is
    wrong, fails or kills its process has that as its result, and the others go on. Where other
    programs disturbed a process, another one measures those cases again, up to twice as many in
    all, and the least disturbed ones count.

    Raises UserError when no process can start measuring at all, saying why.
    """
    begun, started = time.monotonic(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    collected = {case.name: _Collected(case) for case in cases}
    fingerprint: Fingerprint | None = None
    limits: dict[str, Limits] = {}
    for process in range(_MOST_PROCESSES * settings.processes):
        left = [
            item.case
            for item in collected.values()
            if not item.broken and item.quiet() < settings.processes
        ]
        if not left:
            break
        heading = f"process {process + 1} of {settings.processes}"
        if process >= settings.processes:
            heading = "the machine is busy, again"
        for answer in _answers(settings.job(process, left), debug):
            if answer["event"] == "start":
                fingerprint = fingerprint or Fingerprint(**answer["fingerprint"])
                if changed := fingerprint.differences(
                    answer["fingerprint"], tuple(answer["fingerprint"])
                ):
                    raise UserError(
                        f"what is measured changed meanwhile ({'; '.join(changed)}): run it again"
                    )
                for dtype, rates in answer["limits"].items():
                    limits[dtype] = _larger(limits.get(dtype), Limits(**rates))
            elif answer["event"] == "begin":
                progress(f"{heading}: {answer['case']}")
            else:
                collected[answer["case"]].answers.append(answer)
    assert fingerprint is not None, "a process that starts tells its fingerprint"
    return Results(
        started,
        round(time.monotonic() - begun, 3),
        command,
        {
            "suite": settings.suite,
            "device": settings.device,
            "rounds": settings.rounds,
            "warmup": settings.warmup,
            "processes": settings.processes,
            "seed": settings.seed,
        },
        fingerprint,
        limits,
        tuple(item.result(settings.processes) for item in collected.values()),
    )


def _larger(a: Limits | None, b: Limits) -> Limits:
    """What the device sustains is the most that any process saw it sustain."""
    if a is None:
        return b
    return Limits(max(a.matmul_flops, b.matmul_flops), max(a.copy_bytes, b.copy_bytes))


def _answers(job: dict[str, Any], debug: bool) -> Iterator[Answer]:
    """The answers of one worker; where it dies within a case, that case's is `failed` and another
    worker does the rest."""
    left = list(job["cases"])
    while left:
        current: str | None = None
        with tempfile.TemporaryFile("w+") as log:
            worker = subprocess.Popen(
                WORKER,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if debug else log,
                text=True,
            )
            try:
                assert worker.stdin is not None
                assert worker.stdout is not None
                with worker.stdin:
                    worker.stdin.write(json.dumps({**job, "cases": left}))
                for line in worker.stdout:
                    answer = json.loads(line)
                    if answer["event"] == "error":
                        raise UserError(f"a worker could not measure: {answer['reason']}")
                    current = answer["case"] if answer["event"] == "begin" else None
                    if answer["event"] == "case":
                        left.remove(answer["case"])
                    yield answer
                code = worker.wait()
            finally:
                worker.kill()
                worker.wait()
                assert worker.stdout is not None
                worker.stdout.close()
            if code == 0:
                return
            log.seek(0)
            lines = log.read().strip().splitlines()
        how = _death(code) + (f": {lines[-1].strip()}" if lines else "")
        if current is None:
            raise UserError(f"a worker {how}")
        left.remove(current)
        broken = {"status": "failed", "reason": f"the process {how}", "samples": []}
        # A worker dies in our code or in SDPA; ours is the one under test.
        sdpa = {"status": "ok", "reason": "", "samples": []}
        yield {
            "event": "case",
            "case": current,
            "ours": broken,
            "sdpa": sdpa,
            "plans": [],
            "error": None,
            "disturbed": 0.0,
        }


def _death(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
