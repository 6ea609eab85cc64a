"""A model of how the axes of a tile make its time: which untried tile promises the most.

A Gaussian process over how the logarithm of the time deviates from the predicted one. Its kernel
adds up what single axes, pairs of axes and the whole tile explain, so a few tiles tell about many
(as in additive Gaussian processes, Duvenaud et al. 2011, arXiv:1112.4394); problems are correlated
tasks (Bonilla et al. 2007), so what neighbouring problems showed is where it starts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
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

Matrix = NDArray[np.float64]


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
    free = [tile for tile in space.tiles if tile not in taken]
    if not free:
        return None
    if prior:
        free = sorted(free, key=lambda tile: prior.get(tile, 0.0))[:_JUDGED]
    judged = [*free, *in_flight]
    points = [(tile, task) for task, found in enumerate((known, *related)) for tile in found]
    logs = [np.log(list(found.values())) for found in (known, *related) if found]
    if known:
        logs[0] = logs[0] - [prior.get(tile, 0.0) for tile in known]
    level = float(logs[0].mean()) if known else 0.0
    y = np.concatenate([log - log.mean() for log in logs]) if logs else np.zeros(0)
    spread = max(float(y.std()) if len(y) > 3 else _SPREAD, 1e-3)
    # One thread: many would wait for one another on cores that are busy compiling, for seconds.
    with _threads().limit(limits=1, user_api="blas"):
        # The variance does not ask for values, so tiles in flight are points, too.
        every = [*points, *((tile, 0) for tile in in_flight)]
        here = _positions(space, judged)
        there = _positions(space, [tile for tile, _ in every])
        task = np.array([task for _, task in every], dtype=np.int64)
        gram = _kernel(there, there) * _between(task, task) + _NOISE * np.eye(len(every))
        across = _kernel(here, there) * _between(np.zeros(1, dtype=np.int64), task)
        told = len(points)
        weights = np.linalg.solve(gram[:told, :told], y)
        explained = np.einsum("ij,ji->i", across, np.linalg.solve(gram, across.T))
    mean = across[:, :told] @ weights + level + [prior.get(tile, 0.0) for tile in judged]
    deviation = spread * np.sqrt(np.maximum(1.0 - explained, 1e-9))
    best = min([*np.log(list(known.values())), *mean[len(free) :]], default=0.0)
    z = ((best - mean) / deviation)[: len(free)]
    gain = z * ndtr(z) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return free[int(np.argmax(deviation[: len(free)] * gain))]


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


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
