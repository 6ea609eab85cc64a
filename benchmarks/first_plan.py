"""What the first plan of a process takes, reading the shipped database included.

    python benchmarks/first_plan.py

Each figure is of a fresh process that has imported flashmoe and used the GPU. Without a GPU it is
an H200's plan, which takes a build with CUDA kernels.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import torch
from suites import SHIPPED

from flashmoe import make_plan
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import Arch
from flashmoe.planning import plan

H200 = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)


def once(number: int) -> str:
    """Milliseconds of one problem's plan, the first of this process; and its source."""
    device = torch.device("cuda", 0)
    if torch.cuda.is_available():
        torch.zeros(1, device=device)
    else:
        plan.arch = lambda device: H200  # type: ignore[assignment]
        for name in ("cuda", "triton"):
            BACKENDS[name].unavailable = lambda device: ""  # type: ignore[method-assign]
    start = time.perf_counter()
    made = make_plan(SHIPPED[number], device)
    return f"{(time.perf_counter() - start) * 1e3:.3f} {made.source}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=15)
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once is not None:
        print(once(arguments.once))
        return
    times = []
    for process in range(arguments.processes):
        number = process * 7 % len(SHIPPED)
        command = [sys.executable, __file__, "--once", str(number)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        milliseconds, _, source = done.stdout.strip().partition(" ")
        times.append(float(milliseconds))
        print(f"{milliseconds} ms: {SHIPPED[number].label} ({source})", flush=True)
    low, middle, high = min(times), statistics.median(times), max(times)
    print(f"first plan: median {middle:.2f} ms, {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
