"""What tests of terms and sequences share: random calls whose tensors are NaN where nothing may be
read, and the judgement of what comes back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from support import DEVICE, LAYOUTS, guarded
from torch import Tensor

from flashmoe.backends import BACKENDS
from flashmoe.frontend.attend import new_rng_state
from flashmoe.machine.device import arch
from flashmoe.measure.reference import error_bound, sequences_reference
from flashmoe.spec.call import DENSE, NO_TERMS, Call, Saved, Sequences, Terms
from flashmoe.spec.mask import FULL, Mask
from flashmoe.spec.problem import TERMS, Problem
from flashmoe.spec.sequence import rows_of_keys, sequences_of
from flashmoe.tiles import Tile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def backends_for(problem: Problem) -> list[tuple[str, Tile | None]]:
    """What computes `problem` on this machine, with its default tile. Interpreted, Triton takes
    seconds for what others do in milliseconds."""
    here = arch(DEVICE)
    return [
        (name, backend.default_tile(problem, here))
        for name, backend in BACKENDS.items()
        if not (name == "triton" and DEVICE.type == "cpu")
        and not (backend.unavailable(DEVICE) or backend.unsupported(problem, here))
    ]


def check_forward(call: Call, mask: Mask) -> None:
    problem = Problem.of_call(call, mask)
    for name, tile in backends_for(problem):
        out, lse = BACKENDS[name].bind(problem, tile)(call)
        if name != "cpu" and lse is not None:  # others leave what is in no sequence as it is
            unused = ~used_rows(call)[0]
            out[unused] = 0
            lse.masked_fill_(unused.unsqueeze(-2), -torch.inf)
        assert_forward_matches(out, lse, call, mask)


def check_backward(call: Call, saved: Saved, mask: Mask) -> None:
    problem = Problem.of_call(call, mask, "bwd")
    for name, tile in backends_for(problem):
        gradients = BACKENDS[name].bind_backward(problem, tile)(call, saved)
        assert_backward_matches(gradients, call, saved, mask)


def int32(values: Sequence[int] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    """Tensors that a list of cases has on the CPU where others are; sizes stay on the host."""
    return {
        name: x.to(DEVICE) if isinstance(x, Tensor) and x.is_cpu and "max_" not in name else x
        for name, x in arguments.items()
    }


def cumulative(lengths: list[int]) -> Tensor:
    """(batch + 1,)"""
    return int32([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def masks() -> st.SearchStrategy[Mask]:
    narrow, wide = st.integers(-1, 8), st.integers(-1, 80)
    limits = st.one_of(narrow, wide)
    return st.one_of(
        st.just(FULL), st.builds(Mask, st.just(-1), st.just(0)), st.builds(Mask, limits, limits)
    )


@st.composite
def terms(
    draw: st.DrawFn, batch: int, heads: int, dense: tuple[int, int] | None, dtype: torch.dtype
) -> Terms:
    """Of a dense call, of (seqlen_q, seqlen_kv), at least one: what plain kernels do not have."""
    known = TERMS if dense else tuple(term for term in TERMS if term != "mask")
    chosen = draw(st.sets(st.sampled_from(known), min_size=1 if dense else 0))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.sampled_from([(heads,), (batch, heads)]))
    slopes = torch.rand(shape, generator=generator).to(DEVICE)
    sinks = 3 * torch.randn(heads, generator=generator).to(DEVICE)
    state = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator)
    return Terms(
        draw(st.sampled_from([0.5, 20.0])) if "softcap" in chosen else 0.0,
        slopes if "alibi" in chosen else None,
        sinks if "sink" in chosen else None,
        draw(st.sampled_from([0.1, 0.5])) if "dropout" in chosen else 0.0,
        state.to(DEVICE) if "dropout" in chosen else None,
        draw(attn_masks((batch, heads, *dense), dtype)) if dense and "mask" in chosen else None,
    )


@st.composite
def attn_masks(draw: st.DrawFn, full: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Broadcast along any dimensions, of any strides, with NaN, or True, between its rows."""
    shape = tuple(n if draw(st.booleans()) else 1 for n in full)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from((torch.bool, torch.float32, dtype)))
    pattern = draw(st.sampled_from(("random", "padding", "staircase")))
    if pattern == "random":
        share = draw(st.sampled_from((0.0, 0.1, 0.6, 1.0)))
        seen = torch.rand(shape, generator=generator) < share
    elif pattern == "padding":
        first, last = sorted(draw(st.tuples(*2 * [st.integers(0, full[3])])))
        place = torch.arange(shape[3])
        seen = ((place >= first) & (place < last)).expand(shape)
    else:
        place = torch.arange(shape[3]) - torch.arange(shape[2]).unsqueeze(1)
        seen = (place % 40 < 20).expand(shape)
    mask = seen
    if kind != torch.bool:
        lowest = draw(st.sampled_from((-torch.inf, torch.finfo(kind).min)))
        size = draw(st.sampled_from((0.0, 2.0)))
        mask = torch.randn(shape, generator=generator).to(kind) * size
        mask = mask.masked_fill(~seen, lowest)
    layout = draw(st.sampled_from(("contiguous", "transposed", "padded", "expanded")))
    if layout == "expanded":
        return mask.to(DEVICE).expand(full)
    if layout == "contiguous":
        return mask.contiguous().to(DEVICE)
    rows, keys = shape[2:] if layout == "padded" else shape[:1:-1]
    buffer = torch.full((*shape[:2], rows + 1, keys + 3), torch.nan).to(kind).to(DEVICE)
    found = buffer[..., :rows, :keys]
    if layout == "transposed":
        found = found.transpose(2, 3)
    return found.copy_(mask.to(DEVICE))


