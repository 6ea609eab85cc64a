"""The baseline moves forward only: a case takes a new value when it is a confirmed improvement."""

from __future__ import annotations

from dataclasses import replace

from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate import IMPROVED, Decision, percent
from flashmoe.ratchet.results import CaseResult, Origin, Results


def create(current: Results) -> Results:
    """The first baseline from a run. Raises UserError when a case has no figures: a baseline must
    be able to judge every case it names."""
    if broken := [f"{case.name} ({case.reason})" for case in current.cases if not case.ok]:
        raise UserError(f"a baseline needs every case to have run: {'; '.join(broken)}")
    return current


def forward(
    baseline: Results, current: Results, decision: Decision
) -> tuple[Results, tuple[str, ...]]:
    """The baseline with every IMPROVED case (larger than the threshold and significant over
    several processes) replaced by its current measurement, and a line for each that moved.

    Gains below the threshold are not taken one by one, but they add up against the old value and
    are taken together once they exceed it. Nothing else moves: not a case that regressed, not one
    that is unchanged, so noise cannot ratchet. Only after exit code 0.
    """
    if decision.exit_code != 0:
        raise UserError(f"the baseline does not move: the gate {decision.summary}")
    improved = {v.name: v for v in decision.named(IMPROVED)}
    new = current.by_name()
    cases = tuple(
        _with_origin(new[case.name], current) if case.name in improved else case
        for case in baseline.cases
    )
    moved = tuple(
        f"{v.name}: speedup over SDPA {percent(v.change.value):+.1f} % "
        f"[{percent(v.change.low):+.1f}, {percent(v.change.high):+.1f}]"
        for v in improved.values()
        if v.change is not None
    )
    return replace(baseline, cases=cases), moved


def _with_origin(case: CaseResult, run: Results) -> CaseResult:
    origin = Origin(run.started, run.command, run.fingerprint.kernels)
    return replace(case, origin=origin)
