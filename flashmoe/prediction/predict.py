"""How long a kernel takes for a problem, from what it does there: pure arithmetic in microseconds.

A kernel tells its Work: how many blocks of rows there are, how many tiles of keys each visits, and
how many of them run at a time. Costs are what these take: a handful of constants, fitted to
measured times (benchmarks/plane_fit.py) for a kernel and a GPU model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from flashmoe.spec.problem import Problem

T = TypeVar("T")

# Arithmetic and traffic are both felt where they take alike: the norm of the two. Norms of 1.5 to 3
# choose alike.
_NORM = 2.0
# What takes so many times as long as another takes as long.
_AS_LONG = 1.01
# Rows that TMA fetches are slower unless they begin at multiples of 32 bytes, 16 elements.
_ALIGNED = 16


class Work(NamedTuple):
    """`blocks` of rows that visit `steps` tiles of keys in all, one of them between `shortest` and
    `longest`, the longest first; `slots` of them run at a time, `per_sm` on an SM.

    masked: the last tiles of a block are. ahead: a thread block draws its next block of rows when
    it begins one, not when it ends. idle: the share of the steps that groups of a block's rows pass
    over, for they are past the end or see none of these keys. ragged: rows in memory are not
    aligned. nbytes: what is read and written at least.
    """

    blocks: int
    steps: int
    longest: int
    shortest: int
    slots: int
    per_sm: int
    masked: bool
    ahead: bool
    idle: float
    ragged: bool
    nbytes: float


class Costs(NamedTuple):
    """Microseconds of a call, of a block of rows (full or masked) and of one step of it, with all
    slots taken, and what a block of a single step takes more. alone: the share of that which a
    block takes with its SM for itself. idle: the share of a step that is saved where it is passed
    over. ragged: what a step takes more where rows are. bytes_per_us: what memory sustains."""

    launch: float
    block: float
    masked_block: float
    step: float
    single: float
    alone: float
    idle: float
    ragged: float
    bytes_per_us: float


def fastest(times: Mapping[T, float]) -> T:
    """The first of those that take the least time, or hardly more: what is listed first is the
    better known."""
    limit = min(times.values()) * _AS_LONG
    return next(name for name, time in times.items() if time <= limit)


def microseconds(work: Work, costs: Costs) -> float:
    """The predicted time of one call."""
    used = 1.0 - costs.idle * work.idle
    block = used * (costs.masked_block if work.masked else costs.block)
    if work.longest == 1:
        block += costs.single
    step = used * (costs.step * (1.0 + costs.ragged) if work.ragged else costs.step)
    busy = _schedule(work, block, step, costs.alone)
    traffic = work.nbytes / costs.bytes_per_us
    both: float = (busy**_NORM + traffic**_NORM) ** (1 / _NORM)
    return costs.launch + both


def _schedule(work: Work, block: float, step: float, alone: float) -> float:
    """When the last block of rows ends: blocks are drawn, the longest first, as slots come free.

    That is bounded from below by the longest block; by k + 1 times the shortest of the longest
    k * slots + 1, of which k + 1 share a slot; and by the mean of the slots, which end within a
    short block of each other. Lengths are taken to fall evenly. A simulation differs by
    2 to 4 % (standard deviation over random problems of a few waves).
    """
    longest, shortest = block + work.longest * step, block + work.shortest * step
    sms = work.slots // work.per_sm
    if work.blocks <= work.slots:
        return longest * (alone if work.blocks <= sms else 1.0)
    last_wave = (work.blocks - 1) // work.slots
    fall = (longest - shortest) * work.slots / work.blocks  # from one wave to the next
    if fall == 0.0:
        rest = work.blocks - last_wave * work.slots
        return (last_wave + (alone if rest <= sms else 1.0)) * longest
    wave = min(int(longest / fall / 2), last_wave)
    mean = (work.blocks * block + work.steps * step) / work.slots
    end = max(longest, (wave + 1) * (longest - wave * fall))
    if not work.ahead:
        return max(end, mean + min(shortest, longest - shortest) / 2)
    # The second is chosen before it is known who ends first, and each one after that as early.
    return max(end, 2 * longest - fall, mean + 0.75 * min(shortest + fall, longest - shortest))


def tiled_work(
    problem: Problem,
    sm_count: int,
    block_m: int,
    block_n: int,
    *,
    per_sm: int = 1,
    group: int = 0,
    ahead: bool = False,
) -> Work:
    """The Work of a forward kernel whose thread blocks take block_m rows of a head at a time, which
    visit what the last of them sees in tiles of block_n keys. `group`: rows that pass over together
    what they do not see, if fewer."""
    heads = problem.batch * problem.heads_q
    m_blocks = -(-problem.seqlen_q // block_m)
    steps, longest, shortest = _visited(problem, m_blocks, block_m, block_n)
    idle = 0.0
    if group and group < block_m and steps:
        seen, *_ = _visited(problem, -(-problem.seqlen_q // group), group, block_n)
        idle = 1.0 - seen * group / (steps * block_m)
        if problem.mask.right < 0 and m_blocks > 1:
            # Blocks are dealt in turn: a slot gets one in m_blocks that is partly past the end, or
            # where slots and m_blocks have a common divisor, some get none and end last.
            slots = sm_count * per_sm
            waves = -(-heads * m_blocks // slots)
            partial = waves // m_blocks if math.gcd(slots, m_blocks) == 1 else 0
            idle *= m_blocks * partial / waves
    return Work(
        blocks=heads * m_blocks,
        steps=heads * steps,
        longest=longest,
        shortest=shortest,
        slots=sm_count * per_sm,
        per_sm=per_sm,
        masked=not problem.mask.is_full,
        ahead=ahead,
        idle=idle,
        ragged=any(d % _ALIGNED for d in (problem.head_dim, problem.value_dim)),
        nbytes=problem.bytes,
    )


def split_work(work: Work, splits: int) -> Work:
    """`work` with the keys of each block of rows shared out over so many thread blocks."""
    return work._replace(
        blocks=work.blocks * splits,
        longest=-(-work.longest // splits),
        shortest=-(-work.shortest // splits),
    )


def _visited(problem: Problem, m_blocks: int, block_m: int, block_n: int) -> tuple[int, int, int]:
    """Tiles of keys that the blocks of rows of one head visit: in all, and the one that visits most
    and least. Exact, as csrc/forward/sm90/work.cuh counts them."""
    most = -(-problem.seqlen_kv // block_n)
    if problem.mask.is_full:
        return m_blocks * most, most, most
    if problem.mask.is_local:
        return _visited_in_window(problem, m_blocks, block_m, block_n)
    # Block i sees keys up to block_m * (i + 1) + shift, from block `first` on any, from `whole` on
    # all of them.
    shift = problem.seqlen_kv - problem.seqlen_q
    first = max(-(shift + block_m) // block_m + 1, 0)
    whole = min(max(problem.seqlen_q // block_m, first), m_blocks)
    rounded = block_m * (first + 1) + shift + block_n - 1
    partly = _floor_sum(whole - first, block_n, block_m, rounded)
    least = min(max(-(-(block_m + shift) // block_n), 0), most)
    return partly + (m_blocks - whole) * most, most, least


def _visited_in_window(
    problem: Problem, m_blocks: int, block_m: int, block_n: int
) -> tuple[int, int, int]:
    """By trying at most 64 blocks of rows, evenly spread; what lies between is interpolated."""
    tried = min(m_blocks, 64)
    picked = [i * (m_blocks - 1) // max(tried - 1, 1) for i in range(tried)]
    counts = []
    for i in picked:
        rows = block_m * i, min(block_m * (i + 1), problem.seqlen_q)
        first, last = problem.mask.visible(*rows, problem.seqlen_q, problem.seqlen_kv)
        counts.append(-(-last // block_n) - first // block_n if last > first else 0)
    return round(sum(counts) * m_blocks / len(counts)), max(counts), min(counts)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of (a * i + b) // m over i in range(n), with m > 0 and a, b >= 0, in O(log m):
    AtCoder Library's floor_sum."""
    total = 0
    while n > 0:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b, m, a = top // m, top % m, a, m
    return total
