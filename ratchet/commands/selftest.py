"""`selftest`: does the gate see a slowdown, here and now?"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from flashmoe.ratchet.commands import common
from flashmoe.ratchet.commands.bench import add_budget, settings
from flashmoe.ratchet.commands.gate import show
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate.decide import (
    EXIT_INCONCLUSIVE,
    EXIT_INTEGRITY,
    EXIT_PASS,
    EXIT_REGRESSION,
    FAIL,
    IMPROVED,
    PASS,
    Decision,
    decide,
)
from flashmoe.ratchet.gate.thresholds import Thresholds, percent
from flashmoe.ratchet.measuring.processes import Source
from flashmoe.ratchet.measuring.run import bench
from flashmoe.ratchet.measuring.suite import Case, select
from flashmoe.ratchet.measuring.worse import worse_tile
from flashmoe.ratchet.report.outputs import cost_line
from flashmoe.ratchet.results.values import Results

HELP = "prove that the gate sees a known slowdown on this machine"
DESCRIPTION = """Measure the same kernels three times over, in processes that take turns: as they
are, as they are once more, and with every other case delayed by a known share of its time, and,
where a slower tile was compiled in, one of the rest with that tile. The gate has to pass the second
against the first, and to fail exactly the slowed cases of the third."""
EPILOG = """Exit codes: 0 the gate sees it; 1 it raised a false alarm or missed the slowdown; 2 bad
usage; 3 too noisy here to tell; 4 not comparable (a throttled GPU, for one)."""

# The default slowdown, as a multiple of the fail threshold: of exactly the threshold, one of 20
# gates does not fail on it.
_INJECTED = 1.5
# A CPU's noise comes and goes: a selftest asks for more processes until it can tell, for so long.
_BUDGET = {"cpu": 450.0, "cuda": 55.0}
_CASES = {
    "cpu": (
        "fwd-b2-h8-s512-d64-float32",
        "fwd-b1-h4-s1024-d128-float32-causal",
        "bwd-b1-h4-s256-d64-float32",
        "fwd-b4-h8-s512-d64-float32-causal-packed",
    ),
    "cuda": (
        "bwd-b4-h16-s4096-d128-bfloat16-causal",
        "fwd-b4-h16-s2048-d128-float16-causal",
        "fwd-b32-h32k8-s1x8192-d128-bfloat16-paged",
        "fwd-b16-h16-s2048-d128-bfloat16-causal-packed",
    ),
}


def add(parser: argparse.ArgumentParser) -> None:
    common.add_cases(parser)
    add_budget(parser, **_BUDGET)
    common.add_thresholds(parser)
    parser.add_argument(
        "--slowdown",
        type=float,
        metavar="PERCENT",
        help=f"to inject (default: {_INJECTED:g} times the fail threshold)",
    )
    common.add(parser, "price-per-hour", "device", "seed")


def ending(same: Decision, slowed: Decision, expected: Collection[str]) -> tuple[int, str]:
    """The exit code and why: from the gates of the same kernels and of the slowed ones, which are
    to fail in the `expected` cases."""
    failed = {v.name for v in slowed.named(FAIL)}
    missed = sorted({*expected} - failed)
    # Slowed, and yet let through. One that is INCONCLUSIVE is not let through.
    passed = sorted({*expected} & {v.name for v in slowed.named(PASS, IMPROVED)})
    alarms = sorted(failed - {*expected}) or [v.name for v in same.named(FAIL)]
    if EXIT_INTEGRITY in (same.exit_code, slowed.exit_code):
        return EXIT_INTEGRITY, "the runs are not comparable"
    if passed:
        return EXIT_REGRESSION, f"the gate missed a slowdown: {', '.join(passed)}"
    if alarms:
        return EXIT_REGRESSION, f"the gate raised a false alarm: {', '.join(alarms)}"
    if same.exit_code == EXIT_INCONCLUSIVE or missed:
        what = ", ".join(missed) or "same against same"
        told = f"too noisy for this threshold and budget: {what} is inconclusive"
        return EXIT_INCONCLUSIVE, told
    return EXIT_PASS, f"the gate fails on {', '.join(sorted(failed))}, and only there"


def writes(arguments: argparse.Namespace) -> list[Path]:
    return []


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    device = common.device(arguments.device)
    kind = torch.device(device).type
    cases = select(arguments.suite, kind, arguments.case or _CASES[kind])
    chosen, thresholds = settings(arguments, device, **_BUDGET), common.thresholds(arguments, kind)
    thresholds.check(case.name for case in cases)
    slowdown = -_INJECTED * thresholds.fail if arguments.slowdown is None else arguments.slowdown
    if not slowdown > 0:
        raise UserError(f"slowdown must be positive, got {slowdown}")
    slow, expected = _slow_source(cases, torch.device(device), slowdown, thresholds)
    sources = (Source("base"), Source("same"), slow)
    with common.progress(len(sources) * len(cases) * chosen.least) as step:
        runs = bench(
            cases, chosen, common.command(argv), step, sources=sources, debug=arguments.debug
        )
    base, *others = runs
    same, slowed = (decide(run, base, thresholds) for run in others)
    code, told = ending(same, slowed, expected)
    for name, what in expected.items():
        print(f"injected into {name}: {what}")
    for decision in (same, slowed):
        show(decision)
    print(_visible(same, base))
    print(cost_line(3 * base.duration, arguments.price_per_hour))
    print(f"selftest: {told}")
    return code


def _slow_source(
    cases: Sequence[Case], device: torch.device, slowdown: float, thresholds: Thresholds
) -> tuple[Source, dict[str, str]]:
    """The source with its slowed cases, and what was done to each: every other one is delayed; the
    first of the rest with a tile that is slower by clearly more than the threshold runs that."""
    slow = {case.name: slowdown for case in cases[::2]}
    job: dict[str, Any] = {"slow": slow, "options": {}}
    expected = dict.fromkeys(slow, f"a delay of {slowdown:g} %")
    for case in cases[1::2]:
        if found := worse_tile(case, device, 1 - 2 * thresholds.of(case.name).fail / 100):
            job["options"] = {case.name: {"backend": found.backend, "tile": found.tile}}
            expected[case.name] = f"tile {found.tile}, about {found.factor:.2f} times as slow"
            break
    return Source("slowed", job=job), expected


def _visible(same: Decision, base: Results) -> str:
    """The smallest slowdown that this budget sees 19 times of 20."""
    seen = {v.name: v.detectable for v in same.verdicts if v.detectable is not None}
    if not seen:
        return "nothing was measured that could tell the smallest visible slowdown"
    worst = max(seen, key=lambda name: seen[name])
    processes = min(len(case.ours.samples) for case in base.cases)
    least, most = (-percent(1 / factor) for factor in (min(seen.values()), seen[worst]))
    return (
        f"with {processes} processes, a slowdown is seen 19 times of 20 from {least:.1f} % in the "
        f"quietest case to {most:.1f} % in {worst}"
    )
