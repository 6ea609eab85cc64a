"""A model of how the axes of a tile make its time: which untried tile promises the most.

A Gaussian process over how the logarithm of the time deviates from the predicted one. Its kernel
adds up what single axes, pairs of axes and the whole tile explain, so a few tiles tell about many
(as in additive Gaussian processes, Duvenaud et al. 2011, arXiv:1112.4394); problems are correlated
tasks (Bonilla et al. 2007), so what neighbouring problems showed is where it starts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

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
# Of thousands of tiles those that are predicted to be fastest are judged; the others never won.
_JUDGED = 600

# Of the libraries above, which are loaded.
_BLAS = ThreadpoolController()

Matrix = NDArray[np.float64]
# A tile in a task: 0 is the problem at hand, the others are related ones.
Point = tuple[Tile, int]


class Model:
    """What is known of `space`, and what that makes of the tiles not tried yet.

    Each of `related`, another problem's, are times relative to something of their own; `prior` is
    the logarithm of the predicted one, 0 where nothing is predicted, and what is learnt is how
    times deviate from that. Those of `related` are relative to their predictions, too.
    """

    def __init__(
        self,
        space: Space,
        related: Sequence[Mapping[Tile, float]] = (),
        prior: Mapping[Tile, float] | None = None,
    ) -> None:
        self._prior = prior or {}
        judged = sorted(space.tiles, key=lambda tile: self._prior.get(tile, 0.0))
        self._judged = judged[:_JUDGED] if prior else space.tiles
        self._index = {tile: index for index, tile in enumerate(self._judged)}
        self._means = np.array([self._prior.get(tile, 0.0) for tile in self._judged])
        self._elsewhere = [(tile, n) for n, found in enumerate(related, 1) for tile in found]
        logs = [np.log(list(found.values())) for found in related if found]
        self._logs = np.concatenate([log - log.mean() for log in logs]) if logs else np.zeros(0)
        self._factor = _Factor(space, self._judged)

    def promising(
        self, known: Mapping[Tile, float], in_flight: Sequence[Tile], taken: Collection[Tile]
    ) -> Tile | None:
        """The tile with the largest expected improvement over the fastest of `known`; none of
        `taken`, and None where there is no other.

        `known` are times relative to something of their own. Tiles in flight are believed to come
        out as expected.
        """
        free = np.ones(len(self._judged), dtype=bool)
        free[[self._index[tile] for tile in taken if tile in self._index]] = False
        if not free.any():
            return None
        times = np.log(list(known.values()))
        logs = times - [self._prior.get(tile, 0.0) for tile in known]
        level = float(logs.mean()) if known else 0.0
        y = np.concatenate([self._logs, logs - level])
        spread = max(float(y.std()) if len(y) > 3 else _SPREAD, 1e-3)
        # The variance does not ask for values, so tiles in flight are points, too.
        points = [*self._elsewhere, *((tile, 0) for tile in (*known, *in_flight))]
        # One thread: many would wait for one another on cores that are busy compiling, for seconds.
        with _BLAS.limit(limits=1, user_api="blas"):
            here, there, variance = self._factor.posterior(points, y)
        mean = here + level + self._means
        expected = there + level + [self._prior.get(tile, 0.0) for tile in in_flight]
        deviation = spread * np.sqrt(np.maximum(variance, 1e-9))
        z = (min([*times, *expected], default=0.0) - mean) / deviation
        gain = deviation * (z * ndtr(z) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
        return self._judged[int(np.argmax(np.where(free, gain, -1.0)))]


class _Factor:
    """The Cholesky factor of the covariance of points, which grows by what is new: points that
    were in flight are mostly the next ones that are known."""

    def __init__(self, space: Space, judged: Sequence[Tile]) -> None:
        self._space = space
        self._judged = _positions(space, judged)
        self._points: list[Point] = []
        self._at: Matrix = _positions(space, [])
        self._task = np.zeros(0, dtype=np.int64)
        self._lower: Matrix = np.zeros((0, 0))
        # The inverse of that times the covariance of the points with what is judged.
        self._half: Matrix = np.zeros((0, len(judged)))

    def posterior(self, points: Sequence[Point], y: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        """The mean of what is judged and of those points that `y`, the values of the first ones,
        leaves out; and the variance of what is judged, in shares of that before any is known."""
        self._move(points)
        told = len(y)
        weights = solve_triangular(self._lower[:told, :told], y, lower=True, check_finite=False)
        mean: Matrix = weights @ self._half[:told]
        variance: Matrix = 1.0 - np.einsum("ij,ij->j", self._half, self._half)
        return mean, self._lower[told:, :told] @ weights, variance

    def _move(self, points: Sequence[Point]) -> None:
        """Drop the points from the first that differs on, and add the new ones."""
        same = 0
        while points[same : same + 1] == self._points[same : same + 1] != []:
            same += 1
        self._points, added = list(points), points[same:]
        lower, half = self._lower[:same, :same], self._half[:same]
        old, old_task = self._at[:same], self._task[:same]
        new = _positions(self._space, [tile for tile, _ in added])
        task = np.array([task for _, task in added], dtype=np.int64)
        border = solve_triangular(
            lower, _kernel(old, new) * _between(old_task, task), lower=True, check_finite=False
        ).T
        own = _kernel(new, new) * _between(task, task) + _NOISE * np.eye(len(added))
        corner = np.linalg.cholesky(own - border @ border.T)
        across = _kernel(new, self._judged) * _between(task, np.zeros(1, dtype=np.int64))
        rest = solve_triangular(corner, across - border @ half, lower=True, check_finite=False)
        self._lower = np.block([[lower, np.zeros((same, len(added)))], [border, corner]])
        self._half = np.concatenate([half, rest])
        self._at, self._task = np.concatenate([old, new]), np.concatenate([old_task, task])


def _positions(space: Space, tiles: Sequence[Tile]) -> Matrix:
    width = len(space.position(space.tiles[0]))
    rows = [space.position(tile) for tile in tiles]
    return np.array(rows, dtype=np.float64).reshape(len(rows), width)


def _kernel(a: Matrix, b: Matrix) -> Matrix:
    """Covariance of two sets of tiles, 1 for a tile with itself, 0 between kernels."""
    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)))
    # Axis by axis: an array of all of them at once is too large for the caches.
    total, squares = np.zeros((2, len(a), len(b)))
    product: Matrix = np.ones((len(a), len(b)))
    count = a.shape[1] - 1
    for axis in range(1, count + 1):
        agree = np.exp(-_DECAY * np.abs(a[:, None, axis] - b[None, :, axis]))
        total += agree
        squares += agree**2
        product *= agree
    pairs = (total**2 - squares) / max(count * (count - 1), 1)
    same: Matrix = (a[:, None, 0] == b[None, :, 0]).astype(np.float64)
    covariance: Matrix = same * (
        _SINGLE * total / count + _PAIR * (pairs if count > 1 else 1.0) + _WHOLE * product
    )
    return covariance


def _between(a: NDArray[np.int64], b: NDArray[np.int64]) -> Matrix:
    related: Matrix = np.where(a[:, None] == b[None, :], 1.0, _RELATED)
    return related
