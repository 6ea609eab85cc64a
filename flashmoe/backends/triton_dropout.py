"""Which weights dropout keeps, in Triton: what flashmoe/spec/dropout.py says."""

from __future__ import annotations

import triton
import triton.language as tl

from flashmoe.spec import dropout

ROUNDS = tl.constexpr(dropout.ROUNDS)


@triton.jit
def dropout_state(rng_ptr, batch, head):
    """(seed, offset, head's part of the counter) of what dropout does to one head's weights."""
    offset = tl.load(rng_ptr + 1) + batch
    return tl.load(rng_ptr), offset.to(tl.uint32), ((offset >> 32) + head).to(tl.uint32)


@triton.jit
def kept_weights(
    seed, offset, head, limit, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED:
    tl.constexpr,
):  # fmt: skip
    """Which weights of the ROWS x COLUMNS from `row` and `column` on stay, which are multiples of
    16; COLUMNS x ROWS if TRANSPOSED.

    A call of Philox decides on 8 weights, whose bits stand side by side: rows 8 apart, and columns
    that are neighbours or 8 apart.
    """
    rows = row // 2 + tl.arange(0, ROWS // 2)
    columns = column // 4 + tl.arange(0, COLUMNS // 4)
    all_rows = tl.arange(0, ROWS)
    all_columns = tl.arange(0, COLUMNS)
    if TRANSPOSED:
        zeros = tl.zeros([COLUMNS // 4, ROWS // 2], tl.int32)
        rows = rows[None, :] + zeros
        columns = columns[:, None] + zeros
        all_rows = all_rows[None, :]
        all_columns = all_columns[:, None]
    else:
        zeros = tl.zeros([ROWS // 2, COLUMNS // 4], tl.int32)
        rows = rows[:, None] + zeros
        columns = columns[None, :] + zeros
        all_rows = all_rows[:, None]
        all_columns = all_columns[None, :]
    low = zeros.to(tl.uint32) + offset
    high = zeros.to(tl.uint32) + head
    words = tl.philox(seed, rows, columns, low, high, ROUNDS)
    kept = zeros
    for i in tl.static_range(4):
        even = (words[i] & 0xFFFF).to(tl.int32) <= limit
        odd = (words[i] >> 16).to(tl.int32) <= limit
        kept |= (even.to(tl.int32) << (2 * i)) | (odd.to(tl.int32) << (2 * i + 1))
    if TRANSPOSED:
        kept = kept.reshape(COLUMNS // 16, 1, 4, 1, ROWS // 16, 1, 8)
        kept = tl.broadcast_to(kept, (COLUMNS // 16, 2, 4, 2, ROWS // 16, 2, 8))
        kept = kept.reshape(COLUMNS, ROWS)
    else:
        kept = kept.reshape(ROWS // 16, 1, 8, COLUMNS // 16, 1, 4, 1)
        kept = tl.broadcast_to(kept, (ROWS // 16, 2, 8, COLUMNS // 16, 2, 4, 2))
        kept = kept.reshape(ROWS, COLUMNS)
    bit = (all_columns & 8) // 2 + (all_rows & 8) // 4 + (all_columns & 1)
    return ((kept >> bit) & 1) != 0
