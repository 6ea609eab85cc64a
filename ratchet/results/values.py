"""What was measured, as values: one run, its cases, their samples."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flashmoe.machine.nvml import THROTTLING
from flashmoe.measure.fingerprint import Fingerprint
from flashmoe.measure.stats import Interval, ratio_by_process
from flashmoe.measure.timing import Limits
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.measuring.suite import Case

SIDES = ("ours", "sdpa")


@dataclass(frozen=True, slots=True)
class Series:
    """Raw seconds, samples[process][round], with what became of the candidate (timing.STATUSES).
    For any status but ok, `reason` says why and there are no samples."""

    status: str
    samples: tuple[tuple[float, ...], ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PlanUsed:
    """What `flash_attn_func` ran: flashmoe.planning.plan.Plan with its tile as text."""

    direction: str
    backend: str
    tile: str
    source: str

    def __str__(self) -> str:
        return self.tile or self.backend


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a baseline's case was measured, when that was another run than the file's own."""

    run: str
    started: str
    command: str
    commit: str
    kernels: str


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What the GPU did while one process measured one case: median clocks in MHz, the highest
    temperature in degrees Celsius, mean watts, every reason for lower clocks that was seen, and the
    rounds in which one of nvml.THROTTLING held."""

    sm_mhz: int
    memory_mhz: int
    celsius: int
    watts: float
    reasons: tuple[str, ...]
    throttled: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One measured case. ours[p][r] and sdpa[p][r] were taken in the same round. `error` is the
    largest error as a share of the allowed one; `sdpa_backend` the one of SDPA's own backends that
    ran; `disturbed` the share of rounds during which other programs had our cores or the GPU was
    throttled; `telemetry` one of each process, none where the device tells nothing."""

    case: Case
    ours: Series
    sdpa: Series
    plans: tuple[PlanUsed, ...] = ()
    error: float | None = None
    sdpa_backend: str = ""
    disturbed: float = 0.0
    telemetry: tuple[Telemetry, ...] = ()
    origin: Origin | None = None

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def ok(self) -> bool:
        return self.ours.status == self.sdpa.status == "ok"

    @property
    def reason(self) -> str:
        """Why this case has no figures; empty when it has."""
        for side, series in (("", self.ours), ("SDPA: ", self.sdpa)):
            if series.status != "ok":
                return f"{side}{series.status}: {series.reason}"
        return ""

    @property
    def speedup(self) -> Interval:
        """Over SDPA, of a case that is ok."""
        return ratio_by_process(self.sdpa.samples, self.ours.samples)

    @property
    def throttled(self) -> float:
        """Share of all rounds in which the GPU throttled itself."""
        rounds = sum(map(len, self.ours.samples))
        return sum(len(t.throttled) for t in self.telemetry) / rounds if rounds else 0.0

    @property
    def throttle_reasons(self) -> str:
        found = {reason for t in self.telemetry for reason in t.reasons}
        return ", ".join(reason for reason in THROTTLING if reason in found)


@dataclass(frozen=True, slots=True)
class Results:
    """One run: every case measured on one machine by one command. `run` is random and tells two
    runs of one command apart; `commit` is the source's, with a + where files were changed, and
    empty where it is unknown."""

    run: str
    commit: str
    started: str
    duration: float
    command: str
    settings: Mapping[str, Any]
    fingerprint: Fingerprint
    limits: Mapping[str, Limits]
    cases: tuple[CaseResult, ...] = field(default_factory=tuple)

    @property
    def kind(self) -> str:
        """The kind of device: cpu or cuda."""
        return self.fingerprint.kind

    def by_name(self) -> dict[str, CaseResult]:
        return {case.name: case for case in self.cases}


def slowed(results: Results, name: str, factor: float) -> Results:
    """`results` as if our kernel took `factor` times as long in case `name`: the proof that a gate
    sees a slowdown of that size. Raises UserError when there is no such case."""
    if name not in results.by_name():
        raise UserError(f"no case {name!r}; there are {', '.join(results.by_name())}")

    def slow(case: CaseResult) -> CaseResult:
        if case.name != name:
            return case
        samples = tuple(tuple(x * factor for x in process) for process in case.ours.samples)
        return replace(case, ours=replace(case.ours, samples=samples))

    # Nothing that ran: a run of its own, and the same one each time.
    run = uuid.uuid5(uuid.NAMESPACE_OID, f"{results.run} {name} {factor}").hex
    return replace(results, run=run, cases=tuple(map(slow, results.cases)))
