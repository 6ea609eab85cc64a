"""Where a decision is written to, in which forms, and what it cost."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate.decide import Decision
from flashmoe.ratchet.report import markdown as report
from flashmoe.ratchet.report.html import html
from flashmoe.ratchet.report.junit import junit
from flashmoe.ratchet.report.trend import sparklines
from flashmoe.ratchet.results import history
from flashmoe.ratchet.results.files import write_json, write_text
from flashmoe.ratchet.results.values import Results

# What is written, and what for.
_REPORTS = {
    "report": "write a Markdown report here",
    "html": "write a self-contained HTML report here",
    "json": "write the decision here",
    "junit": "write the decision here as JUnit XML",
    "profile-targets": "write the names of regressed and much improved cases here",
}


def add_reports(parser: argparse.ArgumentParser) -> None:
    for name, help in _REPORTS.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=help)
    history = "of trend: adds its lines to the report"
    parser.add_argument("--history", type=Path, metavar="FILE", help=history)


def reports(arguments: argparse.Namespace) -> list[Path]:
    """The files that `write_reports` will write."""
    paths = (getattr(arguments, name.replace("-", "_")) for name in _REPORTS)
    return [path for path in paths if path]


def write_reports(
    arguments: argparse.Namespace,
    decision: Decision,
    current: Results,
    baseline: Results,
    seconds: float,
) -> None:
    """`seconds` of the machine went into the comparison."""
    cost = cost_line(seconds, arguments.price_per_hour)
    if arguments.report:
        trends = None
        if arguments.history:
            here = history.entry(current).environment
            trends = sparklines(history.load(arguments.history), here)
        text = report.markdown(decision, current, baseline, cost, trends)
        write_text(arguments.report, text)
    if arguments.html:
        write_text(arguments.html, html(decision, current, baseline, cost))
    if arguments.json:
        write_json(arguments.json, report.as_json(decision, current, baseline))
    if arguments.junit:
        write_text(arguments.junit, junit(decision))
    if arguments.profile_targets:
        targets = report.profile_targets(decision)
        write_text(arguments.profile_targets, "".join(f"{name}\n" for name in targets))


def cost_line(seconds: float, price_per_hour: float | None) -> str:
    """The machine's time, and its cost where a price is known."""
    line = f"took {seconds:.0f} s of the machine"
    if price_per_hour is None:
        return line
    if not 0 <= price_per_hour < float("inf"):
        raise UserError(f"price-per-hour must not be negative, got {price_per_hour}")
    return f"{line}: {seconds * price_per_hour / 3600:.4f} at {price_per_hour:g} an hour"
