"""Results as JSON and back, with every field checked."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

from flashmoe.measure.fingerprint import Fingerprint
from flashmoe.measure.stats import median_by_process
from flashmoe.measure.timing import STATUSES, Limits
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.measuring.suite import Case, parse
from flashmoe.ratchet.results.fields import finite, get, is_finite, items, positive, shown
from flashmoe.ratchet.results.values import (
    SIDES,
    CaseResult,
    Origin,
    PlanUsed,
    Results,
    Series,
    Telemetry,
)

SCHEMA = 2
_T = TypeVar("_T", PlanUsed, Origin, Telemetry, Fingerprint)
# Seconds: nothing that a clock can tell is shorter, and nobody waits longer.
_SHORTEST, _LONGEST = 1e-9, 1e6


def to_json(results: Results) -> dict[str, Any]:
    cases = [_case_to_json(case, results.limits) for case in results.cases]
    return {"schema": SCHEMA, **asdict(replace(results, cases=())), "cases": cases}


def _case_to_json(result: CaseResult, limits: Mapping[str, Limits]) -> dict[str, Any]:
    fields = asdict(result)
    sides = {side: fields.pop(side) for side in SIDES}
    del fields["case"]
    data = {"name": result.name, "problem": result.case.problem.to_json(), **fields, **sides}
    if result.ok:
        for side in SIDES:
            data[side]["summary"] = summary(result.case, getattr(result, side), limits)
        data["speedup"] = result.speedup.to_json()
    return data


def summary(case: Case, series: Series, limits: Mapping[str, Limits]) -> dict[str, Any]:
    """Figures derived from the samples. Seconds, and per second; `interval` is the median's."""
    x = [sample for process in series.samples for sample in process]
    middle = median_by_process(series.samples)
    data: dict[str, Any] = {
        "mean": statistics.fmean(x),
        "median": middle.value,
        "standard_deviation": statistics.stdev(x) if len(x) > 1 else 0.0,
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
        **{key: get(data, key, str) for key in ("run", "commit", "started", "command")},
        duration=finite(data, "duration"),
        settings=get(data, "settings", dict),
        fingerprint=_made(Fingerprint, get(data, "fingerprint", dict)),
        limits=limits,
        cases=tuple(
            _located(f"cases[{i}]", case) for i, case in enumerate(get(data, "cases", list))
        ),
    )
    if not results.cases:
        raise ValueError("cases is empty: nothing was measured")
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
    # A Problem may have gained fields since, at their defaults.
    problem = get(data, "problem", dict)
    if not problem or not problem.items() <= case.problem.to_json().items():
        raise ValueError(f"problem is not the one that the name {name!r} says")
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
        tuple(_made(PlanUsed, plan) for plan in get(data, "plans", list)),
        float(error) if is_finite(error) else None,
        get(data, "sdpa_backend", str),
        finite(data, "disturbed"),
        tuple(_made(Telemetry, telemetry) for telemetry in get(data, "telemetry", list)),
        None if origin is None else _made(Origin, origin),
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
            if not is_finite(x) or not _SHORTEST <= x <= _LONGEST:
                raise ValueError(
                    f"{side}.samples[{p}][{r}] must be finite and positive seconds, "
                    f"{_SHORTEST:g} to {_LONGEST:g}, got {shown(x)}"
                )
        samples.append(tuple(map(float, process)))
    return Series(status, tuple(samples))


def _made(kind: type[_T], data: Any) -> _T:
    """A dataclass whose fields are text, numbers, and tuples of either."""
    readers: dict[str, Callable[[str], Any]] = {
        "str": lambda name: get(data, name, str),
        "int": lambda name: get(data, name, int),
        "float": lambda name: finite(data, name),
        "tuple[str, ...]": lambda name: items(data, name, str),
        "tuple[int, ...]": lambda name: items(data, name, int),
    }
    return kind(**{field.name: readers[str(field.type)](field.name) for field in fields(kind)})
