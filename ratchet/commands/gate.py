"""`gate`: compare a measurement with the baseline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flashmoe.machine.device import slug
from flashmoe.ratchet.commands import common
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate.decide import EXIT_BAD_INPUT, EXIT_INTEGRITY, IMPROVED, Decision, decide
from flashmoe.ratchet.gate.thresholds import Thresholds
from flashmoe.ratchet.report import console
from flashmoe.ratchet.report.outputs import add_reports, reports, write_reports
from flashmoe.ratchet.results import baseline as baselines
from flashmoe.ratchet.results.files import load, save
from flashmoe.ratchet.results.values import Results

HELP = "compare a measurement with the baseline"
DESCRIPTION = """Compare speedups over SDPA with the baseline's. The exact rule is in
flashmoe.ratchet.gate.decide (pydoc flashmoe.ratchet.gate.decide)."""
EPILOG = """Exit codes: 0 pass; 1 a regression, or a case that is wrong or does not run; 2 bad usage
or input; 3 inconclusive: too noisy for the threshold, or the environment changed; 4 not comparable:
cases missing or extra, another machine, software or SDPA backend than the baseline's, a throttled
GPU."""


def add(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("current", type=Path, help="what bench wrote")
    add(
        "--baseline",
        type=Path,
        required=True,
        help="baseline file, or a folder with one DEVICE.json per device model",
    )
    common.add_thresholds(parser)
    add_reports(parser)
    add(
        "--update",
        action="store_true",
        help="move improved cases of the baseline forward, which takes a confirming run "
        "(--confirm); without a baseline, create it",
    )
    add("--confirm", type=Path, metavar="FILE", help="what a second bench of the same source wrote")
    common.add(parser, "price-per-hour")


def writes(arguments: argparse.Namespace) -> list[Path]:
    return reports(arguments)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    if arguments.confirm and not arguments.update:
        raise UserError("--confirm goes with --update")
    current = load(arguments.current)
    thresholds = common.thresholds(arguments, current.kind)
    path = baseline_path(arguments.baseline, current)
    created = not path.exists()
    if created:
        if not arguments.update:
            raise UserError(f"there is no baseline {path}; the same command with --update makes it")
        save(baselines.create(current), path)
        print(f"created baseline {path} with {len(current.cases)} cases")
    baseline = load(path)
    decision = decide(current, baseline, thresholds, created=created)
    write_reports(arguments, decision, current, baseline, current.duration)
    show(decision)
    if arguments.update:
        print(updated(path, baseline, current, decision, thresholds, arguments.confirm))
    return decision.exit_code


def baseline_path(path: Path, current: Results) -> Path:
    """Of this device's model, where `path` is a folder, or is to be one: no file, and not called
    .json either."""
    if path.is_dir() or (not path.exists() and path.suffix != ".json"):
        return path / f"{slug(current.fingerprint.device)}.json"
    return path


def show(decision: Decision) -> None:
    out = common.stdout()
    out.print(console.decision_table(decision))
    for problem in decision.problems:
        out.print(f"not comparable: {problem}")
    for note in decision.environment:
        out.print(f"environment, not the kernel: {note}")
    for case in decision.skipped:
        out.print(f"not compared, for the baseline's build does not support it: {case}")


def updated(
    path: Path,
    baseline: Results,
    current: Results,
    decision: Decision,
    thresholds: Thresholds,
    confirm: Path | None,
) -> str:
    """Moves the baseline at `path`, where that is due, and tells what moved, or why nothing did."""
    if decision.exit_code in (EXIT_BAD_INPUT, EXIT_INTEGRITY, 1):
        return f"baseline {path} stays: the gate did not pass"
    if confirm is None:
        improved = [v.name for v in decision.named(IMPROVED)]
        if not improved:
            return f"baseline {path} stays: nothing improved"
        return (
            f"baseline {path} stays: {len(improved)} cases improved ({', '.join(improved)}); "
            "bench once more and pass that file as --confirm"
        )
    confirming = load(confirm)
    second = decide(confirming, baseline, thresholds)
    moved_baseline, moved = baselines.forward(baseline, current, confirming, decision, second)
    if moved:
        save(moved_baseline, path)
    lines = [f"baseline {path}: {len(moved)} of {len(baseline.cases)} cases moved forward"]
    return "\n".join([*lines, *(f"  {line}" for line in moved)])
