"""The gate's outcome as Markdown for a pull request, and the list of cases worth profiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flashmoe.measure.fingerprint import Fingerprint
from flashmoe.measure.stats import Interval
from flashmoe.ratchet.gate.decide import (
    ALPHA,
    FAIL,
    IMPROVED,
    INCONCLUSIVE,
    PASS,
    Decision,
    Verdict,
)
from flashmoe.ratchet.gate.thresholds import Thresholds
from flashmoe.ratchet.report.rows import SIGNS, by_kind, figures, plans, ranked
from flashmoe.ratchet.results.values import Results

# What GitHub accepts in a comment.
MAX_CHARACTERS = 65536
_LEAST_LISTED = 20
_HEADER = (
    "| case | | speedup over SDPA: baseline | now | change | 95 % interval |",
    "|:--|:--|--:|--:|--:|--:|",
)
# Of a case, for programs.
_FIGURES = (
    *("name", "kind", "verdict", "reason", "percent", "change", "ours", "sdpa"),
    *("p_slower", "p_faster", "detectable"),
)


def profile_targets(decision: Decision) -> tuple[str, ...]:
    """Cases that ran and got slower or much faster: where a profile has something to explain.
    Each is a name that `bench --case` takes."""
    return tuple(v.name for v in ranked(decision.named(FAIL, IMPROVED)) if v.change is not None)


def markdown(
    decision: Decision,
    current: Results,
    baseline: Results,
    cost: str,
    trends: Mapping[str, str] | None = None,
) -> str:
    """Below MAX_CHARACTERS whatever the number of cases: what does not fit is left out from the
    end, best cases first, and the report says so. `trends`: a line about a case's history."""
    rows = {v.name: _row(v) for v in ranked(decision.verdicts)}
    for shown in _halvings(len(rows)):
        text = _markdown(decision, rows, shown, current, baseline, cost, trends or {})
        if len(text) < MAX_CHARACTERS:
            return text
    return f"{_heading(decision)}\n\nThe report does not fit into a comment.\n"


