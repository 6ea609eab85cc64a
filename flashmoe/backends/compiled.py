"""What the cpu and cuda backends share: the forward that was compiled into the extension."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmoe import _extension
from flashmoe.tiles import Tile

_extension.load()
_fwd = torch.ops.flashmoe.fwd.default


class CompiledBackend:
    """forward and backward of a Backend whose kernels are behind torch.ops.flashmoe.fwd."""

    name: str

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        causal: bool,
        tile: Tile | None,
    ) -> tuple[Tensor, Tensor]:
        assert tile is not None, "a compiled forward needs a tile"
        result: tuple[Tensor, Tensor] = _fwd(
            q,
            k,
            v,
            softmax_scale,
            causal,
            tile.block_m,
            tile.block_n,
            tile.num_stages,
            tile.num_warps,
        )
        return result

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
        raise NotImplementedError(f"the {self.name} backend has no backward kernel")
