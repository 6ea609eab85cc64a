"""Tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from flashmoe.ratchet.gate import stats
from flashmoe.ratchet.gate.decide import FAIL, IMPROVED, INCONCLUSIVE, INTEGRITY, Decision
from flashmoe.ratchet.gate.thresholds import percent
from flashmoe.ratchet.report.markdown import ranked
from flashmoe.ratchet.results.schema import summary
from flashmoe.ratchet.results.values import CaseResult, Results

_STYLES = {FAIL: "bold red", INTEGRITY: "bold yellow", IMPROVED: "green", INCONCLUSIVE: "dim"}


def results_table(results: Results) -> Table:
    device, seconds = results.fingerprint.device, results.duration
    table = Table(title=f"{device}: {len(results.cases)} cases in {seconds:.0f} s")
    table.add_column("case", no_wrap=True)
    for name in ("ours", "SDPA", "speedup [95 %]", "processes", "GFLOP/s", "GB/s", "efficiency"):
        table.add_column(name, justify="right")
    table.add_column("plan", overflow="fold")
    for case in results.cases:
        table.add_row(*_result_row(case, results), style="" if case.ok else "bold red")
    return table


def _result_row(case: CaseResult, results: Results) -> list[str]:
    plan = ", ".join(map(str, case.plans))
    if not case.ok:
        alone = sorted(x for process in case.sdpa.samples for x in process)
        yardstick = milliseconds(alone[len(alone) // 2]) if alone else case.sdpa.status
        return [case.name, case.ours.status, yardstick, "", "", "", "", "", case.reason]
    ours, sdpa = (summary(case.case, s, results.limits) for s in (case.ours, case.sdpa))
    speedup = stats.speedup(case.ours.samples, case.sdpa.samples)
    return [
        case.name,
        milliseconds(ours["median"]),
        milliseconds(sdpa["median"]),
        f"{speedup.value:.3f} [{speedup.low:.3f}, {speedup.high:.3f}]",
        str(len(case.ours.samples)),
        f"{ours['gflops']:,.0f}",
        f"{ours['gbytes']:,.1f}",
        f"{ours['efficiency']:.0%}" if "efficiency" in ours else "",
        f"{plan} ({case.plans[0].source})" if case.plans else "",
    ]


def decision_table(decision: Decision) -> Table:
    table = Table(title=f"ratchet {decision.summary}")
    table.add_column("case", no_wrap=True)
    table.add_column("verdict")
    table.add_column("change of speedup", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("sees from", justify="right")
    table.add_column("note", overflow="fold")
    for v in ranked(decision.verdicts):
        change = bounds = sees = ""
        if v.detectable is not None:
            sees = f"{percent(1 / v.detectable):.1f} %"
        if v.change is not None:
            change = f"{percent(v.change.value):+.1f} %"
            bounds = f"[{percent(v.change.low):+.1f}, {percent(v.change.high):+.1f}]"
        style = _STYLES.get(v.verdict, "")
        table.add_row(v.name, v.verdict, change, bounds, sees, v.reason, style=style)
    return table


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
