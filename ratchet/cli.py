"""The command line: `bench` measures, `gate` compares with a baseline."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flashmoe.device import slug
from flashmoe.ratchet import baseline as baselines
from flashmoe.ratchet import console, report
from flashmoe.ratchet.bench import Settings, bench
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate import (
    EXIT_BAD_INPUT,
    EXIT_PASS,
    EXIT_REGRESSION,
    Decision,
    Thresholds,
    decide,
)
from flashmoe.ratchet.results import Results, load, save, write_text
from flashmoe.ratchet.suite import NAME_FORM, SUITES, select

PROGRAM = "flashmoe.ratchet"
INTERRUPTED = 130
# On a CPU, processes differ more from each other, and start sooner.
PROCESSES = {"cpu": 20, "cuda": 5}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments, argv)
    except UserError as error:
        if arguments.debug:
            raise
        line = " ".join(str(error).split())
        print(f"{PROGRAM}: error: {line}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Measure attention against SDPA and let no kernel get slower unnoticed.",
    )
    commands = parser.add_subparsers(required=True, metavar="bench|gate")
    _add_bench(
        commands.add_parser(
            "bench",
            help="measure every case against SDPA, in several fresh processes",
            description="Measure flash_attn_func as a user calls it against "
            "torch.nn.functional.scaled_dot_product_attention, interleaved, in several fresh "
            "processes, each case checked for correctness first.",
            epilog="Exit codes: 0 every case measured; 1 a case gave wrong results or did not run "
            "(the file says why); 2 bad usage.",
        )
    )
    _add_gate(
        commands.add_parser(
            "gate",
            help="compare a measurement with the baseline",
            description="Compare speedups over SDPA with the baseline's. The exact rule is in "
            "flashmoe.ratchet.gate (pydoc flashmoe.ratchet.gate).",
            epilog="Exit codes: 0 pass; 1 a regression, or a case that is wrong or does not run; 2 "
            "bad usage or input; 4 not comparable: cases missing or extra, another machine or "
            "software than the baseline's, or SDPA itself moved in every case.",
        )
    )
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--suite", choices=list(SUITES), default="quick", help="default: %(default)s")
    add(
        "--case",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="these cases instead of a suite: patterns such as '*-causal', or names of the form "
        + NAME_FORM.replace("%", "%%"),
    )
    add("--output", type=Path, default=Path("results/current.json"), help="default: %(default)s")
    add("--rounds", type=int, default=100, help="timed rounds of a case (default: %(default)s)")
    add("--warmup", type=int, default=20, help="rounds before those (default: %(default)s)")
    add(
        "--processes",
        type=int,
        help="fresh processes that share the rounds (default: "
        + ", ".join(f"{number} on {kind}" for kind, number in PROCESSES.items())
        + ")",
    )
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="of inputs and orders (default: %(default)s)")
    add("--debug", action="store_true", help="show tracebacks and the workers' own output")
    parser.set_defaults(run=_bench)


def _add_gate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("current", type=Path, help="what bench wrote")
    add(
        "--baseline",
        type=Path,
        required=True,
        help="baseline file, or a folder with one DEVICE.json per device model",
    )
    add("--report", type=Path, help="write a Markdown report here")
    add("--profile-targets", type=Path, help="write regressed and much improved cases here")
    add(
        "--threshold-fail", type=float, default=-3.0, metavar="PERCENT", help="default: %(default)s"
    )
    add(
        "--threshold-improve",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="default: %(default)s",
    )
    add(
        "--update",
        action="store_true",
        help="after a pass, move improved cases of the baseline forward; without a baseline, "
        "create it",
    )
    add("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_gate)


def _bench(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    device = _device(arguments.device)
    kind = torch.device(device).type
    cases = select(arguments.suite, kind, arguments.case)
    settings = Settings(
        device,
        arguments.rounds,
        arguments.warmup,
        PROCESSES[kind] if arguments.processes is None else arguments.processes,
        arguments.seed,
        "" if arguments.case else arguments.suite,
    )
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        total = len(cases) * settings.processes
        task = bar.add_task("starting", total=total)
        begun = 0

        def progress(line: str) -> None:
            nonlocal begun
            bar.update(task, description=line, completed=begun, total=max(total, begun + 1))
            begun += 1

        results = bench(cases, settings, _command(argv), progress, arguments.debug)
        bar.update(task, description="done", completed=begun)
    save(results, arguments.output)
    console.stdout().print(console.results_table(results))
    return EXIT_PASS if all(case.ok for case in results.cases) else EXIT_REGRESSION


def _gate(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    thresholds = Thresholds(arguments.threshold_fail, arguments.threshold_improve)
    current = load(arguments.current)
    path: Path = arguments.baseline
    if path.is_dir():
        path = path / f"{slug(current.fingerprint.device)}.json"
    if not path.exists():
        if not arguments.update:
            raise UserError(f"there is no baseline {path}; the same command with --update makes it")
        save(baselines.create(current), path)
        print(f"created baseline {path} with {len(current.cases)} cases")
    baseline = load(path)
    decision = decide(current, baseline, thresholds)
    out = console.stdout()
    out.print(console.decision_table(decision))
    for problem in decision.integrity:
        out.print(f"not comparable: {problem}", markup=False)
    for note in decision.environment:
        out.print(f"environment, not the kernel: {note}", markup=False)
    if arguments.report:
        write_text(arguments.report, report.markdown(decision, current, baseline))
    if arguments.profile_targets:
        targets = report.profile_targets(decision)
        write_text(arguments.profile_targets, "".join(f"{name}\n" for name in targets))
    if arguments.update:
        _update(path, baseline, current, decision)
    return decision.exit_code


def _update(path: Path, baseline: Results, current: Results, decision: Decision) -> None:
    if decision.exit_code != EXIT_PASS:
        print(f"baseline {path} stays: the gate did not pass")
        return
    forward, moved = baselines.forward(baseline, current, decision)
    if moved:
        save(forward, path)
    print(f"baseline {path}: {len(moved)} of {len(baseline.cases)} cases moved forward")
    for line in moved:
        print(f"  {line}")


def _device(name: str | None) -> str:
    """A device that exists; cuda where there is one and none was named."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(f"--device {name} does not exist; there are {count} CUDA devices here")
    return name


def _command(argv: Sequence[str]) -> str:
    """The command as it would be repeated elsewhere: no path of this machine in it."""

    def portable(argument: str) -> str:
        if not os.path.isabs(argument):
            return argument
        relative = os.path.relpath(argument)
        return os.path.basename(argument) if relative.startswith("..") else relative

    return shlex.join(["python", "-m", PROGRAM, *map(portable, argv)])
