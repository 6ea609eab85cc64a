"""Calls with terms and lengths, and the judgement of their results: what several tests share."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from support import DEVICE
from torch import Tensor

from flashmoe.measure.reference import error_bound, sequences_reference
from flashmoe.spec.call import NO_TERMS, Call, Sequences, Terms
from flashmoe.spec.mask import FULL, Mask

# Sequences of packed batches: empty, of one token, and of more than a kernel's block.
lengths = st.one_of(st.integers(0, 3), st.integers(0, 40), st.integers(60, 100))
masks = st.one_of(
    st.sampled_from([Mask(), Mask(right=0)]),
    st.builds(Mask, st.integers(-1, 30), st.integers(-1, 30)),
)


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def cumulative(lengths: list[int]) -> Tensor:
    """(batch + 1,)"""
    return int32([sum(lengths[:i]) for i in range(len(lengths) + 1)])


def random_terms(names: tuple[str, ...], heads: int, batch: int | None = None) -> Terms:
    """Those of `names`; slopes by sequence, too, with a batch."""
    slopes = torch.rand(heads if batch is None else (batch, heads), device=DEVICE)
    return Terms(
        3.0 if "softcap" in names else 0.0,
        slopes if "alibi" in names else None,
        torch.randn(heads, device=DEVICE) * 2 if "sink" in names else None,
    )


def keywords(terms: Terms) -> dict[str, Any]:
    """The terms as our functions take them."""
    return terms._asdict()


def assert_matches(out: Tensor, lse: Tensor | None, call: Call, mask: Mask = FULL) -> None:
    """Error at most twice that of the same-dtype PyTorch computation, plus rounding; what is in no
    sequence, and rows that see nothing, exactly 0."""
    expected, expected_lse = sequences_reference(call, mask)
    assert (out.shape, out.dtype) == (call.q.shape, call.q.dtype)
    assert out.is_contiguous()
    if lse is not None:
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-5)
    if not out.numel():
        return
    assert not out[expected == 0].any()
    error = (out.double() - expected).abs().max().item()
    same_error = max((x.double() - expected).abs().max().item() for x in _same_dtype(call, mask))
    bound = error_bound(out.dtype, same_error, max(1.0, expected.abs().max().item()))
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"


def _same_dtype(call: Call, mask: Mask) -> list[Tensor]:
    """out as PyTorch computes it in q's dtype, with head_dim in some orders: what rounding does."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        order = torch.randperm(call.q.shape[-1], generator=generator).to(call.q.device)
        other = call._replace(q=call.q[..., order], k=call.k[..., order])
        found.append(sequences_reference(other, mask, call.q.dtype)[0])
    return found


def assert_gradients(
    actual: tuple[Tensor, ...], douts: tuple[Tensor, Tensor], call: Call, mask: Mask = FULL
) -> None:
    """Of q, k, v and, where there are any, sinks: by the same rule, against autograd through the
    reference. douts are the gradients of out and softmax_lse."""

    def gradients(signs: Tensor | int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in call[:3]]
        terms = call.terms
        if terms.sinks is not None:
            sinks = terms.sinks.detach().to(torch.promote_types(dtype, torch.float32))
            terms = terms._replace(sinks=sinks.requires_grad_())
            leaves.append(terms.sinks)
        out, lse = sequences_reference(
            call._replace(q=leaves[0], k=leaves[1], v=leaves[2], terms=terms), mask, dtype
        )
        # What no row sees has a softmax_lse of -inf, and no gradient.
        dlse = douts[1].to(dtype).masked_fill(lse == -torch.inf, 0.0)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        total = (out * (douts[0] * signs).to(dtype)).sum() + (lse * dlse).sum()
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        return tuple(
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)
        )

    generator = torch.Generator().manual_seed(0)
    shape = douts[0].shape[:-1]
    signs = torch.randint(0, 2, shape, generator=generator).to(DEVICE) * 2 - 1
    tried = []
    for sign in (1, signs.unsqueeze(-1)):
        pairs = zip(gradients(sign, call.q.dtype), gradients(sign, torch.float64), strict=True)
        tried.append([_distance(same, exact) for same, exact in pairs])
    names = ("dq", "dk", "dv", "dsinks")
    expected = gradients(1, torch.float64)
    for name, x, exact, same_error in zip(
        names, actual, expected, map(max, zip(*tried, strict=True)), strict=False
    ):
        assert x.shape == exact.shape
        if not x.numel():
            continue
        # Of q's dtype for sinks, too: their gradient is computed from out, which was rounded to it.
        bound = error_bound(call.q.dtype, same_error, max(1.0, exact.abs().max().item()))
        # float32 sums, whose order is anybody's choice.
        bound += 16 * torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())
        error = _distance(x, exact)
        assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}"


def _distance(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).abs().max().item() if x.numel() else 0.0


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
