"""What each kernel does for a problem, by its own description, and the features from which Costs
follow where nobody measured them."""

from __future__ import annotations

import math
from collections.abc import Callable

from flashmoe.prediction.predict import Work, split_work, tiled_work
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

# SDPA's kernels by what they are called here; each is fitted for head dimensions up to these.
SDPA, SDPA_FLASH, SDPA_SPLIT = "sdpa", "sdpa-flash", "sdpa-split"
_FEWEST_QUERIES = 16
_SDPA_HEAD_DIMS = (32, 64, 96, 128, 192, 256)


def tile_name(tile: Tile, head_dim: int) -> str:
    """What the kernel of a tile that is compiled for head_dim is called in a table of Costs."""
    return f"{tile}@{head_dim}"


def sdpa_name(kernel: str, head_dim: int) -> str:
    """The same for one of SDPA's kernels."""
    return f"{kernel}@{next(d for d in _SDPA_HEAD_DIMS if d >= head_dim)}"


def tile_work(tile: Tile, problem: Problem, sm_count: int) -> Work | None:
    """The Work of one of our kernels; None for those that do not tell it."""
    describe = _TILES.get(tile.kernel)
    return None if describe is None else describe(tile, problem, sm_count)


def _sm90_work(tile: Tile, problem: Problem, sm_count: int) -> Work:
    return tiled_work(
        problem,
        sm_count,
        tile.block_m,
        tile.block_n,
        per_sm=tile.ctas_per_sm,
        group=64,
        ahead=tile.q_stages > 1,
    )


def _sm80_work(tile: Tile, problem: Problem, sm_count: int) -> Work:
    per_sm = 2 if tile.num_warps == 4 else 1
    return tiled_work(problem, sm_count, tile.block_m, tile.block_n, per_sm=per_sm)


_TILES: dict[str, Callable[[Tile, Problem, int], Work]] = {
    "sm90": _sm90_work,
    "sm80": _sm80_work,
    "triton": _sm80_work,
}


def sdpa_works(problem: Problem, sm_count: int) -> dict[str, Work]:
    """The Work of SDPA's kernels that run the problem: of the one it chooses itself (cuDNN's on
    Hopper), and of FlashAttention-2, which splits the keys where rows are few. For fewer queries
    than were measured, and other kernels, there are none."""
    if problem.seqlen_q < _FEWEST_QUERIES:
        return {}
    wide, long = problem.padded_dim > 64, problem.padded_dim > 128
    chosen = tiled_work(problem, sm_count, 128, 64 if long else 128)
    block_n = 64 if long else 128 if wide else 256
    few = tiled_work(problem, sm_count, 64, block_n, per_sm=2)
    splits = _splits(few.blocks, few.slots, few.longest)
    if splits > 1:
        return {SDPA: chosen, SDPA_SPLIT: split_work(few, splits)}
    return {SDPA: chosen, SDPA_FLASH: tiled_work(problem, sm_count, 128, 64 if wide else 128)}


def _splits(blocks: int, slots: int, steps: int) -> int:
    """Into how many parts FlashAttention-2 splits the keys (its num_splits_heuristic): the fewest
    that fill the slots at least 0.85 times as well as the best number does."""
    if blocks >= 0.8 * slots:
        return 1

    def filled(splits: int) -> float:
        waves = blocks * splits / slots
        return waves / math.ceil(waves)

    # Those that shorten the longest part.
    useful = [
        s for s in range(1, min(128, steps) + 1) if s == 1 or -(-steps // s) < -(-steps // (s - 1))
    ]
    enough = 0.85 * max(map(filled, useful))
    return next(splits for splits in useful if filled(splits) >= enough)


def features(kernel: str, head_dim: int) -> tuple[float, ...]:
    """What the logarithms of the Costs of a kernel and its relatives are linear in."""
    d = math.log(head_dim / 96)
    if kernel.startswith("sdpa"):
        return 1.0, d
    tile = Tile.parse(kernel)
    m, n = math.log(tile.block_m / 128), math.log(tile.block_n / 64)
    if tile.kernel == "sm80":
        return 1.0, m, n, d, float(tile.num_warps == 8), float(tile.num_stages == 2)
    two, serial, turns = map(float, (tile.ctas_per_sm == 2, tile.serial, tile.pingpong))
    deep = float(tile.num_stages >= 3)
    return (
        *(1.0, m, n, d, m * m, n * n, d * d, m * n, m * d, n * d),
        *(two, two * m, two * n, two * d, two * deep),
        *(serial, serial * m, serial * n, serial * d, serial * two),
        *(turns, turns * m, float(tile.q_in_registers), tile.exp2_fma / 8),
        *(float(tile.num_stages == 1), deep, float(tile.q_stages == 2)),
    )
