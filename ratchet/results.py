"""What `bench` writes and `gate` reads: the schema, its validation, loading and saving."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flashmoe.device import Fingerprint
from flashmoe.ratchet import stats
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.fields import get, is_number, positive
from flashmoe.ratchet.suite import Case, parse
from flashmoe.timing import STATUSES, Limits

SCHEMA = 1
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
    """What `flash_attn_func` ran: flashmoe.plan.Plan with its tile as text."""

    direction: str
    backend: str
    tile: str
    source: str

    def __str__(self) -> str:
        return self.tile or self.backend


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a baseline's case was measured, when that was another run than the file's own."""

    started: str
    command: str
    kernels: str


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One measured case. ours[p][r] and sdpa[p][r] were taken in the same round. `error` is the
    largest error as a share of the allowed one; `disturbed` the share of rounds during which other
    programs had our cores."""

    case: Case
    ours: Series
    sdpa: Series
    plans: tuple[PlanUsed, ...] = ()
    error: float | None = None
    disturbed: float = 0.0
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


@dataclass(frozen=True, slots=True)
class Results:
    """One run: every case measured on one machine by one command."""

    started: str
    duration: float
    command: str
    settings: Mapping[str, Any]
    fingerprint: Fingerprint
    limits: Mapping[str, Limits]
    cases: tuple[CaseResult, ...] = field(default_factory=tuple)

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

    return replace(results, cases=tuple(map(slow, results.cases)))


def load(path: Path) -> Results:
    """Read and validate. Raises UserError naming the path and what is wrong; the file stays."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8 text") from None
    try:
        return from_json(json.loads(text))
    except (ValueError, UserError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def save(results: Results, path: Path) -> None:
    """Write atomically, creating the folder: a reader sees the old file or the new one."""
    # A line per process rather than per sample keeps a committed baseline's diffs readable.
    text = re.sub(
        r"\[\n\s*([^\[\]{}\"]*?)\n\s*\]",
        lambda match: f"[{' '.join(match[1].split())}]",
        json.dumps(to_json(results), indent=1, allow_nan=False),
    )
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Atomically. Raises UserError when the place cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def to_json(results: Results) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "started": results.started,
        "duration": results.duration,
        "command": results.command,
        "settings": dict(results.settings),
        "fingerprint": results.fingerprint.to_json(),
        "limits": {dtype: asdict(limits) for dtype, limits in results.limits.items()},
        "cases": [_case_to_json(case, results.limits) for case in results.cases],
    }


def _case_to_json(result: CaseResult, limits: Mapping[str, Limits]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": result.name,
        "problem": result.case.problem.to_json(),
        "backward": result.case.backward,
        "plans": [asdict(plan) for plan in result.plans],
        "error": result.error,
        "disturbed": result.disturbed,
        "origin": asdict(result.origin) if result.origin else None,
    }
    for side in SIDES:
        series: Series = getattr(result, side)
        data[side] = asdict(series)
        if result.ok:
            data[side]["summary"] = summary(result.case, series, limits)
    if result.ok:
        data["speedup"] = stats.speedup(result.ours.samples, result.sdpa.samples).to_json()
    return data


def summary(case: Case, series: Series, limits: Mapping[str, Limits]) -> dict[str, Any]:
    """Figures derived from the samples. Seconds, and per second; `interval` is the median's."""
    x = [sample for process in series.samples for sample in process]
    mean = math.fsum(x) / len(x)
    middle = stats.median(series.samples)
    data: dict[str, Any] = {
        "mean": mean,
        "median": middle.value,
        "standard_deviation": math.sqrt(
            math.fsum((sample - mean) ** 2 for sample in x) / max(len(x) - 1, 1)
        ),
        "interval": [middle.low, middle.high],
        "gflops": case.flops / middle.value * 1e-9,
        "gbytes": case.bytes / middle.value * 1e-9,
    }
    if case.problem.dtype in limits:
        floor = limits[case.problem.dtype].floor(case.flops, case.bytes)
        data["efficiency"] = floor / middle.value
    return data


def from_json(data: Any) -> Results:
    """Raises ValueError or UserError naming the field, what it holds and what is allowed. Derived
    figures are not read: everything is decided from the samples."""
    schema = get(data, "schema", int)
    if schema != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {schema}")
    limits = {
        dtype: Limits(positive(value, "matmul_flops"), positive(value, "copy_bytes"))
        for dtype, value in get(data, "limits", dict).items()
    }
    results = Results(
        get(data, "started", str),
        float(get(data, "duration", (int, float))),
        get(data, "command", str),
        get(data, "settings", dict),
        _fingerprint(get(data, "fingerprint", dict)),
        limits,
        tuple(_located(f"cases[{i}]", case) for i, case in enumerate(get(data, "cases", list))),
    )
    if not results.cases:
        raise ValueError("it has no cases")
    if len(results.by_name()) != len(results.cases):
        raise ValueError("a case name occurs twice")
    return results


def _located(where: str, data: Any) -> CaseResult:
    try:
        return _case(data)
    except (ValueError, UserError) as error:
        raise ValueError(f"{where}: {error}") from None


def _case(data: Any) -> CaseResult:
    name = get(data, "name", str)
    case = parse(name)
    if get(data, "problem", dict) != case.problem.to_json():
        raise ValueError(f"problem is not the one that the name {name!r} says")
    if get(data, "backward", bool) != case.backward:
        raise ValueError(f"backward is not what the name {name!r} says")
    ours, sdpa = (_series(side, get(data, side, dict)) for side in SIDES)
    if ours.status == sdpa.status == "ok":
        shapes = [[len(process) for process in series.samples] for series in (ours, sdpa)]
        if shapes[0] != shapes[1] or len(set(shapes[0])) != 1 or 0 in shapes[0]:
            raise ValueError(
                f"{name}: ours and sdpa need as many rounds in every process, got {shapes}"
            )
    error = data.get("error")
    origin = data.get("origin")
    return CaseResult(
        case,
        ours,
        sdpa,
        tuple(
            PlanUsed(*(get(plan, key, str) for key in ("direction", "backend", "tile", "source")))
            for plan in get(data, "plans", list)
        ),
        float(error) if isinstance(error, (int, float)) else None,
        float(get(data, "disturbed", (int, float))),
        None
        if origin is None
        else Origin(*(get(origin, key, str) for key in ("started", "command", "kernels"))),
    )


def _series(side: str, data: dict[str, Any]) -> Series:
    status = get(data, "status", str)
    if status not in STATUSES:
        raise ValueError(f"{side}.status must be one of {', '.join(STATUSES)}, got {status!r}")
    if status != "ok":
        return Series(status, (), get(data, "reason", str))
    samples: list[tuple[float, ...]] = []
    for p, process in enumerate(get(data, "samples", list)):
        if not isinstance(process, list):
            raise ValueError(f"{side}.samples[{p}] must be a list of seconds, got {process!r}")
        for r, x in enumerate(process):
            if not is_number(x) or not 0 < x < math.inf:
                raise ValueError(
                    f"{side}.samples[{p}][{r}] must be finite and positive seconds, got {x!r}"
                )
        samples.append(tuple(map(float, process)))
    return Series(status, tuple(samples))


def _fingerprint(data: dict[str, Any]) -> Fingerprint:
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float)}
    fields = Fingerprint.__dataclass_fields__
    return Fingerprint(**{name: get(data, name, kinds[str(f.type)]) for name, f in fields.items()})
