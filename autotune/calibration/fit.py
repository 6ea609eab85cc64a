"""Fits a kernel's Costs to measured times: from what was believed before, by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from flashmoe.prediction.costs import Table, from_logs, to_logs
from flashmoe.prediction.predict import Costs, Work, microseconds
from flashmoe.tiles import Tile

# Where the fit of a kernel that nobody knows begins.
START = Costs(4.0, 1.0, 1.3, 0.6, 0.3, 0.7, 0.4, 0.15, 3.5e6)
# How many e-folds a constant may be from there before it costs as much as an error of one part in
# _PRECISION.
SPREAD = (0.5, 1.5, 1.5, 1.5, 1.5, 1.0, 1.0, 1.0, 0.2)
_PRECISION = 25.0

# What a kernel did, and the microseconds that it took.
Pair = tuple[Work, float]
Vector = NDArray[np.float64]


class Fit(NamedTuple):
    """Costs as to_logs has them, and their variances."""

    x: Vector
    variances: Vector


def fit_one(pairs: Sequence[Pair], prior: Vector, spread: Vector) -> Fit:
    """Of one kernel; `prior` and `spread` as to_logs has Costs."""
    logs = np.log([us for _, us in pairs])

    def residuals(x: Vector) -> Vector:
        costs = from_logs(x.tolist())
        predicted = np.log([microseconds(work, costs) for work, _ in pairs])
        return np.concatenate([_PRECISION * (predicted - logs), (x - prior) / spread])

    found = least_squares(residuals, prior, loss="soft_l1", max_nfev=25)
    return Fit(found.x, np.diag(np.linalg.inv(found.jac.T @ found.jac)))


def calibrated(known: Table, pairs: Mapping[str, Sequence[Pair]]) -> Table:
    """The Costs of a GPU on which these kernels, by their names in a Table, took these times; where
    nobody measured, `known` is shifted by what the measured sm90 tiles say."""
    costs: dict[str, Costs] = {}
    # The formula is of another GPU, whose Costs are scaled to this one.
    scale = np.array(to_logs(known.scaled(START))) - to_logs(START)
    shifts: list[Vector] = []
    for name, found in pairs.items():
        prior = np.array(to_logs(_believed(known, name)))
        x = fit_one(found, prior, np.array(SPREAD)).x
        costs[name] = from_logs(x.tolist())
        if name.startswith("sm90:"):
            shifts.append(x - prior)
    scale += np.mean(shifts, axis=0) if shifts else 0.0
    formula = [
        [row[0] + float(shift), *row[1:]] for row, shift in zip(known.formula, scale, strict=True)
    ]
    return Table(costs, formula)


def _believed(known: Table, name: str) -> Costs:
    kernel, _, head_dim = name.partition("@")
    found = known.named(name)
    if found is None and kernel.startswith("sm90:"):
        found = known.of_tile(Tile.parse(kernel), int(head_dim))
    return found or START
