"""The comparison with every implementation that is installed: measuring, and what it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from flashmoe.measure.fingerprint import Fingerprint
from flashmoe.measure.reference import error_bound
from flashmoe.measure.stats import Interval, paired_ratio
from flashmoe.measure.timing import Limits, measure
from flashmoe.ratchet.gate import stats
from flashmoe.ratchet.measuring.suite import Case, parse
from flashmoe.ratchet.measuring.telemetry import Watch
from flashmoe.ratchet.measuring.workload import Workload
from flashmoe.ratchet.sota.providers import PROVIDERS

OURS = "flashmoe"
ALPHA = 0.05
# A ratio this close to 1 may be the process's: all rounds are one's, and speedups of an H200's
# processes differ by 0.1 to 0.7 %.
SAME = 0.01


@dataclass(frozen=True, slots=True)
class Row:
    """One provider in one case: seconds a call by round, or why there are none. `ratio`: its time
    over ours, above 1 where we are faster; `p`: that this is chance, over all comparisons."""

    provider: str
    samples: tuple[float, ...]
    reason: str = ""
    ratio: Interval | None = None
    p: float = 1.0

    @property
    def seconds(self) -> float:
        """The median."""
        return median(self.samples)


@dataclass(frozen=True, slots=True)
class Compared:
    """One case. `tflops` and `bandwidth` of a row follow from the case; `floor` is the time below
    which no kernel runs on this device."""

    case: Case
    rows: tuple[Row, ...]
    floor: float
    watts: float | None

    def row(self, provider: str) -> Row:
        found = (row for row in self.rows if row.provider == provider)
        return next(found, Row(provider, (), "not compared"))

    @property
    def direction(self) -> str:
        """`forward`, `training` or `decode`."""
        return self.case.kind.partition(",")[0]

    @property
    def fastest_other(self) -> Row | None:
        """None where nothing else ran, or ours did not."""
        others = [row for row in self.rows if row.ratio is not None]
        return min(others, key=lambda row: row.seconds, default=None)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run: what was compared, how (`timing` is one of timing.HOW), and where."""

    started: str
    command: str
    commit: str
    timing: str
    fingerprint: Fingerprint
    versions: Mapping[str, str]
    limits: Mapping[str, Limits]
    measured: Sequence[Compared]


def compare(
    cases: Sequence[Case],
    device: torch.device,
    limits: Mapping[str, Limits],
    rounds: int,
    progress: Callable[[str], None],
) -> list[Compared]:
    """Every provider in every case, interleaved; significance over all comparisons by Holm."""
    measured = []
    for case in cases:
        progress(case.name)
        floor = limits[case.problem.dtype].floor(case.flops, case.bytes)
        rows, watts = _measure(case, device, rounds)
        measured.append(Compared(case, rows, floor, watts))
    return with_significance(measured)


def _measure(case: Case, device: torch.device, rounds: int) -> tuple[tuple[Row, ...], float | None]:
    workload = Workload(case, device, seed=0)
    wrong = workload.check().reason
    calls: dict[str, Callable[[], object]] = {} if wrong else {OURS: workload.ours}
    reasons = {OURS: wrong} if wrong else {}
    # Others multiply what is behind a sequence by a weight of 0.
    workload.fill_gaps()
    expected = workload.ours()
    for provider in PROVIDERS:
        try:
            attend = provider.call(case, workload.call)
            call = workload.other(attend, provider.heads_first)
            if why := _differs(call(), expected, case):
                raise ValueError(why)
            calls[provider.name] = call
        except Exception as error:  # noqa: BLE001 - what cannot run is a result
            words = " ".join(str(error).split())[:160]
            reasons[provider.name] = words or type(error).__name__
    watch = Watch(device)
    after = watch.look if device.type == "cuda" else None
    taken = measure(calls, device, rounds=rounds, warmup=10, after_round=after)
    rows = [Row(name, m.samples, m.reason) for name, m in taken.items()]
    rows += [Row(name, (), reason) for name, reason in reasons.items()]
    seen = watch.seen()
    return tuple(rows), None if seen is None else float(seen["watts"])


