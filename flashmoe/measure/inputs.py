"""Random tensors for any Problem: what is timed, and what a result is checked with."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashmoe.measure.reference import attention_reference
from flashmoe.spec.call import Call, Sequences, Terms
from flashmoe.spec.dropout import rng_state_of_sequence
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import Problem
from flashmoe.spec.sequence import rows_of_keys, sequences_of

# Keys of a page in a cache of pages.
PAGE_SIZE = 64
# Weak enough to be felt by scores of standard normal data.
_SOFTCAP = 2.0
_DROPOUT_P = 0.25
# Scores that a reference may materialize: 2^22 float64 values are 32 MiB, of which the reference
# holds about four.
_MAX_SCORES = 1 << 22
# Odd, so that no tile divides them, and several tiles long; and windows that still hide some.
_RAGGED = (419, 387)
_RAGGED_WINDOW = (101, 61)
GUARD_ROWS = 64


@dataclass(frozen=True)
class Inputs:
    """A problem's call: standard normal q, k and v, laid out and with terms as the problem says.
    dout, as q, is there for a backward alone.

    What must not be read is NaN: keys past a sequence's end, pages of no sequence, and rows behind
    each tensor where there are guards."""

    problem: Problem
    call: Call
    dout: Tensor | None = None

    @functools.cached_property
    def sequences(self) -> list[tuple[int, Tensor, int]]:
        """Of each sequence: its first row in q.flatten(0, -3), the rows of k.flatten(0, -3) that
        hold its keys, and how many queries it has."""
        found = []
        for index, sequence in enumerate(sequences_of(self.call)):
            begin = sequence.q_begin
            if self.call.sequences.cu_seqlens_q is None:
                begin += index * self.call.q.shape[1]
            keys = rows_of_keys(self.call, index, sequence)
            found.append((begin, keys, sequence.seqlen_q))
        return found

    def pieces(self, sequence: int, head: int, *, some: bool = False) -> Iterator[Piece]:
        """The rows of one sequence for one head of k, as many at a time as a reference may
        materialize; with `some` only the first, the middle and the last."""
        begin, keys, seqlen_q = self.sequences[sequence]
        group = self.problem.heads_q // self.problem.heads_kv
        affordable = max(_MAX_SCORES // (group * max(len(keys), 1)), 3)
        starts = list(range(0, seqlen_q, affordable))
        if some and len(starts) > 1:
            affordable //= 3
            starts = [0, (seqlen_q - affordable) // 2, seqlen_q - affordable]
        for start in starts:
            rows = slice(begin + start, begin + min(start + affordable, seqlen_q))
            heads = slice(head * group, (head + 1) * group)
            yield Piece(self, sequence, rows, keys, heads, head, start)


@dataclass(frozen=True)
class Piece:
    """Rows of q and keys of k and v, both counted over all sequences, that are of one sequence, and
    a head of k with the heads of q that use it. `start` is its first row in its sequence."""

    inputs: Inputs
    sequence: int
    rows: slice
    keys: Tensor
    heads: slice
    head: int
    start: int

    def reference(
        self, dtype: torch.dtype, order: Tensor | None = None, *, gradients: bool = False
    ) -> dict[str, Tensor]:
        """out, softmax_lse (rows, heads) and, of these rows of dout, dq, dk and dv by name,
        computed in `dtype`, with head_dim in this order."""
        call, dout = self.inputs.call, self.inputs.dout
        q = call.q.flatten(0, -3)[None, self.rows, self.heads]
        k, v = (x.flatten(0, -3)[None, self.keys, self.head : self.head + 1] for x in call[1:3])
        terms = call.terms
        slopes, sinks, attn_mask = terms.alibi_slopes, terms.sinks, terms.attn_mask
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[self.sequence]
        leaves = [x.detach().to(dtype).requires_grad_(gradients) for x in (q, k, v)]
        scored = leaves if order is None else [leaves[0][..., order], leaves[1][..., order]]
        out, lse = attention_reference(
            *(scored[0], scored[1], leaves[2]),
            softmax_scale=call.softmax_scale,
            mask=self.inputs.problem.mask,
            dtype=dtype,
            softcap=call.terms.softcap,
            alibi_slopes=None if slopes is None else slopes[self.heads],
            sinks=None if sinks is None else sinks[self.heads],
            dropout_p=call.terms.dropout_p,
            rng_state=rng_state_of_sequence(call.terms.rng_state, self.sequence, self.heads.start),
            # One of keys, of each sequence.
            attn_mask=None if attn_mask is None else attn_mask[self.sequence],
            first_row=self.start,
            seqlen_q=self.inputs.sequences[self.sequence][2],
        )
        found = {"out": out[0].detach(), "softmax_lse": lse[0].detach().transpose(0, 1)}
        if gradients:
            assert dout is not None, "gradients of what?"
            of_out = dout.flatten(0, -3)[None, self.rows, self.heads].to(dtype)
            each = torch.autograd.grad(out, leaves, of_out)
            found |= {name: x[0] for name, x in zip(("dq", "dk", "dv"), each, strict=True)}
        return found

    def of(self, name: str, result: Tensor) -> Tensor:
        """The same part of a whole result, which is shaped as backends return it."""
        if name == "softmax_lse":
            return result.transpose(-1, -2).flatten(0, -2)[self.rows, self.heads]
        if name in ("out", "dq"):
            return result.flatten(0, -3)[self.rows, self.heads]
        return result.flatten(0, -3)[self.keys, self.head : self.head + 1]


def make_inputs(problem: Problem, device: torch.device, seed: int = 0, guard: int = 0) -> Inputs:
    """Inputs for `problem`, each tensor contiguous but for `guard` rows of NaN behind each
    sequence, or behind all of them where they are packed."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, problem.dtype)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return x.to(dtype)

    def rows_of(batch: int, rows: int, heads: int, head_dim: int) -> Tensor:
        """(batch, rows, heads, head_dim), or (rows, heads, head_dim) without a batch."""
        x = normal(max(batch, 1), rows + guard, heads, head_dim)
        x[:, rows:] = float("nan")
        return x[:, :rows] if batch else x[0, :rows]

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    rng = random.Random(seed)
    lengths = [(q, k) for q, k, count in problem.histogram for _ in range(count)]
    rng.shuffle(lengths)
    seqlens_q, seqlens_kv = ([pair[i] for pair in lengths] for i in (0, 1))
    packed_q, packed_k = problem.layout.startswith("packed"), problem.layout == "packed"
    batch, heads_q, heads_kv = len(lengths), problem.heads_q, problem.heads_kv
    queries = (0, sum(seqlens_q)) if packed_q else (batch, problem.seqlen_q)
    head_dims = problem.head_dim, problem.value_dim
    q, dout = (rows_of(*queries, heads_q, head_dim) for head_dim in head_dims)
    keys = (0, sum(seqlens_kv)) if packed_k else (batch, problem.seqlen_kv)
    sequences = Sequences()
    if packed_q:
        sequences = sequences._replace(
            cu_seqlens_q=integers(_sums(seqlens_q)), max_seqlen_q=problem.seqlen_q
        )
    if packed_k:
        sequences = sequences._replace(
            cu_seqlens_k=integers(_sums(seqlens_kv)), max_seqlen_k=problem.seqlen_kv
        )
    elif problem.layout != "dense":
        sequences = sequences._replace(seqused_k=integers(seqlens_kv))
    if problem.layout.endswith("paged"):
        k, v, table = _pages(seqlens_kv, problem, normal, rng)
        sequences = sequences._replace(block_table=table)
    else:
        k, v = (rows_of(*keys, heads_kv, head_dim) for head_dim in head_dims)
        if problem.layout.endswith("cache"):
            for index, used in enumerate(seqlens_kv):
                k[index, used:] = v[index, used:] = float("nan")
    terms = _terms(problem, generator, device)
    call = Call(q, k, v, float(problem.head_dim**-0.5), terms, sequences)
    return Inputs(problem, call, dout if problem.direction == "bwd" else None)


