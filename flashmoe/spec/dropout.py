"""Which weights dropout keeps: a function of the call's state, the batch (or sequence), the head,
the row and the column, whatever computes it. csrc/common/dropout.h says the same in C++.

Each weight has 16 random bits, so that dropout_p is rounded to a multiple of 2**-16, and the scale
is that of what it was rounded to: the mean is exact. They come from Philox4x32 (Salmon et al. 2011)
with 7 rounds, whose key is the seed and whose counter is (rows, columns, offset + batch): a call of
it makes those of 8 weights, the ones that a thread of a GPU's warp has of a 16 x 16 tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 7
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def dropout_limit(dropout_p: float) -> int:
    """A weight stays where its random bits are at most this."""
    return max(int((1 - dropout_p) * 65536 + 0.5), 1) - 1


def dropout_scale(dropout_p: float) -> float:
    """What weights that stay are multiplied by."""
    return 65536 / (dropout_limit(dropout_p) + 1)


def rng_state_of_sequence(
    rng_state: Tensor | None, index: int, first_head: int = 0
) -> Tensor | None:
    """That of a call of one sequence of a batch alone, and of its heads from one on."""
    if rng_state is None:
        return None
    state = rng_state.clone()
    state[1] += index
    state[1] += first_head << 32
    return state


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Of four 32-bit numbers and two, four random ones: int64 tensors that broadcast."""
    a, b, c, d = counter
    key0, key1 = key
    for _ in range(ROUNDS):
        p, q = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # what does not fit is their sign
        a, b = ((q >> 32) & _WORD) ^ b ^ key0, q & _WORD
        c, d = ((p >> 32) & _WORD) ^ d ^ key1, p & _WORD
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return a, b, c, d


def kept_weights(
    rng_state: Tensor,
    dropout_p: float,
    batch: int,
    heads: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> Tensor:
    """(batch, heads, rows, columns), bool: which weights of the rows from the first to before the
    second number, and of such columns, stay. rng_state is that of spec/terms.py."""
    import torch

    device = rng_state.device
    row_tiles, column_tiles = (
        (begin // 16, -(-end // 16)) if begin < end else (0, 0) for begin, end in (rows, columns)
    )
    seed, offset = rng_state
    offset = (offset + torch.arange(batch, device=device)).reshape(-1, 1, 1, 1)
    counter = (
        torch.arange(row_tiles[0] * 8, row_tiles[1] * 8, device=device).unsqueeze(1),
        torch.arange(column_tiles[0] * 4, column_tiles[1] * 4, device=device),
        offset & _WORD,
        ((offset >> 32) + torch.arange(heads, device=device).reshape(-1, 1, 1)) & _WORD,
    )
    words = torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), dim=-1)
    kept = torch.stack((words & 0xFFFF, words >> 16), dim=-1) <= dropout_limit(dropout_p)
    # A tile's row is 8 * lower + r, its column 8 * right + 2 * pair + odd.
    tiles_down, tiles_right = (end - begin for begin, end in (row_tiles, column_tiles))
    kept = kept.reshape(batch, heads, tiles_down, 8, tiles_right, 4, 2, 2, 2)
    b, h, tile, r, column_tile, pair, right, lower, odd = range(9)
    kept = kept.permute(b, h, tile, lower, r, column_tile, right, pair, odd)
    kept = kept.flatten(2, 4).flatten(3, 6)
    first_row, first_column = row_tiles[0] * 16, column_tiles[0] * 16
    return kept[
        :, :, rows[0] - first_row : rows[1] - first_row,
        columns[0] - first_column : columns[1] - first_column,
    ]  # fmt: skip
