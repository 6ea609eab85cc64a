"""A model of how the axes of a tile make its time: which untried tile promises the most.

A Gaussian process over the logarithm of the time. Its kernel adds up what single axes, pairs of
axes and the whole tile explain, so a few tiles tell about many (as in additive Gaussian processes,
Duvenaud et al. 2011, arXiv:1112.4394); problems are correlated tasks (Bonilla et al. 2007), so what
neighbouring problems showed is where it starts. The space is finite: every tile is judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from flashmoe.autotune.space import Space
from flashmoe.tiles import Tile

# Shares of the variance that single axes, pairs and the whole tile explain, and the noise's.
_SINGLE, _PAIR, _WHOLE, _NOISE = 0.55, 0.3, 0.15, 0.003
# Two values of an axis agree by exp(-_DECAY * steps between them).
_DECAY = 0.7
# How alike the same tile behaves in two related problems.
_RELATED = 0.8
# Standard deviation of log times where too few are known to tell.
_SPREAD = 0.15

Vector = NDArray[np.float64]


def promising(
    space: Space,
    known: Mapping[Tile, float],
    in_flight: Sequence[Tile],
    related: Sequence[Mapping[Tile, float]],
    free: Sequence[Tile],
) -> Tile:
    """The tile of `free` with the largest expected improvement over the fastest of `known`.

    `known` and each of `related`, another problem's, are times relative to something of their own.
    Tiles in flight are believed to come out as expected.
    """
    tasks = [known, *related]
    points = [(tile, task) for task, found in enumerate(tasks) for tile in found]
    logs = [np.log(list(found.values())) if found else np.zeros(0) for found in tasks]
    y = np.concatenate([log - log.mean() if len(log) else log for log in logs])
    spread = max(float(y.std()) if len(y) > 3 else _SPREAD, 1e-3)
    cells = _Cells(space)
    x = cells.of([tile for tile, _ in points])
    task = np.array([task for _, task in points], dtype=np.int64)
    gram = _kernel(x, x) * _between(task, task) + _NOISE * np.eye(len(points))
    weights = np.linalg.solve(gram, y / spread)

    def expected(tiles: Sequence[Tile]) -> Vector:
        cross = _kernel(cells.of(tiles), x) * _between(np.zeros(len(tiles), np.int64), task)
        mean: Vector = cross @ weights * spread
        return mean

    def gram_and_cross(tiles: Sequence[Tile]) -> tuple[Vector, Vector]:
        """With the tiles in flight as points, too: the variance does not ask for values."""
        xs = cells.of([tile for tile, _ in points] + list(in_flight))
        ts = np.concatenate([task, np.zeros(len(in_flight), np.int64)])
        full = _kernel(xs, xs) * _between(ts, ts) + _NOISE * np.eye(len(xs))
        return full, _kernel(cells.of(tiles), xs) * _between(np.zeros(len(tiles), np.int64), ts)

    mean = expected(free)
    full, cross = gram_and_cross(free)
    explained = np.einsum("ij,ji->i", cross, np.linalg.solve(full, cross.T))
    deviation = spread * np.sqrt(np.maximum(1.0 - explained, 1e-9))
    mine = y[task == 0]
    best = min([*mine, *expected(in_flight)], default=0.0)
    z = (best - mean) / deviation
    improvement = deviation * (z * ndtr(z) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
    return free[int(np.argmax(improvement))]


class _Cells:
    """Tiles as rows of numbers: which kernel, and where on each of its axes, in steps."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def of(self, tiles: Sequence[Tile]) -> Vector:
        width = len(self._space.position(self._space.tiles[0]))
        rows = [self._space.position(tile) for tile in tiles]
        return np.array(rows, dtype=np.float64).reshape(len(rows), width)


def _kernel(a: Vector, b: Vector) -> Vector:
    """Covariance of two sets of tiles, 1 for a tile with itself, 0 between kernels."""
    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)))
    same: Vector = (a[:, None, 0] == b[None, :, 0]).astype(np.float64)
    axes = np.exp(-_DECAY * np.abs(a[:, None, 1:] - b[None, :, 1:]))
    count = axes.shape[2]
    total = axes.sum(axis=2)
    pairs = (total**2 - (axes**2).sum(axis=2)) / max(count * (count - 1), 1)
    covariance: Vector = same * (
        _SINGLE * total / count + _PAIR * (pairs if count > 1 else 1.0) + _WHOLE * axes.prod(axis=2)
    )
    return covariance


def _between(a: NDArray[np.int64], b: NDArray[np.int64]) -> Vector:
    related: Vector = np.where(a[:, None] == b[None, :], 1.0, _RELATED)
    return related
