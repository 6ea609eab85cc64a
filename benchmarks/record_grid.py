"""Times every legal tile of several forward problems and keeps the raw samples, once.

    python benchmarks/record_grid.py --output tests/autotune/grid-nvidia-h200.json.xz

That is all that the tuner would search. On Hopper only head_dim 256 has so few tiles; below it the
grid is what SM90_AXES span, and the file names the axes (on a CPU: CPU_AXES, besides the tuner's
own). The default is in every grid. The file is what the tuner's tests replay as a simulated device
(tests/autotune/autotune_replay.py). Each tile is checked first, then timed interleaved with the
default tile in batches, so every sample has one of the default from the same round. A tile that is
wrong or fails is recorded as such.

NVRTC takes 5 to 10 s of a core for a Hopper tile, so all of them are compiled in parallel from the
start, those of one head dimension once, while the problems whose tiles are there are timed. With
nvcc they can be compiled elsewhere, without a GPU, at 1 to 2 s of a core each, into a cache that is
then carried:

    FLASHMOE_COMPILER=nvcc FLASHMOE_CACHE_DIR=grid-cache \\
        python benchmarks/record_grid.py --compile-only
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Sequence
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

import torch

from flashmoe import Problem, Tile, tiles
from flashmoe.autotune.running.candidate import SDPA, Candidate, searched_backends
from flashmoe.autotune.running.isolated import IsolatedBench, Processes
from flashmoe.autotune.schedule.suite import Group
from flashmoe.backends import BACKENDS, jit
from flashmoe.machine import device
from flashmoe.machine.device import Arch
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.spec.mask import CAUSAL
from flashmoe.tiles import sm90_head_dim

SCHEMA = 2
ROUNDS = 32
BATCH = 16
GPU_PROBLEMS = (
    Problem(32, 8, 8, 512, 512, 256, "bfloat16"),
    Problem(32, 8, 8, 512, 512, 256, "bfloat16", mask=CAUSAL),
    Problem(8, 8, 8, 2048, 2048, 256, "bfloat16", mask=CAUSAL),
    Problem(4, 16, 4, 1024, 1024, 256, "bfloat16", mask=CAUSAL),
    Problem(1, 8, 8, 4096, 4096, 256, "bfloat16"),
    Problem(4, 16, 2, 100, 3000, 256, "bfloat16"),
    Problem(8, 16, 16, 1024, 1024, 128, "bfloat16"),
    Problem(2, 16, 16, 4096, 4096, 128, "bfloat16"),
    Problem(2, 16, 16, 4096, 4096, 128, "bfloat16", mask=CAUSAL),
    Problem(4, 32, 8, 2048, 2048, 128, "bfloat16", mask=CAUSAL),
    Problem(32, 8, 8, 512, 512, 64, "bfloat16"),
    Problem(2, 32, 32, 4096, 4096, 64, "bfloat16", mask=CAUSAL),
)
CPU_PROBLEMS = (
    Problem(1, 8, 8, 256, 256, 64, "float32"),
    Problem(1, 8, 8, 256, 256, 64, "float32", mask=CAUSAL),
    Problem(1, 4, 4, 512, 512, 64, "float32"),
    Problem(1, 4, 1, 512, 512, 64, "float32", mask=CAUSAL),
    Problem(1, 2, 2, 512, 512, 128, "float32"),
    Problem(4, 8, 8, 128, 128, 32, "float32"),
)
# Below head_dim 256 there are 3,411 legal tiles (192) to 14,777 (64).
SM90_ALL_FROM_HEAD_DIM = 256
SM90_AXES = {
    "block_m": (64, 128, 192, 256),
    "block_n": (64, 80, 128, 176),
    "num_stages": (2, 3),
    "q_stages": (1, 2),
    "pingpong": (False, True),
    "q_in_registers": (False,),
    "exp2_fma": (0, 4),
    "ctas_per_sm": (1,),
}
# An H200 (and an H100), as far as legality goes: to compile where there is none.
HOPPER = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
# Seconds to wait for a tile once all before it are compiled.
PATIENCE = 60.0
# Denser than the backend's own grid: the kernel takes any tile.
CPU_AXES = {
    "block_m": (32, 48, 64, 96, 128, 192, 256, 384, 512),
    "block_n": (32, 48, 64, 96, 128, 192, 256),
}


def grid_of(problem: Problem, here: torch.device) -> tuple[list[Tile], dict[str, Any]]:
    """The legal tiles of the grid, the default first whether it is of the grid or not; and what the
    file says about the grid: its axes, or nothing where it is all that the tuner searches."""
    arch = device.arch(here)
    names = searched_backends(problem, here, None)
    default = BACKENDS[names[0]].default_tile(problem, arch)
    axes: dict[str, Any] = CPU_AXES if here.type == "cpu" else {}
    if default is not None and default.kernel == "sm90" and _only_axes(problem):
        axes, found = SM90_AXES, sm90_grid(problem, arch)
    else:
        found = [tile for name in names for tile in BACKENDS[name].tiles(problem, arch)]
        if here.type == "cpu":
            dense = tiles.grid("cpu", **axes)
            found += [tile for tile in dense if not tile.violations(arch, problem)]
    return [tile for tile in dict.fromkeys([default, *found]) if tile is not None], axes


def sm90_grid(problem: Problem, arch: Arch) -> list[Tile]:
    if not _only_axes(problem):
        return BACKENDS["cuda"].tiles(problem, arch)
    return [t for t in tiles.grid("sm90", **SM90_AXES) if not t.violations(arch, problem)]


def _only_axes(problem: Problem) -> bool:
    return problem.head_dim < SM90_ALL_FROM_HEAD_DIM


def kernels(problems: Sequence[Problem], arch: Arch) -> dict[Problem, list[jit.Target]]:
    """What each problem needs compiled; problems of one head dimension and dtype share it."""
    return {
        problem: [
            jit.Target(tile, sm90_head_dim(problem.head_dim), problem.dtype)
            for tile in sm90_grid(problem, arch)
        ]
        for problem in problems
    }


class Compilation:
    """Compiles the kernels of all problems in the order of the problems, each once, in a pool of
    processes over all cores."""

    def __init__(self, wanted: dict[Problem, list[jit.Target]]) -> None:
        self._wanted = wanted
        cores = len(os.sched_getaffinity(0))
        targets = list(dict.fromkeys(t for found in wanted.values() for t in found))
        self._pool = multiprocessing.get_context("spawn").Pool(
            min(cores, len(targets)), initializer=_in_background
        )
        self._results: dict[jit.Target, AsyncResult[str]] = {
            target: self._pool.apply_async(_compile, (target,)) for target in targets
        }

    def wait_for(self, problem: Problem, deadline: float) -> list[str]:
        """Until the problem's kernels are there, or the deadline; what the compiler refused."""
        refused = []
        for target in self._wanted[problem]:
            result = self._results[target]
            result.wait(min(PATIENCE, max(deadline - time.perf_counter(), 0.0)))
            if result.ready() and (error := result.get()):
                refused.append(f"{target.tile}: {error}")
        return refused

    def done(self) -> int:
        return sum(result.ready() for result in self._results.values())

    def close(self) -> None:
        self._pool.terminate()
        self._pool.join()


