"""The backward in torch operations, one block of query rows at a time: memory linear in seqlen.

Serves every device without a backward kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmoe.backends.base import Backend, matmul_dtype, reject_without_tiles
from flashmoe.machine.device import Arch
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

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
        # A block has whole rows, so it needs neither out nor softmax_lse.
        return _attention_backward(dout, q, k, v, softmax_scale, causal)


def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the inputs' dtype, computed in float32. Deterministic.

    P is the softmax of the row and not exp(scores - softmax_lse), and delta the sum of P * dP and
    not of out * dout: of scores beyond 2**24, softmax_lse keeps too few digits for an exponent.
    """
    if not (q.numel() and k.numel()):
        return _zeros(q), _zeros(k), _zeros(v)
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_kv, heads_kv = k.shape[1], k.shape[2]
    dtype = matmul_dtype(q)
    # (batch, heads_kv, group, seqlen_q, head_dim): a KV head broadcasts over its group of queries.
    grouped = (batch, seqlen_q, heads_kv, heads_q // heads_kv, head_dim)
    qh, doh = (x.to(dtype).reshape(grouped).permute(0, 2, 3, 1, 4) for x in (q, dout))
    kh, vh = (x.to(dtype).permute(0, 2, 1, 3).unsqueeze(2) for x in (k, v))
    dq = _zeros(qh)
    dk, dv = (x.new_zeros(batch, heads_kv, seqlen_kv, head_dim) for x in (kh, vh))
    for start in range(0, seqlen_q, _BLOCK_M):
        stop = min(start + _BLOCK_M, seqlen_q)
        # Keys past the last one that the block's last row sees add nothing.
        seen = min(seqlen_kv, max(stop + seqlen_kv - seqlen_q, 0)) if causal else seqlen_kv
        if seen == 0:
            continue
        keys, values = kh[..., :seen, :], vh[..., :seen, :]
        qb, do = qh[..., start:stop, :], doh[..., start:stop, :]
        scores = qb @ keys.transpose(-1, -2)
        if causal:
            i = torch.arange(start, stop, device=q.device).unsqueeze(1)
            j = torch.arange(seen, device=q.device)
            hidden = j > i + (seqlen_kv - seqlen_q)
            scores.masked_fill_(hidden, float("-inf"))
        # Less the maximum before they are scaled: scaled, they may be more than float32 holds.
        scores -= scores.amax(-1, keepdim=True)
        p = torch.softmax(scores.mul_(softmax_scale), dim=-1)
        if causal:
            p.masked_fill_(hidden, 0.0)  # a row that sees nothing has no softmax
        ds = p * (do @ values.transpose(-1, -2))
        ds -= p * ds.sum(-1, keepdim=True)
        dq[..., start:stop, :] = ds @ keys
        # Sum over the group: fold it into the contracted dimension.
        dk[..., :seen, :] += _fold(ds).transpose(-1, -2) @ _fold(qb)
        dv[..., :seen, :] += _fold(p).transpose(-1, -2) @ _fold(do)
    dq = (dq * softmax_scale).permute(0, 3, 1, 2, 4).reshape(q.shape)
    dk, dv = (dk * softmax_scale).transpose(1, 2), dv.transpose(1, 2)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def _fold(x: Tensor) -> Tensor:
    return x.flatten(2, 3)
