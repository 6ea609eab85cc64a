"""Tables for a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from flashmoe.ratchet import stats
from flashmoe.ratchet.gate import FAIL, IMPROVED, INCONCLUSIVE, YARDSTICK, Decision, percent
from flashmoe.ratchet.report import ranked
from flashmoe.ratchet.results import CaseResult, Results, summary

_STYLES = {FAIL: "bold red", YARDSTICK: "yellow", IMPROVED: "green", INCONCLUSIVE: "dim"}
# Wide enough for every column, where the output is a file that does not wrap.
_FILE_WIDTH = 160


def stdout() -> Console:
    wide = None if sys.stdout.isatty() else _FILE_WIDTH
    return Console(width=wide, highlight=False)


def results_table(results: Results) -> Table:
    device, seconds = results.fingerprint.device, results.duration
    table = Table(title=f"{device}: {len(results.cases)} cases in {seconds:.0f} s")
    table.add_column("case", no_wrap=True)
    for name in ("ours", "SDPA", "speedup [95 %]", "GFLOP/s", "GB/s", "efficiency"):
        table.add_column(name, justify="right")
    table.add_column("plan", overflow="fold")
    for case in results.cases:
        table.add_row(*_result_row(case, results), style="" if case.ok else "bold red")
    return table


def _result_row(case: CaseResult, results: Results) -> list[str]:
    plan = ", ".join(map(str, case.plans))
    if not case.ok:
        return [case.name, case.ours.status, case.sdpa.status, "", "", "", "", case.reason]
    ours, sdpa = (summary(case.case, s, results.limits) for s in (case.ours, case.sdpa))
    speedup = stats.speedup(case.ours.samples, case.sdpa.samples)
    return [
        case.name,
        milliseconds(ours["median"]),
        milliseconds(sdpa["median"]),
        f"{speedup.value:.3f} [{speedup.low:.3f}, {speedup.high:.3f}]",
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
    table.add_column("note", overflow="fold")
    for v in ranked(decision.verdicts):
        change = bounds = ""
        if v.change is not None:
            change = f"{percent(v.change.value):+.1f} %"
            bounds = f"[{percent(v.change.low):+.1f}, {percent(v.change.high):+.1f}]"
        table.add_row(v.name, v.verdict, change, bounds, v.reason, style=_STYLES.get(v.verdict, ""))
    return table


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
