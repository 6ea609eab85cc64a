"""The baseline moves forward only: a case takes a new value when it is a confirmed improvement."""

from __future__ import annotations

from dataclasses import replace

from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate.decide import (
    EXIT_INCONCLUSIVE,
    EXIT_PASS,
    IMPROVED,
    MIN_PROCESSES,
    Decision,
    Verdict,
)
from flashmoe.ratchet.gate.thresholds import percent
from flashmoe.ratchet.results.values import Origin, Results


def create(current: Results) -> Results:
    """The first baseline from a run. Raises UserError when a case has no figures, or too few: a
    baseline must be able to judge every case it names."""
    if broken := [f"{case.name} ({case.reason})" for case in current.cases if not case.ok]:
        raise UserError(f"a baseline needs every case to have run: {'; '.join(broken)}")
    if few := [case.name for case in current.cases if len(case.ours.samples) < MIN_PROCESSES]:
        raise UserError(
            f"a baseline needs {MIN_PROCESSES} processes of every case, too few are of "
            f"{', '.join(few)}"
        )
    return current


def forward(
    baseline: Results, current: Results, confirming: Results, first: Decision, second: Decision
) -> tuple[Results, tuple[str, ...]]:
    """The baseline with every case replaced that is IMPROVED in `first`, the gate of `current`, and
    in `second`, the gate of another run's processes, `confirming`; and a line for each that moved.

    What is taken is the confirming run's value: the first run was chosen for being fast, and so is
    faster than the truth. Gains below the threshold are not taken one by one, but they add up
    against the old value and are taken together once they exceed it. Nothing else moves: not a
    case that regressed, not one that is unchanged, so noise cannot ratchet.

    Raises UserError when either gate found a regression or nothing comparable, when both runs are
    one, or when they measured different sources.
    """
    sources = [(run.fingerprint.kernels, run.commit) for run in (current, confirming)]
    if sources[0] != sources[1]:
        told = [f"kernels {kernels}, commit {commit or 'unknown'}" for kernels, commit in sources]
        raise UserError(
            f"the baseline stays: the confirming run is of another source ({told[1]}) than the "
            f"first ({told[0]})"
        )
    for which, decision in (("first", first), ("confirming", second)):
        if decision.exit_code not in (EXIT_PASS, EXIT_INCONCLUSIVE):
            raise UserError(f"the baseline stays: the {which} run {decision.summary}")
    seen = {v.current.ours.samples for v in first.verdicts if v.current and v.current.ok}
    if any(case.ok and case.ours.samples in seen for case in confirming.cases):
        raise UserError("the baseline stays: a run cannot confirm itself; run bench once more")
    before = {v.name: v for v in first.named(IMPROVED)}
    confirmed = {v.name: v for v in second.named(IMPROVED) if v.name in before}
    new = confirming.by_name()
    origin = Origin(
        **{name: getattr(confirming, name) for name in ("run", "started", "command", "commit")},
        kernels=confirming.fingerprint.kernels,
    )
    cases = tuple(
        replace(new[case.name], origin=origin) if case.name in confirmed else case
        for case in baseline.cases
    )
    lines = tuple(_line(v, before[name]) for name, v in confirmed.items())
    return replace(baseline, cases=cases), lines


def _line(confirmed: Verdict, first: Verdict) -> str:
    assert confirmed.change is not None
    assert first.change is not None
    change = confirmed.change.map(percent)
    return (
        f"{confirmed.name}: speedup over SDPA {change.value:+.1f} % [{change.low:+.1f}, "
        f"{change.high:+.1f}], confirmed after {percent(first.change.value):+.1f} %"
    )
