"""Whether results are right: forward and gradients of any Problem against the reference."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flashmoe.measure.inputs import Inputs, Piece
from flashmoe.measure.reference import error_bound

# Below so many elements of q the same-dtype computation is made in so many orders.
_FEW, _ORDERS = 1 << 20, 8
# By so many roundings to float32 all orders of few elements may be luckier than a kernel's.
_LUCK = 4.0


@dataclass(frozen=True, slots=True)
class Correctness:
    """The largest absolute error as a share of what is allowed, over all results; `reason` says
    what is wrong, empty when nothing is."""

    error: float
    reason: str = ""


@dataclass(slots=True)
class _Expected:
    """One result's part in a few pieces, and what is known of its rounding."""

    exact: list[tuple[Piece, Tensor]]
    same_dtype_error: float = 0.0
    scale: float = 0.0


class Checker:
    """What results of some Inputs are compared with, computed when it is first needed. `seed`
    chooses the parts: so many `pairs` of a sequence and a head of k, the first, middle and last
    rows of each where scores are too many, and of gradients all rows; all else must be finite."""

    def __init__(self, inputs: Inputs, seed: int = 0, pairs: int = 4) -> None:
        self._inputs, self._seed, self._most_pairs = inputs, seed, pairs

    @cached_property
    def expected(self) -> dict[str, _Expected]:
        """By the result's name: out, softmax_lse and, where there is a dout, dq, dk, dv."""
        found: dict[str, _Expected] = {}
        gradients = self._inputs.dout is not None
        for sequence, head in self._pairs():
            pieces = list(self._inputs.pieces(sequence, head, some=not gradients))
            exact = [piece.reference(torch.float64, gradients=gradients) for piece in pieces]
            self._add(found, pieces, exact)
            for order in self._orders():
                dtype = self._inputs.call.q.dtype
                same = [piece.reference(dtype, order, gradients=gradients) for piece in pieces]
                for name in found:
                    each = zip(_joined(name, same), _joined(name, exact), strict=True)
                    error = max(_largest(x.double() - y) for x, y in each)
                    found[name].same_dtype_error = max(found[name].same_dtype_error, error)
        return found

    def check(self, results: Mapping[str, Tensor | None]) -> Correctness:
        """Judge results by name, shaped as backends return them; None is no result."""
        judged = [
            self._judge(name, result) for name, result in results.items() if result is not None
        ]
        reasons = [found.reason for found in judged if found.reason]
        return Correctness(max((x.error for x in judged), default=0.0), "; ".join(reasons))

    def _judge(self, name: str, result: Tensor) -> Correctness:
        q, k, v = self._inputs.call[:3]
        like = {"out": q, "dq": q, "dk": k, "dv": v}.get(name)
        if like is not None and (result.shape != like.shape or result.dtype != like.dtype):
            wanted, got = ((tuple(x.shape), x.dtype) for x in (like, result))
            return Correctness(math.inf, f"{name} must be {wanted}, got {got}")
        # What a page or a cache holds beside its sequences has no gradient that anybody reads.
        if like is not None and not bool(torch.isfinite(result).all()):
            return Correctness(math.inf, f"{name} holds values that are not finite")
        expected, error = self.expected[name], 0.0
        bound = error_bound(q.dtype, expected.same_dtype_error, expected.scale)
        # Kernels keep scores in float32, whose rounding is the weight's relative error.
        roundings = max(self._largest_score, _LUCK)
        bound += torch.finfo(torch.float32).eps * roundings * expected.scale
        for piece, exact in expected.exact:
            actual = piece.of(name, result).double()
            infinite = torch.isinf(exact)
            if not torch.equal(infinite, ~torch.isfinite(actual)):
                reason = f"{name} is infinite in other places than the reference"
                return Correctness(math.inf, reason)
            error = max(error, _largest(actual - exact))
        if error <= bound:
            return Correctness(error / bound if bound else 0.0)
        reason = f"{name} is off by {error:.3g} where at most {bound:.3g} is allowed"
        return Correctness(error / bound if bound else math.inf, reason)

    @cached_property
    def _largest_score(self) -> float:
        """At least that of any query and key, before ALiBi."""
        q, k, _, scale, terms, _ = self._inputs.call
        longest = [_largest(x.detach().float().norm(dim=-1)) for x in (q, k)]
        return min(math.prod(longest) * scale, terms.softcap or math.inf)

    def _pairs(self) -> list[tuple[int, int]]:
        """The first, the last and random other (sequence, head of k) pairs of those with rows."""
        heads = range(self._inputs.problem.heads_kv)
        known = self._inputs.sequences
        pairs = [(index, head) for index, x in enumerate(known) if x[2] for head in heads]
        picked = {*pairs[:1], *pairs[-1:]}
        rest = [pair for pair in pairs if pair not in picked]
        random.Random(self._seed).shuffle(rest)
        return sorted([*picked, *rest[: self._most_pairs - len(picked)]])

    def _orders(self) -> list[Tensor]:
        """Orders of head_dim for the same-dtype computation. The largest error of few elements is a
        matter of luck; other orders of summation tell what rounding does to them."""
        q = self._inputs.call.q
        generator = torch.Generator().manual_seed(0)
        count = _ORDERS if q.numel() < _FEW else 1
        orders = [torch.randperm(q.shape[-1], generator=generator) for _ in range(count)]
        return [order.to(q.device) for order in orders]

    @staticmethod
    def _add(
        found: dict[str, _Expected], pieces: list[Piece], exact: list[dict[str, Tensor]]
    ) -> None:
        for name in exact[0] if exact else ():
            joined = _joined(name, exact)
            expected = found.setdefault(name, _Expected([]))
            expected.exact += list(zip(pieces, joined, strict=False))
            expected.scale = max(expected.scale, *map(_largest, joined))


def _joined(name: str, pieces: list[dict[str, Tensor]]) -> list[Tensor]:
    """One result of the pieces of one sequence and head: of keys, the sum over rows."""
    each = [piece[name] for piece in pieces]
    if name in ("dk", "dv"):
        return [torch.stack([x.double() for x in each]).sum(0)]
    return each


def _largest(x: Tensor) -> float:
    """The largest finite magnitude, 0 without any."""
    finite = x[torch.isfinite(x)]
    return float(finite.abs().max()) if finite.numel() else 0.0