class Drawn:
    """Heads, dtype, strides and values of a call's tensors."""

    def __init__(self, draw: st.DrawFn, max_head_dim: int = 72) -> None:
        self.draw = draw
        self.dtype = draw(st.sampled_from(DTYPES))
        self.heads_kv = draw(st.integers(1, 2))
        self.heads_q = self.heads_kv * draw(st.integers(1, 3))
        head_dims = st.integers(1, max_head_dim // 8).map(lambda n: 8 * n)
        self.head_dim = draw(head_dims)
        self.head_dim_v = draw(st.one_of(st.just(self.head_dim), head_dims))
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def queries(self, batch: int, rows: int) -> Tensor:
        return self._tensor(batch, rows, self.heads_q, self.head_dim)

    def keys(self, batch: int, rows: int) -> tuple[Tensor, Tensor]:
        """And values."""
        k, v = (
            self._tensor(batch, rows, self.heads_kv, head_dim)
            for head_dim in (self.head_dim, self.head_dim_v)
        )
        return k, v

    def _tensor(self, *shape: int) -> Tensor:
        layout = self.draw(st.sampled_from(LAYOUTS))
        return guarded(shape, self.dtype, layout, DEVICE, self.generator)

    def call(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, batch: int) -> Call:
        """With terms, and NaN in every row that is in no sequence."""
        scale = self.draw(st.sampled_from([self.head_dim**-0.5, 1.5]))
        dense = (q.shape[1], k.shape[1]) if sequences is DENSE else None
        of_call = self.draw(terms(batch, self.heads_q, dense, self.dtype))
        call = Call(q, k, v, scale, of_call, sequences)
        used_q, used_k = used_rows(call)
        for x, used in ((q, used_q), (k, used_k), (v, used_k)):
            x.masked_fill_(~used[..., None, None], torch.nan)
        return call


def lengths() -> st.SearchStrategy[int]:
    return st.one_of(st.integers(0, 1), st.integers(2, 9), st.integers(10, 70))


@st.composite
def dense_calls(draw: st.DrawFn) -> Call:
    drawn, batch = Drawn(draw), draw(st.integers(1, 2))
    q = drawn.queries(batch, draw(lengths()))
    k, v = drawn.keys(batch, draw(lengths()))
    return drawn.call(q, k, v, DENSE, batch)


@st.composite
def packed_queries(draw: st.DrawFn, drawn: Drawn, batch: int) -> tuple[Tensor, Sequences]:
    """With rows in front of the first sequence and behind the last that are in none."""
    lens = draw(st.lists(lengths(), min_size=batch, max_size=batch))
    cu_seqlens = torch.tensor([draw(st.integers(0, 3)), *lens]).cumsum(0)
    q = drawn.queries(1, int(cu_seqlens[-1]) + draw(st.integers(0, 3)))[0]
    longest = max(lens) + draw(st.integers(0, 5))
    return q, Sequences(cu_seqlens_q=int32(cu_seqlens), max_seqlen_q=longest)


@st.composite
def packed_calls(draw: st.DrawFn) -> Call:
    """Some with keys that are not used behind those of each sequence."""
    drawn, batch = Drawn(draw), draw(st.integers(1, 4))
    q, sequences = draw(packed_queries(drawn, batch))
    lens = draw(st.lists(lengths(), min_size=batch, max_size=batch))
    cu_seqlens = torch.tensor([draw(st.integers(0, 3)), *lens]).cumsum(0)
    total = int(cu_seqlens[-1]) + draw(st.integers(0, 3))
    k, v = (x[0] for x in drawn.keys(1, total))
    sequences = sequences._replace(cu_seqlens_k=int32(cu_seqlens), max_seqlen_k=max(lens))
    if draw(st.booleans()):
        used = [draw(st.integers(0, length)) for length in lens]
        sequences = sequences._replace(seqused_k=int32(used))
    return drawn.call(q, k, v, sequences, batch)


@st.composite
def cached_calls(draw: st.DrawFn) -> Call:
    """Keys in a cache, dense or in pages of any order, some left padded; q dense or packed."""
    drawn, batch = Drawn(draw), draw(st.integers(1, 4))
    if draw(st.booleans()):
        q, sequences = draw(packed_queries(drawn, batch))
    else:
        seqlen_q = draw(st.one_of(st.just(1), st.integers(1, 20)))
        q, sequences = drawn.queries(batch, seqlen_q), DENSE
    page_size, capacity = draw(lengths()), 70
    if draw(st.booleans()):
        page_size = max(page_size, 1)
        pages = -(-capacity // page_size)
        shape, capacity = (pages * batch + 2, page_size), pages * page_size
        table = torch.randperm(shape[0], generator=drawn.generator)[: pages * batch]
        sequences = sequences._replace(block_table=int32(table.reshape(batch, pages)))
    elif draw(st.booleans()):
        shape = (batch, capacity)
    else:
        batches = batch + draw(st.integers(0, 2))
        shape = (batches, capacity)
        index = torch.randperm(batches, generator=drawn.generator)[:batch]
        sequences = sequences._replace(cache_batch_idx=int32(index))
    k, v = drawn.keys(*shape)
    used = [min(draw(lengths()), capacity) for _ in range(batch)]
    sequences = sequences._replace(seqused_k=int32(used))
    if draw(st.booleans()):
        padding = [draw(st.integers(0, length)) for length in used]
        sequences = sequences._replace(leftpad_k=int32(padding))
    call = drawn.call(q, k, v, sequences, batch)
    if sequences.block_table is not None:
        # What a table holds behind the pages in use is no page.
        column = torch.arange(sequences.block_table.shape[1], device=DEVICE)
        unused = column >= -(-int32(used) // page_size).unsqueeze(1)
        sequences.block_table.masked_fill_(unused, draw(st.sampled_from([-1, 2**31 - 1])))
    return call


def random_terms(names: tuple[str, ...], heads: int, batch: int | None = None) -> Terms:
    """Those of `names`; slopes by sequence, too, with a batch."""
    slopes = torch.rand(heads if batch is None else (batch, heads), device=DEVICE)
    return Terms(
        3.0 if "softcap" in names else 0.0,
        slopes if "alibi" in names else None,
        torch.randn(heads, device=DEVICE) * 2 if "sink" in names else None,
        *((0.25, new_rng_state(DEVICE)) if "dropout" in names else ()),
    )


def keywords(terms: Terms) -> dict[str, Any]:
    """The terms as our functions take them."""
    return {name: x for name, x in terms._asdict().items() if name != "attn_mask" or x is not None}


def dense_call(q: Tensor, k: Tensor, v: Tensor, terms: Terms = NO_TERMS) -> Call:
    return Call(q, k, v, float(q.shape[-1] ** -0.5), terms)


def packed_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    terms: Terms = NO_TERMS,
    seqused_k: Tensor | None = None,
) -> Call:
    sequences = Sequences(
        *(cumulative(lengths_q), cumulative(lengths_k), seqused_k),
        max_seqlen_q=max(lengths_q, default=0),
        max_seqlen_k=max(lengths_k, default=0),
    )
    return Call(q, k, v, float(q.shape[-1] ** -0.5), terms, sequences)


def used_rows(call: Call) -> tuple[Tensor, Tensor]:
    """Which rows of q, and of k and v, are in a sequence."""
    used_q, used_k = (torch.zeros(x.shape[:-2], dtype=torch.bool, device=DEVICE) for x in call[:2])
    for index, sequence in enumerate(sequences_of(call)):
        rows = used_q if call.sequences.cu_seqlens_q is not None else used_q[index]
        rows[sequence.q_begin : sequence.q_begin + sequence.seqlen_q] = True
        used_k.view(-1)[rows_of_keys(call, index, sequence)] = True
    return used_q, used_k


def _known_lse(lse: Tensor) -> Tensor:
    """Hopper's kernel adds no mask's value below about -1e38, whatever the scale: of rows that see
    none but such, softmax_lse is some very low number."""
    return torch.where(lse.isfinite(), lse.clamp(min=-1e36), lse)


def assert_forward_matches(out: Tensor, lse: Tensor | None, call: Call, mask: Mask = FULL) -> None:
    """tests/support.py's rule for any call: at most twice the error of the same-dtype computation,
    plus rounding: of the result, and in float32, which is all that kernels compute scores in, of
    the largest score. Rows that see nothing are exactly 0."""
    expected, expected_lse = sequences_reference(call, mask)
    assert out.shape == (*call.q.shape[:-1], call.v.shape[-1])
    assert out.dtype == call.q.dtype
    assert out.is_contiguous()
    if lse is not None:
        assert lse.shape == expected_lse.shape
        assert lse.dtype == torch.float32
        found, wanted = map(_known_lse, (lse.double(), expected_lse))
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-5)
    assert not out[expected == 0].any()
    error = _largest(out.double() - expected)
    tried = [sequences_reference(_shuffled(call, x), mask, out.dtype)[0] for x in _orders(call)]
    same = _largest_of(tried, expected)
    scale = max(1.0, _largest(expected))
    bound = error_bound(out.dtype, same, scale)
    bound += torch.finfo(torch.float32).eps * scale * _largest_score(call)
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"


def assert_gradients_of_call(
    actual: tuple[Tensor, ...], dout: Tensor, dlse: Tensor, call: Call, mask: Mask = FULL
) -> None:
    """Of q, k, v and, where there are any, sinks, for these gradients of out and softmax_lse."""
    out, lse = sequences_reference(call, mask)
    # What no row sees has a softmax_lse of -inf, and no gradient.
    saved = Saved(dout, out, lse, dlse.masked_fill(lse == -torch.inf, 0.0))
    assert_backward_matches(actual, call, saved, mask)


def assert_backward_matches(
    actual: tuple[Tensor, ...], call: Call, saved: Saved, mask: Mask
) -> None:
    """The same for dq, dk, dv and, where it is among them, the gradient of sinks; float32 may round
    the terms of a sum in any order."""
    exact = _reference_gradients(call, saved, mask, torch.float64, _orders(call)[0])
    tried = [_reference_gradients(call, saved, mask, call.q.dtype, x) for x in _orders(call)]
    sums = _sums_of_magnitudes(call, saved, mask)
    for name, x, expected, of_terms, *same in zip(
        ("dq", "dk", "dv", "dsinks"), actual, exact, sums, *tried, strict=False
    ):
        assert x.shape == expected.shape
        assert x.dtype == (torch.float32 if name == "dsinks" else call.q.dtype)
        assert x.is_contiguous()
        error = _largest(x.double() - expected)
        same_error = _largest_of(same, expected)
        # Of q's dtype for sinks, too: their gradient is computed from out, which was rounded to it.
        bound = error_bound(call.q.dtype, same_error, max(1.0, _largest(expected)))
        bound += torch.finfo(torch.float32).eps * of_terms
        assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}"


