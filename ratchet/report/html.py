"""The gate's outcome as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from flashmoe.ratchet.gate.decide import Decision, Verdict
from flashmoe.ratchet.gate.thresholds import percent
from flashmoe.ratchet.report.rows import by_kind, figures
from flashmoe.ratchet.report.svg import COLOURS, Bar, forest
from flashmoe.ratchet.results.values import CaseResult, Results

_STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def html(decision: Decision, current: Results, baseline: Results, cost: str) -> str:
    """Regressions first, as in the Markdown report."""
    kinds = by_kind(decision.verdicts)
    bars = {
        kind: [Bar(v.name, v.change.map(percent), v.verdict) for v in some if v.change]
        for kind, some in kinds.items()
    }
    rows = [row for kind, some in kinds.items() for row in ([kind], *map(_row, some))]
    limits = (decision.thresholds.fail, decision.thresholds.improve)
    body = [f"<h1>flashmoe ratchet {escape(decision.summary)}</h1>"]
    body += _section("The run and the baseline cannot be compared", decision.problems)
    if any(bars.values()):
        body += [
            "<h2>Change of the speedup over SDPA, with 95 % intervals</h2>",
            f"<div class=wide>{forest(bars, limits, ' %')}</div>",
        ]
    columns = ("case", "verdict", "speedup over SDPA: baseline", "now", "change", "sees from", "")
    body += ["<h2>Cases</h2>", table(columns, rows, numbers=(2, 3, 4, 5))]
    title = "Not compared, for the baseline's build does not support them"
    body += _section(title, decision.skipped)
    body += _section("The environment changed, which is not the kernel", decision.environment)
    body += ["<h2>Where and how</h2>", _fingerprints(current, baseline), f"<p>{escape(cost)}</p>"]
    if telemetry := [_telemetry(case) for case in current.cases if case.telemetry]:
        names = ("case", "SM MHz", "memory MHz", "°C", "W", "reasons for lower clocks", "throttled")
        body += ["<h2>What the GPU did meanwhile</h2>", table(names, telemetry, (1, 2, 3, 4, 6))]
    return page(f"flashmoe ratchet: {decision.summary}", body)


def page(title: str, body: Iterable[str]) -> str:
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        "<body>" + "\n".join(body) + "</body></html>\n"
    )


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()
) -> str:
    """Cells are HTML; `numbers` are the columns to align right. A row of one cell is a heading."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        if len(texts) < len(columns):
            return f"<th colspan={len(columns)}>{texts[0]}</th>"
        return "".join(
            f"<{tag}{' class=number' if i in numbers else ''}>{text}</{tag}>"
            for i, text in enumerate(texts)
        )

    head = f"<thead><tr>{cells('th', [escape(column) for column in columns])}</tr></thead>"
    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<div class=wide><table>{head}<tbody>{body}</tbody></table></div>"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return [f"<h2>{escape(title)}</h2><ul>{items}</ul>"]


def _row(v: Verdict) -> list[str]:
    baseline, now, change, bounds, sees = figures(v)
    return [
        f"<code>{escape(v.name)}</code>",
        f"<span class=verdict style='color:{COLOURS[v.verdict]}'>{v.verdict}</span>",
        *(x.replace(" [", "<br>[") for x in (baseline, now)),
        change and f"<b>{change}</b><br>{bounds}",
        sees,
        f"<span class=note>{escape(v.reason)}</span>",
    ]


def _fingerprints(current: Results, baseline: Results) -> str:
    old, new = baseline.fingerprint.to_json(), current.fingerprint.to_json()
    for run, values in ((baseline, old), (current, new)):
        values |= {"commit": run.commit, "started": run.started, "command": run.command}
    rows = [[name, *(f"<code>{escape(str(x[name]))}</code>" for x in (old, new))] for name in new]
    return table(("", "baseline", "now"), rows)


def _telemetry(case: CaseResult) -> list[str]:
    seen = case.telemetry
    reasons = sorted({reason for t in seen for reason in t.reasons})
    sm, memory = ([getattr(t, name) for t in seen] for name in ("sm_mhz", "memory_mhz"))
    return [
        f"<code>{escape(case.name)}</code>",
        f"{min(sm)} to {max(sm)}",
        f"{min(memory)} to {max(memory)}",
        str(max(t.celsius for t in seen)),
        f"{sum(t.watts for t in seen) / len(seen):.0f}",
        escape(", ".join(reasons)),
        f"{case.throttled:.0%}",
    ]