def _in_background() -> None:
    # The process that times needs its core when it needs it.
    os.nice(10)


def _compile(target: jit.Target) -> str:
    """Into the cache unless it is there, from any compiler; why that failed, or nothing."""
    try:
        if not jit.is_cached(target):
            jit.precompile(target)
    except (jit.CompilationFailed, jit.CompilerUnavailable) as error:
        return str(error)
    return ""


def record(problem: Problem, processes: Processes, deadline: float) -> dict[str, Any]:
    grid, axes = grid_of(problem, processes.device)
    default = grid[0]
    anchor = Candidate.of_tile(default)
    batches: list[dict[str, Any]] = []
    rejected: dict[str, list[str]] = {}
    candidates = [*map(Candidate.of_tile, grid), SDPA]
    reached = 0
    bench = IsolatedBench(Group((problem,), (1.0,)), processes, seed=0, patience=PATIENCE)
    try:
        # Triton's, which come last, while the others are timed.
        bench.precompile([candidate for candidate in candidates if candidate.backend == "triton"])
        while reached < len(candidates) and bench.now() < deadline:
            batch = []
            for candidate in candidates[reached : reached + BATCH]:
                if bench.now() > deadline:
                    break
                reached += 1
                checked = bench.prepare(candidate)
                if checked.status == "ok":
                    batch.append(candidate)
                else:
                    rejected[str(candidate)] = [checked.status, checked.reason]
            if not batch:
                continue
            field = {"anchor": anchor, **{str(candidate): candidate for candidate in batch}}
            measured = bench.measure(field, rounds=ROUNDS, warmup=2)
            tiles_us = {}
            for candidate in batch:
                found = measured[str(candidate)]
                if found.status == "ok":
                    tiles_us[str(candidate)] = _microseconds(found.samples)
                else:
                    rejected[str(candidate)] = [found.status, found.reason]
            anchor_us = _microseconds(measured["anchor"].samples)
            batches.append({"anchor_us": anchor_us, "tiles_us": tiles_us})
    finally:
        bench.close()
    return {
        "problem": problem.to_json(),
        "default": str(default),
        "axes": axes,
        "legal": len(grid),
        # Whether every legal tile of the grid was timed or rejected.
        "complete": reached == len(candidates),
        "batches": batches,
        "rejected": rejected,
    }