def ragged(problem: Problem) -> Problem:
    """A small relative of `problem` with odd lengths, which differ where it is of many, for what is
    stored for its bucket serves such problems, too. It takes the same kernels."""
    bounds = problem.seqlen_q, problem.seqlen_kv
    seqlen_q, seqlen_kv = (
        min(odd, length | 1) for odd, length in zip(_RAGGED, bounds, strict=True)
    )
    if not problem.mask.is_full and problem.seqlen_q == problem.seqlen_kv:
        seqlen_kv = seqlen_q
    heads_kv, batch = min(problem.heads_kv, 2), min(problem.batch, 2)
    left, right = problem.mask.left, problem.mask.right
    lengths: tuple[tuple[int, int, int], ...] = ()
    if problem.layout != "dense":
        batch = 4
        others = ((seqlen_q // 3 | 1, seqlen_kv // 2 | 1), (1, 1), (0, 7 % (seqlen_kv + 1)))
        lengths = ((seqlen_q, seqlen_kv, 1), *((*pair, 1) for pair in others))
        if not problem.layout.startswith("packed"):
            lengths = tuple((seqlen_q, keys, count) for _, keys, count in lengths)
    return replace(
        problem,
        batch=batch,
        heads_q=heads_kv * (problem.heads_q // problem.heads_kv),
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        mask=Mask(min(left, _RAGGED_WINDOW[0]), min(right, _RAGGED_WINDOW[1])),
        lengths=lengths,
    )


def _sums(lengths: list[int]) -> list[int]:
    sums = [0]
    for length in lengths:
        sums.append(sums[-1] + length)
    return sums


def _pages(
    used: list[int], problem: Problem, normal: Callable[..., Tensor], rng: random.Random
) -> tuple[Tensor, Tensor, Tensor]:
    """k and v (num_pages, PAGE_SIZE, heads_kv, head_dim or head_dim_v) in no order, the last page
    being of no sequence, and the block table."""
    columns = max(-(-problem.seqlen_kv // PAGE_SIZE), 1)
    needed = [-(-length // PAGE_SIZE) for length in used]
    order = list(range(sum(needed)))
    rng.shuffle(order)
    k, v = (
        normal(len(order) + 1, PAGE_SIZE, problem.heads_kv, head_dim)
        for head_dim in (problem.head_dim, problem.value_dim)
    )
    rows, taken = [], iter(order)
    for length, count in zip(used, needed, strict=True):
        pages = [next(taken) for _ in range(count)]
        if length % PAGE_SIZE:
            k[pages[-1], length % PAGE_SIZE :] = v[pages[-1], length % PAGE_SIZE :] = float("nan")
        rows.append(pages + [len(order)] * (columns - count))
    k[-1] = v[-1] = float("nan")
    return k, v, torch.tensor(rows, dtype=torch.int32, device=k.device)


def _terms(problem: Problem, generator: torch.Generator, device: torch.device) -> Terms:
    heads = problem.heads_q
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device) / heads)
    sinks = torch.randn(heads, generator=generator, device=device)
    state = torch.tensor([generator.initial_seed(), 0], device=device)
    return Terms(
        _SOFTCAP if "softcap" in problem.terms else 0.0,
        slopes if "alibi" in problem.terms else None,
        sinks if "sink" in problem.terms else None,
        _DROPOUT_P if "dropout" in problem.terms else 0.0,
        state if "dropout" in problem.terms else None,
        _padding(problem, device) if "mask" in problem.terms else None,
    )


def _padding(problem: Problem, device: torch.device) -> Tensor:
    """A mask of keys (batch, 1, 1, seqlen_kv), which leaves a sequence the first half of its keys,
    or more, up to all of them."""
    batch, seqlen_kv = problem.batch, problem.seqlen_kv
    kept = seqlen_kv - torch.arange(batch, device=device) * (seqlen_kv // 2) // max(batch - 1, 1)
    return (torch.arange(seqlen_kv, device=device) < kept.unsqueeze(1))[:, None, None]
