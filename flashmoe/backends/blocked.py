"""The backward in torch operations, one block of query rows at a time: memory linear in seqlen.

Serves every device without a backward kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmoe.backends.base import Backend, reject_without_tiles
from flashmoe.problem import Problem
from flashmoe.tiles import Arch, Tile

_BLOCK_M = 256


class BlockedBackend(Backend):
    name = "blocked"

    def unavailable(self, device: torch.device) -> str:
        return ""

    def unsupported(self, problem: Problem, arch: Arch) -> str:
        return "" if problem.direction == "bwd" else "has a backward only"

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
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the blocked backend has a backward only")

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
        return _attention_backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal)


def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the inputs' dtype, computed in float32.

    P is recomputed from softmax_lse (FlashAttention, arXiv:2205.14135). Deterministic.
    """
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_kv, heads_kv = k.shape[1], k.shape[2]
    group = heads_q // heads_kv
    # (batch, heads_kv, group, seqlen_q, head_dim): a KV head broadcasts over its group of queries.
    grouped = (batch, seqlen_q, heads_kv, group, head_dim)
    qh, oh, doh = (x.float().reshape(grouped).permute(0, 2, 3, 1, 4) for x in (q, out, dout))
    kh, vh = (x.float().permute(0, 2, 1, 3).unsqueeze(2) for x in (k, v))
    lse = softmax_lse.reshape(batch, heads_kv, group, seqlen_q)
    delta = (oh * doh).sum(-1)
    dq = torch.zeros_like(qh, memory_format=torch.contiguous_format)
    dk = torch.zeros(batch, heads_kv, seqlen_kv, head_dim, device=q.device)
    dv = torch.zeros_like(dk)
    for start in range(0, seqlen_q, _BLOCK_M):
        stop = min(start + _BLOCK_M, seqlen_q)
        # Keys past the last one that the block's last row sees add nothing.
        seen = min(seqlen_kv, max(stop + seqlen_kv - seqlen_q, 0)) if causal else seqlen_kv
        if seen == 0:
            continue
        keys, values = kh[..., :seen, :], vh[..., :seen, :]
        rows = slice(start, stop)
        scores = qh[..., rows, :] @ keys.transpose(-1, -2) * softmax_scale
        # A row that sees nothing has lse -inf; +inf makes its P exactly 0.
        row_lse = lse[..., rows]
        row_lse = row_lse.masked_fill(row_lse == float("-inf"), float("inf"))
        p = torch.exp(scores - row_lse.unsqueeze(-1))
        if causal:
            i = torch.arange(start, stop, device=q.device).unsqueeze(1)
            j = torch.arange(seen, device=q.device)
            p = p.masked_fill(j > i + (seqlen_kv - seqlen_q), 0.0)
        do = doh[..., rows, :]
        dp = do @ values.transpose(-1, -2)
        ds = p * (dp - delta[..., rows].unsqueeze(-1)) * softmax_scale
        dq[..., rows, :] = ds @ keys
        # Sum over the group: fold it into the contracted dimension.
        dk[..., :seen, :] += _fold(ds).transpose(-1, -2) @ _fold(qh[..., rows, :])
        dv[..., :seen, :] += _fold(p).transpose(-1, -2) @ _fold(do)
    dq = dq.permute(0, 3, 1, 2, 4).reshape(q.shape)
    dk, dv = dk.transpose(1, 2), dv.transpose(1, 2)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def _fold(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], -1, x.shape[-1])
