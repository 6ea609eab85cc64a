"""Fits each kernel's Costs to what plane.py measured, and tells how well they choose.

    python benchmarks/plane_fit.py benchmarks/results/plane-nvidia-h200.jsonl.xz \\
        --output flashmoe/prediction/nvidia-h200.json

Every second random problem is held out: no constant has seen it. A kernel's constants begin from
those that a linear formula of its tile's fields gives, which is fitted to all kernels' in turn, so
that kernels with few measured problems lean on their relatives; the formula is for tiles that
nobody measured.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from flashmoe.autotune.calibration import SPREAD, START, Fit, Pair, fit_one
from flashmoe.prediction import kernels
from flashmoe.prediction.costs import Table, from_logs, to_logs
from flashmoe.prediction.predict import Work
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile
from flashmoe.tiles.sm80 import instance_head_dim

# Kernels of one tile's neighbours do not agree closer than that.
_LEAST_SPREAD = 0.08
_ROUNDS = 3
_ROW_WEIGHT = 4


class Row(NamedTuple):
    """One measured problem; microseconds are medians, by the kernel's name in a table of Costs."""

    name: str
    problem: Problem
    microseconds: dict[str, float]

    @property
    def held_out(self) -> bool:
        kind, _, number = self.name.partition(" ")
        return kind == "random" and int(number) % 2 == 1

    @property
    def weight(self) -> int:
        """How often it counts in a fit: the rows that the kernel is judged by must be right."""
        return _ROW_WEIGHT if self.name.startswith("row") else 1


def load(paths: Sequence[Path]) -> tuple[list[Row], int]:
    """The rows of all files, and the GPU's SMs. A problem measured in several files has all their
    samples."""
    samples: dict[tuple[str, Problem], dict[str, list[float]]] = {}
    sm_count = 0
    for path in paths:
        content = path.read_bytes()
        text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode()
        head, *lines = map(json.loads, text.splitlines())
        sm_count = head["fingerprint"]["sm_count"]
        for line in lines:
            problem = Problem.from_json(line["problem"])
            found = samples.setdefault((line["name"], problem), {})
            for name, times in line["us"].items():
                found.setdefault(_table_name(name, problem, sm_count), []).extend(times)
    return [
        Row(name, problem, {kernel: median(times) for kernel, times in found.items()})
        for (name, problem), found in samples.items()
    ], sm_count


def _table_name(name: str, problem: Problem, sm_count: int) -> str:
    """The name in a table of Costs of what plane.py calls `name`."""
    if name.startswith("sm90"):
        return name
    if name.startswith("sm80"):
        return kernels.tile_name(Tile.parse(name), instance_head_dim(problem.head_dim))
    if name == "sdpa":
        return kernels.sdpa_name(kernels.SDPA, problem.head_dim)
    if name == "sdpa:flash":
        (flash,) = kernels.sdpa_works(problem, sm_count).keys() - {kernels.SDPA}
        return kernels.sdpa_name(flash, problem.head_dim)
    return name  # nobody predicts it


def work_of(name: str, problem: Problem, sm_count: int) -> Work | None:
    kernel, _, head_dim = name.partition("@")
    if not head_dim:
        return None
    if kernel.startswith("sdpa"):
        return kernels.sdpa_works(problem, sm_count).get(kernel)
    return kernels.tile_work(Tile.parse(kernel), problem, sm_count)


def pairs_of(rows: Sequence[Row], sm_count: int) -> dict[str, list[Pair]]:
    """What was measured, by kernel."""
    pairs: dict[str, list[Pair]] = {}
    for row in rows:
        for name, us in row.microseconds.items():
            if (work := work_of(name, row.problem, sm_count)) is not None:
                pairs.setdefault(name, []).extend([(work, us)] * row.weight)
    return pairs


def family(name: str) -> str:
    """What kernels lean on one another: those of one source."""
    return name.partition(":")[0].partition("@")[0]


def features_of(name: str) -> np.ndarray:
    kernel, _, head_dim = name.partition("@")
    return np.array(kernels.features(kernel, int(head_dim)))


def regress(fits: Mapping[str, Fit]) -> tuple[np.ndarray, np.ndarray]:
    """A linear formula for each constant of one family, (constants, features), and how far the
    constants are from it."""
    X = np.array([features_of(name) for name in fits])
    coefficients, spreads = [], []
    for j in range(len(START)):
        y = np.array([found.x[j] for found in fits.values()])
        weight = 1 / (np.array([f.variances[j] for f in fits.values()]) + _LEAST_SPREAD**2)
        ridge = np.eye(X.shape[1]) * weight.mean() * 0.2
        ridge[0, 0] = 0.0
        b = np.linalg.solve(X.T @ (weight[:, None] * X) + ridge, X.T @ (weight * y))
        coefficients.append(b)
        spreads.append(np.sqrt(np.average((y - X @ b) ** 2, weights=weight)))
    return np.array(coefficients), np.clip(spreads, _LEAST_SPREAD, SPREAD)


def fit(pairs: Mapping[str, Sequence[Pair]]) -> Table:
    """Every kernel's Costs, and the formula for sm90 tiles."""
    start, spread = np.array(to_logs(START)), np.array(SPREAD)
    fits = {name: fit_one(found, start, spread) for name, found in pairs.items()}
    families = {family(name): {n for n in fits if family(n) == family(name)} for name in fits}
    formulas = {}
    for _ in range(_ROUNDS):
        for kind, names in families.items():
            formulas[kind], near = regress({name: fits[name] for name in names})
            for name in names:
                prior = formulas[kind] @ features_of(name)
                fits[name] = fit_one(pairs[name], prior, near)
    costs = {name: from_logs(found.x.tolist()) for name, found in sorted(fits.items())}
    return Table(costs, formulas["sm90"].tolist())


def text_of(table: Table) -> str:
    """JSON with a line a kernel."""
    data = table.to_json()

    def numbers(values: Sequence[float]) -> str:
        return json.dumps([float(f"{x:.4g}") for x in values])

    costs = ",\n".join(f'  "{name}": {numbers(values)}' for name, values in data["costs"].items())
    formula = ",\n".join(f"  {numbers(row)}" for row in data["formula"])
    return (
        f'{{\n "schema": {data["schema"]},\n "costs": {{\n{costs}\n }},\n'
        f' "formula": [\n{formula}\n ]\n}}\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, nargs="+", help="what plane.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="the table of Costs to write")
    arguments = parser.parse_args()
    rows, sm_count = load(arguments.measured)
    pairs = pairs_of([row for row in rows if not row.held_out], sm_count)
    arguments.output.write_text(text_of(fit(pairs)), encoding="utf-8")


if __name__ == "__main__":
    main()
