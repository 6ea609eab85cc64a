"""The gate's outcome as Markdown for a pull request, and the list of cases worth profiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

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
from flashmoe.ratchet.report.rows import SIGNS, by_kind, figures, plan, ranked
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
    cases = ranked(decision.verdicts)
    # All of them, half as many, and so on down to none.
    for shown in (len(cases) >> halvings for halvings in range(len(cases).bit_length() + 1)):
        kept, left_out = cases[:shown], len(cases) - shown
        parts = _parts(decision, kept, left_out, trends or {})
        rule = _environment(decision, current, baseline, cost)
        text = "\n".join([*parts, *_details("Environment and rule", rule)]) + "\n"
        if len(text) < MAX_CHARACTERS:
            return text
    return f"{_heading(decision)}\n\nThe report does not fit into a comment.\n"


def _parts(
    decision: Decision, kept: Sequence[Verdict], left_out: int, trends: Mapping[str, str]
) -> list[str]:
    listed = max(len(kept), _LEAST_LISTED)
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
        parts += [*_table(urgent), ""]
        parts += [*(f"- `{v.name}`: {_escaped(v.reason)}" for v in urgent if v.reason), ""]
        if past := [f"- `{v.name}`: {trends[v.name]}" for v in urgent if v.name in trends]:
            parts += ["Speedup over SDPA in accepted runs:", "", *past, ""]
    if quiet:
        title = f"{len(quiet)} cases without a significant change"
        parts += _details(title, _table(quiet))
    if notes := [f"- `{v.name}`: {_escaped(v.reason)}" for v in quiet if v.reason]:
        parts += _details(f"{len(notes)} of them inconclusive", notes)
    if left_out:
        parts += [f"{left_out} more cases do not fit here; the result file has them.", ""]
    if plans := _plan_changes(kept):
        parts += _details(f"{len(plans)} cases run another plan than before", plans)
    if decision.environment:
        title = f"The environment changed in {len(decision.environment)} ways (not the kernel)"
        parts += _details(title, _list(decision.environment, listed))
    return parts


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


def _table(verdicts: Sequence[Verdict]) -> list[str]:
    lines = list(_HEADER)
    for kind, some in by_kind(verdicts).items():
        lines += [f"| **{kind}** | | | | | |", *map(_row, some)]
    return lines


def _plan_changes(verdicts: Sequence[Verdict]) -> list[str]:
    lines = []
    for v in verdicts:
        if v.current is None or v.baseline is None:
            continue
        old, new = plan(v.baseline), plan(v.current)
        if old != new:
            lines.append(f"- `{v.name}`: {old} before, {new} now")
    return lines


def _environment(decision: Decision, current: Results, baseline: Results, cost: str) -> list[str]:
    thresholds = decision.thresholds
    old, new = (run.fingerprint.to_json() for run in (baseline, current))
    return [
        "| | baseline | now |",
        "|:--|:--|:--|",
        *(f"| {k} | {_escaped(str(old[k]))} | {_escaped(str(new[k]))} |" for k in new),
        "",
        f"FAIL: a slowdown is proven, and one of {-thresholds.fail:g} % is not excluded. PASS: it "
        f"is. IMPROVED: faster by more than {thresholds.improve:g} %, and proven. Of our time as a "
        "multiple of SDPA's; -3 % takes 3 % longer. Proven: over the processes of both runs, by "
        f"Yuen's t-test, Holm over the cases, {100 * ALPHA:g} %. Intervals are 95 %, each for its "
        "case alone.",
        "",
        *(f"Thresholds of {_escaped(x)}: {own}  " for x, own in thresholds.cases),
        f"Now: {current.started}, commit {current.commit[:12] or 'unknown'}, `{current.command}`, "
        f"{cost}  ",
        f"Baseline: {baseline.started}, commit {baseline.commit[:12] or 'unknown'}, "
        f"`{baseline.command}`",
    ]


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


def _details(title: str, lines: Sequence[str]) -> list[str]:
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>", ""]


def _escaped(text: str) -> str:
    """Text from an exception or a file, so that it stays one cell and shows what it says."""
    text = " ".join(text.split())
    for character in "\\`*_<>[]|":
        text = text.replace(character, f"\\{character}")
    return text if len(text) <= 500 else f"{text[:500]}…"