def _differs(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], case: Case) -> str:
    """Why a provider's results are not ours; ours have been checked. Both sides' errors count."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=False):
        a, b = a.detach(), b.detach()
        scale = float(b.abs().max())
        # As far apart as two computations in this dtype may be.
        bound = 8 * error_bound(b.dtype, 0.0, scale) + 4e-3 * scale
        if not float((a.float() - b.float()).abs().max()) <= bound:
            return f"{name} differs from ours: wrong, or another problem"
    return ""


def with_significance(measured: Sequence[Compared]) -> list[Compared]:
    """Ratios to ours with their intervals, and p-values of Wilcoxon's signed-rank test on rounds,
    adjusted by Holm over all comparisons."""

    def others(compared: Compared) -> list[Row]:
        ran = compared.row(OURS).samples
        return [row for row in compared.rows if ran and row.samples and row.provider != OURS]

    values = [_p(row.samples, c.row(OURS).samples) for c in measured for row in others(c)]
    adjusted = iter(stats.holm(values))
    found = []
    for compared in measured:
        ours, ran = compared.row(OURS).samples, others(compared)
        rows = tuple(
            replace(row, ratio=paired_ratio(row.samples, ours), p=next(adjusted))
            if row in ran
            else row
            for row in compared.rows
        )
        found.append(replace(compared, rows=rows))
    return found


def _p(theirs: Sequence[float], ours: Sequence[float]) -> float:
    difference = np.log(theirs) - np.log(ours)
    if not difference.any():
        return 1.0
    return float(scipy.stats.wilcoxon(difference).pvalue)


def conclusion(row: Row) -> str:
    """What a comparison shows, from our side."""
    if row.ratio is None:
        return ""
    if row.p < ALPHA and row.ratio.low > 1 + SAME:
        return "faster"
    if row.p < ALPHA and row.ratio.high < 1 / (1 + SAME):
        return "slower"
    return "same"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """With raw samples, six digits each."""
    told = asdict(replace(comparison, measured=()))
    del told["measured"]
    return {
        **told,
        "cases": [
            {
                "name": compared.case.name,
                "flops": compared.case.flops,
                "bytes": compared.case.bytes,
                "floor": compared.floor,
                "watts": compared.watts,
                "providers": {
                    row.provider: {
                        "reason": row.reason,
                        "ratio": row.ratio.to_json() if row.ratio else None,
                        "p": row.p,
                        "conclusion": conclusion(row),
                        "samples": [float(f"{x:.6g}") for x in row.samples],
                    }
                    for row in compared.rows
                },
            }
            for compared in comparison.measured
        ],
    }


def from_json(data: Any) -> Comparison:
    """What `to_json` told; what follows from a case is computed anew. Raises ValueError or
    UserError where it is something else."""
    try:
        limits = {dtype: Limits(**rates) for dtype, rates in data["limits"].items()}
        return Comparison(
            **{name: str(data[name]) for name in ("started", "command", "commit", "timing")},
            fingerprint=Fingerprint(**data["fingerprint"]),
            versions={name: str(version) for name, version in data["versions"].items()},
            limits=limits,
            measured=tuple(_compared(told, limits) for told in data["cases"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _compared(told: Any, limits: Mapping[str, Limits]) -> Compared:
    case = parse(told["name"])
    rows = tuple(
        Row(
            name,
            tuple(map(float, row["samples"])),
            str(row["reason"]),
            Interval(*map(float, row["ratio"])) if row["ratio"] else None,
            float(row["p"]),
        )
        for name, row in told["providers"].items()
    )
    floor = limits[case.problem.dtype].floor(case.flops, case.bytes)
    return Compared(case, rows, floor, told["watts"])