def _microseconds(samples: tuple[float, ...]) -> list[float]:
    return [round(seconds * 1e6, 2) for seconds in samples]


def compile_only() -> int:
    """Fill the cache for GPU_PROBLEMS; the exit code."""
    if why := jit.unavailable():
        raise SystemExit(why)
    start = time.perf_counter()
    wanted = kernels(GPU_PROBLEMS, HOPPER)
    compilation = Compilation(wanted)
    refused: set[str] = set()
    try:
        for problem in GPU_PROBLEMS:
            refused |= set(compilation.wait_for(problem, float("inf")))
            print(f"{problem.label}: {compilation.done()} kernels compiled", flush=True)
    finally:
        compilation.close()
    for line in sorted(refused):
        print(line, file=sys.stderr)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return 1 if refused else 0


def _write(path: Path, rows: Sequence[dict[str, Any]], here: torch.device, command: str) -> None:
    """Whole problems first; the file is there in full or as it was."""
    data = {
        "schema": SCHEMA,
        "fingerprint": fingerprint(here).to_json(),
        "command": command,
        "problems": sorted(rows, key=lambda row: not row["complete"]),
    }
    text = json.dumps(data, separators=(",", ":")).replace('{"anchor_us"', '\n{"anchor_us"') + "\n"
    writing = path.with_name(path.name + ".writing")
    writing.write_bytes(lzma.compress(text.encode()))
    writing.replace(path)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="the file to write, JSON in xz")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds", type=float, default=270.0, help="when no more is begun (default %(default)s)"
    )
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="only compile the Hopper tiles into FLASHMOE_CACHE_DIR; needs no GPU",
    )
    args = parser.parse_args(words)
    if args.compile_only:
        return compile_only()
    if args.output is None:
        parser.error("--output is required")
    start = time.perf_counter()
    deadline = start + args.seconds
    here = torch.device(args.device)
    compilation = None
    if here.type == "cuda":
        if here.index is None:
            here = torch.device("cuda", torch.cuda.current_device())
        arch = device.arch(here)
        if arch.capability[0] == 9 and not jit.unavailable():
            compilation = Compilation(kernels(GPU_PROBLEMS, arch))
    command = shlex.join(["python", *(sys.argv if words is None else [__file__, *words])])
    rows: list[dict[str, Any]] = []
    processes = Processes(here)
    try:
        _write(args.output, rows, here, command)
        for problem in GPU_PROBLEMS if here.type == "cuda" else CPU_PROBLEMS:
            if compilation is not None:
                compilation.wait_for(problem, deadline)
            now = time.perf_counter()
            if now >= deadline:
                break
            row = record(problem, processes, deadline)
            rows.append(row)
            _write(args.output, rows, here, command)
            timed = sum(len(batch["tiles_us"]) for batch in row["batches"])
            print(
                f"{problem.label}: {timed} of {row['legal'] + 1} candidates from "
                f"{now - start:.0f} to {time.perf_counter() - start:.0f} s"
                + (f", {compilation.done()} kernels compiled" if compilation else ""),
                flush=True,
            )
    finally:
        processes.close()
        if compilation is not None:
            compilation.close()
    print(f"{args.output}: {args.output.stat().st_size} bytes, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