@st.composite
def saved(draw: st.DrawFn, call: Call, mask: Mask) -> Saved:
    """What a forward leaves, random gradients of out and, in some cases, of softmax_lse; NaN where
    rows are in no sequence."""
    out, lse = sequences_reference(call, mask)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dout, dlse = (torch.randn(x.shape, generator=generator).to(DEVICE) for x in (out, lse))
    unused = ~used_rows(call)[0]
    dout.masked_fill_(unused[..., None, None], torch.nan)
    dlse.masked_fill_(lse == -torch.inf, 0.0)
    of_forward = out.to(call.q.dtype), lse.float()
    return Saved(dout.to(call.q.dtype), *of_forward, dlse if draw(st.booleans()) else None)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _largest_of(tried: Sequence[Tensor], expected: Tensor) -> float:
    """The largest error of these computations. One that has no number says nothing: float16 does
    not hold its lowest value and a score less."""
    errors = [_largest(x.double() - expected) for x in tried]
    return max((x for x in errors if math.isfinite(x)), default=0.0)


def _largest_score(call: Call) -> float:
    """At least that of any query and key, before ALiBi, and of a mask, beside whose lowest values
    others drown, in float64, too, or are rounded."""
    q, k = (_largest(x.double().nan_to_num().norm(dim=-1)) for x in call[:2])
    mask, added = call.terms.attn_mask, 0.0
    if mask is not None and mask.dtype != torch.bool:
        finite = mask.double().nan_to_num(0.0, 0.0, 0.0).abs()
        added = _largest(finite.masked_fill(finite > 1e30, 0.0))
    return min(q * k * call.softmax_scale, call.terms.softcap or torch.inf) + added


