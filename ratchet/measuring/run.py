"""`bench`: measures every case in several fresh processes and puts the samples together."""

from __future__ import annotations

import math
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from flashmoe.measure.fingerprint import Fingerprint
from flashmoe.measure.timing import HOW, Limits
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate import stats
from flashmoe.ratchet.measuring.processes import Answer, Process, Source, answers
from flashmoe.ratchet.measuring.suite import Case
from flashmoe.ratchet.results.values import CaseResult, PlanUsed, Results, Series, Telemetry

# A process's share of disturbed rounds (see `quiet`) from which another one is asked as well.
_DISTURBED = 0.2
# Processes asked at most, for each one wanted.
_MOST_PROCESSES = 2
THIS = Source("this")


@dataclass(frozen=True, slots=True)
class Settings:
    """`rounds` are of each process (on a GPU the first may find that a case needs more), which
    takes them in `visits` to the case with all other cases in between, and runs `warmup` more
    before those of each visit. A case is done when `least` processes have measured it and the 95 %
    interval of its speedup reaches at most `precision` percent to either side, or when `most`
    processes have. After `budget` seconds no process is started beyond `least`."""

    device: str
    rounds: int
    visits: int
    warmup: int
    least: int
    most: int
    precision: float
    budget: float
    seed: int
    suite: str

    def __post_init__(self) -> None:
        for name, lowest in (
            ("rounds", 1),
            ("visits", 1),
            ("warmup", 0),
            ("least", 1),
            ("most", self.least),
        ):
            if getattr(self, name) < lowest:
                told = {"least": "processes", "most": "most processes"}.get(name, name)
                raise UserError(f"{told} must be at least {lowest}, got {getattr(self, name)}")
        for name in ("precision", "budget"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")

    def job(
        self, process: int, cases: Sequence[Case], rounds_of: Mapping[str, int]
    ) -> dict[str, Any]:
        """What process number `process` is told to do, the cases in an order of its own.
        `rounds_of`: how many rounds the first process found that a case needs."""
        names = [case.name for case in cases]
        random.Random(self.seed + process).shuffle(names)
        return {
            "device": self.device,
            "cases": names,
            "rounds": self.rounds,
            "rounds_of": dict(rounds_of),
            "visits": self.visits,
            "warmup": self.warmup,
            "seed": self.seed + process,
            "first": process == 0,
            # On a CPU the rounds of one process teach little more than its visits.
            "adapts": process == 0 and not self.device.startswith("cpu"),
        }


@dataclass(slots=True)
class _Collected:
    """One case's answers so far, a process after another."""

    case: Case
    answers: list[Answer] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        return any(a[side]["status"] != "ok" for a in self.answers for side in ("ours", "sdpa"))

    def done(self, settings: Settings) -> bool:
        quiet = [a for a in self.answers if a["disturbed"] <= _DISTURBED]
        if self.broken or len(quiet) >= settings.most:
            return True
        if len(quiet) < settings.least:
            return False
        values = stats.log_speedups(*([a[x]["samples"] for a in quiet] for x in ("ours", "sdpa")))
        return stats.half_width(values) <= settings.precision / 100

    def result(self, least: int) -> CaseResult:
        """From every quiet process, and where those are fewer than `least`, from the `least` least
        disturbed ones."""
        ours, sdpa = (self._status(side) for side in ("ours", "sdpa"))
        first = self.answers[0]
        kept: list[Answer] = []
        if ours.status == sdpa.status == "ok":
            # Stable: among the equally quiet the earlier ones.
            ordered = sorted(self.answers, key=lambda answer: float(answer["disturbed"]))
            quiet = sum(answer["disturbed"] <= _DISTURBED for answer in ordered)
            kept = ordered[: max(quiet, least)]
            ours, sdpa = (
                Series("ok", tuple(tuple(answer[side]["samples"]) for answer in kept))
                for side in ("ours", "sdpa")
            )
        elif sdpa.status == "ok":  # nothing to compare with, but the machine's state is on record
            alone = tuple(tuple(a["sdpa"]["samples"]) for a in self.answers if a["sdpa"]["samples"])
            sdpa = Series("ok", alone)
        disturbed = sum(answer["disturbed"] for answer in kept) / max(len(kept), 1)
        telemetry = [a["telemetry"] for a in kept if a["telemetry"]]
        backends = {answer["sdpa_backend"] for answer in kept or self.answers} - {""}
        return CaseResult(
            self.case,
            ours,
            sdpa,
            tuple(PlanUsed(**plan) for plan in first["plans"]),
            first["error"],
            " and ".join(sorted(backends)),
            round(disturbed, 4),
            tuple(_telemetry(data) for data in telemetry),
        )

    def _status(self, side: str) -> Series:
        for answer in self.answers:
            if answer[side]["status"] != "ok":
                return Series(answer[side]["status"], (), answer[side]["reason"])
        return Series("ok")


def _fingerprint(source: str, data: Mapping[str, Any]) -> Fingerprint:
    """A worker of another commit may tell more than is known here, which is left out."""
    names = list(Fingerprint.__dataclass_fields__)
    if missing := [name for name in names if name not in data]:
        raise UserError(f"{source}: its worker tells no {', '.join(missing)} of the machine")
    return Fingerprint(**{name: data[name] for name in names})


def _telemetry(data: dict[str, Any]) -> Telemetry:
    lists = {name: tuple(data[name]) for name in ("reasons", "throttled")}
    return Telemetry(**{**data, **lists})


@dataclass(slots=True)
class _Run:
    """What one source's processes have said so far."""

    source: Source
    collected: dict[str, _Collected]
    fingerprint: Fingerprint | None = None
    limits: dict[str, Limits] = field(default_factory=dict)

    def hear(self, answer: Answer) -> None:
        if answer["event"] == "case":
            self.collected[answer["case"]].answers.append(answer)
        elif answer["event"] == "start":
            folder = self.source.folder
            if folder and not Path(answer["package"]).is_relative_to(Path(folder).resolve()):
                raise UserError(
                    f"{self.source.name}: {answer['package']} was imported, not the one in {folder}"
                )
            told = _fingerprint(self.source.name, answer["fingerprint"])
            self.fingerprint = self.fingerprint or told
            if changed := self.fingerprint.differences(
                told.to_json(), tuple(Fingerprint.__dataclass_fields__)
            ):
                raise UserError(
                    f"what is measured changed meanwhile ({'; '.join(changed)}): run it again"
                )
            self.limits |= {dtype: Limits(**rates) for dtype, rates in answer["limits"].items()}


def bench(
    cases: Sequence[Case],
    settings: Settings,
    command: str,
    progress: Callable[[str], None],
    *,
    sources: Sequence[Source] = (THIS,),
    debug: bool = False,
) -> tuple[Results, ...]:
    """Measure `cases` of each of `sources`, whose processes take turns in an order drawn anew each
    time. `progress` hears a line before each case of each process. A case that is wrong, fails or
    kills its process has that as its result, and the others go on. Where something disturbed a
    process, another one measures those cases again, up to twice as many in all, and the least
    disturbed ones count.

    Raises UserError when no process can start measuring at all, saying why.
    """
    begun, started = time.monotonic(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    runs = [_Run(source, {case.name: _Collected(case) for case in cases}) for source in sources]
    waiting: Process | None = None
    rounds_of: dict[str, int] = {}
    # Importing takes a core, which on a CPU is one of those that are measured.
    ahead = not settings.device.startswith("cpu")
    try:
        for number, left, run, following in _turns(runs, settings, begun):
            process, waiting = waiting or Process(run.source, debug), None
            if ahead and following is not None:
                waiting = Process(following.source, debug)
            job = {**settings.job(number, left, rounds_of), **run.source.job}
            for answer in answers(process, run.source, job, debug):
                run.hear(answer)
                if answer["event"] == "case" and (taken := len(answer["ours"]["samples"])):
                    rounds_of.setdefault(answer["case"], taken)
                if answer["event"] == "begin":
                    side = f"{run.source.name}, " if len(runs) > 1 else ""
                    progress(f"{side}process {number + 1}: {answer['case']}")
    finally:
        if waiting is not None:
            waiting.kill()
    duration = time.monotonic() - begun
    return tuple(_results(run, settings, started, duration / len(runs), command) for run in runs)


def _turns(
    runs: Sequence[_Run], settings: Settings, begun: float
) -> Iterator[tuple[int, Sequence[Case], _Run, _Run | None]]:
    """Whose turn it is: the number of the process, the cases it has to measure, the run it is of,
    and whose turn is next (if any is, as far as can be told now). All sides measure the same cases
    equally often."""
    rng = random.Random(settings.seed)
    order = rng.sample(list(runs), len(runs))
    for number in range(_MOST_PROCESSES * settings.most):
        spent = time.monotonic() - begun
        # Not one that would probably end after the budget.
        late = number >= settings.least and spent * (number + 1) / number > settings.budget
        left = [c.case for c in runs[0].collected.values() if not _done(runs, c.case, settings)]
        if late or not left:
            return
        following = rng.sample(list(runs), len(runs))
        for i, run in enumerate(order):
            last = i + 1 == len(order)
            more = number + 1 < settings.least
            yield number, left, run, order[i + 1] if not last else following[0] if more else None
        order = following


def _done(runs: Sequence[_Run], case: Case, settings: Settings) -> bool:
    same = [run.collected[case.name] for run in runs]
    return any(c.broken for c in same) or all(c.done(settings) for c in same)


def _results(run: _Run, settings: Settings, started: str, duration: float, command: str) -> Results:
    assert run.fingerprint is not None, "a process that starts tells its fingerprint"
    told = {name: getattr(settings, name) for name in Settings.__dataclass_fields__}
    told["budget"] = None if math.isinf(settings.budget) else settings.budget
    told["timing"] = HOW[run.fingerprint.kind]
    cases = tuple(c.result(settings.least) for c in run.collected.values())
    return Results(
        uuid.uuid4().hex,
        run.source.commit,
        started,
        round(duration, 3),
        command,
        told,
        run.fingerprint,
        run.limits,
        cases,
    )
