"""Every compiled-in tile once on small problems, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python benchmarks/sanitize_gpu.py
compute-sanitizer --tool racecheck python benchmarks/sanitize_gpu.py --kernel sm90 sm90_bwd
"""

from __future__ import annotations

import argparse

import torch

from flashmoe import _extension
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

DEVICE = torch.device("cuda", 0)
# seqlen_q, seqlen_kv, mask
PLAIN_SIZES = ((130, 257, FULL), (257, 200, CAUSAL))
LOCAL_SIZES = ((130, 257, Mask(40, 3)), (257, 200, Mask(70, 0)))
CUDA = BACKENDS["cuda"]


def run(tile: Tile, head_dim: int, seqlen_q: int, seqlen_kv: int, mask: Mask) -> bool:
    """False where the tile cannot."""
    q = torch.randn(1, seqlen_q, 4, head_dim, device=DEVICE).bfloat16()
    k, v = (torch.randn(1, seqlen_kv, 2, head_dim, device=DEVICE).bfloat16() for _ in "kv")
    backward = tile.kernel == "sm90_bwd"
    problem = Problem.of(q, k, mask, direction="bwd" if backward else "fwd")
    if tile.violations(arch(DEVICE), problem):
        return False
    call = Call(q, k, v, 0.1)
    if not backward:
        CUDA.bind(problem, tile)(call)
        return True
    forward = Problem.of(q, k, mask)
    out, lse = CUDA.bind(forward, CUDA.default_tile(forward, arch(DEVICE)))(call)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    CUDA.bind_backward(problem, tile)(call, Saved(dout, out, lse, dlse))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kernels = ("sm80", "sm90", "sm90_bwd")
    parser.add_argument(
        "--kernel", nargs="+", choices=kernels, default=kernels, help="only tiles of these"
    )
    arguments = parser.parse_args()
    info = _extension.load()
    calls = 0
    for instances in (info.instances, info.backward_instances):
        for (kernel, head_dim, variant), tiles in instances.items():
            if kernel not in arguments.kernel:
                continue
            sizes = LOCAL_SIZES if variant.local else PLAIN_SIZES
            calls += sum(run(tile, head_dim - 8, *size) for tile in tiles for size in sizes)
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
