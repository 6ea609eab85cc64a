"""The decode kernel for CUDA devices: few queries over many keys, and caches (csrc/decode)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from flashmoe import _extension
from flashmoe.backends.base import Backend, Features, Run, lacking
from flashmoe.backends.cuda import CudaBackend
from flashmoe.backends.padding import run_padded
from flashmoe.machine.device import Arch
from flashmoe.spec.call import Call
from flashmoe.spec.problem import Problem
from flashmoe.tiles import FAMILIES, PLAIN, Tile

_decode = _extension.kernel_op("decode_cuda")
# With as few arguments as most calls need: each costs the host some 0.1 us.
_decode_dense = _extension.kernel_op("decode_cuda_dense")
_decode_cache = _extension.kernel_op("decode_cuda_cache")

# The widest tile's. Blocks of more rows read K and V again, and dense kernels are faster.
_DENSE_ROWS = 64


class DecodeBackend(Backend):
    """A block's rows are (query, head of a group) pairs; the keys of a sequence are split over
    thread blocks."""

    name = "decode"
    features: ClassVar[Features] = {
        "fwd": frozenset({"window", "softcap", "alibi", "sink", "head_dim_v", "cache", "paged"})
    }

    def __init__(self, cuda: CudaBackend) -> None:
        self._cuda = cuda  # which is in the same builds, on the same GPUs

    def unavailable(self, device: torch.device) -> str:
        return self._cuda.unavailable(device)

    def unsupported(self, problem: Problem, arch: Arch) -> str:
        if missing := lacking(self, problem):
            return missing
        if problem.layout == "dense" and _rows(problem) > _DENSE_ROWS:
            return (
                f"computes up to {_DENSE_ROWS} rows of a head of k without a cache, "
                f"got {_rows(problem)}"
            )
        if not self.compiled_in(problem, arch):
            return f"no tile is compiled in for {problem.dtype}, head_dim {problem.head_dim}"
        return ""

    def default_tile(self, problem: Problem, arch: Arch) -> Tile | None:
        """Of the fewest rows that hold the problem's, or else of the most: the first one listed in
        csrc/instances, or where one thread block an SM is enough for all rows, the first of those
        that have an SM to themselves, which leave fewer results to merge (H200: 129 us instead of
        134 at 16 sequences of 8192 keys, 8 heads of k, 128)."""
        compiled = self.compiled_in(problem, arch)
        rows = min(_rows(problem), max(tile.block_m for tile in compiled))
        block_m = min(tile.block_m for tile in compiled if tile.block_m >= rows)
        blocks = problem.batch * problem.heads_kv * -(-_rows(problem) // block_m)
        fits = [tile for tile in compiled if tile.block_m == block_m]
        return min(fits, key=lambda t: t.ctas_per_sm if blocks <= arch.sm_count else 0)

    def tiles(self, problem: Problem, arch: Arch) -> list[Tile]:
        """Those that are compiled in, each with several numbers of thread blocks instead of as many
        as run at a time."""
        per_sm, found = FAMILIES["decode"].at_launch["split_blocks"], []
        for tile in self.compiled_in(problem, arch):
            counts = [tile, *(replace(tile, split_blocks=n * arch.sm_count) for n in per_sm)]
            # Where the batch has more blocks than that, none is split.
            by_splits = {_num_splits(x, problem): x for x in reversed(counts)}
            found += list(by_splits.values())[::-1]
        return found

    def compiled_in(self, problem: Problem, arch: Arch) -> list[Tile]:
        key = ("decode", _instance_head_dim(problem), PLAIN)  # each has all features
        tiles = _extension.load().decode_instances.get(key, ())
        return [tile for tile in tiles if not tile.violations(arch, problem)]

    def rejects(self, tile: Tile | None, problem: Problem, arch: Arch) -> str:
        if tile is None:
            return "it needs a tile"
        if broken := tile.violations(arch, problem):
            return "; ".join(broken)
        compiled = self.compiled_in(problem, arch)
        is_there = replace(tile, split_blocks=0) in compiled
        return "" if is_there else f"not compiled in; compiled are {_listed(compiled)}"

    def bind(self, problem: Problem, tile: Tile | None) -> Run:
        return self.bind_split(problem, tile, 0)

    def bind_split(self, problem: Problem, tile: Tile | None, num_splits: int) -> Run:
        assert tile is not None, "the decode kernel needs a tile"
        key = _instance_head_dim(problem), replace(tile, split_blocks=0), PLAIN
        num_splits = num_splits or _num_splits(tile, problem)
        handle = _extension.load().decode_handles[key]
        fixed = (problem.mask.left, problem.mask.right, handle, num_splits)

        def run(call: Call) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = _decode_dense(*call[:4], *fixed)
            return result

        def run_cached(call: Call) -> tuple[Tensor, Tensor]:
            cu_seqlens_q, _, used, leftpad, batch_idx, table, longest, _ = call.sequences
            if leftpad is not None or batch_idx is not None:
                return run_with_options(call)
            lengths = cu_seqlens_q, used, table, longest
            result: tuple[Tensor, Tensor] = _decode_cache(*call[:4], *fixed, *lengths)
            return result

        def run_with_options(call: Call) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = _decode(*call[:4], *fixed, *call.terms, *call.sequences)
            return result

        chosen = run if problem.layout == "dense" else run_cached
        if problem.terms:
            chosen = run_with_options
        return chosen if problem.head_dim_v is None else run_padded(chosen)


def _rows(problem: Problem) -> int:
    return problem.seqlen_q * (problem.heads_q // problem.heads_kv)


def _num_splits(tile: Tile, problem: Problem) -> int:
    """Thread blocks for the keys of a sequence; 0 for as many as fill the GPU."""
    if not tile.split_blocks:
        return 0
    m_blocks = -(-_rows(problem) // tile.block_m)
    return max(tile.split_blocks // max(problem.batch * problem.heads_kv * m_blocks, 1), 1)


def _instance_head_dim(problem: Problem) -> int:
    """The smallest head dimension that is compiled in and holds the problem's; 0 without one."""
    compiled = {head_dim for _, head_dim, _ in _extension.load().decode_instances}
    return min((d for d in compiled if d >= problem.padded_dim), default=0)


def _listed(tiles: list[Tile]) -> str:
    return ", ".join(map(str, tiles))
