"""The C++ kernel for CPUs: blocked online softmax with AVX2 or AVX-512 chosen at run time."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from flashmoe import _extension, tiles
from flashmoe.backends.base import (
    Backend,
    Features,
    Run,
    RunBackward,
    reasons_of,
    reject_illegal,
)
from flashmoe.machine.device import Arch
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.problem import TERMS, Problem
from flashmoe.tiles import Tile

# A wide block is what amortizes staging K and V; below this it no longer fills the vector panels.
_MIN_BLOCK_M = 48


_fwd = _extension.kernel_op("fwd_cpu")
_fwd_dense = _extension.kernel_op("fwd_cpu_dense")
_bwd = _extension.kernel_op("bwd_cpu")
_bwd_dense = _extension.kernel_op("bwd_cpu_dense")


class CpuBackend(Backend):
    """A block's rows are (position, query head) pairs: a GQA group shares each tile of K and V."""

    name = "cpu"
    features: ClassVar[Features] = {
        "fwd": frozenset({"window", "head_dim_v", *TERMS, "packed", "cache", "paged"}),
        "bwd": frozenset({"window", "head_dim_v", *TERMS, "packed"}),
    }

    def unavailable(self, device: torch.device) -> str:
        return "" if device.type == "cpu" else f"runs on cpu tensors, not on {device.type}"

    def default_tile(self, problem: Problem, arch: Arch) -> Tile | None:
        """block_m 256, in the forward 512 for head_dim above 64 (Zen 3, 2 threads, float32: within
        2 % of the best of a sweep at seqlen 128 to 2048; backward: Sapphire Rapids, 1 thread,
        within 5 %), less where the threads would run out of blocks."""
        block_m = 256 if problem.padded_dim <= 64 or problem.direction == "bwd" else 512
        rows = problem.seqlen_q * (problem.heads_q // problem.heads_kv)
        while (
            block_m // 2 >= _MIN_BLOCK_M
            and problem.batch * problem.heads_kv * -(-rows // block_m) < 2 * torch.get_num_threads()
        ):
            block_m //= 2
        return Tile("cpu", block_m, 128)

    def tiles(self, problem: Problem, arch: Arch) -> list[Tile]:
        """Blocks past the end of the problem are clamped, so only the first such one is listed."""
        rows = problem.seqlen_q * (problem.heads_q // problem.heads_kv)
        axes = tiles.axes("cpu")
        return [
            tile
            for tile in _considered()
            if (tile.block_m < 2 * rows or tile.block_m == axes["block_m"][0])
            and (tile.block_n < 2 * problem.seqlen_kv or tile.block_n == axes["block_n"][0])
            and not tile.violations(arch, problem)
        ]

    def reasons(self, problem: Problem, arch: Arch) -> dict[Tile, str]:
        return reasons_of(_considered(), self.tiles(problem, arch), problem, arch)

    def rejects(self, tile: Tile | None, problem: Problem, arch: Arch) -> str:
        return reject_illegal(tile, problem, arch)

    def bind(self, problem: Problem, tile: Tile | None) -> Run:
        assert tile is not None, "the cpu forward needs a tile"
        fixed = (problem.mask.left, problem.mask.right, tile.block_m, tile.block_n)

        def run(call: Call) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = _fwd_dense(*call[:4], *fixed)
            return result

        def run_with_options(call: Call) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = _fwd(*call[:4], *fixed, *call.terms, *call.sequences)
            return result

        return run_with_options if problem.features - {"window", "head_dim_v"} else run

    def bind_backward(
        self, problem: Problem, tile: Tile | None, deterministic: bool = False
    ) -> RunBackward:
        assert tile is not None, "the cpu backward needs a tile"
        fixed = (problem.mask.left, problem.mask.right, tile.block_m, tile.block_n)

        def run(call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
            result: tuple[Tensor, Tensor, Tensor] = _bwd_dense(
                *(saved.dout, *call[:3], *saved[1:], call.softmax_scale), *fixed
            )
            return result

        def run_with_options(call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
            s = call.sequences
            result: tuple[Tensor, Tensor, Tensor] = _bwd(
                *(saved.dout, *call[:3], *saved[1:], call.softmax_scale),
                *fixed,
                *call.terms,
                *(s.cu_seqlens_q, s.cu_seqlens_k, s.seqused_k, s.max_seqlen_q, s.max_seqlen_k),
            )
            return result

        return run_with_options if problem.features - {"window", "head_dim_v"} else run


def _considered() -> list[Tile]:
    return tiles.grid("cpu", **tiles.axes("cpu"))
