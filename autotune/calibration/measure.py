"""Which kernels are timed on which problems to calibrate the predictor."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe.autotune.calibration.fit import Pair
from flashmoe.backends import BACKENDS
from flashmoe.backends.cuda import instance_head_dim
from flashmoe.backends.sdpa import torch_sdpa
from flashmoe.machine.device import Arch
from flashmoe.measure.inputs import make_inputs
from flashmoe.measure.timing import measure
from flashmoe.prediction import kernels
from flashmoe.prediction.predict import Work
from flashmoe.spec.call import Call
from flashmoe.spec.mask import CAUSAL, FULL
from flashmoe.spec.problem import Problem
from flashmoe.tiles import PLAIN
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


Run = Callable[[Call], object]


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
