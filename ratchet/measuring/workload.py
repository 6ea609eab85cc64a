"""A case as two calls on random data, ours and SDPA's, and whether ours is right."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import flashmoe
from flashmoe.measure.reference import attention_reference, error_bound
from flashmoe.ratchet.measuring.suite import Case
from flashmoe.spec.call import Call, Sequences, Terms
from flashmoe.spec.sequence import rows_of_keys, sequences_of

# Torch's own, whatever torch.nn.functional calls so by now: users put ours there. Not by the
# library's name for it, which older builds lack.
torch_sdpa = torch._C._nn.scaled_dot_product_attention

_Results = tuple[Tensor, ...]
_Inputs = tuple[Tensor, Tensor, Tensor]
# Keys of a page, of which a cache has no more than it needs, in any order.
_PAGE_SIZE = 64
# Bends scores of standard normal data, which are mostly below 3.
_SOFTCAP = 3.0
# Elements of one materialized score matrix while checking: 0.25 GiB in float64.
_MAX_SCORES = 1 << 25
# Below so many elements the same-dtype computation is made in so many orders.
_FEW, _ORDERS = 1 << 20, 8


@dataclass(frozen=True, slots=True)
class Correctness:
    """Largest absolute errors against the reference as a share of what is allowed, over all
    results; `reason` says what is wrong, empty when nothing is."""

    error: float
    reason: str = ""


class _Piece(NamedTuple):
    """Some heads of one sequence: `q` and `k` are its rows in tensors whose batches, or pages, lie
    one behind the other."""

    q: slice
    k: Tensor
    heads: slice
    heads_kv: slice


def random_call(case: Case, device: torch.device, seed: int) -> Call:
    """The case's call on standard normal data, with NaN for keys that it may not read."""
    p, generator = case.problem, torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def lengths(name: str) -> list[int]:
        return [getattr(part, name) for part in case.parts]

    def cumulative(lengths: list[int]) -> Tensor:
        return (
            torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        )

    sequences, rows, keys = Sequences(), (p.batch, p.seqlen_q), (p.batch, p.seqlen_kv)
    lens_q, lens_k = lengths("seqlen_q"), lengths("seqlen_kv")
    if p.layout.startswith("packed"):
        rows = (sum(lens_q),)
        sequences = Sequences(cumulative(lens_q), max_seqlen_q=max(lens_q))
    if p.layout == "packed":
        keys = (sum(lens_k),)
        sequences = sequences._replace(cu_seqlens_k=cumulative(lens_k), max_seqlen_k=max(lens_k))
    elif p.layout != "dense":
        used = torch.tensor(lens_k, dtype=torch.int32, device=device)
        sequences = sequences._replace(seqused_k=used)
    if "paged" in p.layout:
        pages = -(-p.seqlen_kv // _PAGE_SIZE)
        keys = (p.batch * pages, _PAGE_SIZE)
        order = torch.randperm(keys[0], generator=generator, device=device, dtype=torch.int32)
        sequences = sequences._replace(block_table=order.reshape(p.batch, pages))
    dtype = getattr(torch, p.dtype)
    q = randn(*rows, p.heads_q, p.head_dim).to(dtype)
    k, v = (randn(*keys, p.heads_kv, p.head_dim).to(dtype) for _ in "kv")
    slopes = 2.0 ** torch.linspace(-1, -8, p.heads_q, device=device)
    terms = Terms(
        _SOFTCAP if "softcap" in p.terms else 0.0,
        slopes if "alibi" in p.terms else None,
        randn(p.heads_q) if "sink" in p.terms else None,
    )
    if set(terms.names) != set(p.terms):
        raise NotImplementedError(f"terms must be some of {', '.join(Terms._fields)} here, got {p}")
    call = Call(q, k, v, float(p.head_dim**-0.5), terms, sequences)
    if sequences.seqused_k is not None:
        unused = torch.ones(k.shape[:2], dtype=torch.bool, device=device).flatten()
        for index, sequence in enumerate(sequences_of(call)):
            unused[rows_of_keys(call, index, sequence)] = False
        for x in (k, v):
            x.flatten(0, 1)[unused] = torch.nan
    return call


class Workload:
    """One case's data and the calls on them. Each call returns (out,), or (out, dq, dk, dv) where
    the case has a backward."""

    def __init__(
        self, case: Case, device: torch.device, seed: int, options: Mapping[str, str] | None = None
    ) -> None:
        """`options`: backend and tile of our function, where others than the planned ones are to
        run."""
        self._case, self._options = case, dict(options or {})
        self._call = random_call(case, device, seed)
        generator = torch.Generator(device).manual_seed(seed)

        def randn_like(x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=generator, device=device).to(x.dtype)

        q, k, v = self._call[:3]
        self._dout = randn_like(q)
        if case.problem.layout == "dense":
            self._transposed = tuple(x.transpose(1, 2).contiguous() for x in (q, k, v))
        if case.yardstick == case.problem:
            self._yardstick = self._transposed
        else:
            of_q, of_k = (
                q.new_empty(y.batch, heads, seqlen, y.head_dim)
                for y in (case.yardstick,)
                for heads, seqlen in ((y.heads_q, y.seqlen_q), (y.heads_kv, y.seqlen_kv))
            )
            self._yardstick = (randn_like(of_q), randn_like(of_k), randn_like(of_k))

    @functools.cached_property
    def ours(self) -> Callable[[], _Results]:
        """Our function, as users call it. Raises NotImplementedError where the build that is
        measured has nothing like it."""
        return self.with_options(self._options)

    def with_options(self, options: Mapping[str, str]) -> Callable[[], _Results]:
        name, keywords = self._arguments()
        function = getattr(flashmoe, name, None)
        if function is None:
            raise NotImplementedError(f"flashmoe has no {name}")
        if unknown := sorted(set(keywords) - set(inspect.signature(function).parameters)):
            raise NotImplementedError(f"{name} has no argument {', '.join(unknown)}")
        call = functools.partial(function, **keywords, **options)
        return self._timed(call, self._call[:3], self._dout)

    @functools.cached_property
    def sdpa(self) -> Callable[[], _Results]:
        """The yardstick."""
        call = functools.partial(torch_sdpa, **self._sdpa_arguments)
        dout = self._dout
        if self._case.yardstick == self._case.problem:
            dout = dout.transpose(1, 2).contiguous()
        elif self._case.backward:
            dout = torch.randn_like(self._yardstick[0])
        return self._timed(call, self._yardstick, dout)

    def other(
        self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], heads_first: bool
    ) -> Callable[[], _Results]:
        """Another implementation on the data of a dense case, `heads_first` in SDPA's layout and
        otherwise in ours. Results are (batch, seqlen, heads, head_dim), as `ours` returns them."""
        if not heads_first:
            return self._timed(attend, self._call[:3], self._dout)
        dout = self._dout.transpose(1, 2).contiguous()
        call = self._timed(attend, self._transposed, dout)
        return lambda: tuple(x.transpose(1, 2) for x in call())

    def sdpa_backend(self) -> str:
        """Which of its own backends SDPA runs on these inputs, by the function it asks itself."""
        chosen = torch._fused_sdp_choice(*self._yardstick, **self._sdpa_arguments)
        return str(SDPBackend(chosen).name).lower()

    def check(self) -> Correctness:
        """Our results against the reference, with twice the error of the same computation in the
        case's dtype allowed, plus the rounding of the result."""
        results = [x.detach().flatten(0, -3) for x in self.ours()]
        names = [f"{self._case.kind}: {name}" for name in ("out", "dq", "dk", "dv")]
        judges = [_Judge(name, x.dtype) for name, x in zip(names, results, strict=False)]
        exact = torch.float64 if self._case.problem.dtype == "float32" else torch.float32
        for piece in self._pieces():
            q, k = (piece.q, piece.heads), (piece.k, piece.heads_kv)
            actual = [x[where] for x, where in zip(results, (q, q, k, k), strict=False)]
            exactly = self._reference(piece, exact)
            for order in self._orders():
                same_dtype = self._reference(piece, results[0].dtype, order)
                for judge, *values in zip(judges, actual, exactly, same_dtype, strict=True):
                    judge.see(*values)
        reasons = [reason for judge in judges if (reason := judge.reason())]
        return Correctness(max(judge.share for judge in judges), "; ".join(reasons))

    def _timed(
        self, attend: Callable[..., Any], inputs: _Inputs, dout: Tensor
    ) -> Callable[[], _Results]:
        """What is timed of `attend`: all of it, or only the backward of a forward that ran here."""
        if not self._case.backward:
            return lambda: (attend(*inputs),)
        for x in inputs:
            x.requires_grad_()
        kept = None if "fwd" in self._case.directions else attend(*inputs)

        def call() -> _Results:
            out = attend(*inputs) if kept is None else kept
            gradients = torch.autograd.grad(out, inputs, dout, retain_graph=kept is not None)
            return (out, *gradients)

        return call

    def _arguments(self) -> tuple[str, dict[str, Any]]:
        """Which function of flashmoe computes the case, and its arguments besides q, k and v. Of
        those with a default only what the case needs: older builds have fewer."""
        mask, terms, s = self._case.problem.mask, self._call.terms, self._call.sequences
        keywords: dict[str, Any] = {}
        if mask.is_local:
            keywords["window_size"] = (mask.left, mask.right)
        elif mask.is_causal:
            keywords["causal"] = True
        keywords |= _given(terms)
        lengths = _given(s)
        if s.layout == "dense":
            return "flash_attn_func", keywords
        if s.layout == "packed":
            return "flash_attn_varlen_func", keywords | lengths
        lengths["cache_seqlens"] = lengths.pop("seqused_k")
        return "flash_attn_with_kvcache", keywords | lengths

    @property
    def _sdpa_arguments(self) -> dict[str, bool]:
        p = self._case.yardstick
        return {"is_causal": p.mask.is_causal, "enable_gqa": p.heads_q != p.heads_kv}

    def _pieces(self) -> Iterator[_Piece]:
        """The case in pieces whose scores fit in memory."""
        p, call = self._case.problem, self._call
        group = p.heads_q // p.heads_kv
        for index, sequence in enumerate(sequences_of(call)):
            begin = sequence.q_begin if call.q.dim() == 3 else index * p.seqlen_q
            keys = rows_of_keys(call, index, sequence)
            scores = group * sequence.seqlen_q * sequence.seqlen_kv
            step = max(1, _MAX_SCORES // scores)
            for h in range(0, p.heads_kv, step):
                end = min(h + step, p.heads_kv)
                yield _Piece(
                    slice(begin, begin + sequence.seqlen_q),
                    keys,
                    slice(h * group, end * group),
                    slice(h, end),
                )

    def _orders(self) -> list[Tensor]:
        """Orders of head_dim in which the same-dtype computation is made. The largest error of few
        elements is a matter of luck; other orders of summation tell what rounding does to them."""
        q, generator = self._call.q, torch.Generator().manual_seed(0)
        orders = [torch.arange(q.shape[-1])]
        while q.numel() < _FEW and len(orders) < _ORDERS:
            orders.append(torch.randperm(q.shape[-1], generator=generator))
        return [order.to(q.device) for order in orders]

    def _reference(
        self, piece: _Piece, dtype: torch.dtype, order: Tensor | None = None
    ) -> _Results:
        q, k, v = (x.detach().flatten(0, -3) for x in self._call[:3])
        of_q, of_k = (piece.q, piece.heads), (piece.k, piece.heads_kv)
        inputs = [x[where].to(dtype) for x, where in ((q, of_q), (k, of_k), (v, of_k))]
        for x in inputs:
            x.requires_grad_(self._case.backward)
        softcap, slopes, sinks = self._call.terms
        q, k = inputs[:2] if order is None else (x[..., order] for x in inputs[:2])
        out = attention_reference(
            *(x.unsqueeze(0) for x in (q, k, inputs[2])),
            mask=self._case.problem.mask,
            dtype=dtype,
            softcap=softcap,
            alibi_slopes=None if slopes is None else slopes[piece.heads],
            sinks=None if sinks is None else sinks[piece.heads],
        )[0][0]
        if not self._case.backward:
            return (out,)
        dout = self._dout.flatten(0, -3)[of_q].to(dtype)
        return (out.detach(), *torch.autograd.grad(out, inputs, dout))


def _given(arguments: Terms | Sequences) -> dict[str, Any]:
    """Those that are not left at their default, None or 0."""
    found = arguments._asdict().items()
    return {name: x for name, x in found if isinstance(x, Tensor) or x}


class _Judge:
    """Collects one result's errors piece by piece."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self._name, self._dtype = name, dtype
        self._error = self._same_dtype_error = self._scale = 0.0

    @torch.no_grad()
    def see(self, actual: Tensor, reference: Tensor, same_dtype: Tensor) -> None:
        error = (actual.to(reference.dtype) - reference).abs().max().item()
        same = (same_dtype.to(reference.dtype) - reference).abs().max().item()
        # max() drops a NaN on its right, and NaN here is as wrong as it gets.
        self._error = max(self._error, math.inf if math.isnan(error) else error)
        self._same_dtype_error = max(self._same_dtype_error, same)
        self._scale = max(self._scale, reference.abs().max().item())

    @property
    def share(self) -> float:
        return self._error / error_bound(self._dtype, self._same_dtype_error, self._scale)

    def reason(self) -> str:
        if self.share <= 1:
            return ""
        if math.isinf(self._error):
            return f"{self._name} is not finite where the reference is"
        bound = error_bound(self._dtype, self._same_dtype_error, self._scale)
        return f"{self._name} is off by {self._error:.3g}, allowed is {bound:.3g}"
