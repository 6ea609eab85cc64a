"""`ab`: build two commits, measure both in turns on one device, and decide as `gate` does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from flashmoe.ratchet.commands import common
from flashmoe.ratchet.commands.bench import add_budget, settings
from flashmoe.ratchet.commands.gate import show
from flashmoe.ratchet.gate.decide import EXIT_PASS, EXIT_REGRESSION, decide
from flashmoe.ratchet.measuring import builds
from flashmoe.ratchet.measuring.run import bench
from flashmoe.ratchet.measuring.suite import select
from flashmoe.ratchet.report.outputs import add_reports, cost_line, reports, write_reports
from flashmoe.ratchet.results.files import save

HELP = "build two commits, measure both in turns on one device, and compare them"
DESCRIPTION = """Build both commits in folders of their own and measure them in fresh processes that
take turns in random order, each with SDPA as the yardstick. No baseline, no other day, no other
machine: the strongest comparison there is."""
EPILOG = """Exit codes: 0 pass; 1 a regression, or --head does not build; 2 bad usage, or --base
does not build; 3 inconclusive; 4 not comparable."""

SIDES = ("base", "head")


def add(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", required=True, metavar="REF", help="what to compare with")
    add(
        "--head",
        metavar="REF",
        help="what to judge (default: the working tree, with changes of tracked files)",
    )
    common.add_cases(parser)
    add_budget(parser)
    common.add_thresholds(parser)
    add_reports(parser)
    add(
        "--output",
        type=Path,
        default=Path("results/ab"),
        metavar="FOLDER",
        help="for base.json and head.json (default: %(default)s)",
    )
    common.add(parser, "build-folder", "build-only", "price-per-hour", "device", "seed")


def writes(arguments: argparse.Namespace) -> list[Path]:
    results = [arguments.output / f"{side}.json" for side in SIDES]
    return [] if arguments.build_only else [*results, *reports(arguments)]


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    device = common.device(arguments.device)
    kind = torch.device(device).type
    cases = select(arguments.suite, kind, arguments.case)
    chosen, thresholds = settings(arguments, device), common.thresholds(arguments, kind)
    thresholds.check(case.name for case in cases)
    base = builds.resolve(arguments.base)
    head = builds.resolve(arguments.head) if arguments.head else builds.working_tree()
    base_site = builds.build(base, arguments.build_folder, arguments.debug)
    try:
        head_site = builds.build(head, arguments.build_folder, arguments.debug)
    except builds.BuildError as error:
        print(f"ratchet failed: {' '.join(str(error).split())}")
        return EXIT_REGRESSION
    if arguments.build_only:
        print(f"--base {base} --head {head}")
        return EXIT_PASS
    # One build for one commit: the same against itself has to pass.
    sites = zip(SIDES, (base_site, head_site), strict=True)
    sources = [builds.source(side, site, cuda=kind == "cuda") for side, site in sites]
    with common.progress(2 * len(cases) * chosen.least) as step:
        command = common.command(argv)
        old, new = bench(cases, chosen, command, step, sources=sources, debug=arguments.debug)
    for side, results in zip(SIDES, (old, new), strict=True):
        save(results, arguments.output / f"{side}.json")
    decision = decide(new, old, thresholds)
    seconds = old.duration + new.duration
    write_reports(arguments, decision, new, old, seconds)
    show(decision)
    print(cost_line(seconds, arguments.price_per_hour))
    return decision.exit_code
