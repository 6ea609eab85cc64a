"""Triton kernels, forward and backward: the same parameters, compiled on the user's machine."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from flashmoe import tiles
from flashmoe.backends.base import reject_illegal
from flashmoe.problem import Problem
from flashmoe.tiles import Arch, Tile


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend:
    name = "triton"

    def unavailable(self, device: torch.device) -> str:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            return "" if major >= 8 else f"needs compute capability 8.0, got {major}.{minor}"
        if device.type == "cpu" and _interpreted():
            return ""
        return f"needs a CUDA device (or TRITON_INTERPRET=1), got {device.type}"

    def unsupported(self, problem: Problem, arch: Arch) -> str:
        return ""

    def default_tile(self, problem: Problem, arch: Arch) -> Tile | None:
        if arch.kind == "cpu":
            return Tile("triton", 16, 16, 1, 1)
        if problem.direction == "bwd":
            return Tile("triton", 64, 64, 2, 4)
        return Tile("triton", 128, 64, 2, 8 if problem.head_dim > 64 else 4)

    def tiles(self, problem: Problem, arch: Arch) -> list[Tile]:
        space = tiles.grid(
            "triton",
            block_m=(64, 128, 256),
            block_n=(32, 64, 128),
            num_stages=(2, 3, 4),
            num_warps=(4, 8),
        )
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
        from flashmoe.backends.triton_fwd import attention_forward

        assert tile is not None, "the triton forward needs a tile"
        return attention_forward(
            q,
            k,
            v,
            softmax_scale,
            causal,
            block_m=tile.block_m,
            block_n=tile.block_n,
            num_stages=tile.num_stages,
            num_warps=tile.num_warps,
        )

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
        from flashmoe.backends.triton_bwd import attention_backward

        assert tile is not None, "the triton backward needs a tile"
        return attention_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            softmax_scale,
            causal,
            block_m=tile.block_m,
            block_n=tile.block_n,
            num_stages=tile.num_stages,
            num_warps=tile.num_warps,
            deterministic=deterministic,
        )
