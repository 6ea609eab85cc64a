"""Compares two snapshots of compiled kernels. Pure.

A kernel fails when it spills more (loads and stores of local memory), or has no tensor-core
instruction left where it had some. Everything else that changed is told and passes: more registers
or larger code may well be faster, which is for `gate` to judge.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe.ratchet.machine_code.cubins import COLUMNS, INSTRUCTIONS, Kernel, demangled
from flashmoe.ratchet.results.fields import get
from flashmoe.ratchet.results.files import read_json
from flashmoe.tiles import (
    Tile,
    columns,
    decode_smem_bytes,
    sm80_smem_bytes,
    sm90_bwd_smem_bytes,
    sm90_smem_bytes,
)

SCHEMA = 1
FAIL, CHANGED, IMPROVED, INTEGRITY = "FAIL", "CHANGED", "IMPROVED", "INTEGRITY"
# Worst first.
_ORDER = (FAIL, INTEGRITY, CHANGED, IMPROVED)
_TENSOR_CORES = ("HGMMA", "HMMA")
_MOST_ROWS = 200
# How a symbol spells its tile: head_dim, then its family's columns (flashmoe/tiles/fields.py), and
# what its variant is for.
_SYMBOLS = {
    "sm80": r"Sm80TileI((?:Li\d+E)+)E",
    "sm90": r"fwd_sm90_(\d+(?:_\d+)+)(?:_[a-z]+)*?(?:_v(?P<v>\d+))?__",
    "sm90_bwd": r"bwd_sm90_(\d+(?:_\d+)+)(?:_[a-z]+)*_attention_backward__",
    "decode": r"DecodeTileI((?:Li\d+E)+)E",
}
_TILES = {kernel: (re.compile(text), columns(kernel)) for kernel, text in _SYMBOLS.items()}
_SMEM_BYTES = {
    "sm80": sm80_smem_bytes,
    "sm90": sm90_smem_bytes,
    "sm90_bwd": sm90_bwd_smem_bytes,
    "decode": decode_smem_bytes,
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one build contains, and the version of CUDA's compiler that made it."""

    compiler: str
    commit: str
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True, slots=True)
class Change:
    label: str
    verdict: str
    what: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What changed, worst first; `problems` concern no single kernel."""

    changes: tuple[Change, ...]
    problems: tuple[str, ...]
    kernels: int

    @property
    def exit_code(self) -> int:
        verdicts = {change.verdict for change in self.changes}
        if self.problems or INTEGRITY in verdicts:
            return 4
        return 1 if FAIL in verdicts else 0

    @property
    def summary(self) -> str:
        counts = [
            f"{n} {verdict}"
            for verdict in _ORDER
            if (n := sum(change.verdict == verdict for change in self.changes))
        ]
        outcome = {
            0: "passed",
            1: "failed: kernels compile to worse code",
            4: "not comparable with the baseline",
        }[self.exit_code]
        return f"{outcome} ({', '.join([*counts, f'{self.kernels} kernels'])})"


def compare(now: Snapshot, baseline: Snapshot) -> Comparison:
    """`now` against `baseline`."""
    problems = []
    if now.compiler != baseline.compiler:
        problems.append(f"compiled by CUDA {now.compiler}, the baseline by {baseline.compiler}")
    new, old = ({kernel.key: kernel for kernel in x.kernels} for x in (now, baseline))
    labels = demangled(sorted({kernel.name for kernel in (*now.kernels, *baseline.kernels)}))
    changes = []
    for key in sorted({*new, *old}):
        kernel = new.get(key) or old[key]
        label = f"{kernel.arch} {labels[kernel.name]}"
        if dynamic := dynamic_shared(kernel.name):
            label += f" ({dynamic} bytes of dynamic shared memory)"
        if key not in new:
            changes.append(Change(label, INTEGRITY, "missing from this build"))
        elif key not in old:
            changes.append(Change(label, INTEGRITY, "not in the baseline"))
        elif new[key] != old[key]:
            changes.append(_change(label, new[key], old[key]))
    changes.sort(key=lambda change: (_ORDER.index(change.verdict), change.label))
    return Comparison(tuple(changes), tuple(problems), len(new))


def dynamic_shared(name: str) -> int:
    """Bytes of shared memory that a kernel is launched with besides its own, by the tile in its
    symbol; 0 where that names none. It is no part of the machine code that is compared."""
    for kernel, (spelled, fields) in _TILES.items():
        if match := spelled.search(name):
            head_dim, *shape = map(int, re.findall(r"\d+", match[1]))
            values: dict[str, Any] = dict(zip(fields, shape, strict=False))
            own_dim = [int(match["v"])] if match.groupdict().get("v") else []
            return _SMEM_BYTES[kernel](Tile(kernel, **values), head_dim, *own_dim)
    return 0


def _change(label: str, new: Kernel, old: Kernel) -> Change:
    before, now = old.numbers, new.numbers
    told = [f"{name} {before[name]} to {now[name]}" for name in now if now[name] != before[name]]
    lost = any(old.instructions[x] for x in _TENSOR_CORES) and not any(
        new.instructions[x] for x in _TENSOR_CORES
    )
    verdict = FAIL if new.spills > old.spills or lost else CHANGED
    if verdict != FAIL and new.spills < old.spills:
        verdict = IMPROVED
    return Change(label, verdict, ", ".join(told))


def markdown(comparison: Comparison) -> str:
    """For a pull request; the worst first, and no more rows than a comment holds."""
    sign = {0: "✅", 1: "🔴", 4: "🟠"}[comparison.exit_code]
    lines = [f"### {sign} flashmoe static ratchet {comparison.summary}", ""]
    lines += [f"- {problem}" for problem in comparison.problems]
    if shown := comparison.changes[:_MOST_ROWS]:
        lines += ["| kernel | | what changed |", "|:--|:--|:--|"]
        lines += [f"| `{c.label}` | {c.verdict} | {c.what} |" for c in shown]
    if more := len(comparison.changes) - len(shown):
        lines.append(f"\nand {more} more")
    return "\n".join(lines) + "\n"


def to_json(snapshot: Snapshot) -> dict[str, Any]:
    """A list of numbers a kernel, in the order of `columns`."""
    return {
        "schema": SCHEMA,
        "compiler": snapshot.compiler,
        "commit": snapshot.commit,
        "columns": " ".join(COLUMNS),
        "kernels": {kernel.key: [*kernel.numbers.values()] for kernel in snapshot.kernels},
    }


def load(path: Path) -> Snapshot:
    """Raises UserError naming the path and what is wrong; the file stays."""
    return read_json(path, _snapshot)


def _snapshot(data: Any) -> Snapshot:
    if (schema := get(data, "schema", int)) != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {schema}")
    columns = get(data, "columns", str).split()
    if columns != [*COLUMNS]:
        raise ValueError(f"columns must be {[*COLUMNS]}, got {columns}")
    found = [_kernel(k, x) for k, x in get(data, "kernels", dict).items()]
    if not found:
        raise ValueError("kernels is empty: nothing was compiled")
    return Snapshot(get(data, "compiler", str), get(data, "commit", str), tuple(found))


def _kernel(key: str, numbers: Sequence[Any]) -> Kernel:
    arch, colon, name = key.partition(":")
    whole = isinstance(numbers, list) and all(type(x) is int and x >= 0 for x in numbers)
    if not colon or not whole or len(numbers) != len(COLUMNS):
        raise ValueError(
            f"kernel {key!r} must be ARCH:NAME with {len(COLUMNS)} numbers, got {numbers!r}"
        )
    registers, stack, shared, code, *counts = numbers
    counted = dict(zip(INSTRUCTIONS, counts, strict=True))
    return Kernel(arch, name, registers, stack, shared, code, counted)
