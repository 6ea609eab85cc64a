"""Times the legal tiles of several forward problems and keeps the raw samples, once.

    python benchmarks/record_grid.py --output tests/autotune/grid-nvidia-h200.json --seconds 150

Every legal Triton tile, and of the Hopper kernel's thousands those in SM90_AXES. The file is what
the tuner's tests replay as a simulated device (tests/autotune/autotune_replay.py). Each tile is
checked first, then timed interleaved with the default tile in batches, so every sample has one of
the default from the same round. A tile that is wrong or fails is recorded as such.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from flashmoe import Problem, Tile, device, tiles
from flashmoe.autotune.candidate import SDPA, Candidate, searched_backends
from flashmoe.autotune.isolated import IsolatedBench, Processes
from flashmoe.autotune.suite import Group
from flashmoe.backends import BACKENDS

SCHEMA = 1
ROUNDS = 32
BATCH = 8
GPU_PROBLEMS = (
    Problem(32, 8, 8, 512, 512, 64, "bfloat16"),
    Problem(2, 32, 32, 4096, 4096, 64, "bfloat16", causal=True),
    Problem(8, 16, 16, 1024, 1024, 128, "bfloat16"),
    Problem(2, 16, 16, 4096, 4096, 128, "bfloat16"),
    Problem(2, 16, 16, 4096, 4096, 128, "bfloat16", causal=True),
    Problem(4, 32, 8, 2048, 2048, 128, "bfloat16", causal=True),
    Problem(1, 16, 16, 4096, 4096, 256, "bfloat16"),
)
CPU_PROBLEMS = (
    Problem(1, 8, 8, 256, 256, 64, "float32"),
    Problem(1, 8, 8, 256, 256, 64, "float32", causal=True),
    Problem(1, 4, 4, 512, 512, 64, "float32"),
    Problem(1, 4, 1, 512, 512, 64, "float32", causal=True),
    Problem(1, 2, 2, 512, 512, 128, "float32"),
    Problem(4, 8, 8, 128, 128, 32, "float32"),
)
# Of the Hopper kernel's thousands of tiles, those with these values.
SM90_AXES = {
    "block_n": (64, 96, 128, 176),
    "num_stages": (2,),
    "q_in_registers": (False,),
    "exp2_fma": (0, 4),
    "ctas_per_sm": (1,),
}
# Denser than the backend's own grid: the kernel takes any tile.
CPU_TILES = tiles.grid(
    "cpu",
    block_m=(32, 48, 64, 96, 128, 192, 256, 384, 512),
    block_n=(32, 48, 64, 96, 128, 192, 256),
)


def grid_of(problem: Problem, here: torch.device) -> list[Tile]:
    """Every legal tile, the default first."""
    arch = device.arch(here)
    names = searched_backends(problem, here, None)
    found = [BACKENDS[name].default_tile(problem, arch) for name in names]
    found += [
        tile
        for name in names
        for tile in BACKENDS[name].tiles(problem, arch)
        if tile.kernel != "sm90" or all(getattr(tile, a) in v for a, v in SM90_AXES.items())
    ]
    if here.type == "cpu":
        found += [tile for tile in CPU_TILES if not tile.violations(arch, problem)]
    return [tile for tile in dict.fromkeys(found) if tile is not None]


def record(problem: Problem, processes: Processes, deadline: float) -> dict[str, Any]:
    grid = grid_of(problem, processes.device)
    default = grid[0]
    anchor = Candidate.of_tile(default)
    batches: list[dict[str, Any]] = []
    rejected: dict[str, list[str]] = {}
    bench = IsolatedBench(Group((problem,), (1.0,)), processes, seed=0, patience=60.0)
    try:
        candidates = [*map(Candidate.of_tile, grid), SDPA]
        bench.precompile(candidates)
        for start in range(0, len(candidates), BATCH):
            batch = []
            for candidate in candidates[start : start + BATCH]:
                if bench.now() > deadline:
                    break
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
        "legal": len(grid),
        "batches": batches,
        "rejected": rejected,
    }


def _microseconds(samples: tuple[float, ...]) -> list[float]:
    return [round(seconds * 1e6, 2) for seconds in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=150.0, help="for all problems together")
    args = parser.parse_args()
    here = torch.device(args.device)
    if here.type == "cuda" and here.index is None:
        here = torch.device("cuda", torch.cuda.current_device())
    problems = GPU_PROBLEMS if here.type == "cuda" else CPU_PROBLEMS
    start = time.perf_counter()
    processes = Processes(here)
    found = []
    try:
        for number, problem in enumerate(problems):
            now = time.perf_counter()
            left = start + args.seconds - now
            row = record(problem, processes, now + left / (len(problems) - number))
            timed = sum(len(batch["tiles_us"]) for batch in row["batches"])
            print(
                f"{problem.label}: {timed} of {row['legal'] + 1} candidates in "
                f"{time.perf_counter() - now:.0f} s",
                flush=True,
            )
            found.append(row)
    finally:
        processes.close()
    data = {
        "schema": SCHEMA,
        "fingerprint": device.fingerprint(here).to_json(),
        "command": f"python benchmarks/record_grid.py --device {args.device}",
        "problems": found,
    }
    text = json.dumps(data, separators=(",", ":"))
    args.output.write_text(text.replace('{"anchor_us"', '\n{"anchor_us"') + "\n")
    print(f"{args.output}: {args.output.stat().st_size} bytes, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
