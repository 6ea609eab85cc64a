"""tuning/report.html: one file that needs no network, no script and no second look at the log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import chain
from pathlib import Path

from flashmoe.autotune.report import charts
from flashmoe.autotune.report.sensitivity import steps
from flashmoe.autotune.report.texts import apart, duration, outcome, ratio
from flashmoe.autotune.schedule.result import Result
from flashmoe.autotune.search.trials import Trial
from flashmoe.autotune.verdict.decide import AGAIN
from flashmoe.measure.fingerprint import Fingerprint
from flashmoe.measure.stats import median_by_process
from flashmoe.measure.timing import Limits

_STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def html(
    results: Sequence[Result],
    fingerprint: Fingerprint,
    limits: Mapping[str, Limits],
    *,
    command: str,
    database: str,
) -> str:
    """The whole report. `limits` by dtype, measured in this run; without them, no roofline."""
    facts = {**fingerprint.to_json(), "command": command, "database": database}
    rows = [[escape(name), f"<code>{escape(str(value))}</code>"] for name, value in facts.items()]
    parts = [
        _problem(kind, result, limits.get(result.problem.dtype))
        for kind, found in apart(results)
        for result in found
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Tuning on {escape(fingerprint.device)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Tuning on {escape(fingerprint.device)}</h1>{_summary(results)}{''.join(parts)}"
        f"<h2>Environment</h2>{_table(['', ''], rows)}</body></html>\n"
    )


def _summary(results: Sequence[Result]) -> str:
    """One table, in which each kind of problem has its rows below its name."""
    heads = ["problem", "runs", "time", "over default", "over SDPA", "outcome"]
    rows = [
        row
        for kind, found in apart(results)
        for row in ([f"<h3>{kind}</h3>"], *map(_summary_row, found))
    ]
    return _table(heads, rows)


def _summary_row(result: Result) -> list[str]:
    return [
        escape(result.problem.label),
        f"<code>{escape(str(result.best or '-'))}</code>",
        _kept_together(duration(result.seconds.value) if result.seconds else "-"),
        *(
            # Between a figure and its interval a line may break, within them not.
            " [".join(map(_kept_together, ratio(interval).split(" [")))
            for interval in (result.speedup_default, result.speedup_sdpa)
        ),
        escape(result.status),
    ]


def _kept_together(text: str) -> str:
    return text.replace(" ", "&nbsp;")


def _problem(kind: str, result: Result, limits: Limits | None) -> str:
    told, searched = "", []
    if search := result.search:
        if search.told:
            chart = charts.best_so_far(search.told)
            searched.append(f"<h3>Best so far, over the default's time</h3>{chart}")
        if search.importances:
            bars = charts.bars(search.importances)
            searched.append(f"<h3>What matters (PED-ANOVA)</h3>{bars}")
        told = (
            f'<p class="soft">{len(search.trials)} of {search.space} legal tiles tried '
            f"({escape(search.sampler or 'all known')}; {escape(search.ended)}), "
            f"{sum(t.pruned for t in search.trials)} of them pruned after a first look. "
            f"Study <code>{escape(search.study)}</code> in "
            f"<code>{escape(result.storage or 'memory')}</code>.</p>"
        )
    rest = _sensitivity(result), _roofline(result, limits), _rejected(result)
    panels = [*_heat_maps(result), _final(result), *searched, *rest]
    body = "".join(f'<div class="panel">{panel}</div>' for panel in panels if panel)
    return (
        f"<section><h2>{kind}: {escape(result.problem.label)}</h2>"
        f"<p>{escape(outcome(result))}</p>{told}"
        f'<div class="panels">{body}</div></section>'
    )


def _heat_maps(result: Result) -> list[str]:
    """One for each kernel and number of stages; a cell shows the best of the other axes."""
    trials = result.search.trials if result.search else ()
    values = [trial.ratio.value for trial in trials if trial.ratio]
    if not values:
        return []
    best, worst = min(values), min(max(values), 2 * min(values))
    maps: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        maps.setdefault((trial.tile.kernel, trial.tile.num_stages), []).append(trial)
    found = []
    for (kernel, stages), of_map in sorted(maps.items()):
        rows = sorted({t.tile.block_m for t in trials if t.tile.kernel == kernel})
        columns = sorted({t.tile.block_n for t in trials if t.tile.kernel == kernel})
        cells: dict[tuple[int, int], tuple[float | None, str]] = {}
        # The fastest of a cell first, and those without a time last.
        for trial in sorted(of_map, key=lambda t: t.ratio.value if t.ratio else math.inf):
            value = trial.ratio.value if trial.ratio else None
            told = f"{trial.tile}: {f'{value:.3f}' if value else trial.status + trial.reason}"
            cells.setdefault((trial.tile.block_m, trial.tile.block_n), (value, told))
        name = f"{kernel}, {stages} stage{'s' if stages > 1 else ''}"
        chart = charts.heat_map(name, rows, columns, cells, best, worst)
        found.append(f"<h3>Time over the default's, block_m down, block_n across</h3>{chart}")
    return found


def _final(result: Result) -> str:
    rows = []
    for name, samples in result.samples.items():
        if name == AGAIN:
            continue
        ticks = [seconds * 1e6 for seconds in chain(*samples)]
        middle = median_by_process(samples)
        role = " (default)" if name == str(result.default) else ""
        low, high = middle.low * 1e6, middle.high * 1e6
        rows.append((name + role, ticks, middle.value * 1e6, low, high))
    if not rows:
        return ""
    rows.sort(key=lambda row: row[2])
    noise = f"noise floor {result.noise:.1%}"
    return f"<h3>The final: samples, median, 95 % interval; {noise}</h3>{charts.strips(rows, 'µs')}"


def _sensitivity(result: Result) -> str:
    rows = [
        [step.axis, f"<code>{step.tile}</code>", "-" if step.loss is None else f"{step.loss:+.1%}"]
        for step in steps(result)
    ]
    if not rows:
        return ""
    return f"<h3>One step away from the best tile</h3>{_table(['axis', 'tile', 'time'], rows)}"


def _roofline(result: Result, limits: Limits | None) -> str:
    problem = result.problem
    if limits is None or result.seconds is None or problem.bytes == 0 or problem.flops == 0:
        return ""
    intensity = problem.flops / problem.bytes
    points = []
    for role, candidate in (("best", result.best), ("default", result.default), ("sdpa", "sdpa")):
        samples = result.samples.get(str(candidate))
        if samples and (role == "best" or str(candidate) != str(result.best)):
            points.append((role, intensity, problem.flops / median_by_process(samples).value))
    floor = limits.floor(problem.flops, problem.bytes)
    share = floor / result.seconds.value
    chart = charts.roofline(points, limits.matmul_flops, limits.copy_bytes)
    return f"<h3>Roofline: {share:.0%} of what matmul and copy reach here</h3>{chart}"


def _rejected(result: Result) -> str:
    rows = [
        [f"<code>{t.tile}</code>", escape(t.status), escape(t.reason)] for t in result.rejected()
    ]
    if not rows:
        return ""
    return f"<h3>Not used</h3>{_table(['tile', 'status', 'reason'], rows)}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads) if any(heads) else ""
    body = "".join(
        # A row of one cell is a heading of those that follow.
        f'<tr><td colspan="{len(heads)}">{row[0]}</td></tr>'
        if len(row) < len(heads)
        else f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