def _orders(call: Call) -> list[Tensor]:
    """Orders in which head_dim may be added up: one computation's rounding may be lucky."""
    generator = torch.Generator().manual_seed(0)
    count = 16 if call.q.numel() < 1 << 12 else 4 if call.q.numel() < 1 << 15 else 2
    return [torch.randperm(call.q.shape[-1], generator=generator).to(DEVICE) for _ in range(count)]


def _shuffled(call: Call, order: Tensor) -> Call:
    return call._replace(q=call.q[..., order], k=call.k[..., order])


def _reference_gradients(
    call: Call, saved: Saved, mask: Mask, dtype: torch.dtype, order: Tensor
) -> tuple[Tensor, ...]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in call[:3]]
    call = call._replace(q=leaves[0], k=leaves[1], v=leaves[2])
    if call.terms.sinks is not None:
        sinks = call.terms.sinks.detach().to(torch.promote_types(dtype, torch.float32))
        leaves.append(sinks.requires_grad_())
        call = call._replace(terms=call.terms._replace(sinks=sinks))
    out, lse = sequences_reference(_shuffled(call, order), mask, dtype)
    used = used_rows(call)[0][..., None, None]
    of_out = (out * saved.dout.to(dtype).masked_fill(~used, 0.0)).sum()
    if saved.dlse is not None:
        of_out = of_out + (lse * saved.dlse.to(dtype)).masked_fill(saved.dlse == 0, 0.0).sum()
    return torch.autograd.grad(of_out, leaves, allow_unused=True, materialize_grads=True)


