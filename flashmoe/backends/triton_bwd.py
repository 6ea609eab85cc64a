"""Attention backward in Triton: one program per tile of keys accumulates dK and dV in registers.

The algorithm is FlashAttention-2's (Dao 2023, https://arxiv.org/abs/2307.08691): probabilities are
recomputed from the log-sum-exp, transposed so that both stationary products take them from
registers. dQ is either added to a float32 buffer in the same pass (5 products a tile, the order of
the additions differs from run to run) or computed by a second pass over tiles of queries (7
products, the same bits every time).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashmoe.backends.triton_fwd import (
    LOG2_E,
    _dot,
    _load_rows,
    _tile_of_program,
    can_use_tma,
    device_guard,
    dot_precision,
    heads_per_section,
    tma_descriptor,
)

# The workspaces' rows per (batch, head) are a multiple of this, so that no access to them needs a
# mask; block_m and block_n must divide it.
_ROWS_PADDED_TO = 128
# Of the two kernels around the main one, which only stream.
_ROWS_PER_PROGRAM = 32


@triton.jit(do_not_specialize=["heads_q", "seqlen_q", "rows_padded"])
def _backward_prepare_kernel(
    out_ptr, dout_ptr, lse_ptr, lse2_ptr, delta_ptr, dq_sum_ptr,
    stride_db, stride_dm, stride_dh, heads_q, seqlen_q, rows_padded,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    ZERO_DQ: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * dout), lse in log2, and zeros for dQ, in rows_padded rows.

    A row that sees no key has lse -inf, a padding row none: +inf makes their probabilities 0.
    """
    num_tiles = rows_padded // BLOCK_M
    batch_head = tl.program_id(0) // num_tiles
    start = (tl.program_id(0) - batch_head * num_tiles) * BLOCK_M
    batch = (batch_head // heads_q).to(tl.int64)
    head = (batch_head % heads_q).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    stride_om = heads_q * HEAD_DIM
    out_base = out_ptr + batch * seqlen_q * stride_om + head * HEAD_DIM
    dout_base = dout_ptr + batch * stride_db + head * stride_dh
    out = _load_rows(out_base, start, stride_om, seqlen_q, offs_m, HEAD_DIM, BLOCK_D, True)
    dout = _load_rows(dout_base, start, stride_dm, seqlen_q, offs_m, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    rows = start + offs_m
    lse_row = batch_head.to(tl.int64) * seqlen_q
    lse = tl.load(lse_ptr + lse_row + rows, mask=rows < seqlen_q, other=float("-inf"))
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    padded_row = batch_head.to(tl.int64) * rows_padded + start
    tl.store(lse2_ptr + padded_row + offs_m, lse2)
    tl.store(delta_ptr + padded_row + offs_m, delta)
    if ZERO_DQ:
        dq_pointers = dq_sum_ptr + padded_row * BLOCK_D
        dq_offsets = offs_m[:, None] * BLOCK_D + offs_d[None, :]
        tl.store(dq_pointers + dq_offsets, tl.zeros([BLOCK_M, BLOCK_D], tl.float32))


@triton.jit
def _load_statistic(base, row, start, offs_m, USE_TMA: tl.constexpr):
    """lse2 or delta of a tile of rows. Through TMA it is one copy to shared memory; through
    pointers every thread fetches the columns of its part of the transposed scores itself."""
    return base.load([row + start]) if USE_TMA else tl.load(base + row + start + offs_m)


@triton.jit
def _visit_queries(
    dk, dv, k, v, q_base, dout_base, lse2_base, delta_base, dq_base,
    stride_qm, stride_dm, batch, head, row, begin, end, start_n, seqlen_q, seqlen_kv, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    DQ_MODE: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the query rows begin..end give a tile of keys, and what those keys give dQ."""
    offs_m = tl.arange(0, BLOCK_M)
    keys = start_n + tl.arange(0, BLOCK_N)
    offs_dq = offs_m[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    for start in tl.range(begin, end, BLOCK_M):
        start = tl.multiple_of(start, BLOCK_M)
        if USE_TMA:
            q = q_base.load([batch, start, head, 0]).reshape(BLOCK_M, BLOCK_D)
            dout = dout_base.load([batch, start, head, 0]).reshape(BLOCK_M, BLOCK_D)
        else:
            q = _load_rows(
                q_base, start, stride_qm, seqlen_q, offs_m, HEAD_DIM, BLOCK_D, not EVEN_M
            )
            dout = _load_rows(
                dout_base, start, stride_dm, seqlen_q, offs_m, HEAD_DIM, BLOCK_D, not EVEN_M
            )
        lse2 = _load_statistic(lse2_base, row, start, offs_m, USE_TMA)
        delta = _load_statistic(delta_base, row, start, offs_m, USE_TMA)
        # The products stand in two groups, the registers that the second reads complete before it
        # starts: ptxas serializes wgmma when their definitions lie between (C7513).
        zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        scores_t = _dot(k, tl.trans(q), zeros, PRECISION)
        dprobs_t = _dot(v, tl.trans(dout), zeros, PRECISION)
        probs_t = tl.math.exp2(scores_t * scale - lse2[None, :])
        if MASKED:
            if CAUSAL:
                limit = start + offs_m + (seqlen_kv - seqlen_q)
                probs_t = tl.where(keys[:, None] <= limit[None, :], probs_t, 0.0)
            if not EVEN_N:
                probs_t = tl.where((keys < seqlen_kv)[:, None], probs_t, 0.0)
        dscores_t = (probs_t * (dprobs_t - delta[None, :])).to(q.dtype)
        dv = _dot(probs_t.to(dout.dtype), dout, dv, PRECISION)
        dk = _dot(dscores_t, q, dk, PRECISION)
        if DQ_MODE != "none":
            dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            dq = _dot(tl.trans(dscores_t), k, dq, PRECISION)
            if DQ_MODE == "tma":
                dq_base.atomic_add([row + start, 0], dq)
            else:
                dq_tile = dq_base + (row + start) * BLOCK_D
                tl.atomic_add(dq_tile + offs_dq, dq, sem="relaxed")
    return dk, dv


@triton.jit(do_not_specialize=["batch_heads_kv", "heads_kv", "group", "seqlen_q", "seqlen_kv",
                               "section", "rows_padded"])  # fmt: skip
def _backward_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, dq_sum_ptr, scale,
    softmax_scale, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb,
    stride_vn, stride_vh, stride_db, stride_dm, stride_dh, batch_heads_kv, heads_kv, group,
    seqlen_q, seqlen_kv, section, rows_padded, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr, DQ_MODE: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(seqlen_kv, BLOCK_N)
    tile, batch_head_kv = _tile_of_program(
        tl.program_id(0), num_tiles, batch_heads_kv, section, CAUSAL
    )
    if CAUSAL:
        # The first keys are seen by most queries: here the longest tile is the first.
        tile = num_tiles - 1 - tile
    batch = batch_head_kv // heads_kv
    head_kv = batch_head_kv % heads_kv
    batch64 = batch.to(tl.int64)
    start_n = tile * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    k_base = k_ptr + batch64 * stride_kb + head_kv.to(tl.int64) * stride_kh
    v_base = v_ptr + batch64 * stride_vb + head_kv.to(tl.int64) * stride_vh
    k = _load_rows(k_base, start_n, stride_kn, seqlen_kv, offs_n, HEAD_DIM, BLOCK_D, not EVEN_N)
    v = _load_rows(v_base, start_n, stride_vn, seqlen_kv, offs_n, HEAD_DIM, BLOCK_D, not EVEN_N)

    # Query rows begin..masked_end see some of the keys, masked_end..seqlen_q see all of them.
    begin = 0
    masked_end = 0
    if CAUSAL:
        first_row = start_n - (seqlen_kv - seqlen_q)
        begin = tl.maximum(first_row, 0) // BLOCK_M * BLOCK_M
        masked_end = tl.cdiv(tl.maximum(first_row + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M
        masked_end = tl.minimum(tl.maximum(masked_end, begin), tl.cdiv(seqlen_q, BLOCK_M) * BLOCK_M)
    if not EVEN_N:
        # Keys past the end read as 0, so that only a mask keeps their probability at 0.
        tail = start_n + BLOCK_N > seqlen_kv
        masked_end = tl.where(tail, tl.cdiv(seqlen_q, BLOCK_M) * BLOCK_M, masked_end)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(group):
        head = head_kv * group + member
        head64 = head.to(tl.int64)
        batch_head = batch * (heads_kv * group) + head
        # The accelerator takes 32-bit coordinates; attention_backward keeps to pointers past them.
        row = batch_head * rows_padded if USE_TMA else batch_head.to(tl.int64) * rows_padded
        if USE_TMA:
            q_base = q_ptr
            dout_base = dout_ptr
        else:
            q_base = q_ptr + batch64 * stride_qb + head64 * stride_qh
            dout_base = dout_ptr + batch64 * stride_db + head64 * stride_dh
        if CAUSAL or not EVEN_N:
            dk, dv = _visit_queries(
                dk, dv, k, v, q_base, dout_base, lse2_ptr, delta_ptr, dq_sum_ptr,
                stride_qm, stride_dm, batch, head, row, begin, masked_end, start_n,
                seqlen_q, seqlen_kv, scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
                CAUSAL, True, EVEN_M, EVEN_N, DQ_MODE, USE_TMA, PRECISION,
            )  # fmt: skip
        dk, dv = _visit_queries(
            dk, dv, k, v, q_base, dout_base, lse2_ptr, delta_ptr, dq_sum_ptr,
            stride_qm, stride_dm, batch, head, row, masked_end, seqlen_q, start_n,
            seqlen_q, seqlen_kv, scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            CAUSAL, False, EVEN_M, EVEN_N, DQ_MODE, USE_TMA, PRECISION,
        )  # fmt: skip

    offs_d = tl.arange(0, BLOCK_D)
    stride_dkn = heads_kv * HEAD_DIM
    tile_offset = (batch64 * seqlen_kv + start_n) * stride_dkn + head_kv * HEAD_DIM
    offsets = offs_n.to(tl.int64)[:, None] * stride_dkn + offs_d[None, :]
    mask = (start_n + offs_n < seqlen_kv)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(dv_ptr + tile_offset + offsets, dv.to(dv_ptr.dtype.element_ty), mask=mask)
    dk = dk * softmax_scale
    tl.store(dk_ptr + tile_offset + offsets, dk.to(dk_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _visit_keys(
    dq, q, dout, lse2, delta, k_base, v_base, stride_kn, stride_vn, batch, head_kv,
    begin, end, seqlen_kv, causal_limit, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, EVEN_N: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs_n = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        if USE_TMA:
            k = k_base.load([batch, start, head_kv, 0]).reshape(BLOCK_N, BLOCK_D)
            v = v_base.load([batch, start, head_kv, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            k = _load_rows(
                k_base, start, stride_kn, seqlen_kv, offs_n, HEAD_DIM, BLOCK_D,
                MASKED and not EVEN_N,
            )  # fmt: skip
            v = _load_rows(
                v_base, start, stride_vn, seqlen_kv, offs_n, HEAD_DIM, BLOCK_D,
                MASKED and not EVEN_N,
            )  # fmt: skip
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        scores = _dot(q, tl.trans(k), zeros, PRECISION)
        dprobs = _dot(dout, tl.trans(v), zeros, PRECISION)
        probs = tl.math.exp2(scores * scale - lse2[:, None])
        if MASKED:
            if CAUSAL:
                visible = (start + offs_n)[None, :] <= causal_limit[:, None]
                probs = tl.where(visible, probs, 0.0)
            if not EVEN_N:
                probs = tl.where((start + offs_n < seqlen_kv)[None, :], probs, 0.0)
        dscores = (probs * (dprobs - delta[:, None])).to(k.dtype)
        dq = _dot(dscores, k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["batch_heads", "heads_q", "group", "seqlen_q", "seqlen_kv",
                               "section", "rows_padded"])  # fmt: skip
def _backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, dq_ptr, scale, softmax_scale,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_db, stride_dm, stride_dh,
    batch_heads, heads_q, group, seqlen_q, seqlen_kv, section, rows_padded,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(seqlen_q, BLOCK_M)
    tile, batch_head = _tile_of_program(tl.program_id(0), num_tiles, batch_heads, section, CAUSAL)
    batch = batch_head // heads_q
    head = batch_head % heads_q
    head_kv = head // group
    batch64 = batch.to(tl.int64)
    head64 = head.to(tl.int64)
    start_m = tile * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    rows = start_m + offs_m
    q_base = q_ptr + batch64 * stride_qb + head64 * stride_qh
    dout_base = dout_ptr + batch64 * stride_db + head64 * stride_dh
    q = _load_rows(q_base, start_m, stride_qm, seqlen_q, offs_m, HEAD_DIM, BLOCK_D, not EVEN_M)
    dout = _load_rows(
        dout_base, start_m, stride_dm, seqlen_q, offs_m, HEAD_DIM, BLOCK_D, not EVEN_M
    )
    row = batch_head.to(tl.int64) * rows_padded + start_m
    lse2 = tl.load(lse2_ptr + row + offs_m)
    delta = tl.load(delta_ptr + row + offs_m)
    if USE_TMA:
        k_base = k_ptr
        v_base = v_ptr
    else:
        k_base = k_ptr + batch64 * stride_kb + head_kv.to(tl.int64) * stride_kh
        v_base = v_ptr + batch64 * stride_vb + head_kv.to(tl.int64) * stride_vh

    causal_limit = rows + (seqlen_kv - seqlen_q)
    end = seqlen_kv
    full_end = seqlen_kv // BLOCK_N * BLOCK_N
    if CAUSAL:
        first_limit = start_m + (seqlen_kv - seqlen_q)
        end = tl.maximum(tl.minimum(end, first_limit + BLOCK_M), 0)
        full_end = tl.maximum(tl.minimum(full_end, (first_limit + 1) // BLOCK_N * BLOCK_N), 0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _visit_keys(
        dq, q, dout, lse2, delta, k_base, v_base, stride_kn, stride_vn, batch, head_kv,
        0, full_end, seqlen_kv, causal_limit, scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        CAUSAL, False, EVEN_N, USE_TMA, PRECISION,
    )  # fmt: skip
    if CAUSAL or not EVEN_N:
        dq = _visit_keys(
            dq, q, dout, lse2, delta, k_base, v_base, stride_kn, stride_vn, batch, head_kv,
            full_end, end, seqlen_kv, causal_limit, scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            CAUSAL, True, EVEN_N, USE_TMA, PRECISION,
        )  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    stride_dqm = heads_q * HEAD_DIM
    dq_base = dq_ptr + (batch64 * seqlen_q + start_m) * stride_dqm + head64 * HEAD_DIM
    offsets = offs_m.to(tl.int64)[:, None] * stride_dqm + offs_d[None, :]
    mask = (rows < seqlen_q)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(dq_base + offsets, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heads_q", "seqlen_q", "rows_padded"])
def _backward_finish_dq_kernel(
    dq_sum_ptr, dq_ptr, softmax_scale, heads_q, seqlen_q, rows_padded,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dQ in the input's dtype and layout from the padded float32 sums."""
    num_tiles = rows_padded // BLOCK_M
    batch_head = tl.program_id(0) // num_tiles
    start = (tl.program_id(0) - batch_head * num_tiles) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    padded_row = batch_head.to(tl.int64) * rows_padded + start
    offs_acc = offs_m[:, None] * BLOCK_D + offs_d[None, :]
    dq = tl.load(dq_sum_ptr + padded_row * BLOCK_D + offs_acc) * softmax_scale
    batch = (batch_head // heads_q).to(tl.int64)
    stride_dqm = heads_q * HEAD_DIM
    dq_base = dq_ptr + (batch * seqlen_q + start) * stride_dqm + batch_head % heads_q * HEAD_DIM
    offsets = offs_m.to(tl.int64)[:, None] * stride_dqm + offs_d[None, :]
    mask = (start + offs_m < seqlen_q)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(dq_base + offsets, dq.to(dq_ptr.dtype.element_ty), mask=mask)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    softmax_scale: float,
    causal: bool,
    *,
    block_m: int,
    block_n: int,
    num_stages: int,
    num_warps: int,
    deterministic: bool = False,
    dq_mode: str | None = None,
    use_tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv), contiguous and in the inputs' dtype.

    Shapes as in attention_forward, whose out and softmax_lse these must be; dout as out, with any
    strides. A program keeps block_n keys and visits block_m queries a step; the pass over queries
    swaps the two. Both must divide 128. dq_mode "atomic" adds dQ in float32 in one pass, "tma" does
    so through the tensor memory accelerator (Hopper), "two_pass" computes it apart and gives the
    same bits every time; the default is the fastest that `deterministic` and the device allow.
    """
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_kv, heads_kv = k.shape[1], k.shape[2]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    if dout.stride(3) != 1:
        dout = dout.contiguous()
    out = out.contiguous()

    block_d = max(16, triton.next_power_of_2(head_dim))
    group = heads_q // heads_kv
    rows_padded = triton.cdiv(seqlen_q, _ROWS_PADDED_TO) * _ROWS_PADDED_TO
    rows = rows_padded * batch * heads_q
    if use_tma is None:
        use_tma = rows < 2**31 and can_use_tma(q, k, v, dout)
    if dq_mode is None:
        dq_mode = "two_pass" if deterministic else "tma" if use_tma else "atomic"
    if deterministic and dq_mode != "two_pass":
        raise ValueError(f"dq_mode must be two_pass when deterministic, got {dq_mode}")
    if dq_mode == "tma" and not use_tma:
        raise ValueError("dq_mode must be atomic or two_pass without use_tma, got tma")
    two_pass = dq_mode == "two_pass"

    workspace = torch.empty((2, rows), dtype=torch.float32, device=q.device)
    lse2, delta = workspace[0], workspace[1]
    dq_sum = delta
    if not two_pass:
        dq_sum = torch.empty((rows, block_d), dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    common = (softmax_scale * LOG2_E.value, softmax_scale, *strides)
    lengths = (group, seqlen_q, seqlen_kv)
    dq_block = [block_m, block_d]
    section_kv, section_q = 1, 1
    if causal:
        size = q.element_size()
        # A program of the first pass reads group heads of Q, dO and (twice as wide) of dQ.
        per_pass = (group * seqlen_q, head_dim, 2 * size)
        section_kv = heads_per_section(batch * heads_kv, 1, *per_pass)
        section_q = heads_per_section(batch * heads_q, group, seqlen_kv, head_dim, size)
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
    options: dict[str, Any] = {
        **shape, "CAUSAL": causal, "USE_TMA": use_tma, "PRECISION": dot_precision(q),
        "num_stages": num_stages, "num_warps": num_warps,
    }  # fmt: skip
    with device_guard(q):
        _backward_prepare_kernel[(rows // _ROWS_PER_PROGRAM,)](
            out, dout, softmax_lse, lse2, delta, dq_sum, *dout.stride()[:3],
            heads_q, seqlen_q, rows_padded,
            **shape, BLOCK_M=_ROWS_PER_PROGRAM, ZERO_DQ=not two_pass,
        )  # fmt: skip
        _backward_dkdv_kernel[(triton.cdiv(seqlen_kv, block_n) * batch * heads_kv,)](
            tma_descriptor(q, block_m, block_d) if use_tma else q,
            k, v,
            tma_descriptor(dout, block_m, block_d) if use_tma else dout,
            TensorDescriptor.from_tensor(lse2, [block_m]) if use_tma else lse2,
            TensorDescriptor.from_tensor(delta, [block_m]) if use_tma else delta,
            dk, dv,
            TensorDescriptor.from_tensor(dq_sum, dq_block) if dq_mode == "tma" else dq_sum,
            *common, batch * heads_kv, heads_kv, *lengths, section_kv, rows_padded,
            BLOCK_M=block_m, BLOCK_N=block_n,
            EVEN_M=seqlen_q % block_m == 0, EVEN_N=seqlen_kv % block_n == 0,
            DQ_MODE="none" if two_pass else dq_mode, **options,
        )  # fmt: skip
        if two_pass:
            _backward_dq_kernel[(triton.cdiv(seqlen_q, block_n) * batch * heads_q,)](
                q,
                tma_descriptor(k, block_m, block_d) if use_tma else k,
                tma_descriptor(v, block_m, block_d) if use_tma else v,
                dout, lse2, delta, dq,
                *common, batch * heads_q, heads_q, *lengths, section_q, rows_padded,
                BLOCK_M=block_n, BLOCK_N=block_m,
                EVEN_M=seqlen_q % block_n == 0, EVEN_N=seqlen_kv % block_m == 0, **options,
            )  # fmt: skip
        else:
            _backward_finish_dq_kernel[(rows // _ROWS_PER_PROGRAM,)](
                dq_sum, dq, softmax_scale, heads_q, seqlen_q, rows_padded,
                **shape, BLOCK_M=_ROWS_PER_PROGRAM,
            )  # fmt: skip
    return dq, dk, dv
