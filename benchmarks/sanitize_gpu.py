"""Every compiled-in tile once on small problems, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python benchmarks/sanitize_gpu.py
compute-sanitizer --tool racecheck python benchmarks/sanitize_gpu.py --kernel sm90
"""

from __future__ import annotations

import argparse

import torch

from flashmoe import _extension
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.spec.call import Call
from flashmoe.spec.mask import causal_if
from flashmoe.spec.problem import Problem
from flashmoe.tiles import PLAIN

DEVICE = torch.device("cuda", 0)
# seqlen_q, seqlen_kv, causal
SIZES = ((130, 257, False), (257, 200, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=("sm80", "sm90"), help="only tiles of this kernel")
    arguments = parser.parse_args()
    calls = 0
    for (kernel, head_dim, variant), tiles in _extension.load().instances.items():
        if variant != PLAIN or arguments.kernel not in (None, kernel):
            continue
        for tile in tiles:
            for seqlen_q, seqlen_kv, causal in SIZES:
                q = torch.randn(1, seqlen_q, 4, head_dim - 8, device=DEVICE).bfloat16()
                k, v = (
                    torch.randn(1, seqlen_kv, 2, head_dim - 8, device=DEVICE).bfloat16()
                    for _ in "kv"
                )
                problem = Problem.of(q, k, causal_if(causal))
                if tile.violations(arch(DEVICE), problem):
                    continue
                BACKENDS["cuda"].bind(problem, tile)(Call(q, k, v, 0.1))
                calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
