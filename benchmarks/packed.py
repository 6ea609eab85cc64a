"""Packed batches beside dense ones of equal lengths, mixed lengths beside peers, short and empty
sequences, and chunks of a prompt on a paged cache.

    python benchmarks/packed.py --output benchmarks/results/packed-DEVICE.json
    python benchmarks/packed.py --only equal empty

Forward and backward; bfloat16. Peers are torch's varlen_attn, FlashAttention-3 and 4 where they are
installed. Everything is compared with the float64 reference before it is timed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from decode import PAGE_SIZES, in_cache, of_cache, state_pages
from sides import PACKED, against, differs, judged, ours, timed
from tables import Row, Table, listed, measures, over_peers, run_sections

from flashmoe.measure.inputs import Inputs, make_inputs
from flashmoe.spec.call import Sequences
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import Problem

DIRECTIONS = ("fwd", "bwd")
TOKENS = 32768


def _dense(batch: int, heads: int, seqlen: int, head_dim: int, mask: Mask) -> Problem:
    return Problem(batch, heads, heads, seqlen, seqlen, head_dim, "bfloat16", mask)


EQUAL = tuple(
    _dense(TOKENS // seqlen, 2048 // d, seqlen, d, mask)
    for d in (64, 128)
    for seqlen in (1024, 4096, 16384)
    for mask in (FULL, CAUSAL)
)
SHORT = (_dense(8192, 16, 34, 128, CAUSAL),)


def log_normal(count: int, total: int) -> list[int]:
    """Lengths whose logarithms are spread by 1, of that sum; the same every time."""
    rng = random.Random(0)
    drawn = [rng.lognormvariate(0.0, 1.0) for _ in range(count)]
    lengths = [max(1, round(x * total / sum(drawn))) for x in drawn]
    lengths[lengths.index(max(lengths))] += total - sum(lengths)
    return lengths


def of_lengths(
    lengths: Sequence[int], heads_q: int, heads_kv: int, head_dim: int, mask: Mask = CAUSAL
) -> Problem:
    sizes = (len(lengths), heads_q, heads_kv, max(lengths), max(lengths), head_dim)
    histogram = tuple((n, n, 1) for n in lengths)
    return Problem(*sizes, "bfloat16", mask, layout="packed", lengths=histogram)


@dataclass(frozen=True)
class Mixed:
    """Lengths, and the efficiencies of others on 34 log-normal lengths of 34472 tokens on an H200
    forward and backward (29 November 2026, 791 TFLOP/s; 0 where they were not measured)."""

    problem: Problem
    fa3: tuple[float, float]
    fa4: tuple[float, float]


MIXED = (
    Mixed(of_lengths(log_normal(34, 34472), 32, 8, 128), (0.59, 0.0), (0.585, 0.499)),
    Mixed(of_lengths(log_normal(34, 34472), 32, 32, 64), (0.0, 0.0), (0.420, 0.472)),
)
EMPTY = 1000  # sequences among eight others
# FlashAttention-3 took 0.104 ms for the first.
CHUNKS = tuple(
    (Problem(batch, 32, 8, 512, 8192, 128, "bfloat16", CAUSAL), fa3)
    for batch, fa3 in ((1, 0.104), (8, 0.0))
)


def packed_of(dense: Inputs) -> Inputs:
    """The same tensors, one sequence behind the other."""
    p, call = dense.problem, dense.call
    ends = torch.arange(p.batch + 1, dtype=torch.int32, device=call.q.device) * p.seqlen_q
    sequences = Sequences(ends, ends, max_seqlen_q=p.seqlen_q, max_seqlen_k=p.seqlen_kv)
    q, k, v = (x.flatten(0, 1) for x in call[:3])
    dout = None if dense.dout is None else dense.dout.flatten(0, 1)
    packed = replace(p, layout="packed", lengths=((p.seqlen_q, p.seqlen_kv, p.batch),))
    return Inputs(packed, call._replace(q=q, k=k, v=v, sequences=sequences), dout)


@measures
def equal_row(table: Table, section: str, problem: Problem) -> Row | None:
    """The packed call, as "ours", and the dense one in one row."""
    dense = make_inputs(problem, table.device)
    calls, failed, wrong = against(packed_of(dense), table.peers(PACKED))
    calls["ours, dense"] = timed(ours(dense), dense)
    flat = tuple(x.flatten(0, 1) for x in calls["ours, dense"]())
    wrong = wrong or differs(calls["ours"](), flat)
    return table.row(section, problem, calls, wrong=wrong, failed=failed)


def equal_rows(
    table: Table, section: str, problems: Sequence[Problem]
) -> dict[str, list[Row | None]]:
    """By direction, one of which follows the other."""
    found: dict[str, list[Row | None]] = {direction: [] for direction in DIRECTIONS}
    for problem in problems:
        for direction in DIRECTIONS:
            row = equal_row(table, section, replace(problem, direction=direction))
            found[direction].append(row)
    return found


def of_dense(row: Row) -> float:
    return row.ratio("ours, dense").value


def state_equal(table: Table) -> None:
    found = equal_rows(table, "equal", EQUAL)
    for direction in DIRECTIONS:
        line = f"packed of equal lengths, {direction}: share of the dense call's speed"
        table.mean(f"{line}, mean (the goal)", found[direction], of_dense, at_least=0.97)
        table.mean(f"{line}, mean (enough)", found[direction], of_dense, at_least=0.94)
        table.each(f"{line}, each", found[direction], of_dense, at_least=0.90)


def state_short(table: Table) -> None:
    found = equal_rows(table, "short", SHORT)
    line = "8192 sequences of 34 tokens: share of the dense call's speed"
    table.each(f"{line}, fwd", found["fwd"], of_dense, at_least=0.90)
    table.each(f"{line}, bwd", found["bwd"], of_dense, at_least=0.90)


def packed_inputs(problem: Problem, device: torch.device) -> Inputs:
    """As make_inputs, with the longest lengths as bounds: a packed problem's are rounded up, which
    others launch thread blocks for."""
    made = make_inputs(problem, device)
    longest_q, longest_k = (max(each[i] for each in problem.histogram) for i in (0, 1))
    sequences = made.call.sequences._replace(max_seqlen_q=longest_q, max_seqlen_k=longest_k)
    return replace(made, call=made.call._replace(sequences=sequences))


@measures
def mixed_row(
    table: Table, section: str, problem: Problem, peers: Mapping[str, float]
) -> Row | None:
    inputs = packed_inputs(problem, table.device)
    calls, failed, wrong = against(inputs, table.peers(PACKED))
    return table.row(section, problem, calls, wrong=wrong, failed=failed, listed=peers)


def state_mixed(table: Table) -> None:
    rows: list[Row | None] = []
    over: dict[str, list[Row | None]] = {"FA3": [], "FA4": []}
    for mixed in MIXED:
        for number, direction in enumerate(DIRECTIONS):
            peers = {"FA3": mixed.fa3[number], "FA4": mixed.fa4[number]}
            row = mixed_row(table, "mixed", replace(mixed.problem, direction=direction), peers)
            rows.append(row)
            for name, efficiency in peers.items():
                if name in row.peers if row is not None else efficiency:
                    over[name].append(row)
    for name, bound in (("FA3", 1.2), ("FA4", 1.0)):

        def value(row: Row, name: str = name) -> float:
            return row.efficiency() / row.peers[name]

        table.each(f"mixed lengths: times {name}'s efficiency", over[name], value, at_least=bound)
    table.each("mixed lengths: ahead of the best peer", rows, over_peers, at_least=1.0)


@measures
def empty_row(table: Table, section: str, problem: Problem) -> Row | None:
    """`problem` has none; "ours" is with them, on the same tensors."""
    without = packed_inputs(problem, table.device)
    ends = without.call.sequences.cu_seqlens_q
    assert ends is not None
    # Empty sequences end where the one before them does.
    repeats = torch.full_like(ends, EMPTY // (len(ends) - 1) + 1)
    repeats[0] = 1
    more = ends.repeat_interleave(repeats)
    sequences = without.call.sequences._replace(cu_seqlens_q=more, cu_seqlens_k=more)
    counts = (*problem.histogram, (0, 0, len(more) - len(ends)))
    padded = replace(problem, batch=len(more) - 1, lengths=counts)
    with_empty = Inputs(padded, without.call._replace(sequences=sequences))
    calls = {"ours": timed(ours(with_empty), with_empty)}
    calls["ours, without"] = timed(ours(without), without)
    wrong = judged(without, calls["ours, without"]())
    wrong = wrong or differs(calls["ours"](), calls["ours, without"]())
    return table.row(section, padded, calls, wrong=wrong)


def state_empty(table: Table) -> None:
    row = empty_row(table, "empty", of_lengths([4096] * 8, 16, 16, 128))
    cost = None if row is None else (row.seconds() - row.seconds("ours, without")) * 1e6
    table.one(f"{EMPTY} empty sequences: us", cost, at_most=5.0)


@measures
def chunk_row(table: Table, section: str, problem: Problem, fa3: float) -> Row | None:
    """Queries at the end of a cache, which is contiguous or in pages."""
    dense = make_inputs(problem, table.device)
    calls, failed, wrong = against(dense, table.peers(("FA3", "FA4")))
    calls["ours, cache"] = of_cache(in_cache(dense))
    calls |= {f"ours, pages of {n}": of_cache(in_cache(dense, n)) for n in PAGE_SIZES}
    expected = calls["ours"]()
    reasons = [differs(calls[name](), expected) for name in calls]
    wrong = wrong or "; ".join(reason for reason in reasons if reason)
    times = listed(problem, {"FA3": fa3})
    return table.row(section, problem, calls, wrong=wrong, failed=failed, listed=times)


def state_chunks(table: Table) -> None:
    rows = [chunk_row(table, "chunks", problem, ms) for problem, ms in CHUNKS]
    line = "chunks of a prompt: not behind a peer by more than 2 %"
    table.each(line, rows, over_peers, at_least=1 / 1.02)
    state_pages(table, "chunks, pages", rows, "ours, cache")


SECTIONS = {
    "equal": state_equal,
    "mixed": state_mixed,
    "short": state_short,
    "empty": state_empty,
    "chunks": state_chunks,
}


def main() -> int:
    return run_sections(__doc__, SECTIONS, seconds=240)


if __name__ == "__main__":
    raise SystemExit(main())
