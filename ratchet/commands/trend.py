"""`trend`: the history of accepted runs, as pages and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

from flashmoe.ratchet.commands import common
from flashmoe.ratchet.gate.thresholds import percent
from flashmoe.ratchet.measuring.suite import parse
from flashmoe.ratchet.report import svg
from flashmoe.ratchet.report.html import page, table
from flashmoe.ratchet.report.trend import Series, all_series
from flashmoe.ratchet.results import history
from flashmoe.ratchet.results.files import load, write_text

HELP = "append a run to the history, and draw how speedups went over time"
DESCRIPTION = """Keep the history of accepted runs, one JSON object a line, and draw each case's
speedup over SDPA with its interval. Changes of level are marked by triangles; where the environment
changed (see gate) a dashed line breaks the series, for nothing is compared across it."""
EPILOG = "Exit codes: 0 done; 2 bad usage, or a damaged file."


def add(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--history", type=Path, required=True, help="the file; made by the first --append")
    add("--append", type=Path, metavar="FILE", help="add this result of bench, once")
    add("--html", type=Path, metavar="FILE", help="write a page here")
    add("--svg", type=Path, metavar="FILE", help="write a picture for a README here")
    common.add(parser)


def writes(arguments: argparse.Namespace) -> list[Path]:
    history = [arguments.history] if arguments.append else []
    return [*history, *(path for path in (arguments.html, arguments.svg) if path)]


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    if arguments.append:
        new = history.entry(load(arguments.append))
        added = history.append(arguments.history, new)
        print(f"{'added' if added else 'has already'} run {new.run[:12]} of {new.started}")
    entries = history.load(arguments.history)
    found = all_series(entries)
    if arguments.svg:
        write_text(arguments.svg, svg.document(svg.grid([_drawn(s) for s in found])))
    if arguments.html:
        write_text(arguments.html, _page(found, len(entries)))
    for series in found:
        for line in changes(series):
            print(f"{series.name}: {line}")
    return 0


def changes(series: Series) -> list[str]:
    """What happened to a case, a line each, in order."""
    values, lines = series.values(), []
    for i in sorted((*series.changes, *series.breaks)):
        one = series.entries[i]
        when = f"{one.started[:16]}, commit {one.commit[:10] or 'unknown'}"
        if i in series.breaks:
            before = series.entries[i - 1].fingerprint
            differ = [
                f"{key} {before.get(key)} to {value}"
                for key, value in one.fingerprint.items()
                if value != before.get(key) and key != "kernels"
            ]
            lines.append(f"{when}: another environment ({'; '.join(differ)})")
        else:
            change = percent(values[i].value / values[i - 1].value)
            lines.append(f"{when}: {change:+.1f} % from one run to the next")
    return lines


def _drawn(series: Series) -> str:
    return svg.series(series.name, series.points())


def _page(found: Sequence[Series], runs: int) -> str:
    body = [f"<h1>flashmoe ratchet: speedup over SDPA in {runs} accepted runs</h1>"]
    rows = [
        [f"<code>{escape(series.name)}</code>", escape(line)]
        for series in found
        for line in changes(series)
    ]
    if rows:
        body += ["<h2>What changed</h2>", table(("case", "change"), rows)]
    for kind in dict.fromkeys(parse(series.name).kind for series in found):
        some = (_drawn(series) for series in found if parse(series.name).kind == kind)
        body += [f"<h2>{escape(kind)}</h2>", "<div class=wide>", *some, "</div>"]
    return page("flashmoe ratchet trend", body)
