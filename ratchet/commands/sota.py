"""`sota`: compare with every implementation of attention that is installed, for a publication."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import geometric_mean

import torch

from flashmoe.machine.device import slug
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.timing import HOW, limits_of
from flashmoe.ratchet.commands import common
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.measuring.programs import commit
from flashmoe.ratchet.measuring.suite import select
from flashmoe.ratchet.report import svg
from flashmoe.ratchet.results.files import read_json, write_json, write_text
from flashmoe.ratchet.sota import figures, providers
from flashmoe.ratchet.sota.comparison import (
    OURS,
    SAME,
    Compared,
    Comparison,
    compare,
    conclusion,
    from_json,
    to_json,
)

HELP = "compare with every implementation of attention that is installed, and write it up"
DESCRIPTION = """Measure flashmoe and every other implementation found (SDPA's four backends,
FlexAttention, flash-attn 2, 3 and 4, xFormers, FlashInfer, cuDNN's front end) in the same process,
interleaved, and write a document with tables, figures, raw samples and the command that repeats
it."""
EPILOG = "Exit codes: 0 done; 2 bad usage, or a damaged file."
UNTUNED = """
## Untuned, over the plane

The choice that a fresh install makes without a compiler, on 200 random problems that its predictor
had not seen ([untuned.md](untuned.md) has the method and the figures):

![the untuned choice over 200 random problems]({picture})
"""


def add(parser: argparse.ArgumentParser) -> None:
    common.add_cases(parser)
    parser.set_defaults(suite="sota")
    add = parser.add_argument
    add("--rounds", type=int, default=100, help="default: %(default)s")
    add(
        "--output",
        type=Path,
        default=Path("docs/performance.md"),
        help="the document; figures and JSON go into a folder of the same name "
        "(default: %(default)s)",
    )
    add(
        "--from",
        dest="earlier",
        type=Path,
        metavar="FILE",
        help="measure nothing: write the document anew from the JSON of an earlier run",
    )
    common.add(parser, "device", "seed")


def writes(arguments: argparse.Namespace) -> list[Path]:
    """The document, and what is beside it is in a folder that is one."""
    return [arguments.output, arguments.output.with_suffix("") / "figures"]


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    if arguments.rounds < 10:
        raise UserError(f"rounds must be at least 10, got {arguments.rounds}")
    earlier = arguments.earlier
    comparison = (
        read_json(earlier, from_json) if earlier else _measure(arguments, common.command(argv))
    )
    folder = arguments.output.with_suffix("")
    name = slug(comparison.fingerprint.device)
    write_json(folder / f"{name}.json", to_json(comparison))
    drawn = {"lead": figures.lead(comparison.measured), "rates": figures.bars(comparison.measured)}
    for dtype, limit in comparison.limits.items():
        if some := [c for c in comparison.measured if c.case.problem.dtype == dtype]:
            drawn[f"roofline-{dtype}"] = figures.roofline(some, limit)
    for title, text in drawn.items():
        write_text(folder / f"{name}-{title}.svg", svg.document(text))
    text = document(comparison, [f"{folder.name}/{name}-{title}.svg" for title in drawn])
    # Drawn by benchmarks/plane_report.py: a document that is written anew keeps it.
    plane = folder / f"{name}-plane.svg"
    if plane.exists():
        text += UNTUNED.format(picture=plane.relative_to(arguments.output.parent))
    write_text(arguments.output, text)
    print(text)
    return 0


def _measure(arguments: argparse.Namespace, command: str) -> Comparison:
    device = torch.device(common.device(arguments.device))
    cases = select(arguments.suite, device.type, arguments.case)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    limits = limits_of(device, (case.problem.dtype for case in cases))
    with common.progress(len(cases)) as step:
        measured = compare(cases, device, limits, arguments.rounds, step)
    prints = fingerprint(device)
    return Comparison(
        started, command, commit(), HOW[prints.kind], prints, providers.found(), limits, measured
    )


def document(comparison: Comparison, links: Sequence[str]) -> str:
    """Markdown."""
    here, versions, measured = comparison.fingerprint, comparison.versions, comparison.measured
    names = [n for n in versions if any(c.row(n).samples for c in measured)]
    first, *more = links
    lines = [
        "# Performance",
        "",
        f"![speed over the fastest other implementation]({first})",
        "",
        *sentences(comparison),
        "",
        "## How it was measured",
        "",
        f"{here.device}, driver {here.driver or 'none'}, CUDA {here.cuda or 'none'}, torch "
        f"{here.torch}, {comparison.started[:10]}. Each case: all implementations in one process, "
        f"interleaved in an order drawn anew each round, {len(measured[0].row(OURS).samples)} "
        f"rounds, {comparison.timing}, random data, results compared. Repeat it with",
        "",
        f"```sh\n{comparison.command}\n```",
        "",
        "Raw samples are in the JSON file beside the figures.",
        "",
        *(f"![{Path(link).stem}]({link})\n" for link in more),
        "## Summary",
        "",
        "| | version | | cases | flashmoe is faster | same | slower | speedup, geometric mean |",
        "|:--|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        # Kernels of their own: one mean over all kinds would say nothing of any.
        for what in dict.fromkeys(c.case.kind for c in measured):
            rows = [c.row(name) for c in measured if c.case.kind == what]
            if not (told := [conclusion(row) for row in rows if row.ratio]):
                continue
            mean = geometric_mean([row.ratio.value for row in rows if row.ratio])
            counts = " | ".join(str(told.count(word)) for word in ("faster", "same", "slower"))
            cells = f"{name} | {versions[name]} | {what} | {len(told)} | {counts} | {mean:.2f}"
            lines.append(f"| {cells} |")
    absent = [n for n in versions if not versions[n]]
    if absent:
        lines += ["", f"Not installed here: {', '.join(absent)}."]
    lines += [
        "",
        "## Cases",
        "",
        "Speedup of flashmoe: the other's time over ours, medians, 95 % intervals by bootstrap "
        f"over rounds; **bold** where it differs from 1 by more than {SAME:.0%}, which another "
        "process may (Wilcoxon's signed-rank test, Holm over all comparisons, 5 %). Efficiency: "
        "the time that the arithmetic or the traffic takes at the rates measured in this run, over "
        "ours.",
        "",
        f"| case | ms | TFLOP/s | efficiency | W | {' | '.join(names)} |",
        f"|:--|--:|--:|--:|--:|{'--:|' * len(names)}",
    ]
    lines += [_row(compared, names) for compared in measured]
    failures = [
        f"- {row.provider} in {compared.case.name}: {row.reason}"
        for compared in measured
        for row in compared.rows
        if row.reason and row.reason != "not installed"
    ]
    if failures:
        lines += ["", "<details>", "<summary>What did not run</summary>", "", *failures]
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def sentences(comparison: Comparison) -> list[str]:
    """What the rows come to, in five sentences where all directions ran. In each case the fastest
    other counts."""
    best = [(c, row, row.ratio) for c in comparison.measured if (row := c.fastest_other)]
    found = [(c, row, ratio.value) for c, row, ratio in best if ratio is not None]
    if not found:
        return ["Nothing could be compared."]
    told = [conclusion(row) for _, row, _ in found]
    faster, same, slower = (told.count(word) for word in ("faster", "same", "slower"))
    lines = [
        f"1. On {comparison.fingerprint.device}, flashmoe is faster than every other "
        f"implementation found in {faster} of {len(found)} cases, as fast as the fastest in "
        f"{same}, and slower than it in {slower}."
    ]
    for direction in dict.fromkeys(c.direction for c, *_ in found):
        of_it = [(row.provider, ratio) for c, row, ratio in found if c.direction == direction]
        ratios = [ratio for _, ratio in of_it]
        others = sorted({name for name, _ in of_it})
        lines.append(
            f"{len(lines) + 1}. {direction.capitalize()}: {geometric_mean(ratios):.2f} times as "
            f"fast as the fastest other (geometric mean of {len(ratios)}, from {min(ratios):.2f} "
            f"to {max(ratios):.2f}), which is {' or '.join(others)}."
        )
    (most, first, high), (least, last, low) = (
        pick(found, key=lambda row: row[2]) for pick in (max, min)
    )
    lines.append(
        f"{len(lines) + 1}. At best it is {high:.2f} times as fast as {first.provider} "
        f"(`{most.case.name}`), at worst {low:.2f} times as fast as {last.provider} "
        f"(`{least.case.name}`)."
    )
    return lines


def _row(compared: Compared, names: Sequence[str]) -> str:
    ours = compared.row(OURS)
    cells = [f"`{compared.case.name}`"]
    if ours.samples:
        seconds = ours.seconds
        rate = compared.case.flops / seconds * 1e-12
        watts = "" if compared.watts is None else f"{compared.watts:.0f}"
        efficiency = f"{compared.floor / seconds:.0%}"
        cells += [f"{seconds * 1e3:.3f}", f"{rate:.3g}", efficiency, watts]
    else:
        cells += [ours.reason, "", "", ""]
    for name in names:
        ratio = compared.row(name).ratio
        if ratio is None:
            cells.append("")
            continue
        text = f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        cells.append(text if conclusion(compared.row(name)) == "same" else f"**{text}**")
    return f"| {' | '.join(cells)} |"
