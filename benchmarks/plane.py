"""Times many tiles, and SDPA's backends, on problems over the whole plane: what the untuned choice
is fitted to and judged by.

    python benchmarks/plane.py --seconds 400 --output plane-DEVICE.jsonl

One line of JSON a problem, written as soon as it is done; --first goes on from a problem on. Tiles
that are not compiled in are compiled first, by all cores, unless FLASHMOE_CACHE_DIR holds them:

    FLASHMOE_COMPILER=nvcc FLASHMOE_CACHE_DIR=plane-cache python benchmarks/plane.py --compile-only

Samples are interleaved and shuffled as flashmoe.measure.timing takes them. All candidates are timed
twice; those within 1.6 of the best then go on, and those within 1.1 of it once more, so that what
is best is known from fresh samples. `--dry-run` goes through everything with invented times, on a
CPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from plane_problems import Case, cases
from plane_tiles import HOPPER, INSTANCES, Kernel, kernels_at, kernels_for
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe import _extension, flash_attn_func
from flashmoe.backends import BACKENDS, jit
from flashmoe.machine import device
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.timing import cuda_sampler, measure_limits
from flashmoe.spec.problem import Problem
from flashmoe.tiles import PLAIN

SCHEMA = 1
# Rounds, and how far behind the best a candidate may be to take part in the next ones.
STEPS = ((2, 1.6), (3, 1.1), (6, 0.0))
SDPA = {
    "sdpa": None,
    "sdpa:cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa:flash": SDPBackend.FLASH_ATTENTION,
    "sdpa:efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Triton compiles for seconds, and rarely wins: one random problem of so many.
TRITON_EVERY = 8
# How far an output may be from the first candidate's, whose own is rounded to 2^-8 of it.
_ABSOLUTE, _RELATIVE = 0.06, 0.05

Calls = dict[str, Callable[[], Any]]


def compile_kernels(pool: ThreadPoolExecutor) -> list[str]:
    """All tiles that are not compiled in, into the cache unless they are there; what failed."""
    handles = _extension.load().handles
    wanted = [k for d in INSTANCES for k in kernels_at(d) if (d, k.tile, PLAIN) not in handles]

    def compile_one(kernel: Kernel) -> str:
        target = jit.Target(kernel.tile, kernel.head_dim, "bfloat16")
        try:
            if not jit.is_cached(target):
                jit.precompile(target)
        except (jit.CompilationFailed, jit.CompilerUnavailable) as error:
            return f"{kernel}: {error}"
        return ""

    return [error for error in pool.map(compile_one, wanted) if error]


def has_triton(number: int, case: Case) -> bool:
    return not case.name.startswith(("random", "train")) or number % TRITON_EVERY == 0


def _compile_triton(problem: Problem) -> None:
    here = torch.device("cuda", 0)
    triton = BACKENDS["triton"]
    tile = triton.default_tile(problem, device.arch(here))
    assert tile is not None
    triton.precompile(tile, problem, here)


def compiled(triton: Future[None] | None) -> bool:
    """Whether Triton's kernel is there, or will be in a minute."""
    try:
        return triton is not None and triton.exception(timeout=60) is None
    except TimeoutError:
        return False


def inputs(problem: Problem, where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q, k and v."""

    def normal(seqlen: int, heads: int) -> Tensor:
        shape = (problem.batch, seqlen, heads, problem.head_dim)
        return torch.empty(shape, dtype=torch.bfloat16, device=where).normal_()

    torch.manual_seed(0)
    q = normal(problem.seqlen_q, problem.heads_q)
    k, v = (normal(problem.seqlen_kv, problem.heads_kv) for _ in range(2))
    return q, k, v


def _sm90_call(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Any]:
    handle = _extension.load().handles.get((kernel.head_dim, kernel.tile, PLAIN))
    if handle is None:
        handle = _loaded(kernel)
    scale = q.shape[-1] ** -0.5
    return lambda: torch.ops.flashmoe.fwd_cuda(q, k, v, scale, -1, 0 if causal else -1, handle)[0]


_handles: dict[Kernel, int] = {}


def _loaded(kernel: Kernel) -> int:
    if kernel not in _handles:
        target = jit.Target(kernel.tile, kernel.head_dim, "bfloat16")
        _handles[kernel] = _extension.load_kernel(jit.cubin(target), *target)
    return _handles[kernel]


def _sdpa_call(
    backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> Callable[[], Tensor]:
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[2] != k.shape[2]

    def call() -> Tensor:
        return F.scaled_dot_product_attention(q_, k_, v_, is_causal=causal, enable_gqa=gqa)

    if backend is None:
        return lambda: call().transpose(1, 2)

    def call_backend() -> Tensor:
        with sdpa_kernel(backend):
            return call().transpose(1, 2)

    return call_backend


def sdpa_runs(problem: Problem) -> bool:
    """SDPA's causal mask is aligned top-left: the same where all is seen or both lengths agree."""
    return not problem.mask.is_causal or problem.seqlen_q in (1, problem.seqlen_kv)


def calls_of(
    problem: Problem, with_triton: bool, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Calls, dict[str, str]]:
    """What is timed, by name; and why some of it cannot be."""
    calls: Calls = {}
    failed: dict[str, str] = {}
    causal = problem.mask.is_causal
    for kernel in kernels_for(problem):
        try:
            calls[str(kernel)] = _sm90_call(kernel, q, k, v, causal)
        except (RuntimeError, jit.CompilationFailed, jit.CompilerUnavailable) as error:
            failed[str(kernel)] = str(error)[:200]
    cuda = BACKENDS["cuda"]
    others = [tile for tile in cuda.compiled_in(problem, HOPPER) if tile.kernel != "sm90"]
    if with_triton:
        others += [t for t in [BACKENDS["triton"].default_tile(problem, HOPPER)] if t]
    for tile in others:
        calls[str(tile)] = lambda tile=tile: flash_attn_func(q, k, v, causal=causal, tile=tile)
    if sdpa_runs(problem):
        for name, backend in SDPA.items():
            calls[name] = _sdpa_call(backend, q, k, v, causal and problem.seqlen_q > 1)
    return calls, failed


def check(calls: Calls, failed: dict[str, str]) -> dict[str, float]:
    """Run each once; drop those that fail or whose output differs. Seconds of each first call."""
    first: dict[str, float] = {}
    expected: Tensor | None = None
    for name in list(calls):
        start = time.perf_counter()
        try:
            out = calls[name]()
            torch.cuda.synchronize()
            first[name] = round(time.perf_counter() - start, 3)
            if expected is None:
                expected = out
            elif not torch.allclose(out, expected, rtol=_RELATIVE, atol=_ABSOLUTE):
                worst = float((out - expected).abs().max())
                failed[name] = f"output differs by {worst}"
        except RuntimeError as error:
            failed[name] = str(error).splitlines()[0][:200]
            torch.cuda.synchronize()  # raises where nothing more can run in this process
        if name in failed:
            del calls[name]
    return first


def race(
    calls: Mapping[str, Callable[[], Any]], sample: Callable[[Callable[[], Any]], float], seed: int
) -> dict[str, list[float]]:
    """Microseconds by candidate, as many as it took part in rounds."""
    rng = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in calls}
    running = list(calls)
    for rounds, behind in STEPS:
        for _ in range(rounds):
            rng.shuffle(running)
            for name in running:
                times[name].append(round(sample(calls[name]) * 1e6, 2))
        medians = {name: median(times[name][-rounds:]) for name in running}
        limit = behind * min(medians.values())
        running = [name for name in running if medians[name] <= limit]
    return times


