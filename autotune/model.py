"""A model of how the axes of a tile make its time: which untried tile promises the most.

A Gaussian process over the logarithm of the time. Its kernel adds up what single axes, pairs of
axes and the whole tile explain, so a few tiles tell about many (as in additive Gaussian processes,
Duvenaud et al. 2011, arXiv:1112.4394); problems are correlated tasks (Bonilla et al. 2007), so what
neighbouring problems showed is where it starts. The space is finite: every tile is judged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from threadpoolctl import ThreadpoolController

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

# Columns that are computed together: more would not stay in a cache.
_COLUMNS = 8

Vector = NDArray[np.float64]


def promising(
    space: Space,
    known: Mapping[Tile, float],
    in_flight: Sequence[Tile],
    related: Sequence[Mapping[Tile, float]],
    taken: Collection[Tile],
) -> Tile | None:
    """The tile of `space` with the largest expected improvement over the fastest of `known`; none
    of `taken`, and None where there is no other.

    `known` and each of `related`, another problem's, are times relative to something of their own.
    Tiles in flight are believed to come out as expected.
    """
    if len(taken) >= len(space):
        return None
    # One thread: many would wait for one another on cores that are busy compiling, for seconds.
    with _threads().limit(limits=1, user_api="blas"):
        return _promising(space, known, in_flight, related, taken)


def _promising(
    space: Space,
    known: Mapping[Tile, float],
    in_flight: Sequence[Tile],
    related: Sequence[Mapping[Tile, float]],
    taken: Collection[Tile],
) -> Tile:
    tasks = [known, *related]
    points = [(tile, task) for task, found in enumerate(tasks) for tile in found]
    logs = [np.log(list(found.values())) if found else np.zeros(0) for found in tasks]
    y = np.concatenate([log - log.mean() if len(log) else log for log in logs])
    spread = max(float(y.std()) if len(y) > 3 else _SPREAD, 1e-3)
    # The tiles in flight are points, too: the variance does not ask for values.
    tiles = [*(tile for tile, _ in points), *in_flight]
    task = np.array([task for _, task in points] + [0] * len(in_flight), dtype=np.int64)
    cells = _cells(space)
    cross = cells.covariance(tiles)
    gram = cells.among(tiles, cross) * _between(task, task) + _NOISE * np.eye(len(tiles))
    cross = cross * _between(np.zeros(1, np.int64), task)
    told = len(points)
    mean = cross[:, :told] @ (np.linalg.solve(gram[:told, :told], y / spread) * spread)
    free = np.ones(len(space), dtype=np.bool_)
    free[cells.rows(list(taken))] = False
    rows = np.flatnonzero(free)
    cross = cross[rows]
    explained = np.einsum("ij,ij->i", cross, cross @ np.linalg.inv(gram))
    deviation = spread * np.sqrt(np.maximum(1.0 - explained, 1e-9))
    best = min([*y[task[:told] == 0], *mean[cells.rows(in_flight)]], default=0.0)
    z = (best - mean[rows]) / deviation
    improvement = deviation * (z * ndtr(z) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
    return space.tiles[int(rows[np.argmax(improvement)])]


class _Cells:
    """Tiles as rows of numbers: which kernel, and where on each of its axes, in steps. Keeps the
    covariances with all of the space: thousands of tiles, asked for again at every trial."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._rows = {tile: row for row, tile in enumerate(space.tiles)}
        self._all = self.of(space.tiles)
        self._columns: dict[Tile, Vector] = {}

    def of(self, tiles: Sequence[Tile]) -> Vector:
        width = len(self._space.position(self._space.tiles[0]))
        rows = [self._space.position(tile) for tile in tiles]
        return np.array(rows, dtype=np.float64).reshape(len(rows), width)

    def rows(self, tiles: Sequence[Tile]) -> NDArray[np.int64]:
        """Where these tiles of the space stand in covariance()."""
        return np.array([self._rows[tile] for tile in tiles], dtype=np.int64)

    def covariance(self, tiles: Sequence[Tile]) -> Vector:
        """Of every tile of the space, in order, with these, which need not be of it."""
        new = list(dict.fromkeys(tile for tile in tiles if tile not in self._columns))
        for first in range(0, len(new), _COLUMNS):
            some = new[first : first + _COLUMNS]
            self._columns |= dict(zip(some, _kernel(self.of(some), self._all), strict=True))
        found = [self._columns[tile] for tile in tiles]
        return np.stack(found, axis=1) if found else np.zeros((len(self._all), 0))

    def among(self, tiles: Sequence[Tile], covariance: Vector) -> Vector:
        """Of these tiles with each other, from their covariance() with the space: related problems
        have tried few that are not of it."""
        inside = [i for i, tile in enumerate(tiles) if tile in self._rows]
        outside = [i for i, tile in enumerate(tiles) if tile not in self._rows]
        found = np.empty((len(tiles), len(tiles)))
        found[inside] = covariance[self.rows([tiles[i] for i in inside])]
        found[:, inside] = found[inside].T
        strangers = self.of([tiles[i] for i in outside])
        found[np.ix_(outside, outside)] = _kernel(strangers, strangers)
        return found


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


@functools.lru_cache(maxsize=1)
def _cells(space: Space) -> _Cells:
    return _Cells(space)


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
