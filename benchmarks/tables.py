"""What the tables of benchmarks/ share: rows that are timed side by side with the limits of the
same run, verdicts on what a table must show, and the JSON of a run.

A script makes a Table of its arguments, adds rows and states verdicts:

    table = Table(parser_of(__doc__).parse_args())
    row = table.row("decode", problem, {"ours": call, "cuDNN": other})
    table.each("no row behind a peer", [row], over_peers, at_least=1.0)
    raise SystemExit(table.finish())

Names that begin with "ours" are ours, "ours" itself is judged; all others are peers. `--device cpu
--shrink 64` runs the same code on small problems in seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Concatenate, ParamSpec

import torch

from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.stats import Interval, median_interval, paired_ratio
from flashmoe.measure.timing import (
    HOW,
    SLEEP_CYCLES,
    DeviceLost,
    Limits,
    measure,
    measure_limits,
    usable,
)
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import Problem

# Of the run on an H200 (29 November 2026) whose times of peers are listed in these scripts: times
# of two runs do not compare, efficiencies do.
LISTED_LIMITS = Limits(791e12, 4.231e12)
P = ParamSpec("P")
# Below so many keys a shrunk problem has no tiles left to speak of.
_LEAST = 16


def parser_of(doc: str | None, rounds: int = 15, seconds: float = 300.0) -> argparse.ArgumentParser:
    """The options that every table has; `doc` is the script's own."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, choices=("cpu", "cuda"), help="default: %(default)s")
    add(
        "--shrink", type=int, default=1, metavar="N", help="sequences shorter by N, one or two each"
    )
    add("--rounds", type=int, default=rounds, help="default: %(default)s")
    add(
        "--seconds",
        type=float,
        default=seconds,
        help="when no further row is begun (default: %(default)s)",
    )
    add("--only", nargs="+", default=[], metavar="SECTION", help="only these sections")
    add("--without", nargs="+", default=[], metavar="PEER", help="leave these peers out")
    add("--output", type=Path, metavar="FILE", help="raw samples, verdicts and fingerprint")
    return parser


@dataclass(frozen=True)
class Row:
    """One problem. `floor`: seconds below which no kernel runs, by this run's limits, or 0 where
    there is none and efficiencies are but speeds; `samples`: seconds by name; `listed`:
    efficiencies of peers in the run of LISTED_LIMITS."""

    section: str
    label: str
    floor: float
    samples: Mapping[str, tuple[float, ...]]
    failed: Mapping[str, str] = field(default_factory=dict)
    listed: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    problem: Problem | None = None

    def seconds(self, name: str = "ours") -> float:
        return median_interval(self.samples[name]).value

    def efficiency(self, name: str = "ours") -> float:
        return (self.floor or 1.0) / self.seconds(name)

    def ratio(self, over: str, name: str = "ours") -> Interval:
        """The time of `over` divided by that of `name`: above 1 where `name` is faster."""
        return paired_ratio(self.samples[over], self.samples[name])

    @property
    def peers(self) -> dict[str, float]:
        """Efficiencies of others, in this run where they ran, and else as listed."""
        here = {name: self.efficiency(name) for name in self.samples if not is_ours(name)}
        return dict(self.listed) | here

    @property
    def best_peer(self) -> str:
        """Empty where there is none."""
        return max(self.peers, key=self.peers.__getitem__, default="")

    def to_json(self) -> dict[str, Any]:
        samples = {n: [float(f"{x:.6g}") for x in times] for n, times in self.samples.items()}
        problem = None if self.problem is None else self.problem.to_json()
        return asdict(self) | {"samples": samples, "problem": problem}


def is_ours(name: str) -> bool:
    return name.startswith("ours")


def over_peers(row: Row) -> float:
    """Our efficiency over that of the best peer; infinite without peers."""
    return row.efficiency() / row.peers[row.best_peer] if row.peers else math.inf


@dataclass(frozen=True)
class Verdict:
    """What a table must show, and what it shows: `value` must be at least, or at most, `bound`;
    None where nothing was measured. `missing` rows were not."""

    line: str
    value: float | None
    bound: float
    at_least: bool
    note: str = ""
    missing: int = 0

    @property
    def met(self) -> bool | None:
        """None where that is not known: rows are missing, and those there are do not decide."""
        if self.value is None:
            return None
        holds = self.value >= self.bound if self.at_least else self.value <= self.bound
        return None if holds and self.missing else holds

    def __str__(self) -> str:
        relation = ">=" if self.at_least else "<="
        if self.value is None:
            return f"not measured: {self.line} ({relation} {self.bound:g}). {self.note}".rstrip()
        word = {True: "met", False: "NOT met", None: "open"}[self.met]
        by = abs(self.value - self.bound)
        text = f"{word} by {by:.3g}: {self.line}: {self.value:.3f} ({relation} {self.bound:g})"
        if self.missing:
            text += f"; {self.missing} rows missing"
        return f"{text}; {self.note}" if self.note else text


