"""Measures the constants of the predictor on the GPU that is here: which kernels are timed on which
problems, and a kernel's Costs fitted to its times, from what was believed before, by least squares.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe.backends import BACKENDS
from flashmoe.backends.cuda import instance_head_dim
from flashmoe.backends.sdpa import torch_sdpa
from flashmoe.machine.device import Arch
from flashmoe.measure.inputs import make_inputs
from flashmoe.measure.timing import measure
from flashmoe.prediction import kernels
from flashmoe.prediction.costs import Table, from_logs, to_logs
from flashmoe.prediction.predict import Costs, Work, microseconds
from flashmoe.spec.call import Call
from flashmoe.spec.mask import CAUSAL, FULL
from flashmoe.spec.problem import Problem
from flashmoe.tiles import PLAIN, Tile
from flashmoe.tiles.triton import triton_head_dim

HEAD_DIMS = (64, 128, 256)
_ROUNDS = 5
# (batch * heads as a share of the SMs, seqlen_q, seqlen_kv): blocks alone, in part of a wave and in
# many waves, of a single step and of many, and what only memory limits.
_SIZES = (
    (0.01, 128, 128), (0.01, 128, 4096), (0.01, 2048, 2048), (0.3, 256, 256), (0.3, 1024, 1024),
    (1.0, 128, 1024), (1.0, 1024, 1024), (1.0, 512, 4096), (2.5, 512, 512), (2.5, 2000, 2000),
    (7.0, 128, 128), (7.0, 1024, 64), (40.0, 64, 64), (40.0, 256, 256), (200.0, 32, 32),
)  # fmt: skip

Run = Callable[[Call], object]

# Where the fit of a kernel that nobody knows begins.
START = Costs(4.0, 1.0, 1.3, 0.6, 0.3, 0.7, 0.4, 0.15, 3.5e6)
# How many e-folds a constant may be from there before it costs as much as an error of one part in
# _PRECISION.
SPREAD = (0.5, 1.5, 1.5, 1.5, 1.5, 1.0, 1.0, 1.0, 0.2)
_PRECISION = 25.0

# What a kernel did, and the microseconds that it took.
Pair = tuple[Work, float]
Vector = NDArray[np.float64]


def problems(head_dim: int, sm_count: int) -> list[Problem]:
    """What a kernel for head_dim is timed on, in an order that may be cut off anywhere."""
    found = []
    for share, seqlen_q, seqlen_kv in _SIZES:
        batch = max(round(share * sm_count), 1)
        for mask in (FULL, CAUSAL):
            sizes = batch, 1, 1, seqlen_q, seqlen_kv, head_dim
            found.append(Problem(*sizes, "bfloat16", mask=mask))
    # Rows in memory that are not aligned.
    found += [replace(x, head_dim=head_dim - 8) for x in found if x.seqlen_q == 1024]
    random.Random(0).shuffle(found)
    return found


def runs_of(problem: Problem, device: torch.device, arch: Arch) -> dict[str, tuple[Work, Run]]:
    """What is timed on a problem, by its name in a Table of Costs."""
    found: dict[str, tuple[Work, Run]] = {}
    cuda, triton = BACKENDS["cuda"], BACKENDS["triton"]
    tiles = []
    if not (cuda.unavailable(device) or cuda.unsupported(problem, arch)):
        tiles += cuda.compiled_in(problem, arch)
    # Every remainder is another kernel to Triton, which compiles for seconds.
    if not triton.unavailable(device) and problem.seqlen_q % 128 == problem.seqlen_kv % 128 == 0:
        tiles += filter(None, [triton.default_tile(problem, arch)])
    for tile in tiles:
        head_dim = (
            triton_head_dim(problem.head_dim)
            if tile.kernel == "triton"
            else instance_head_dim(tile.kernel, problem.head_dim, PLAIN)
        )
        work = kernels.tile_work(tile, problem, arch.sm_count)
        if work is not None and head_dim is not None:
            run = BACKENDS[tile.backend].bind(problem, tile)
            found[kernels.tile_name(tile, head_dim)] = work, run
    if not BACKENDS["sdpa"].unsupported(problem, arch):
        for kernel, work in kernels.sdpa_works(problem, arch.sm_count).items():
            run_sdpa = functools.partial(_sdpa, kernel != kernels.SDPA, problem.mask.is_causal)
            found[kernels.sdpa_name(kernel, problem.head_dim)] = work, run_sdpa
    return found


def _sdpa(flash: bool, causal: bool, call: Call) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in call[:3])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
        out: Tensor = torch_sdpa(q, k, v, is_causal=causal)
    return out


def measured(
    device: torch.device, arch: Arch, seconds: float, watch: Callable[[str], None]
) -> dict[str, list[Pair]]:
    """By a kernel's name in a Table of Costs what it did and how long that took, as many problems
    as can be timed in so many seconds."""
    deadline = time.perf_counter() + seconds
    pairs: dict[str, list[Pair]] = {}
    waiting = [problems(head_dim, arch.sm_count) for head_dim in HEAD_DIMS]
    # Of each head_dim in turn, so that all are there when time is up.
    for number, problem in enumerate(x for some in zip(*waiting, strict=True) for x in some):
        if time.perf_counter() >= deadline:
            break
        watch(f"{number + 1}/{len(HEAD_DIMS) * len(waiting[0])} {problem.label}")
        call = make_inputs(problem, device).call
        runs = runs_of(problem, device, arch)
        calls = {name: functools.partial(run, call) for name, (_, run) in runs.items()}
        for name, found in measure(calls, device, rounds=_ROUNDS, warmup=2).items():
            if found.status == "ok":
                pairs.setdefault(name, []).append((runs[name][0], median(found.samples) * 1e6))
    return pairs


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
