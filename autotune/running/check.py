"""Whether a candidate computes the right numbers: asked before it is timed."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashmoe.measure.reference import attention_reference, error_bound
from flashmoe.spec.problem import Problem

# forward(q, k, v) -> out and softmax_lse (None where a backend does not tell it).
Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

# Scores that a reference may materialize: 2^22 float64 values are 32 MiB, of which the reference
# holds about four. Larger problems are checked on their first, middle and last rows.
_MAX_SCORES = 1 << 22
# (batch, KV head) pairs of the timed problem that are compared; the others must be finite.
_MAX_PAIRS = 4
# Odd, so that no tile divides it, and several tiles long.
_RAGGED = (419, 387)
_GUARD_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Expected:
    """The reference for query rows `rows` of one batch entry and one KV head's group."""

    batch: int
    heads: slice
    rows: slice
    out: Tensor
    lse: Tensor
    # Largest absolute error of the same-dtype PyTorch computation, in out and in lse.
    same_dtype_error: tuple[float, float]


@dataclass(frozen=True)
class Inputs:
    """q (batch, seqlen_q, heads_q, head_dim), k and v (batch, seqlen_kv, heads_kv, head_dim) of a
    problem, standard normal, and the reference for parts of the output, computed when first asked
    for; `seed` chooses the parts."""

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    seed: int

    @functools.cached_property
    def expected(self) -> tuple[_Expected, ...]:
        return tuple(_expectations(self.problem, self.q, self.k, self.v, self.seed))

    def bounds(self) -> tuple[float, float]:
        """The largest error allowed in out and in softmax_lse, over all that is compared."""
        out, lse = (
            error_bound(
                self.q.dtype,
                max(part.same_dtype_error[i] for part in self.expected),
                max(_largest((part.out, part.lse)[i]) for part in self.expected),
            )
            for i in (0, 1)
        )
        return out, lse

    def error(self, forward: Forward) -> str:
        """What is wrong with forward's result, empty when nothing is. Raises what it raises."""
        # The allocator hands freed memory out again: without this, rows that a kernel forgets to
        # write could hold the right result of the previous candidate instead of NaN.
        torch.full_like(self.q, float("nan"))
        out, lse = forward(self.q, self.k, self.v)
        if out.shape != self.q.shape or out.dtype != self.q.dtype:
            return (
                f"out must be {tuple(self.q.shape)} {self.q.dtype}, "
                f"got {tuple(out.shape)} {out.dtype}"
            )
        if not bool(torch.isfinite(out).all()):
            return "out holds values that are not finite"
        out_bound, lse_bound = self.bounds()
        for part in self.expected:
            actual = out[part.batch, part.rows, part.heads].double()
            if wrong := _differs("out", actual, part.out, out_bound):
                return wrong
            if lse is not None:
                actual = lse[part.batch, part.heads, part.rows].double()
                if wrong := _differs("softmax_lse", actual, part.lse, lse_bound):
                    return wrong
        return ""


def timed_inputs(problem: Problem, device: torch.device, seed: int) -> Inputs:
    """Inputs for `problem` as it is timed, each tensor contiguous."""
    return _inputs(problem, device, seed, guard=0)


def ragged_inputs(problem: Problem, device: torch.device, seed: int) -> Inputs:
    """A small relative of `problem` with odd sequence lengths, and NaN in memory behind every
    sequence: the stored tile will serve such problems too."""
    seqlen_q, seqlen_kv = (
        min(odd, length | 1)
        for odd, length in zip(_RAGGED, (problem.seqlen_q, problem.seqlen_kv), strict=True)
    )
    if not problem.mask.is_full and problem.seqlen_q == problem.seqlen_kv:
        seqlen_kv = seqlen_q
    group = problem.heads_q // problem.heads_kv
    small = replace(
        problem,
        batch=min(problem.batch, 2),
        heads_q=min(problem.heads_kv, 2) * group,
        heads_kv=min(problem.heads_kv, 2),
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
    )
    return _inputs(small, device, seed, guard=_GUARD_ROWS)


def _inputs(problem: Problem, device: torch.device, seed: int, guard: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, problem.dtype)

    def normal(seqlen: int, heads: int) -> Tensor:
        shape = (problem.batch, seqlen + guard, heads, problem.head_dim)
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
        x[:, seqlen:] = float("nan")
        return x[:, :seqlen]

    q = normal(problem.seqlen_q, problem.heads_q)
    k = normal(problem.seqlen_kv, problem.heads_kv)
    v = normal(problem.seqlen_kv, problem.heads_kv)
    return Inputs(problem, q, k, v, seed)


def _expectations(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, seed: int
) -> Iterator[_Expected]:
    group = problem.heads_q // problem.heads_kv
    for batch, head in _pairs(problem, seed):
        heads = slice(head * group, (head + 1) * group)
        for rows in _row_blocks(problem, group):
            yield _expect(problem, q, k, v, batch, head, heads, rows)


def _pairs(problem: Problem, seed: int) -> list[tuple[int, int]]:
    """The first, the last and random other (batch, KV head) pairs."""
    last = problem.batch * problem.heads_kv - 1
    picked = {0, last}
    rng = random.Random(seed)
    while len(picked) < min(_MAX_PAIRS, last + 1):
        picked.add(rng.randint(0, last))
    return [divmod(index, problem.heads_kv) for index in sorted(picked)]


def _row_blocks(problem: Problem, group: int) -> list[slice]:
    """All query rows, or the first, middle and last of them if all are too many."""
    rows = problem.seqlen_q
    affordable = max(_MAX_SCORES // (group * problem.seqlen_kv), 3)
    if rows <= affordable:
        return [slice(0, rows)]
    size = affordable // 3
    return [slice(start, start + size) for start in (0, (rows - size) // 2, rows - size)]


def _expect(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: int,
    head: int,
    heads: slice,
    rows: slice,
) -> _Expected:
    first, last, mask = problem.mask.of_rows(
        rows.start, rows.stop, problem.seqlen_q, problem.seqlen_kv
    )
    part_q = q[batch : batch + 1, rows, heads]
    if first == last:
        out = torch.zeros_like(part_q[0], dtype=torch.float64)
        lse = torch.full(out.shape[1::-1], float("-inf"), dtype=torch.float64, device=q.device)
        return _Expected(batch, heads, rows, out, lse, (0.0, 0.0))
    part_k, part_v = (x[batch : batch + 1, first:last, head : head + 1] for x in (k, v))
    exact = attention_reference(part_q, part_k, part_v, mask=mask)
    same = attention_reference(part_q, part_k, part_v, mask=mask, dtype=q.dtype)
    out_error, lse_error = (
        _largest((got.double() - want)[torch.isfinite(want)])
        for want, got in zip(exact, same, strict=True)
    )
    return _Expected(batch, heads, rows, exact[0][0], exact[1][0], (out_error, lse_error))


def _largest(x: Tensor) -> float:
    """The largest finite magnitude, 0 without any."""
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _differs(name: str, actual: Tensor, expected: Tensor, bound: float) -> str:
    infinite = torch.isinf(expected)
    if not torch.equal(infinite, torch.isinf(actual)):
        return f"{name} is infinite in other places than the reference"
    error = float((actual - expected)[~infinite].abs().max()) if not infinite.all() else 0.0
    if error <= bound:
        return ""
    return f"{name} is off by {error:.3g} where at most {bound:.3g} is allowed"