def _sums_of_magnitudes(call: Call, saved: Saved, mask: Mask) -> list[float]:
    """The largest sum of magnitudes of the terms of dq, dk, dv and the gradient of sinks, of all
    sequences at once: with one-hot values the reference's out is P, whose columns are the rows of
    k."""
    q, k, v, dout = (
        x.double().nan_to_num().flatten(0, -3).transpose(0, 1) for x in (*call[:3], saved.dout)
    )
    one_hot = torch.eye(k.shape[1], dtype=torch.float64, device=DEVICE)
    one_hot = one_hot.reshape(*call.k.shape[:-2], 1, k.shape[1]).expand(
        *call.k.shape[:-1], k.shape[1]
    )
    p = sequences_reference(call._replace(v=one_hot), mask)[0].flatten(0, -3).transpose(0, 1)
    group = q.shape[0] // k.shape[0]
    k, v = (x.abs().repeat_interleave(group, dim=0) for x in (k, v))
    ds = p * (dout.abs() @ v.transpose(-1, -2))
    if saved.dlse is not None:
        dlse = saved.dlse.double().abs()
        ds = ds + p * (dlse if dlse.dim() == 2 else dlse.transpose(0, 1).flatten(1)).unsqueeze(-1)
    ds = ds * call.softmax_scale
    dk, dv = ds.transpose(-1, -2) @ q.abs(), p.transpose(-1, -2) @ dout.abs()
    grouped = (x.unflatten(0, (-1, group)).sum(1) for x in (dk, dv))
    of_sinks = (dout.abs() @ v.transpose(-1, -2) * p).sum((-1, -2))
    return [_largest(x) for x in (ds @ k, *grouped, of_sinks)]
