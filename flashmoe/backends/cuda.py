"""CUDA kernels compiled ahead of time. Tiles are those in the binary (csrc/instances)."""

from __future__ import annotations

import torch

from flashmoe import _extension
from flashmoe.backends.compiled import CompiledBackend
from flashmoe.problem import Problem
from flashmoe.tiles import Arch, Tile, instance_head_dim


class CudaBackend(CompiledBackend):
    name = "cuda"

    def unavailable(self, device: torch.device) -> str:
        if device.type != "cuda":
            return f"needs a CUDA device, got {device.type}"
        if not _extension.load().cuda_archs:
            return "this build has no CUDA kernels (nvcc 12.8 or newer was not found)"
        major, minor = torch.cuda.get_device_capability(device)
        return "" if major >= 8 else f"needs compute capability 8.0, got {major}.{minor}"

    def unsupported(self, problem: Problem, arch: Arch) -> str:
        if problem.direction == "bwd":
            return "has no backward kernel"
        if not self.tiles(problem, arch):
            return f"no tile is compiled in for {problem.dtype}, head_dim {problem.head_dim}"
        return ""

    def default_tile(self, problem: Problem, arch: Arch) -> Tile | None:
        """The first one listed in csrc/instances for the head dimension that fits this GPU."""
        return self.tiles(problem, arch)[0]

    def tiles(self, problem: Problem, arch: Arch) -> list[Tile]:
        compiled = _extension.load().instances
        space = compiled.get(("sm80", instance_head_dim(problem.head_dim)), ())
        return [tile for tile in space if not tile.violations(arch, problem)]

    def rejects(self, tile: Tile | None, problem: Problem, arch: Arch) -> str:
        if tile is None:
            return "it needs a tile"
        if broken := tile.violations(arch, problem):
            return "; ".join(broken)
        compiled = self.tiles(problem, arch)
        return (
            ""
            if tile in compiled
            else f"not compiled in; compiled are {', '.join(map(str, compiled))}"
        )
