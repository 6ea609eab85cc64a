"""PyTorch's scaled_dot_product_attention: a candidate like any other, and what others must beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe.backends.base import Backend, reject_without_tiles
from flashmoe.problem import Problem
from flashmoe.tiles import Arch, Tile


class SdpaBackend(Backend):
    name = "sdpa"

    def unavailable(self, device: torch.device) -> str:
        return ""

    def unsupported(self, problem: Problem, arch: Arch) -> str:
        if problem.direction == "bwd":
            return "its backward belongs to its own autograd graph"
        if problem.causal and problem.seqlen_q != problem.seqlen_kv:
            return "its causal mask is aligned top-left when seqlen_q differs from seqlen_kv"
        return ""

    def default_tile(self, problem: Problem, arch: Arch) -> Tile | None:
        return None

    def tiles(self, problem: Problem, arch: Arch) -> list[Tile]:
        return []

    def rejects(self, tile: Tile | None, problem: Problem, arch: Arch) -> str:
        return reject_without_tiles(self.name, tile)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        causal: bool,
        tile: Tile | None,
    ) -> tuple[Tensor, None]:
        """Differentiable by torch's own autograd. Does not tell softmax_lse."""
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=causal,
            scale=softmax_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2), None

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("the sdpa backend is differentiated by torch's autograd")