def invented(problem: Problem) -> Iterator[tuple[Calls, Callable[[Callable[[], Any]], float]]]:
    """Candidates and a clock for a dry run."""
    calls: Calls = {str(k): (lambda: None) for k in kernels_for(problem)}
    calls |= {name: (lambda: None) for name in SDPA}
    rng = random.Random(0)
    yield calls, lambda call: rng.uniform(1e-5, 2e-5)


def measured(
    number: int,
    problem: Problem,
    with_triton: bool,
    sample: Callable[[Callable[[], Any]], float],
) -> dict[str, Any]:
    q, k, v = inputs(problem, torch.device("cuda", 0))
    calls, failed = calls_of(problem, with_triton, q, k, v)
    first = check(calls, failed)
    times = race(calls, sample, seed=number)
    slow = {name: seconds for name, seconds in first.items() if seconds > 0.1}
    return {"us": times, "failed": failed, "first_call_s": slow}


def write(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, separators=(",", ":")) + "\n")
    file.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="the file to write, lines of JSON")
    parser.add_argument("--seconds", type=float, default=420.0, help="when no more is begun")
    parser.add_argument("--first", type=int, default=0, help="the problem to begin with")
    parser.add_argument("--sets", default=",".join(cases()), help="default: %(default)s")
    parser.add_argument("--no-triton", action="store_true", help="leave Triton out")
    parser.add_argument("--compile-only", action="store_true", help="needs no GPU")
    parser.add_argument("--dry-run", action="store_true", help="invent the times; needs no GPU")
    args = parser.parse_args()
    start = time.perf_counter()
    deadline = start + args.seconds
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        errors = [] if args.dry_run else compile_kernels(pool)
    print(f"compiled after {time.perf_counter() - start:.0f} s", *errors, sep="\n", flush=True)
    if args.compile_only:
        return 1 if errors else 0
    if args.output is None:
        parser.error("--output is required")
    chosen = [case for name in args.sets.split(",") for case in cases()[name]]
    everything = list(enumerate(chosen))[args.first :]
    with args.output.open("w", encoding="utf-8") as file, torch.no_grad():
        head: dict[str, Any] = {"schema": SCHEMA, "command": shlex.join(["python", *sys.argv])}
        waiting: dict[int, Future[None]] = {}
        if not args.dry_run:
            here = torch.device("cuda", 0)
            if not args.no_triton:
                triton = ProcessPoolExecutor(
                    max(len(os.sched_getaffinity(0)) - 4, 1),
                    mp_context=multiprocessing.get_context("spawn"),
                    initializer=os.nice,
                    initargs=(10,),
                )
                for number, case in everything:
                    if has_triton(number, case):
                        waiting[number] = triton.submit(_compile_triton, case.problem)
            limits = measure_limits(here, torch.bfloat16)
            head |= {
                "fingerprint": fingerprint(here).to_json(),
                "matmul_flops": limits.matmul_flops,
                "copy_bytes": limits.copy_bytes,
            }
            sample = cuda_sampler(here)
        write(file, head)
        done = 0
        for number, case in everything:
            if time.perf_counter() > deadline:
                break
            row = {"number": number, "name": case.name, "problem": case.problem.to_json()}
            if args.dry_run:
                for calls, clock in invented(case.problem):
                    row["us"] = race(calls, clock, seed=number)
            else:
                row |= measured(number, case.problem, compiled(waiting.get(number)), sample)
            write(file, row)
            done += 1
            if done % 20 == 0:
                print(f"{number}: {time.perf_counter() - start:.0f} s", flush=True)
        if waiting:
            triton.shutdown(wait=False, cancel_futures=True)
    print(f"{done} problems in {time.perf_counter() - start:.0f} s, {args.output}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
