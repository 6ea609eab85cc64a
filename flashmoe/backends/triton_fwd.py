"""Attention forward in Triton: online softmax over tiles of keys, one program per tile of queries.

The algorithm is FlashAttention-2's (Dao 2023, https://arxiv.org/abs/2307.08691): the scores of a
block_m x block_n tile never leave the chip, the running maximum and sum rescale the output tile,
and tiles that no query of a program sees are never visited. A mask of both sides (IS_LOCAL) is a
kernel of its own: without it the code is what it would be if there were no windows. So are softcap,
ALiBi, sinks, dropout and attention masks (flashmoe/spec/terms.py).
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashmoe.backends.triton_dropout import dropout_state, kept_weights
from flashmoe.backends.triton_launch import Launch, Repeated, another, are_aligned
from flashmoe.spec.call import Call
from flashmoe.spec.dropout import dropout_limit, dropout_scale
from flashmoe.spec.mask import Mask

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# From here on (in units of log 2) the rounding of a row's maximum can exceed the exponent's range.
COARSE_MAXIMUM = tl.constexpr(2.0**24)
# Probabilities 2^24 times smaller have no sum above 1 over fewer than 2^24 keys.
CAREFUL_SHIFT = tl.constexpr(24.0)

_NO_GUARD = nullcontext()

# Causal programs that run at once share keys and values in L2 only if these fit in it. 32 MiB
# leaves room in the 40-50 MiB of A100 and H100 for the queries and outputs streaming through.
_L2_BUDGET_BYTES = 32 * 2**20


@triton.jit
def _tile_of_program(pid, num_tiles, num_heads, heads_per_section, LONGEST_FIRST: tl.constexpr):
    """(tile, batch * head) of a program, in the order in which programs start.

    Tiles of one head are neighbours, so that programs running at once share its keys and values.
    Causal tiles differ in length: then a section of heads that fits in L2 is run through tile by
    tile, the longest tiles of all its heads first, which leaves only short ones for the tail.
    """
    if LONGEST_FIRST:
        section_size = heads_per_section * num_tiles
        section = pid // section_size
        first_head = section * heads_per_section
        heads_here = tl.minimum(heads_per_section, num_heads - first_head)
        index = pid - section * section_size
        tile = num_tiles - 1 - index // heads_here
        head = first_head + index % heads_here
    else:
        head = pid // num_tiles
        tile = pid - head * num_tiles
    return tile, head


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32."""
    if PRECISION == "upcast":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _load_rows(
    base, start, stride, seqlen, offs_r, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS:
    tl.constexpr,
):  # fmt: skip
    """Rows start + offs_r of a (seqlen, HEAD_DIM) matrix; whatever lies outside it reads as 0."""
    offs_d = tl.arange(0, BLOCK_D)
    # 64-bit, and apart from `start`: the tensor of offsets is then the same in every iteration.
    offsets = offs_r.to(tl.int64)[:, None] * stride + offs_d[None, :]
    pointers = (base + start.to(tl.int64) * stride) + offsets
    if MASK_ROWS:
        mask = (start + offs_r < seqlen)[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (offs_d < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(pointers, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _head_base(ptr, batch, head, stride_b, stride_h, USE_TMA: tl.constexpr):
    """Where _load_tile finds one head; a descriptor spans them all."""
    # 64-bit: a tensor may hold more than 2**31 elements.
    return ptr if USE_TMA else ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def _load_tile(
    base, batch, head, start, stride, seqlen, offs_r, HEAD_DIM: tl.constexpr, BLOCK_D:
    tl.constexpr, ROWS: tl.constexpr, MASK_ROWS: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """_load_rows, through the tensor memory accelerator if USE_TMA."""
    if USE_TMA:
        tile = base.load([batch, start, head, 0]).reshape(ROWS, BLOCK_D)
    else:
        tile = _load_rows(base, start, stride, seqlen, offs_r, HEAD_DIM, BLOCK_D, MASK_ROWS)
    return tile


@triton.jit
def _store_rows(
    ptr, tile, batch, head, start, heads, seqlen, offs_r, HEAD_DIM: tl.constexpr, BLOCK_D:
    tl.constexpr,
):  # fmt: skip
    """tile as rows start + offs_r of one head of a contiguous (batch, seqlen, heads, HEAD_DIM)."""
    offs_d = tl.arange(0, BLOCK_D)
    stride = heads * HEAD_DIM
    base = ptr + (batch.to(tl.int64) * seqlen + start) * stride + head.to(tl.int64) * HEAD_DIM
    pointers = base + offs_r.to(tl.int64)[:, None] * stride + offs_d[None, :]
    mask = (start + offs_r < seqlen)[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sees(level_key, key, window_left, window_right, IS_LOCAL: tl.constexpr):
    """Whether queries see keys, causally or in their windows, as Mask.hides says. A query's level
    key is its index plus seqlen_kv - seqlen_q."""
    if IS_LOCAL:
        ahead = key - level_key
        seen = (ahead >= -window_left) & (ahead <= window_right)
    else:
        seen = key <= level_key
    return seen


@triton.jit
def _visible_keys(
    start_m, seqlen_q, seqlen_kv, window_left, window_right, BLOCK_M: tl.constexpr, BLOCK_N:
    tl.constexpr, CAUSAL: tl.constexpr, IS_LOCAL: tl.constexpr,
):  # fmt: skip
    """(begin, full_begin, full_end, end): some row of a tile of queries sees the keys begin..end,
    as Mask.visible says, every row sees full_begin..full_end. All but end are multiples of BLOCK_N;
    without IS_LOCAL the first two are 0.

    With queries and keys swapped, and left and right, these are the queries that see a tile of
    keys.
    """
    begin = 0
    full_begin = 0
    end = seqlen_kv
    full_end = seqlen_kv // BLOCK_N * BLOCK_N
    first_limit = start_m + (seqlen_kv - seqlen_q)
    if IS_LOCAL:
        last_limit = tl.minimum(start_m + BLOCK_M, seqlen_q) - 1 + (seqlen_kv - seqlen_q)
        begin = tl.maximum(first_limit - window_left, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(end, last_limit + window_right + 1)
        full_begin = tl.cdiv(tl.maximum(last_limit - window_left, 0), BLOCK_N) * BLOCK_N
        full_end = tl.minimum(full_end, (first_limit + window_right + 1) // BLOCK_N * BLOCK_N)
        full_end = tl.maximum(full_end, begin)
        full_begin = tl.minimum(full_begin, full_end)
    elif CAUSAL:
        end = tl.maximum(tl.minimum(end, first_limit + BLOCK_M), 0)
        full_end = tl.maximum(tl.minimum(full_end, (first_limit + 1) // BLOCK_N * BLOCK_N), 0)
    return begin, full_begin, full_end, end


@triton.jit
def _with_terms(scores, scale, softcap, slope, ahead, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """(scores of Q K^T with softcap and ALiBi, in units of log2; what softcap's tanh gave).

    scale contains log2(e). ahead is by how much a key is ahead of its query's level key, slope the
    head's.
    """
    tanh = 0.0
    if SOFTCAP:
        tanh = 1.0 - 2.0 / (1.0 + tl.math.exp2(scores * (2.0 * scale / softcap)))
        scores = tanh * (softcap * LOG2_E)
    else:
        scores = scores * scale
    if ALIBI:
        scores -= tl.abs(ahead).to(tl.float32) * (slope * LOG2_E)
    return scores, tanh


@triton.jit
def _with_mask(
    scores, base, rows, seqlen_q, stride_m, keys, seqlen_kv, stride_n, MASK: tl.constexpr, HAS_ROWS:
    tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """scores, by rows and keys or TRANSPOSED, with attn_mask, of which `base` is the head's: MASK
    is "bool", or "added" to scores in units of log2. Without HAS_ROWS all rows have the same.

    Finite ones that float32 does not hold in these units are the lowest that P can be computed
    from.
    """
    key_pointers = base + keys.to(tl.int64) * stride_n
    there = keys < seqlen_kv
    if HAS_ROWS:
        offsets = rows.to(tl.int64) * stride_m
        if TRANSPOSED:
            both = there[:, None] & (rows < seqlen_q)[None, :]
            mask = tl.load(key_pointers[:, None] + offsets[None, :], mask=both, other=0)
        else:
            both = there[None, :] & (rows < seqlen_q)[:, None]
            mask = tl.load(key_pointers[None, :] + offsets[:, None], mask=both, other=0)
    else:
        of_keys = tl.load(key_pointers, mask=there, other=0)
        mask = of_keys[:, None] if TRANSPOSED else of_keys[None, :]
    if MASK == "bool":
        scores = tl.where(mask != 0, scores, float("-inf"))
    else:
        added = mask.to(tl.float32)
        low = tl.maximum(added * LOG2_E, -1e38)
        scores = tl.where(added == float("-inf"), float("-inf"), scores + low)
    return scores


@triton.jit(do_not_specialize=["heads", "tiles", "seqlen_q", "seqlen_kv"])
def _mask_bounds_kernel(
    mask_ptr, bounds_ptr, stride_b, stride_h, stride_m, stride_n, heads, tiles, seqlen_q, seqlen_kv,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows the first key that attn_mask lets one of them see, rounded down to BLOCK_N,
    and the last, rounded up; the second is 0 where there is none. With rows and keys swapped, which
    rows see a tile of keys."""
    batch_head = tl.program_id(0) // tiles
    rows = (tl.program_id(0) - batch_head * tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    base = mask_ptr + (batch_head // heads).to(tl.int64) * stride_b
    base += (batch_head % heads).to(tl.int64) * stride_h
    pointers = base + rows.to(tl.int64)[:, None] * stride_m
    begin = seqlen_kv
    end = 0
    for start in range(0, seqlen_kv, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        there = (rows < seqlen_q)[:, None] & (keys < seqlen_kv)[None, :]
        mask = tl.load(pointers + keys.to(tl.int64)[None, :] * stride_n, mask=there, other=0)
        seen = (mask != 0) if MASK == "bool" else mask.to(tl.float32) != float("-inf")
        any_seen = tl.max(tl.max((seen & there).to(tl.int32), 1), 0) > 0
        begin = tl.where(any_seen, tl.minimum(begin, start), begin)
        end = tl.where(any_seen, start + BLOCK_N, end)
    tl.store(bounds_ptr + 2 * tl.program_id(0), begin // BLOCK_N * BLOCK_N)
    tl.store(bounds_ptr + 2 * tl.program_id(0) + 1, end)


@triton.jit
def _within_bounds(
    begin, end, bounds_ptr, batch, head, tile, bounds_b, bounds_h, bounds_m
):  # fmt: skip
    """What of begin..end _mask_bounds_kernel left."""
    at = bounds_ptr + 2 * (batch * bounds_b + head * bounds_h + tile * bounds_m)
    return tl.maximum(begin, tl.load(at)), tl.minimum(end, tl.load(at + 1))


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k_base, v_base, stride_kn, stride_vn, batch, head_kv, begin, end,
    seqlen_kv, level_key, window_left, window_right, scale, softcap, slope, start_m, seed, offset,
    drop_head, drop_limit, mask_base, seqlen_q, stride_mm, stride_mn, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, IS_LOCAL: tl.constexpr, MASKED: tl.constexpr,
    EVEN_N: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Adds the keys begin..end (a multiple of BLOCK_N apart) to the running softmax of a tile.

    row_max is in units of log2: scale contains log2(e). If CAREFUL, and without terms, it is in
    units of the scores, whose differences are scaled, so that none is rounded by its own magnitude;
    and probabilities are 2^CAREFUL_SHIFT times smaller, so that their sums with any values are
    finite. Only a MASKED range looks at which keys each row sees and at seqlen_kv.
    """
    offs_n = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        k = _load_tile(
            k_base, batch, head_kv, start, stride_kn, seqlen_kv, offs_n, HEAD_DIM, BLOCK_D,
            BLOCK_N, MASKED and not EVEN_N, USE_TMA,
        )  # fmt: skip
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        scores = _dot(q, tl.trans(k), scores, PRECISION)
        if SOFTCAP or ALIBI or MASK == "added":
            ahead = (start + offs_n)[None, :] - level_key[:, None]
            scores, _ = _with_terms(scores, scale, softcap, slope, ahead, SOFTCAP, ALIBI)
        if MASK != "":
            scores = _with_mask(
                scores, mask_base, level_key - (seqlen_kv - seqlen_q), seqlen_q, stride_mm,
                start + offs_n, seqlen_kv, stride_mn, MASK, MASK_ROWS, False,
            )  # fmt: skip
        if MASKED:
            if CAUSAL or IS_LOCAL:
                keys = (start + offs_n)[None, :]
                visible = _sees(level_key[:, None], keys, window_left, window_right, IS_LOCAL)
                scores = tl.where(visible, scores, float("-inf"))
            if not EVEN_N:
                scores = tl.where((start + offs_n < seqlen_kv)[None, :], scores, float("-inf"))
        # The maximum is taken before scaling, which is positive.
        factor = 1.0 if SOFTCAP or ALIBI or MASK == "added" else scale
        tile_max = tl.max(scores, 1)
        new_max = tl.maximum(row_max, tile_max if CAREFUL else tile_max * factor)
        # A row that has seen no key yet keeps -inf as its maximum; -inf - (-inf) would be NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        if CAREFUL:
            # float16 does not reach so low, nor so high that its values needed it.
            shift = 0.0 if q.dtype == tl.float16 else CAREFUL_SHIFT
            probs = tl.math.exp2((scores - base[:, None]) * factor - shift)
            rescale = tl.math.exp2((row_max - base) * factor)
        else:
            probs = tl.math.exp2(scores * factor - base[:, None])
            rescale = tl.math.exp2(row_max - base)
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        if DROPOUT:
            kept = kept_weights(
                seed, offset, drop_head, drop_limit, start_m, start, BLOCK_M, BLOCK_N, False
            )
            probs = tl.where(kept, probs, 0.0)
        row_max = new_max
        acc = acc * rescale[:, None]
        v = _load_tile(
            v_base, batch, head_kv, start, stride_vn, seqlen_kv, offs_n, HEAD_DIM_V, BLOCK_DV,
            BLOCK_N, MASKED and not EVEN_N, USE_TMA,
        )  # fmt: skip
        acc = _dot(probs.to(v.dtype), v, acc, PRECISION)
    return acc, row_sum, row_max


@triton.jit
def _attend_all(
    q, k_base, v_base, stride_kn, stride_vn, batch, head_kv, begin, full_begin, full_end, end,
    seqlen_kv, level_key, window_left, window_right, scale, softcap, slope, sink, start_m, seed,
    offset, drop_head, drop_limit, mask_base, seqlen_q, stride_mm, stride_mn,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, IS_LOCAL: tl.constexpr,
    EVEN_N: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr,
    DROPOUT: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The tile's output before normalization, its row sums and maxima, from all keys it sees, and
    from the sink, which they begin with."""
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if SINK:
        shift = 0.0 if q.dtype == tl.float16 or not CAREFUL else CAREFUL_SHIFT
        unit = scale if CAREFUL and not (SOFTCAP or ALIBI or MASK == "added") else 1.0
        row_max = tl.zeros([BLOCK_M], tl.float32) + sink * LOG2_E / unit
        row_sum += tl.math.exp2(-shift)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if IS_LOCAL and MASK == "":
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, k_base, v_base, stride_kn, stride_vn, batch, head_kv, begin,
            full_begin, seqlen_kv, level_key, window_left, window_right, scale, softcap, slope,
            start_m, seed, offset, drop_head, drop_limit, mask_base, seqlen_q, stride_mm, stride_mn,
            HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL, IS_LOCAL, True,
            EVEN_N, SOFTCAP, ALIBI, DROPOUT, MASK, MASK_ROWS, USE_TMA, PRECISION, CAREFUL,
        )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_base, v_base, stride_kn, stride_vn, batch, head_kv, full_begin,
        full_end, seqlen_kv, level_key, window_left, window_right, scale, softcap, slope, start_m,
        seed, offset, drop_head, drop_limit, mask_base, seqlen_q, stride_mm, stride_mn, HEAD_DIM,
        BLOCK_D, HEAD_DIM_V, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL, IS_LOCAL, MASK != "", EVEN_N,
        SOFTCAP, ALIBI, DROPOUT, MASK, MASK_ROWS, USE_TMA, PRECISION, CAREFUL,
    )  # fmt: skip
    if (CAUSAL or IS_LOCAL or not EVEN_N) and MASK == "":
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, k_base, v_base, stride_kn, stride_vn, batch, head_kv,
            full_end, end, seqlen_kv, level_key, window_left, window_right, scale, softcap, slope,
            start_m, seed, offset, drop_head, drop_limit, mask_base, seqlen_q, stride_mm, stride_mn,
            HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL, IS_LOCAL, True,
            EVEN_N, SOFTCAP, ALIBI, DROPOUT, MASK, MASK_ROWS, USE_TMA, PRECISION, CAREFUL,
        )  # fmt: skip
    return acc, row_sum, row_max


@triton.jit(
    do_not_specialize=[
        "batch_heads",
        "heads_q",
        "group",
        "seqlen_q",
        "seqlen_kv",
        "heads_per_section",
        "window_left",
        "window_right",
        "stride_slopes",
        "drop_limit",
        "bounds_b",
        "bounds_h",
        "bounds_m",
    ]
)
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, slopes_ptr, sinks_ptr, rng_ptr, mask_ptr, bounds_ptr,
    scale, softcap, drop_limit, drop_scale, stride_slopes, stride_mb, stride_mh, stride_mm,
    stride_mn, bounds_b, bounds_h, bounds_m, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn,
    stride_kh, stride_vb, stride_vn, stride_vh, batch_heads, heads_q, group, seqlen_q, seqlen_kv,
    heads_per_section, window_left, window_right, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, IS_LOCAL: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(seqlen_q, BLOCK_M)
    tile, batch_head = _tile_of_program(
        tl.program_id(0), num_tiles, batch_heads, heads_per_section, CAUSAL
    )
    head = batch_head % heads_q
    batch = batch_head // heads_q
    head_kv = head // group
    start_m = tile * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    rows = start_m + offs_m
    q_base = _head_base(q_ptr, batch, head, stride_qb, stride_qh, False)
    q = _load_rows(q_base, start_m, stride_qm, seqlen_q, offs_m, HEAD_DIM, BLOCK_D, not EVEN_M)
    k_base = _head_base(k_ptr, batch, head_kv, stride_kb, stride_kh, USE_TMA)
    v_base = _head_base(v_ptr, batch, head_kv, stride_vb, stride_vh, USE_TMA)

    slope = tl.load(slopes_ptr + batch * stride_slopes + head) if ALIBI else 0.0
    sink = tl.load(sinks_ptr + head) if SINK else 0.0
    seed = 0
    offset = 0
    drop_head = 0
    if DROPOUT:
        seed, offset, drop_head = dropout_state(rng_ptr, batch, head)
    level_key = rows + (seqlen_kv - seqlen_q)
    begin, full_begin, full_end, end = _visible_keys(
        start_m, seqlen_q, seqlen_kv, window_left, window_right, BLOCK_M, BLOCK_N, CAUSAL, IS_LOCAL
    )
    mask_base = _head_base(mask_ptr, batch, head, stride_mb, stride_mh, MASK == "")
    if MASK != "":  # one range, which is masked
        full_begin, full_end = _within_bounds(
            begin, end, bounds_ptr, batch, head, tile, bounds_b, bounds_h, bounds_m
        )
    acc, row_sum, row_max = _attend_all(
        q, k_base, v_base, stride_kn, stride_vn, batch, head_kv, begin, full_begin, full_end, end,
        seqlen_kv, level_key, window_left, window_right, scale, softcap, slope, sink, start_m, seed,
        offset, drop_head, drop_limit, mask_base, seqlen_q, stride_mm, stride_mn, HEAD_DIM, BLOCK_D,
        HEAD_DIM_V, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL, IS_LOCAL, EVEN_N, SOFTCAP, ALIBI, SINK,
        DROPOUT, MASK, MASK_ROWS, USE_TMA, PRECISION, False,
    )  # fmt: skip
    # What overflowed is not finite; a row that has seen no key keeps -inf as its maximum.
    lost = (row_max != float("-inf")) & ~(tl.abs(row_max) < COARSE_MAXIMUM)
    lost = tl.max((~(tl.abs(acc) < float("inf"))).to(tl.int32), 1) | lost.to(tl.int32)
    if tl.max(lost, 0) > 0:
        acc, row_sum, row_max = _attend_all(
            q, k_base, v_base, stride_kn, stride_vn, batch, head_kv, begin, full_begin, full_end,
            end, seqlen_kv, level_key, window_left, window_right, scale, softcap, slope, sink,
            start_m, seed, offset, drop_head, drop_limit, mask_base, seqlen_q, stride_mm, stride_mn,
            HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, BLOCK_M, BLOCK_N, CAUSAL, IS_LOCAL, EVEN_N,
            SOFTCAP, ALIBI, SINK, DROPOUT, MASK, MASK_ROWS, USE_TMA, PRECISION, True,
        )  # fmt: skip
        row_max = row_max * (1.0 if SOFTCAP or ALIBI or MASK == "added" else scale)
        row_max += 0.0 if q.dtype == tl.float16 else CAREFUL_SHIFT

    # A row that saw no key has sum 0: its output is 0 and its log-sum-exp -inf.
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("-inf"), (row_max + tl.math.log2(row_sum)) * LN_2)
    acc = acc / row_sum[:, None]
    if DROPOUT:
        acc = acc * drop_scale
    _store_rows(
        out_ptr, acc, batch, head, start_m, heads_q, seqlen_q, offs_m, HEAD_DIM_V, BLOCK_DV
    )  # fmt: skip
    lse_pointers = lse_ptr + batch_head.to(tl.int64) * seqlen_q + rows
    tl.store(lse_pointers, lse, mask=rows < seqlen_q)


def device_guard(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of x. Setting it costs more
    host time than asking for it."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _NO_GUARD


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """How a kernel multiplies tiles of such tensors. float32 is multiplied as float32: tf32 keeps
    10 bits. Triton's interpreter would multiply bfloat16 bit patterns as integers."""
    if dtype == torch.bfloat16 and device.type != "cuda":
        return "upcast"
    return "ieee"


def window_limits(mask: Mask, seqlen_q: int, seqlen_kv: int) -> tuple[int, int]:
    """window_left and window_right of an IS_LOCAL kernel, which has no -1: a limit that hides
    nothing in its place."""
    left, right = mask.left, mask.right
    return seqlen_kv if left < 0 else left, seqlen_q if right < 0 else right


def slope_stride(slopes: Tensor | None) -> int:
    """Elements between the ALiBi slopes of two batches; 0 where all have the same."""
    return slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0


def heads_per_section(heads: int, group: int, seqlen_kv: int, columns: int, itemsize: int) -> int:
    """How many query heads (`group` of them read one head of K and V, which have so many columns
    together) run through L2 together."""
    kv_bytes = max(1, seqlen_kv * columns * itemsize)
    return min(heads, max(1, _L2_BUDGET_BYTES // kv_bytes) * group)


def tma_descriptor(x: Tensor, block_rows: int, block_d: int) -> TensorDescriptor:
    """Descriptor of (block_rows, block_d) tiles of a (batch, seqlen, heads, head_dim) tensor."""
    return another(_descriptor_like(x.shape, x.stride(), x.dtype, block_rows, block_d), x)


@functools.lru_cache(maxsize=4096)
def _descriptor_like(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, block_rows: int, block_d: int
) -> TensorDescriptor:
    # A dimension of size 1 may have any stride; the hardware wants multiples of 16 bytes in all.
    align = 16 // dtype.itemsize
    strides = [s if n > 1 else align for s, n in zip(stride[:3], shape[:3], strict=True)]
    # Of no memory: only what a descriptor says of its tensor is checked.
    base = torch.empty(0, dtype=dtype)
    return TensorDescriptor(base, list(shape), [*strides, 1], [1, block_rows, 1, block_d])


@functools.cache
def _has_tma(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) >= (9, 0)


def can_use_tma(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator (Triton's interpreter emulates it) exists, pays and
    can read the tensors.

    It needs 16-byte alignment. float32 has no tensor core path whose operands it could feed, and
    Triton 3.6 then spills (16 KiB a thread at head_dim 128 and 32 x 32 tiles, sm_90).
    """
    first = tensors[0]
    if first.dtype == torch.float32 or (first.is_cuda and not _has_tma(first.get_device())):
        return False
    for x in tensors:
        align = 16 // x.element_size()
        if x.data_ptr() % 16:
            return False
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
            if size > 1 and (stride % align or stride == 0):
                return False
    return True


class MaskKind(NamedTuple):
    """What launches depend on of attn_mask but its address. There are none of a call without."""

    dtype: torch.dtype
    strides: tuple[int, ...]  # 0 where the mask is the same for all

    @classmethod
    def of(cls, attn_mask: Tensor | None) -> MaskKind | None:
        if attn_mask is None:
            return None
        sizes = zip(attn_mask.shape, attn_mask.stride(), strict=True)
        return cls(attn_mask.dtype, tuple(0 if n == 1 else stride for n, stride in sizes))

    @property
    def name(self) -> str:
        """Of the constant MASK, which is "" without."""
        return "bool" if self.dtype == torch.bool else "added"


class MaskBounds(NamedTuple):
    """A launch of _mask_bounds_kernel, how many tiles it looks at, and how far apart batches, heads
    and tiles have their bounds."""

    launch: Repeated
    num_tiles: int
    strides: tuple[int, int, int]

    def find(self, data: Tensor, is_aligned: bool, launch: bool) -> Tensor:
        """Without `launch` the kernel is only compiled."""
        found = torch.empty((self.num_tiles, 2), dtype=torch.int32, device=data.device)
        if launch:
            self.launch(is_aligned, data, found)
        else:
            self.launch.launch.warm_up(data, found)
        return found


def mask_numbers(mask: MaskKind | None, bounds: MaskBounds | None) -> tuple[int, ...]:
    """From stride_mb to bounds_m."""
    if mask is None or bounds is None:
        return (0,) * 7
    return *mask.strides, *bounds.strides


def mask_constants(mask: MaskKind | None) -> dict[str, Any]:
    if mask is None:
        return {"MASK": "", "MASK_ROWS": False}
    return {"MASK": mask.name, "MASK_ROWS": mask.strides[2] != 0}


def mask_bounds(
    mask: MaskKind | None,
    sizes: tuple[int, int, int, int],
    block_rows: int,
    block_keys: int,
    of_keys: bool = False,
) -> MaskBounds | None:
    """What finds which keys tiles of rows see, or with `of_keys` which rows tiles of keys; `sizes`
    are those of (batch, heads_q, seqlen_q, seqlen_kv) scores."""
    if mask is None:
        return None
    of_batch, of_head, *by = mask.strides
    lengths = list(sizes[2:])
    if of_keys:
        by, lengths = by[::-1], lengths[::-1]
    batches = sizes[0] if of_batch else 1
    heads = sizes[1] if of_head else 1
    tiles = triton.cdiv(lengths[0], block_rows) if by[0] else 1
    # Those that are alike are looked at once.
    rows = lengths[0] if by[0] else 1
    num_tiles = batches * heads * tiles
    launch = Launch(
        _mask_bounds_kernel,
        num_tiles,
        (of_batch, of_head, *by, heads, tiles, rows, lengths[1]),
        {"BLOCK_M": block_rows if by[0] else 1, "BLOCK_N": block_keys, "MASK": mask.name},
        {},
    )
    strides = (heads * tiles if of_batch else 0, tiles if of_head else 0, 1 if by[0] else 0)
    return MaskBounds(Repeated(launch), num_tiles, strides)


def mask_data(attn_mask: Tensor) -> Tensor:
    """As kernels take it."""
    if attn_mask.dtype == torch.bool:
        return attn_mask.view(torch.uint8)
    return attn_mask.detach()


class _Kind(NamedTuple):
    """All that the forward's launch depends on but the tensors' addresses."""

    q_shape: torch.Size
    kv_shape: torch.Size
    head_dim_v: int
    q_strides: tuple[int, ...]
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    softmax_scale: float
    softcap: float
    slopes: int | None  # the stride of a batch; None without
    has_sinks: bool
    dropout_p: float
    attn_mask: MaskKind | None
    mask: Mask
    tile: tuple[int, int, int, int]  # block_m, block_n, num_stages, num_warps
    use_tma: bool


class _Planned(NamedTuple):
    launch: Repeated
    block_d: int
    block_dv: int
    bounds: MaskBounds | None


@functools.lru_cache(maxsize=4096)
def _planned(kind: _Kind) -> _Planned:
    batch, seqlen_q, heads_q, head_dim = kind.q_shape
    seqlen_kv, heads_kv = kind.kv_shape[1:3]
    block_m, block_n, num_stages, num_warps = kind.tile
    mask, group, itemsize = kind.mask, heads_q // heads_kv, kind.dtype.itemsize
    section = 1
    if mask.is_causal:
        columns = head_dim + kind.head_dim_v
        section = heads_per_section(batch * heads_q, group, seqlen_kv, columns, itemsize)
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (head_dim, kind.head_dim_v))
    sizes = (batch, heads_q, seqlen_q, seqlen_kv)
    bounds = mask_bounds(kind.attn_mask, sizes, block_m, block_n)
    numbers = (
        kind.softmax_scale * LOG2_E.value, kind.softcap or 1.0, dropout_limit(kind.dropout_p),
        dropout_scale(kind.dropout_p), kind.slopes or 0, *mask_numbers(kind.attn_mask, bounds),
        *kind.q_strides[:3], *kind.k_strides[:3], *kind.v_strides[:3],
        batch * heads_q, heads_q, group, seqlen_q, seqlen_kv, section,
        *window_limits(mask, seqlen_q, seqlen_kv),
    )  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "HEAD_DIM_V": kind.head_dim_v,
        "BLOCK_DV": block_dv, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "CAUSAL": mask.is_causal, "IS_LOCAL": mask.is_local,
        "EVEN_M": seqlen_q % block_m == 0, "EVEN_N": seqlen_kv % block_n == 0,
        "SOFTCAP": kind.softcap > 0, "ALIBI": kind.slopes is not None, "SINK": kind.has_sinks,
        "DROPOUT": kind.dropout_p > 0, **mask_constants(kind.attn_mask),
        "USE_TMA": kind.use_tma, "PRECISION": dot_precision(kind.dtype, kind.device),
    }  # fmt: skip
    # Triton 3.10 no longer fuses multiply and add unasked.
    options = {"num_stages": num_stages, "num_warps": num_warps, "enable_fp_fusion": True}
    grid = triton.cdiv(seqlen_q, block_m) * batch * heads_q
    launch = Launch(_attention_forward_kernel, grid, numbers, constants, options)
    return _Planned(Repeated(launch), block_d, block_dv, bounds)


def attention_forward(
    call: Call,
    mask: Mask,
    *,
    block_m: int,
    block_n: int,
    num_stages: int,
    num_warps: int,
    use_tma: bool = False,
    launch: bool = True,
) -> tuple[Tensor, Tensor]:
    """softmax(softmax_scale * Q K^T) V, with the call's terms, and the natural log-sum-exp of every
    row of scores.

    The last dimension of q, k and v is contiguous. Returns out (contiguous, as q, with v's
    head_dim) and softmax_lse (batch, heads_q, seqlen_q) in float32; a row that sees no key has out
    0 and lse -inf. A key that no query sees is not read past its block_m x block_n tile; inside
    such a tile it is read, and NaN or inf in V there spreads. use_tma reads K and V through the
    tensor memory accelerator, where that can. Without `launch` the kernel is only compiled, and the
    results are not computed.
    """
    q, k, v, softmax_scale = call[:4]
    batch, seqlen_q, heads_q, _ = q.shape
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads_q, seqlen_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    terms = call.terms
    softcap, slopes, sinks = terms.softcap, terms.alibi_slopes, terms.sinks
    dropout_p, rng_state, attn_mask = terms.dropout_p, terms.rng_state, terms.attn_mask
    if k.shape[1] == 0:
        unseen = torch.full_like(lse, float("-inf"))
        return out.zero_(), unseen if sinks is None else unseen.copy_(sinks[:, None])
    use_tma = use_tma and can_use_tma(k, v)
    kind = _Kind(
        q.shape, k.shape, v.shape[3], q.stride(), k.stride(), v.stride(), q.dtype, q.device,
        softmax_scale, softcap, None if slopes is None else slope_stride(slopes),
        sinks is not None, dropout_p, MaskKind.of(attn_mask), mask,
        (block_m, block_n, num_stages, num_warps), use_tma,
    )  # fmt: skip
    planned = _planned(kind)
    tensors = (
        q,
        tma_descriptor(k, block_n, planned.block_d) if use_tma else k,
        tma_descriptor(v, block_n, planned.block_dv) if use_tma else v,
        out,
        lse,
        lse if slopes is None else slopes,
        lse if sinks is None else sinks,
        lse if rng_state is None else rng_state,
    )
    with device_guard(q):
        masks = lse, lse
        if attn_mask is not None and planned.bounds is not None:
            data = mask_data(attn_mask)
            masks = data, planned.bounds.find(data, are_aligned(data), launch)
        if launch:
            aligned = are_aligned(q, k, v, slopes, sinks, rng_state, attn_mask)
            planned.launch(aligned, *tensors, *masks)
        else:
            planned.launch.launch.warm_up(*tensors, *masks)
    return out, lse
