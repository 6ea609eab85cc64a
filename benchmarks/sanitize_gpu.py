"""Every compiled-in tile once on small problems, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python benchmarks/sanitize_gpu.py
compute-sanitizer --tool racecheck python benchmarks/sanitize_gpu.py --kernel sm90 sm90_bwd
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from flashmoe import _extension
from flashmoe.backends import BACKENDS
from flashmoe.backends.cuda import CudaBackend
from flashmoe.backends.decode import DecodeBackend
from flashmoe.machine.device import arch
from flashmoe.spec.call import Call, Saved, Sequences, Terms
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import TERMS, Problem
from flashmoe.tiles import Tile, Variant

DEVICE = torch.device("cuda", 0)
# seqlen_q, seqlen_kv, mask
PLAIN_SIZES = ((130, 257, FULL), (257, 200, CAUSAL))
LOCAL_SIZES = ((130, 257, Mask(40, 3)), (257, 200, Mask(70, 0)))
WHOLE_SIZES = ((130, 64, FULL), (257, 50, CAUSAL))
CUDA = BACKENDS["cuda"]
DECODE = DecodeBackend(CudaBackend())


def run(
    tile: Tile, head_dim: int, variant: Variant, seqlen_q: int, seqlen_kv: int, mask: Mask
) -> bool:
    """False where the tile cannot."""
    q = torch.randn(1, seqlen_q, 4, head_dim, device=DEVICE).bfloat16()
    k, v = (torch.randn(1, seqlen_kv, 2, head_dim, device=DEVICE).bfloat16() for _ in "kv")
    backward = tile.kernel == "sm90_bwd"
    terms = tuple(term for term in TERMS if term in variant.names)
    layout = "packed" if variant.packed else "dense"
    forward = replace(Problem.of(q, k, mask), terms=terms, layout=layout)
    problem = replace(forward, direction="bwd") if backward else forward
    if tile.violations(arch(DEVICE), problem):
        return False
    each = torch.full((4,), 0.5, device=DEVICE)
    slopes, sinks = (each if term in terms else None for term in ("alibi", "sink"))
    state = torch.tensor([1, 2], device=DEVICE)
    dropout = (0.3, state) if variant.dropout else (0.0, None)
    call = Call(q, k, v, 0.1, Terms(2.0 if variant.softcap else 0.0, slopes, sinks, *dropout))
    if variant.packed:  # two sequences, and a row behind them
        q_ends, k_ends = (
            torch.tensor([0, n // 2, n - 1], dtype=torch.int32, device=DEVICE)
            for n in (seqlen_q, seqlen_kv)
        )
        lengths = Sequences(q_ends, k_ends, max_seqlen_q=seqlen_q, max_seqlen_k=seqlen_kv)
        call = call._replace(q=q[0], k=k[0], v=v[0], sequences=lengths)
    if not backward:
        CUDA.bind(problem, tile)(call)
        return True
    out, lse = CUDA.bind(forward, CUDA.default_tile(forward, arch(DEVICE)))(call)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    CUDA.bind_backward(problem, tile, variant.deterministic)(call, Saved(dout, out, lse, dlse))
    return True


def run_decode(tile: Tile, head_dim: int, num_splits: int) -> bool:
    """The same for a cache of pages with lengths."""
    lengths = torch.tensor([700, 0, 33], dtype=torch.int32, device=DEVICE)
    pages = torch.randperm(3 * 44, dtype=torch.int32, device=DEVICE).reshape(3, 44)
    q = torch.randn(3, 5, 8, head_dim, device=DEVICE).bfloat16()
    k, v = (torch.randn(3 * 44, 16, 2, head_dim, device=DEVICE).bfloat16() for _ in "kv")
    problem = Problem(3, 8, 2, 5, 704, head_dim, "bfloat16", mask=CAUSAL, layout="paged")
    if tile.violations(arch(DEVICE), problem):
        return False
    sequences = Sequences(seqused_k=lengths, block_table=pages)
    DECODE.bind_split(problem, tile, num_splits)(Call(q, k, v, 0.1, sequences=sequences))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kernels = ("sm80", "sm90", "sm90_bwd", "decode")
    parser.add_argument(
        "--kernel", nargs="+", choices=kernels, default=kernels, help="only tiles of these"
    )
    arguments = parser.parse_args()
    info = _extension.load()
    calls = 0
    for handles in (info.handles, info.backward_handles):
        # Of a kernel with several variants the last one, which has everything.
        for head_dim, tile, variant in {handle: key for key, handle in handles.items()}.values():
            if tile.kernel not in arguments.kernel:
                continue
            sizes = LOCAL_SIZES if variant.local else PLAIN_SIZES
            sizes = WHOLE_SIZES if variant.whole else sizes
            calls += sum(run(tile, head_dim - 8, variant, *size) for size in sizes)
    if "decode" in arguments.kernel:
        for head_dim, tile, _ in {
            handle: key for key, handle in info.decode_handles.items()
        }.values():
            calls += sum(run_decode(tile, head_dim - 8, splits) for splits in (1, 5, 44))
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
