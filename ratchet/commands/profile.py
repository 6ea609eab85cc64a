"""`profile`: why a case got slower or faster, by Nsight Compute."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flashmoe.ratchet.commands import common
from flashmoe.ratchet.gate.decide import EXIT_INCONCLUSIVE, EXIT_PASS
from flashmoe.ratchet.machine_code.ncu import CannotProfile, Profile, differences, profile
from flashmoe.ratchet.measuring import builds
from flashmoe.ratchet.measuring.run import THIS
from flashmoe.ratchet.measuring.suite import parse
from flashmoe.ratchet.results.files import read_text, write_text

HELP = "explain regressed and improved cases by Nsight Compute"
DESCRIPTION = """Profile one call of each case with `ncu --clock-control none`: this build's, or
those of the two commits that `ab` compared, and tell what differs. A profile explains; the gate's
verdict stands with or without it."""
EPILOG = """Exit codes: 0 profiled; 2 bad usage; 3 a case could not be, as where counters are not
permitted or ncu is missing, which is told with what to do about it."""


def add(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--targets", type=Path, metavar="FILE", help="profile_targets.txt of gate or ab")
    add("--case", nargs="+", action="extend", default=[], metavar="NAME", help="these as well")
    add("--base", metavar="REF", help="what to compare with")
    add(
        "--head",
        metavar="REF",
        help="what to profile (default: with --base the working tree, else what is installed)",
    )
    add("--report", type=Path, metavar="FILE", help="add the findings to this Markdown report")
    common.add(parser, "build-folder")


def writes(arguments: argparse.Namespace) -> list[Path]:
    return [arguments.report] if arguments.report else []


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    names = [*arguments.case, *(read_text(arguments.targets).split() if arguments.targets else [])]
    names = [parse(name).name for name in dict.fromkeys(names)]
    if not names:
        text, code = "nothing to profile: no case regressed or improved much", EXIT_PASS
    else:
        text, code = _profiled(names, arguments)
    if arguments.report:
        old = arguments.report.read_text(encoding="utf-8") if arguments.report.exists() else ""
        write_text(arguments.report, f"{old}\n{text}\n" if old else f"{text}\n")
    print(text)
    return code


def _profiled(names: Sequence[str], arguments: argparse.Namespace) -> tuple[str, int]:
    refs = {"base": arguments.base, "head": arguments.head}
    names_of = {side: builds.resolve(ref) for side, ref in refs.items() if ref}
    if names_of.keys() == {"base"}:
        names_of["head"] = builds.working_tree()
    built = {}
    for side, build in names_of.items():
        site = builds.build(build, arguments.build_folder, arguments.debug)
        built[side] = builds.source(side, site, cuda=True)
    base, head = built.get("base"), built.get("head", THIS)
    parts: list[str] = []
    failed: dict[str, list[str]] = {}
    for name in names:
        try:
            old = profile(name, base) if base else None
            parts += section(name, old, profile(name, head))
        except CannotProfile as why:
            failed.setdefault(str(why), []).append(name)
    # One reason mostly holds for all of them.
    lines = [f"No profile of {', '.join(missing)}: {why}." for why, missing in failed.items()]
    if lines:
        lines = ["The gate's verdict stands.", "", *lines, ""]
    heading = "### Profiles" if parts else "### No profile"
    text = "\n".join([heading, "", *parts, *lines])
    return text, EXIT_INCONCLUSIVE if failed else EXIT_PASS


def section(name: str, base: Profile | None, head: Profile) -> list[str]:
    """Markdown: what differs, or all there is of one build."""
    kernels = _kernels(head)
    if base is not None and base.kernels != head.kernels:
        kernels += f"; in the base {_kernels(base)}"
    lines = ["<details>", f"<summary>{name}</summary>", "", f"Kernels: {kernels}", ""]
    if base is None:
        lines += ["| | |", "|:--|--:|"]
        lines += [f"| {label} | {value:.4g} |" for label, value in head.values.items()]
    else:
        lines += ["| | base | head | |", "|:--|--:|--:|--:|"]
        lines += [
            f"| {label} | {a:.4g} | {b:.4g} | {100 * (b / a - 1) if a else float('inf'):+.0f} % |"
            for label, a, b in differences(base, head)
        ]
    return [*lines, "", "</details>", ""]


def _kernels(profile: Profile) -> str:
    return ", ".join(f"`{kernel}`" for kernel in profile.kernels)
