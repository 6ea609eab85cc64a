"""Tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from flashmoe.ratchet.gate.decide import FAIL, IMPROVED, INCONCLUSIVE, INTEGRITY, Decision
from flashmoe.ratchet.report.rows import by_kind, figures, plan, speedup
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
    for kind in dict.fromkeys(case.case.kind for case in results.cases):
        table.add_row(kind, style="bold")
        for case in (case for case in results.cases if case.case.kind == kind):
            table.add_row(*_result_row(case, results), style="" if case.ok else "bold red")
        table.add_section()
    return table


def _result_row(case: CaseResult, results: Results) -> list[str]:
    if not case.ok:
        alone = sorted(x for process in case.sdpa.samples for x in process)
        yardstick = milliseconds(alone[len(alone) // 2]) if alone else case.sdpa.status
        return [case.name, case.ours.status, yardstick, "", "", "", "", "", case.reason]
    ours, sdpa = (summary(case.case, s, results.limits) for s in (case.ours, case.sdpa))
    return [
        case.name,
        milliseconds(ours["median"]),
        milliseconds(sdpa["median"]),
        speedup(case),
        str(len(case.ours.samples)),
        f"{ours['gflops']:,.0f}",
        f"{ours['gbytes']:,.1f}",
        f"{ours['efficiency']:.0%}" if "efficiency" in ours else "",
        f"{plan(case)} ({case.plans[0].source})" if case.plans else "",
    ]


def decision_table(decision: Decision) -> Table:
    table = Table(title=f"ratchet {decision.summary}")
    table.add_column("case", no_wrap=True)
    table.add_column("verdict")
    for name in ("change of speedup", "95 % interval", "sees from"):
        table.add_column(name, justify="right")
    table.add_column("note", overflow="fold")
    for kind, some in by_kind(decision.verdicts).items():
        table.add_row(kind, style="bold")
        for v in some:
            _, _, *shown = figures(v)
            style = _STYLES.get(v.verdict, "")
            table.add_row(v.name, v.verdict, *shown, v.reason, style=style)
        table.add_section()
    return table


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