class Table:
    """One run of a script. Rows are printed as they are measured, and the file is written anew
    after each, so that a run that is cut short loses nothing."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device, *(() if arguments.device == "cpu" else (0,)))
        self.began = time.monotonic()
        self.rows: list[Row] = []
        self.verdicts: list[Verdict] = []
        self.wrong: list[str] = []
        self.extra: dict[str, Any] = {}  # what else a script keeps in its file
        self.told: set[tuple[str, str]] = set()  # why peers are left out, each once
        self.limits = measure_limits(self.device, torch.bfloat16, min(arguments.rounds, 10))
        self.prints = fingerprint(self.device)
        print(
            f"{self.prints.device}, torch {self.prints.torch}: matmul "
            f"{self.limits.matmul_flops / 1e12:.4g} TFLOP/s, copy "
            f"{self.limits.copy_bytes / 1e12:.3g} TB/s; {HOW[self.prints.kind]}",
            flush=True,
        )

    def wants(self, section: str) -> bool:
        return not self.arguments.only or section in self.arguments.only

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def peers(self, names: Iterable[str]) -> list[str]:
        """Those that are not left out."""
        return [name for name in names if name not in self.arguments.without]

    def row(
        self,
        section: str,
        problem: Problem,
        calls: Mapping[str, Callable[[], object]],
        *,
        label: str = "",
        floor: float | None = None,
        wrong: str = "",
        failed: Mapping[str, str] | None = None,
        listed: Mapping[str, float] | None = None,
        sleep_cycles: int = SLEEP_CYCLES,
        max_seconds: float | None = None,
        **facts: Any,
    ) -> Row | None:
        """Time `calls` side by side and print them. None, and nothing is timed, where ours is
        `wrong` or fails; a run with such a row ends with code 1. Label and floor are the problem's
        unless they are given; `listed` counts for problems that are whole, where it is not 0."""
        label = label or problem.label
        if wrong:
            self.fail(f"{section}, {label}", wrong)
            return None
        measured = measure(
            *(calls, self.device),
            rounds=self.arguments.rounds,
            sleep_cycles=sleep_cycles,
            max_seconds=max_seconds,
        )
        failures = dict(failed or {}) | {
            name: m.reason for name, m in measured.items() if m.status != "ok"
        }
        samples = {name: m.samples for name, m in measured.items() if m.status == "ok"}
        if "ours" not in samples:
            self.fail(f"{section}, {label}", failures.get("ours", "did not run"))
            return None
        if floor is None:
            floor = self.limits.floor(problem.flops, problem.bytes)
        whole = self.arguments.shrink == 1
        known = {name: x for name, x in (listed or {}).items() if x and whole}
        return self.add(Row(section, label, floor, samples, failures, known, facts, problem))

    def add(self, row: Row) -> Row:
        """Keep and print a row."""
        self.rows.append(row)
        print(f"[{self.elapsed:.0f} s] {text_of(row)}", flush=True)
        for name, why in sorted(row.failed.items() - self.told):
            print(f"  {name}: {' '.join(why.split())[:200]}", flush=True)
        self.told |= set(row.failed.items())
        self.write()
        return row

    def fail(self, label: str, why: object) -> None:
        """Print and keep that ours is wrong, or raised; the run goes on."""
        text = " ".join(str(why).split()) or type(why).__name__
        self.wrong.append(f"{label}: {text[:500]}")
        print(f"WRONG {self.wrong[-1]}", flush=True)
        self.write()

    def each(
        self,
        line: str,
        rows: Sequence[Row | None],
        value: Callable[[Row], float],
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """The worst row's value decides; None among `rows` is one that is missing."""
        found = {f"{r.section}, {r.label}": value(r) for r in rows if r is not None}
        known = {label: x for label, x in found.items() if not math.isinf(x)}
        bound, holds = _bound(at_least, at_most)
        worst = (min if at_least is not None else max)(known.values(), default=None)
        failing = [f"{label} {x:.3f}" for label, x in known.items() if not holds(x)]
        note = f"{len(known) - len(failing)} of {len(rows)} rows" + "".join(
            f"; {text}" for text in failing[:8]
        )
        missing = len(rows) - len(known)
        self._state(Verdict(line, worst, bound, at_least is not None, note, missing))

    def mean(
        self,
        line: str,
        rows: Sequence[Row | None],
        value: Callable[[Row], float],
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """The geometric mean decides."""
        known = [x for r in rows if r is not None and not math.isinf(x := value(r))]
        bound, _ = _bound(at_least, at_most)
        found = geometric_mean(known) if known else None
        missing = len(rows) - len(known)
        self._state(Verdict(line, found, bound, at_least is not None, missing=missing))

    def one(
        self,
        line: str,
        value: float | None,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        note: str = "",
    ) -> None:
        """One number decides."""
        bound, _ = _bound(at_least, at_most)
        self._state(Verdict(line, value, bound, at_least is not None, note))

    def _state(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        print(f"=> {verdict}", flush=True)
        self.write()

    def finish(self) -> int:
        """Repeat the verdicts, write the file. 1 where a result was wrong, and else 0: a bound that
        is not met is a finding."""
        print("\n" + "\n".join(map(str, self.verdicts)))
        for wrong in self.wrong:
            print(f"WRONG {wrong}")
        self.write()
        return 1 if self.wrong else 0

    def write(self) -> None:
        if self.arguments.output is None:
            return
        self.arguments.output.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "command": shlex.join(["python", *sys.argv]),
            "timing": HOW[self.prints.kind],
            "fingerprint": self.prints.to_json(),
            "limits": asdict(self.limits),
            "wrong": self.wrong,
            "verdicts": [asdict(v) | {"met": v.met} for v in self.verdicts],
            "rows": [row.to_json() for row in self.rows],
            **self.extra,
        }
        text = json.dumps(document, separators=(",", ":"))
        self.arguments.output.write_text(text + "\n", encoding="utf-8")


def listed(problem: Problem, milliseconds: Mapping[str, float]) -> dict[str, float]:
    """Efficiencies of times of the run of LISTED_LIMITS; one of 0 was not measured."""
    floor = LISTED_LIMITS.floor(problem.flops, problem.bytes)
    return {name: floor / (ms * 1e-3) for name, ms in milliseconds.items() if ms}


def measures(
    function: Callable[Concatenate[Table, str, Problem, P], Row | None],
) -> Callable[Concatenate[Table, str, Problem, P], Row | None]:
    """Of a function (table, section, problem, …) that measures a row: the same, for a smaller
    problem with --shrink, and None where no time is left or where it raises, which is told."""

    @functools.wraps(function)
    def run(
        table: Table, section: str, problem: Problem, *rest: P.args, **more: P.kwargs
    ) -> Row | None:
        by = table.arguments.shrink
        small = problem if by == 1 else shrunk(problem, by)
        label = f"{section}, {small.label}"
        if table.elapsed > table.arguments.seconds:
            print(f"{label}: no time left", flush=True)
            return None
        try:
            return function(table, section, small, *rest, **more)
        except Exception as error:
            table.fail(label, error)
            if isinstance(error, DeviceLost) or not usable(table.device):
                table.finish()
                raise
            return None

    return run


def _bound(at_least: float | None, at_most: float | None) -> tuple[float, Callable[[float], bool]]:
    if at_least is not None:
        return at_least, lambda x: x >= at_least
    if at_most is None:
        raise ValueError("one of at_least and at_most must be given")
    return at_most, lambda x: x <= at_most


def text_of(row: Row) -> str:
    """A printed row: times, efficiencies, and how ours compares with the best peer."""
    unit, scale = ("us", 1e6) if row.seconds() < 1e-3 else ("ms", 1e3)
    parts = [
        f"{name} {row.seconds(name) * scale:.4g}"
        + (f" ({row.efficiency(name):.3f})" if row.floor else "")
        for name in row.samples
    ]
    parts += [f"{n} listed ({x:.3f})" for n, x in row.listed.items() if n not in row.samples]
    parts += [f"{name} {value}" for name, value in row.facts.items() if value != ""]
    floor = f"floor {row.floor * scale:.4g} " if row.floor else ""
    text = f"{row.section}, {row.label}: {floor}{unit}; {'; '.join(parts)}"
    if not row.peers:
        return text
    interval = ""
    if row.best_peer in row.samples:
        found = row.ratio(row.best_peer)
        interval = f" [{found.low:.3f}, {found.high:.3f}]"
    return f"{text} | {over_peers(row):.3f} x {row.best_peer}{interval}"


def shrunk(problem: Problem, by: int) -> Problem:
    """The same kind of problem, shorter by that factor, of at most two sequences and groups."""
    heads_kv, batch = min(problem.heads_kv, 2), min(problem.batch, 8 if problem.lengths else 2)
    seqlen_q, seqlen_kv = (
        min(n, max(n // by, _LEAST)) for n in (problem.seqlen_q, problem.seqlen_kv)
    )
    left, right = (
        x if x <= 0 else max(x // by, 1) for x in (problem.mask.left, problem.mask.right)
    )
    return replace(
        problem,
        batch=batch,
        heads_q=heads_kv * min(problem.heads_q // problem.heads_kv, 2),
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        mask=Mask(left, right),
        lengths=tuple(
            (min(q, max(q // by, 1)), min(k, max(k // by, 1)), min(count, 2))
            for q, k, count in problem.lengths[: 4 if problem.layout.startswith("packed") else 0]
        ),
    )


def run_sections(
    doc: str | None, sections: Mapping[str, Callable[[Table], None]], seconds: float
) -> int:
    """The command line of a script whose tables are `sections`; returns its exit code."""
    table = Table(parser_of(doc, seconds=seconds).parse_args())
    for section, state in sections.items():
        if table.wants(section):
            state(table)
    return table.finish()
