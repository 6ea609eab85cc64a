"""The C++ kernel for CPUs: blocked online softmax with AVX2 or AVX-512 chosen at run time."""

from __future__ import annotations

import torch

from flashmoe import tiles
from flashmoe.backends.base import reject_illegal
from flashmoe.backends.compiled import CompiledBackend
from flashmoe.problem import Problem
from flashmoe.tiles import Arch, Tile

_BLOCK_M = (32, 64, 96, 128, 192, 256)
_BLOCK_N = (32, 64, 128, 256, 512)


class CpuBackend(CompiledBackend):
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
