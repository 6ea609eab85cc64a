"""A model of how the axes of a tile make its time: which untried tile promises the most.

A Gaussian process over the logarithm of the time. Its kernel adds up what single axes, pairs of
axes and the whole tile explain, so a few tiles tell about many (as in additive Gaussian processes,
Duvenaud et al. 2011, arXiv:1112.4394); problems are correlated tasks (Bonilla et al. 2007), so what
neighbouring problems showed is where it starts. The space is finite: every tile is judged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import ndtr
from threadpoolctl import ThreadpoolController

from flashmoe.autotune.search.space import Space
from flashmoe.tiles import Tile

# Shares of the variance that single axes, pairs and the whole tile explain, and the noise's.
_SINGLE, _PAIR, _WHOLE, _NOISE = 0.55, 0.3, 0.15, 0.003
# Two values of an axis agree by exp(-_DECAY * steps between them).
_DECAY = 0.7
# How alike the same tile behaves in two related problems.
_RELATED = 0.8
# Standard deviation of log times where too few are known to tell.
_SPREAD = 0.15

# Rows that are computed together: more would not stay in a cache.
_ROWS = 8

Point = tuple[Tile, int]
Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
# The task whose tiles are judged; the others are related problems.
_OURS = np.zeros(1, dtype=np.int64)


def promising(
    space: Space,
    known: Mapping[Tile, float],
    in_flight: Sequence[Tile],
    related: Sequence[Mapping[Tile, float]],
    taken: Collection[Tile],
    prior: Mapping[Tile, float] = MappingProxyType({}),
) -> Tile | None:
    """The tile of `space` with the largest expected improvement over the fastest of `known`; none
    of `taken`, and None where there is no other.

    `known` and each of `related`, another problem's, are times relative to something of their own;
    `prior` is the logarithm of the predicted one, 0 where nothing is predicted, and what is learnt
    is how times deviate from that. Those of `related` are relative to their predictions, too. Tiles
    in flight are believed to come out as expected.
    """
    if len(taken) >= len(space):
        return None
    tasks = [known, *related]
    points = [(tile, task) for task, found in enumerate(tasks) for tile in found]
    logs = [np.log(list(found.values())) if found else np.zeros(0) for found in tasks]
    believed = np.array([prior.get(tile, 0.0) for tile in space.tiles])
    logs[0] = logs[0] - [prior.get(tile, 0.0) for tile in known]
    level = float(logs[0].mean()) if known else 0.0
    y = np.concatenate([log - log.mean() if len(log) else log for log in logs])
    spread = max(float(y.std()) if len(y) > 3 else _SPREAD, 1e-3)
    # One thread: many would wait for one another on cores that are busy compiling, for seconds.
    with _threads().limit(limits=1, user_api="blas"):
        seen = _seen(space, bool(related))
        # The tiles in flight are points, too: the variance does not ask for values.
        seen.update([*points, *((tile, 0) for tile in in_flight)])
        mean = believed + level + seen.mean(points, y / spread) * spread
    deviation = spread * np.sqrt(np.maximum(1.0 - seen.explained, 1e-9))
    mine = np.log(list(known.values()))
    best = min([*mine, *mean[seen.rows(in_flight)]], default=0.0)
    z = (best - mean) / deviation
    improvement = deviation * (z * ndtr(z) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
    improvement[seen.rows(taken)] = -np.inf
    return space.tiles[int(np.argmax(improvement))]


class _Seen:
    """What some points, tiles of some task, tell about every tile of a space in task 0. Points come
    one by one, and there are thousands of tiles: what was computed for those before is kept."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._rows = {tile: row for row, tile in enumerate(space.tiles)}
        self._all = self._positions(space.tiles)
        # Covariance of every point so far with all tiles.
        self._known: dict[Point, Vector] = {}
        self._forget()

    def _forget(self) -> None:
        self._index: dict[Point, int] = {}
        # Covariance of the points with each other, and its Cholesky factor L.
        self._gram: Matrix = np.zeros((0, 0))
        self._factor: Matrix = np.zeros((0, 0))
        # Of points that came together: which they are, their covariance with all tiles, and that
        # multiplied by L's inverse.
        self._blocks: list[tuple[slice, Matrix, Matrix]] = []
        # The share of each tile's variance that the points explain.
        self.explained: Vector = np.zeros(len(self._all))

    def rows(self, tiles: Collection[Tile]) -> NDArray[np.int64]:
        """Where these tiles of the space stand in it."""
        return np.array([self._rows[tile] for tile in tiles], dtype=np.int64)

    def update(self, points: Iterable[Point]) -> None:
        """Make these the points. Cheap where they are those of before and some more."""
        wanted = dict.fromkeys(points)
        if not self._index.keys() <= wanted.keys():
            self._forget()  # some are gone: tiles that failed, or were not tried after all
        new = [point for point in wanted if point not in self._index]
        if new:
            self._add(new)

    def mean(self, points: Sequence[Point], values: Vector) -> Vector:
        """Expected value of every tile, from those of some of the points."""
        told = np.array([self._index[point] for point in points], dtype=np.int64)
        weights = np.zeros(len(self._index))
        weights[told] = np.linalg.solve(self._gram[np.ix_(told, told)], values)
        found = np.zeros(len(self._all))
        for block, covariance, _ in self._blocks:
            found += weights[block] @ covariance
        return found

    def _add(self, new: Sequence[Point]) -> None:
        """The next block of the Cholesky factorization."""
        here = self._positions([tile for tile, _ in new])
        task = np.array([task for _, task in new], dtype=np.int64)
        others = np.array([task for _, task in self._index], dtype=np.int64)
        known = self._positions([tile for tile, _ in self._index])
        covariance = self._with_all(new)
        across = _kernel(here, known) * _between(task, others)
        among = _kernel(here, here) * _between(task, task) + _NOISE * np.eye(len(new))
        # Older versions of SciPy refuse an empty factor.
        left = solve_triangular(self._factor, across.T, lower=True).T if len(known) else across
        corner = np.linalg.cholesky(among - left @ left.T)
        rest = covariance.copy()
        for block, _, solved in self._blocks:
            rest -= left[:, block] @ solved
        rest = solve_triangular(corner, rest, lower=True, overwrite_b=True)
        self.explained = self.explained + (rest**2).sum(axis=0)
        first = len(self._index)
        self._blocks.append((slice(first, first + len(new)), covariance, rest))
        self._index |= {point: first + number for number, point in enumerate(new)}
        self._gram = np.block([[self._gram, across.T], [across, among]])
        self._factor = np.block([[self._factor, np.zeros_like(across.T)], [left, corner]])

    def _with_all(self, points: Sequence[Point]) -> Matrix:
        """Covariance of these points with all tiles."""
        new = [point for point in points if point not in self._known]
        for first in range(0, len(new), _ROWS):
            some = new[first : first + _ROWS]
            here = self._positions([tile for tile, _ in some])
            task = np.array([task for _, task in some], dtype=np.int64)
            rows = _kernel(here, self._all) * _between(task, _OURS)
            self._known |= dict(zip(some, rows, strict=True))
        found = np.stack([self._known[point] for point in points])
        # Kept once, as rows of this.
        self._known |= dict(zip(points, found, strict=True))
        return found

    def _positions(self, tiles: Sequence[Tile]) -> Matrix:
        width = len(self._space.position(self._space.tiles[0]))
        rows = [self._space.position(tile) for tile in tiles]
        return np.array(rows, dtype=np.float64).reshape(len(rows), width)


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


@functools.lru_cache(maxsize=2)
def _seen(space: Space, related: bool) -> _Seen:
    """Of the search at hand, with what related problems showed and without."""
    return _Seen(space)


def _kernel(a: Matrix, b: Matrix) -> Matrix:
    """Covariance of two sets of tiles, 1 for a tile with itself, 0 between kernels."""
    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)))
    same: Matrix = (a[:, None, 0] == b[None, :, 0]).astype(np.float64)
    axes = np.exp(-_DECAY * np.abs(a[:, None, 1:] - b[None, :, 1:]))
    count = axes.shape[2]
    total = axes.sum(axis=2)
    pairs = (total**2 - (axes**2).sum(axis=2)) / max(count * (count - 1), 1)
    covariance: Matrix = same * (
        _SINGLE * total / count + _PAIR * (pairs if count > 1 else 1.0) + _WHOLE * axes.prod(axis=2)
    )
    return covariance


def _between(a: NDArray[np.int64], b: NDArray[np.int64]) -> Matrix:
    related: Matrix = np.where(a[:, None] == b[None, :], 1.0, _RELATED)
    return related