def _halvings(n: int) -> list[int]:
    counts = [n]
    while counts[-1] > 0:
        counts.append(counts[-1] // 2)
    return counts


def _markdown(
    decision: Decision,
    rows: Mapping[str, str],
    shown: int,
    current: Results,
    baseline: Results,
    cost: str,
    trends: Mapping[str, str],
) -> str:
    kept, left_out = ranked(decision.verdicts)[:shown], len(rows) - shown
    listed = max(shown, _LEAST_LISTED)
    parts = [_heading(decision), ""]
    if decision.problems:
        parts += ["**The run and the baseline cannot be compared:**", ""]
        parts += [*_list(decision.problems, listed), ""]
    if decision.skipped:
        parts += ["**Not compared, for the baseline's build does not support them:**", ""]
        parts += [*_list(decision.skipped, listed), ""]
    urgent = [v for v in kept if v.verdict in (FAIL, IMPROVED)]
    quiet = [v for v in kept if v.verdict in (INCONCLUSIVE, PASS)]
    if urgent:
        parts += [*_table(rows, urgent), ""]
        parts += [*(f"- `{v.name}`: {_escaped(v.reason)}" for v in urgent if v.reason), ""]
        if past := [f"- `{v.name}`: {trends[v.name]}" for v in urgent if v.name in trends]:
            parts += ["Speedup over SDPA in accepted runs:", "", *past, ""]
    if quiet:
        title = f"{len(quiet)} cases without a significant change"
        parts += _details(title, _table(rows, quiet))
    if notes := [f"- `{v.name}`: {_escaped(v.reason)}" for v in quiet if v.reason]:
        parts += _details(f"{len(notes)} of them inconclusive", notes)
    if left_out:
        parts += [f"{left_out} more cases do not fit here; the result file has them.", ""]
    if plans := _plan_changes(kept):
        parts += _details(f"{len(plans)} cases run another plan than before", plans)
    if decision.environment:
        title = f"The environment changed in {len(decision.environment)} ways (not the kernel)"
        parts += _details(title, _list(decision.environment, listed))
    parts += _details("Environment and rule", _environment(decision, current, baseline, cost))
    return "\n".join(parts) + "\n"


def _list(items: Sequence[str], most: int) -> list[str]:
    lines = [f"- {_escaped(item)}" for item in items[:most]]
    return lines + ([f"- and {len(items) - most} more"] if len(items) > most else [])


def _heading(decision: Decision) -> str:
    sign = {0: "✅", 1: "🔴", 3: "⚪", 4: "🟠"}[decision.exit_code]
    return f"### {sign} flashmoe ratchet {decision.summary}"


def _row(v: Verdict) -> str:
    baseline, now, change, bounds, _ = figures(v)
    cells = [f"`{v.name}`", f"{SIGNS[v.verdict]} {v.verdict}", baseline, now]
    return f"| {' | '.join([*cells, change and f'**{change}**', bounds])} |"


def _table(rows: Mapping[str, str], verdicts: Sequence[Verdict]) -> list[str]:
    lines = list(_HEADER)
    for kind, some in by_kind(verdicts).items():
        lines += [f"| **{kind}** | | | | | |", *(rows[v.name] for v in some)]
    return lines


def _plan_changes(verdicts: Sequence[Verdict]) -> list[str]:
    lines = []
    for v in verdicts:
        if v.current is None or v.baseline is None:
            continue
        old, new = plans((v.baseline, v.current))
        if old != new:
            lines.append(f"- `{v.name}`: {old} before, {new} now")
    return lines


def _environment(decision: Decision, current: Results, baseline: Results, cost: str) -> list[str]:
    thresholds = decision.thresholds
    return [
        *_fingerprint_table(current.fingerprint, baseline.fingerprint),
        "",
        f"FAIL: a slowdown is proven, and one of {-thresholds.fail:g} % is not excluded. PASS: it "
        f"is. IMPROVED: faster by more than {thresholds.improve:g} %, and proven. Of our time as a "
        "multiple of SDPA's; -3 % takes 3 % longer. Proven: over the processes of both runs, by "
        f"Yuen's t-test, Holm over the cases, {100 * ALPHA:g} %. Intervals are 95 %, each for its "
        "case alone.",
        "",
        *_exceptions(thresholds),
        f"Now: {current.started}, commit {current.commit[:12] or 'unknown'}, `{current.command}`, "
        f"{cost}  ",
        f"Baseline: {baseline.started}, commit {baseline.commit[:12] or 'unknown'}, "
        f"`{baseline.command}`",
    ]


def _exceptions(thresholds: Thresholds) -> list[str]:
    return [f"Thresholds of {_escaped(pattern)}: {own}  " for pattern, own in thresholds.cases]


def as_json(decision: Decision, current: Results, baseline: Results) -> dict[str, Any]:
    """For programs: the outcome and each case's figures, ratios as current / baseline."""

    def plain(x: Any) -> Any:
        return x.to_json() if isinstance(x, Interval) else x

    return {
        "exit_code": decision.exit_code,
        "summary": decision.summary,
        "commits": {"current": current.commit, "baseline": baseline.commit},
        "thresholds": asdict(decision.thresholds),
        "integrity": list(decision.integrity),
        "environment": list(decision.environment),
        "skipped": list(decision.skipped),
        "cases": [
            {name: plain(getattr(v, name)) for name in _FIGURES} for v in ranked(decision.verdicts)
        ],
    }


def _fingerprint_table(current: Fingerprint, baseline: Fingerprint) -> list[str]:
    old, new = baseline.to_json(), current.to_json()
    rows = ["| | baseline | now |", "|:--|:--|:--|"]
    return rows + [f"| {k} | {_escaped(str(old[k]))} | {_escaped(str(new[k]))} |" for k in new]


def _details(title: str, lines: Sequence[str]) -> list[str]:
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>", ""]


def _escaped(text: str) -> str:
    """Text from an exception or a file, so that it stays one cell and shows what it says."""
    text = " ".join(text.split())
    for character in "\\`*_<>[]|":
        text = text.replace(character, f"\\{character}")
    return text if len(text) <= 500 else f"{text[:500]}…"
