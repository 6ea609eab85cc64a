"""The C++ kernel for CPUs: blocked online softmax with AVX2 or AVX-512 chosen at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmoe import tiles
from flashmoe.backends.base import reject_illegal
from flashmoe.problem import Problem
from flashmoe.tiles import Arch, Tile

_BLOCK_M = (32, 64, 96, 128, 192, 256)
_BLOCK_N = (32, 64, 128, 256, 512)


class CpuBackend:
    name = "cpu"

    def unavailable(self, device: torch.device) -> str:
        return "" if device.type == "cpu" else f"runs on cpu tensors, not on {device.type}"

    def unsupported(self, problem: Problem, arch: Arch) -> str:
        return "has no backward kernel" if problem.direction == "bwd" else ""

    def default_tile(self, problem: Problem, arch: Arch) -> Tile | None:
        return Tile("cpu", 64, 128)

    def tiles(self, problem: Problem, arch: Arch) -> list[Tile]:
        space = tiles.grid("cpu", block_m=_BLOCK_M, block_n=_BLOCK_N)
        return [tile for tile in space if not tile.violations(arch, problem)]

    def rejects(self, tile: Tile | None, problem: Problem, arch: Arch) -> str:
        return reject_illegal(tile, problem, arch)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        causal: bool,
        tile: Tile | None,
    ) -> tuple[Tensor, Tensor]:
        assert tile is not None, "the cpu forward needs a tile"
        out, lse = torch.ops.flashmoe.fwd(
            q, k, v, softmax_scale, causal, tile.block_m, tile.block_n, 1, 1
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        softmax_scale: float,
        causal: bool,
        tile: Tile | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("the cpu backend has no backward kernel")
