"""`bench`: measure every case against SDPA, in several fresh processes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flashmoe.ratchet.commands import common
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate.decide import EXIT_PASS, EXIT_REGRESSION
from flashmoe.ratchet.measuring import builds
from flashmoe.ratchet.measuring.processes import Source
from flashmoe.ratchet.measuring.programs import commit
from flashmoe.ratchet.measuring.run import Settings, bench
from flashmoe.ratchet.measuring.suite import select
from flashmoe.ratchet.report import console
from flashmoe.ratchet.report.outputs import cost_line
from flashmoe.ratchet.results.files import save

HELP = "measure every case against SDPA, in several fresh processes"
DESCRIPTION = """Measure flash_attn_func as a user calls it against
torch.nn.functional.scaled_dot_product_attention, interleaved, in several fresh processes, each case
checked for correctness first."""
EPILOG = """Exit codes: 0 every case measured; 1 a case gave wrong results or did not run (the file
says why), or --build does not build; 2 bad usage."""


@dataclass(frozen=True, slots=True)
class _Option:
    """One of `bench`'s numbers, with a default for each kind of device."""

    cpu: float
    cuda: float
    help: str
    type: type = float
    metavar: str | None = None


# What disturbs a CPU lasts for tenths of a second: on a virtual machine with 2 cores the speedup of
# fwd-b2-h8-s512-d64-float32 varied by 3.0 % from round to round, 4.0 % from visit to visit and
# 1.3 % from process to process. Nine visits instead of one halved the spread of a process's figure.
_OPTIONS = {
    "rounds": _Option(20, 20, "timed rounds of a case in a process", int),
    "visits": _Option(
        *(10, 1),
        "a process takes a case's rounds in so many visits to it, with all other cases in between",
        int,
    ),
    "warmup": _Option(1, 4, "rounds before those of each visit", int),
    "precision": _Option(
        *(1.5, 0.7),
        "a case is done when its speedup's 95%% interval reaches no further to either side",
        metavar="PERCENT",
    ),
    "budget": _Option(150, 55, "no further processes after it", metavar="SECONDS"),
}
# Resampled from 36 processes of a virtual machine with 2 cores whose speedups differed by 2.6 to
# 5.3 %: with 16 a side, a case slower by 8 % is FAIL in 95 % of gates, one by 10 % in 99 %.
LEAST = {"cpu": 16, "cuda": 10}
_MOST = {"cpu": 40, "cuda": 30}


def add(parser: argparse.ArgumentParser) -> None:
    common.add_cases(parser)
    add = parser.add_argument
    add("--output", type=Path, default=Path("results/current.json"), help="default: %(default)s")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--build",
        metavar="REF",
        help="build this commit and measure it, by the ratchet that is installed here (default: "
        "measure what is installed)",
    )
    what.add_argument(
        "--yardstick",
        metavar="REASON",
        help="measure SDPA alone, once, and note for every case that ours did not run for REASON",
    )
    add_budget(parser)
    common.add(parser, "build-folder", "build-only", "price-per-hour", "device", "seed")


def add_budget(parser: argparse.ArgumentParser, **budget: float) -> None:
    """`budget`: another one by kind of device, which is the option's default."""
    for name, option in _OPTIONS.items():
        kinds = {"cpu": option.cpu, "cuda": option.cuda} | (budget if name == "budget" else {})
        defaults = ", ".join(f"{value:g} on {kind}" for kind, value in kinds.items())
        help = f"{option.help} (default: {defaults})"
        parser.add_argument(f"--{name}", type=option.type, metavar=option.metavar, help=help)
    parser.add_argument(
        "--processes",
        type=int,
        help="exactly so many fresh processes for each case, whatever the precision and the "
        f"budget (default: as many as it takes, from {LEAST['cuda']} to {_MOST['cuda']} on cuda, "
        f"from {LEAST['cpu']} to {_MOST['cpu']} on cpu)",
    )


def settings(arguments: argparse.Namespace, device: str, **budget: float) -> Settings:
    kind, fixed = torch.device(device).type, arguments.processes
    values = {name: getattr(option, kind) for name, option in _OPTIONS.items()}
    values["budget"] = budget.get(kind, values["budget"])
    values |= {name: x for name in values if (x := getattr(arguments, name)) is not None}
    if fixed is not None:
        values["budget"] = math.inf
    return Settings(
        device=device,
        least=LEAST[kind] if fixed is None else fixed,
        most=_MOST[kind] if fixed is None else fixed,
        seed=arguments.seed,
        suite="" if arguments.case else arguments.suite,
        **values,
    )


def writes(arguments: argparse.Namespace) -> list[Path]:
    return [] if arguments.build_only else [arguments.output]


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    device = common.device(arguments.device)
    kind = torch.device(device).type
    cases = select(arguments.suite, kind, arguments.case)
    chosen = settings(arguments, device)
    if arguments.build_only and not arguments.build:
        raise UserError("--build-only goes with --build")
    if arguments.build:
        name = builds.resolve(arguments.build)
        try:
            site = builds.build(name, arguments.build_folder, arguments.debug)
        except builds.BuildError as error:
            print(f"nothing to measure: {' '.join(str(error).split())}")
            return EXIT_REGRESSION
        if arguments.build_only:
            print(f"--build {name}")
            return EXIT_PASS
        source = builds.source("this", site, cuda=kind == "cuda")
    else:
        job = {"yardstick": arguments.yardstick} if arguments.yardstick else {}
        source = Source("this", job=job, commit=commit())
    with common.progress(len(cases) * chosen.least) as step:
        command = common.command(argv)
        (results,) = bench(cases, chosen, command, step, sources=(source,), debug=arguments.debug)
    save(results, arguments.output)
    common.stdout().print(console.results_table(results))
    print(cost_line(results.duration, arguments.price_per_hour))
    return EXIT_PASS if all(case.ok for case in results.cases) else EXIT_REGRESSION
