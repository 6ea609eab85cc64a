"""The backward in torch operations, one block of query rows at a time: memory linear in seqlen.

Serves every device without a backward kernel of its own.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from flashmoe.backends.base import (
    Backend,
    Features,
    RunBackward,
    matmul_dtype,
    reject_without_tiles,
)
from flashmoe.backends.each import backward_of_each
from flashmoe.machine.device import Arch
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.dropout import dropout_scale, kept_weights
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

_BLOCK_M = 256


class BlockedBackend(Backend):
    name = "blocked"
    features: ClassVar[Features] = {
        "bwd": frozenset(
            {"window", "head_dim_v", "softcap", "alibi", "sink", "dropout", "mask", "packed"}
        )
    }

    def unavailable(self, device: torch.device) -> str:
        return ""

    def default_tile(self, problem: Problem, arch: Arch) -> Tile | None:
        return None

    def tiles(self, problem: Problem, arch: Arch) -> list[Tile]:
        return []

    def rejects(self, tile: Tile | None, problem: Problem, arch: Arch) -> str:
        return reject_without_tiles(self.name, tile)

    def bind_backward(
        self, problem: Problem, tile: Tile | None, deterministic: bool = False
    ) -> RunBackward:
        mask = problem.mask

        def run(call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
            # A block has whole rows, so it needs neither out nor softmax_lse.
            dq, dk, dv = attention_backward(call, saved.dout, saved.dlse, mask)[:3]
            return dq, dk, dv

        def run_packed(call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
            return backward_of_each(call, saved, run)

        return run_packed if problem.layout == "packed" else run


def attention_backward(
    call: Call, dout: Tensor, dlse: Tensor | None, mask: Mask, of_mask: bool = False
) -> tuple[Tensor, ...]:
    """dq, dk, dv in the inputs' dtype, computed in float32; then attn_mask's gradient with
    `of_mask`. Deterministic.

    P is the softmax of the row and not exp(scores - softmax_lse), and delta the sum of P * dP and
    not of out * dout: of scores beyond 2**24, softmax_lse keeps too few digits for an exponent.
    """
    q, k, v, softmax_scale, terms, _ = call
    attn_mask, dmask = terms.attn_mask, None
    if of_mask:
        assert attn_mask is not None
        dmask = torch.zeros(attn_mask.shape, dtype=torch.float32, device=q.device)
    if not (q.numel() and k.numel()):
        return _results(call, _zeros(q), _zeros(k), _zeros(v), dmask)
    batch, seqlen_q, heads_q, _ = q.shape
    seqlen_kv, heads_kv = k.shape[1], k.shape[2]
    dtype = matmul_dtype(q)
    # (batch, heads_kv, group, seqlen_q, head_dim): a KV head broadcasts over its group of queries.
    grouped = (batch, seqlen_q, heads_kv, heads_q // heads_kv, -1)
    qh, doh = (x.to(dtype).reshape(grouped).permute(0, 2, 3, 1, 4) for x in (q, dout))
    kh, vh = (x.to(dtype).permute(0, 2, 1, 3).unsqueeze(2) for x in (k, v))
    if attn_mask is not None:  # (batch, heads_kv, group, seqlen_q, seqlen_kv)
        attn_mask = attn_mask.expand(batch, heads_q, seqlen_q, seqlen_kv)
        attn_mask = attn_mask.view(batch, heads_kv, -1, seqlen_q, seqlen_kv)
    dq = _zeros(qh)
    dk, dv = (x.new_zeros(batch, heads_kv, seqlen_kv, x.shape[-1]) for x in (kh, vh))
    # (heads_kv, group, 1, 1), or with a batch in front.
    slopes, sinks = (
        None if x is None else x.to(dtype).reshape(*x.shape[:-1], heads_kv, -1, 1, 1)
        for x in (terms.alibi_slopes, terms.sinks)
    )
    for start in range(0, seqlen_q, _BLOCK_M):
        stop = min(start + _BLOCK_M, seqlen_q)
        first, last = mask.visible(start, stop, seqlen_q, seqlen_kv)
        if first == last:
            continue
        keys, values = kh[..., first:last, :], vh[..., first:last, :]
        qb, do = qh[..., start:stop, :], doh[..., start:stop, :]
        scores = qb @ keys.transpose(-1, -2)
        i = torch.arange(start, stop, device=q.device).unsqueeze(1)
        j = torch.arange(first, last, device=q.device)
        scale = softmax_scale  # what scores are still to be multiplied by
        if terms.softcap:
            capped = torch.tanh(scores.mul_(scale / terms.softcap))
            scores, scale = capped * terms.softcap, 1.0
        if slopes is not None:
            if scale < 1:  # otherwise the product may be more than float32 holds
                scores, scale = scores.mul_(scale), 1.0
            scores -= slopes / scale * (i + seqlen_kv - seqlen_q - j).abs()
        hidden = None if mask.is_full else mask.hides(i, j, seqlen_q, seqlen_kv)
        if attn_mask is not None:
            bias = attn_mask[..., start:stop, first:last]
            if bias.dtype == torch.bool:
                unseen = ~bias
            else:
                unseen = bias == float("-inf")
                if scale < 1:
                    scores, scale = scores.mul_(scale), 1.0
                scores += bias / scale
            hidden = unseen if hidden is None else hidden | unseen
        if hidden is not None:
            scores.masked_fill_(hidden, float("-inf"))
        # Less the maximum before they are scaled: scaled, they may be more than float32 holds.
        top = scores.amax(-1, keepdim=True)
        scores = scores.sub_(top).mul_(scale)
        if sinks is None:
            p = torch.softmax(scores, dim=-1)
        else:
            sink = (sinks - top * scale).clamp(max=torch.finfo(torch.float32).max)
            p = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
        if hidden is not None:
            p.masked_fill_(hidden, 0.0)  # a row that sees nothing has no softmax
        dp = do @ values.transpose(-1, -2)
        p_dropped = p
        if terms.rng_state is not None:
            kept = kept_weights(
                *(terms.rng_state, terms.dropout_p, batch, heads_q, (start, stop), (first, last))
            ).reshape(p.shape)
            factor = kept * dropout_scale(terms.dropout_p)
            p_dropped, dp = p * factor, dp * factor
        ds = p * dp
        shift = ds.sum(-1, keepdim=True)
        if dlse is not None:
            shift -= dlse.to(dtype).reshape(*ds.shape[:3], -1, 1)[..., start:stop, :]
        ds -= p * shift
        if dmask is not None:
            _add_reduced(dmask, ds.flatten(1, 2), slice(start, stop), slice(first, last))
        if terms.softcap:
            ds *= 1 - capped.square()
        dq[..., start:stop, :] = ds @ keys
        # Sum over the group: fold it into the contracted dimension.
        dk[..., first:last, :] += _fold(ds).transpose(-1, -2) @ _fold(qb)
        dv[..., first:last, :] += _fold(p_dropped).transpose(-1, -2) @ _fold(do)
    dq = (dq * softmax_scale).permute(0, 3, 1, 2, 4).reshape(q.shape)
    dk, dv = (dk * softmax_scale).transpose(1, 2), dv.transpose(1, 2)
    return _results(call, dq, dk, dv, dmask)


def _results(
    call: Call, dq: Tensor, dk: Tensor, dv: Tensor, dmask: Tensor | None
) -> tuple[Tensor, ...]:
    gradients = tuple(
        x.to(like.dtype).contiguous() for x, like in zip((dq, dk, dv), call[:3], strict=True)
    )
    if dmask is None or call.terms.attn_mask is None:
        return gradients
    return *gradients, dmask.to(call.terms.attn_mask.dtype)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def _add_reduced(sums: Tensor, x: Tensor, rows: slice, keys: slice) -> None:
    """Adds x (batch, heads, rows, keys) to what stands for it in `sums`, which broadcasts."""
    all_rows, all_keys = (size == 1 for size in sums.shape[2:])
    place = sums[:, :, slice(None) if all_rows else rows, slice(None) if all_keys else keys]
    place += x.sum_to_size(place.shape)


def _fold(x: Tensor) -> Tensor:
    return x.flatten(2, 3)
