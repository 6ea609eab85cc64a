"""The predictor: what is counted is exact, what is scheduled agrees with a simulation."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import replace
from statistics import fmean, pstdev

import pytest

from flashmoe.prediction.predict import Costs, Work, microseconds, split_work, tiled_work
from flashmoe.spec.mask import CAUSAL, causal_if
from flashmoe.spec.problem import Problem

PROBLEM = Problem(2, 33, 33, 1000, 1000, 64, "bfloat16")
COSTS = Costs(
    launch=5.0,
    block=2.0,
    masked_block=3.0,
    step=1.0,
    single=0.0,
    alone=0.5,
    idle=0.5,
    ragged=0.25,
    bytes_per_us=1e30,
)


def visits(problem: Problem, block_m: int, block_n: int) -> list[int]:
    """Tiles of keys that each block of rows of one head visits, one by one."""
    found = []
    for start in range(0, problem.seqlen_q, block_m):
        end = problem.seqlen_kv
        if problem.mask.is_causal:
            end = min(end, start + block_m + problem.seqlen_kv - problem.seqlen_q)
        found.append(-(-max(end, 0) // block_n))
    return found


def test_tiles_of_keys_are_counted_exactly():
    rng = random.Random(0)
    for _ in range(3000):
        problem = Problem(
            *(rng.randint(1, 3), 6, rng.choice((1, 2, 3, 6)), rng.randint(1, 700)),
            *(rng.randint(1, 700), 64, "bfloat16", causal_if(rng.random() < 0.8)),
        )
        block_m, block_n = rng.choice((16, 64, 128, 192, 256)), rng.randrange(16, 257, 16)
        work = tiled_work(problem, 132, block_m, block_n)
        each = visits(problem, block_m, block_n)
        heads = problem.batch * problem.heads_q
        assert work.blocks == heads * len(each)
        assert work.steps == heads * sum(each)
        assert (work.longest, work.shortest) == (max(each), min(each))


def test_a_wave_more_takes_a_block_more():
    def us(batch: int, heads: int, per_sm: int = 1) -> float:
        problem = replace(PROBLEM, batch=batch, heads_q=heads, heads_kv=heads, seqlen_q=128)
        return microseconds(tiled_work(problem, 132, 128, 100, per_sm=per_sm), COSTS)

    # A block visits 10 tiles of keys; one that has its SM for itself takes half.
    assert us(1, 1) == us(1, 132) == pytest.approx(5 + 12 / 2)
    assert us(1, 133) == us(1, 264) == pytest.approx(5 + 12 * 1.5)
    assert us(4, 132) == pytest.approx(5 + 12 * 3.5)
    # With two on an SM, the first 132 are alone.
    assert us(1, 133, 2) == us(2, 132, 2) == pytest.approx(5 + 12)
    assert us(3, 132, 2) == pytest.approx(5 + 12 * 1.5)
    assert us(3, 133, 2) == us(4, 132, 2) == pytest.approx(5 + 12 * 2)


def test_masks_idle_rows_and_alignment_have_costs_of_their_own():
    work = tiled_work(replace(PROBLEM, seqlen_q=64), 132, 128, 100, group=64)
    assert work.idle == 0.5
    assert tiled_work(replace(PROBLEM, seqlen_q=64), 132, 128, 100).idle == 0.0
    one = work._replace(blocks=1)
    assert microseconds(one, COSTS) == pytest.approx(5 + 0.75 * 12 / 2)
    assert microseconds(one._replace(masked=True), COSTS) == pytest.approx(5 + 0.75 * 13 / 2)
    ragged = tiled_work(replace(PROBLEM, head_dim=72), 132, 128, 100)._replace(blocks=1)
    assert microseconds(ragged, COSTS) == pytest.approx(5 + (2 + 10 * 1.25) / 2)


def test_a_block_of_one_step_is_not_overlapped():
    work = tiled_work(replace(PROBLEM, seqlen_kv=100), 132, 128, 100)._replace(blocks=1)
    costs = COSTS._replace(single=4.0)
    assert microseconds(work, costs) == pytest.approx(5 + (2 + 1 + 4) / 2)
    assert microseconds(work._replace(longest=2), costs) == pytest.approx(5 + (2 + 2) / 2)


@pytest.mark.parametrize("seqlen_q", [64, 300, 320, 600, 1000, 5000])
@pytest.mark.parametrize("heads", [1, 44, 90, 133, 700, 5000])
def test_blocks_that_are_dealt_in_turn_end_with_the_slot_that_is_idle_least(seqlen_q, heads):
    problem = replace(PROBLEM, batch=1, heads_q=heads, heads_kv=heads, seqlen_q=seqlen_q)
    work = tiled_work(problem, 132, 128, 100, group=64)
    m_blocks = -(-seqlen_q // 128)
    partly = (0.5 if seqlen_q % 128 in range(1, 65) else 1.0) if seqlen_q % 128 else 1.0
    used = [partly if i % m_blocks == m_blocks - 1 else 1.0 for i in range(work.blocks)]
    last = max(sum(used[slot::132]) for slot in range(132))
    waves = -(-work.blocks // 132)
    assert (1 - work.idle) * waves == pytest.approx(last)


def test_memory_is_a_limit():
    work = tiled_work(PROBLEM, 132, 128, 128)
    bound = COSTS._replace(block=1e-9, step=1e-9, bytes_per_us=1e3)
    assert microseconds(work, bound) == pytest.approx(5 + PROBLEM.bytes / 1e3)


def test_split_keys_take_less_where_rows_are_few():
    work = tiled_work(replace(PROBLEM, batch=1, heads_q=2, heads_kv=2, seqlen_q=64), 132, 64, 10)
    split = split_work(work, 25)
    assert (split.blocks, split.longest, split.steps) == (50, 4, work.steps)
    assert microseconds(split, COSTS) == pytest.approx(5 + (2 + 4) / 2)


def simulated(problem: Problem, work: Work, block: float, step: float, lengths: list[int]) -> float:
    """When the last block of rows ends, slot by slot."""
    heads = problem.batch * problem.heads_q
    queue = [block + n * step for n in sorted(lengths, reverse=True) for _ in range(heads)]
    slots = min(work.slots, len(queue))
    if not work.ahead:
        ends = [0.0] * slots
        for length in queue:
            heapq.heapreplace(ends, ends[0] + length)
        return max(ends)
    # Each slot draws its next block when it begins one.
    running = [(0.0, rank) for rank in range(slots)]
    drawn, last = slots, 0.0
    while running:
        begin, rank = heapq.heappop(running)
        end = begin + queue[rank]
        last = max(last, end)
        if drawn < len(queue):
            heapq.heappush(running, (end, drawn))
            drawn += 1
    return last


@pytest.mark.parametrize("ahead", [False, True])
def test_the_schedule_agrees_with_a_simulation(ahead):
    rng = random.Random(1)
    costs = COSTS._replace(launch=0.0, masked_block=1.5, step=0.7, alone=1.0)
    errors = []
    while len(errors) < 300:
        seqlen_kv = round(2 ** rng.uniform(6, 14))
        seqlen_q = round(seqlen_kv ** rng.uniform(0.7, 1))
        heads = round(2 ** rng.uniform(0, 9))
        problem = Problem(1, heads, heads, seqlen_q, seqlen_kv, 64, "bfloat16", mask=CAUSAL)
        work = tiled_work(problem, 132, 64, 128, ahead=ahead)
        if not work.slots < work.blocks < 20_000:
            continue
        truth = simulated(problem, work, 1.5, 0.7, visits(problem, 64, 128))
        errors.append(math.log(microseconds(work, costs) / truth))
    assert abs(fmean(errors)) < 0.03
    assert pstdev(errors) < 0.05
    assert max(map(abs, errors)) < 0.25
