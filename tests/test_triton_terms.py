"""Softcap, ALiBi, sinks and dropout in the Triton kernels against float64 mathematics."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_calls import attn_masks
from torch import Tensor

from flashmoe.measure.reference import attention_reference, sequences_reference

pytest.importorskip("triton")

from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.spec.call import Call, Saved, Sequences, Terms
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = BACKENDS["triton"]

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1",
)


def assert_close(actual: Tensor, expected: Tensor, *same_dtype: Tensor) -> None:
    """Of several computations in the same dtype, for the rounding of one may be lucky."""
    error = (actual.double() - expected).abs().max().item()
    same = max((x.double() - expected).abs().max().item() for x in same_dtype)
    scale = max(1.0, expected.abs().max().item())
    assert error <= 2 * same + 8 * torch.finfo(actual.dtype).eps * scale


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    group=st.sampled_from((1, 2)),
    mask=st.sampled_from((Mask(), Mask(-1, 0), Mask(20, 3), Mask(9, 0))),
    softcap=st.sampled_from((0.0, 5.0, 30.0)),
    slopes=st.sampled_from(("", "heads", "batch")),
    sink=st.booleans(),
    dropout_p=st.sampled_from((0.0, 0.3)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    magnitude=st.sampled_from((1.0, 8.0)),
    seed=st.integers(0, 2**20),
)
def test_terms_forward_and_backward(
    lengths, group, mask, softcap, slopes, sink, dropout_p, dtype, magnitude, seed
):
    generator = torch.Generator().manual_seed(seed)
    batch, heads_kv, head_dim = 2, 2, 24
    heads = heads_kv * group

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = (random(batch, lengths[0], heads, head_dim) * magnitude).to(DEVICE, dtype)
    k, v = (random(batch, lengths[1], heads_kv, head_dim).to(DEVICE, dtype) for _ in "kv")
    alibi = {"": None, "heads": random(heads), "batch": random(batch, heads)}[slopes]
    alibi = None if alibi is None else alibi.abs().to(DEVICE)
    sinks = (random(heads) * 3).to(DEVICE) if sink else None
    state = torch.tensor([seed, -seed], device=DEVICE) if dropout_p else None
    terms = Terms(softcap, alibi, sinks, dropout_p, state)
    names = terms.names
    problem = Problem.of(q, k, mask)
    problem = Problem(
        *(getattr(problem, n) for n in ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_kv")),
        *(head_dim, problem.dtype, mask),
        terms=names,
    )
    call = Call(q, k, v, head_dim**-0.5, terms)
    tile = TRITON.default_tile(problem, arch(DEVICE))
    assert not TRITON.unsupported(problem, arch(DEVICE))
    out, lse = TRITON.bind(problem, tile)(call)

    def judge(dtype: torch.dtype, order: Tensor) -> tuple[Tensor, ...]:
        """With the products of a score added up in this order."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        given = leaves[0][..., order], leaves[1][..., order], leaves[2]
        out, lse = attention_reference(*given, call.softmax_scale, mask, dtype, **terms._asdict())
        gradients = torch.autograd.grad((out, lse), leaves, (dout.to(dtype), dlse.to(dtype)))
        return (out.detach(), *gradients, lse.detach())

    dout, dlse = random(*q.shape).to(DEVICE, dtype), random(*lse.shape).to(DEVICE)
    orders = [torch.randperm(head_dim, generator=generator).to(DEVICE) for _ in range(4)]
    seen = judge(torch.float64, orders[0])[-1] != -torch.inf
    dlse = dlse * seen  # of a row without keys and sink the reference's gradient is no number
    expected = judge(torch.float64, orders[0])
    tried = [judge(dtype, order) for order in orders]
    saved = Saved(dout, out, lse, dlse)
    tile = TRITON.default_tile(problem, arch(DEVICE))
    gradients = TRITON.bind_backward(problem, tile)(call, saved)
    torch.testing.assert_close(lse.double(), expected[-1], rtol=1e-5, atol=1e-4)
    for actual, right, *same in zip((out, *gradients), expected, *tried, strict=False):
        assert_close(actual, right.nan_to_num(), *(x.nan_to_num() for x in same))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("head_dims", [(24, 40), (40, 24)])
def test_values_of_another_head_dim(head_dims, tma):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(2, rows, heads, d, generator=generator).to(DEVICE)
        for rows, heads, d in (
            *((19, 4, head_dims[0]), (23, 2, head_dims[0])),
            *((23, 2, head_dims[1]), (19, 4, head_dims[1])),
        )
    )
    call, mask = Call(q, k, v, 0.2), Mask(-1, 0)
    problem = Problem.of_call(call, mask)
    tile = TRITON.default_tile(problem, arch(DEVICE))
    out, lse = TRITON.bind(problem, replace(tile, tma=tma))(call)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = attention_reference(*leaves, 0.2, mask)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    backward = replace(problem, direction="bwd")
    actual = TRITON.bind_backward(backward, replace(tile, tma=tma))(call, Saved(dout, out, lse))
    right = torch.autograd.grad(expected, leaves, dout.double())
    for gradient, wanted in zip(actual, right, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [(-1, 0), (3, 2)])
def test_packed_and_paged_calls_one_sequence_at_a_time(window):
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (
        torch.randn(n, heads, 16, generator=generator).to(DEVICE)
        for n, heads in ((12, 4), (14, 2), (14, 2), (12, 4))
    )
    # One of three sequences has no queries; a row of q and one of k are in none.
    ends = [
        torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 5, 5, 11], [0, 6, 9, 13])
    ]
    q[11:], k[13:], v[13:] = torch.nan, torch.nan, torch.nan
    state = torch.tensor([6, 2**32 - 1], device=DEVICE)
    terms = Terms(4.0, sinks=torch.zeros(4, device=DEVICE), dropout_p=0.4, rng_state=state)
    call = Call(q, k, v, 0.25, terms, Sequences(*ends, max_seqlen_q=6, max_seqlen_k=6))
    problem = Problem.of_call(call, Mask(*window))
    tile = TRITON.default_tile(problem, arch(DEVICE))
    out, lse = TRITON.bind(problem, tile)(call)
    expected, expected_lse = sequences_reference(call, Mask(*window))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)

    leaves = [x.double().nan_to_num().requires_grad_() for x in (q, k, v)]
    right, _ = sequences_reference(Call(*leaves, *call[3:]), Mask(*window))
    right = torch.autograd.grad(right, leaves, dout.double())
    backward = replace(problem, direction="bwd")
    actual = TRITON.bind_backward(backward, TRITON.default_tile(backward, arch(DEVICE)))(
        call, Saved(dout, out, lse)
    )
    for x, y in zip(actual, right, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)

    pages = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32, device=DEVICE)
    cache = torch.randn(3, 8, 2, 16, generator=generator).to(DEVICE)
    used = torch.tensor([11, 3], dtype=torch.int32, device=DEVICE)
    sequences = Sequences(seqused_k=used, block_table=pages)
    paged = Call(q[:6].reshape(2, 3, 4, 16), cache, cache, 0.25, terms, sequences)
    problem = Problem.of_call(paged, Mask(*window))
    out, lse = TRITON.bind(problem, TRITON.default_tile(problem, arch(DEVICE)))(paged)
    expected, expected_lse = sequences_reference(paged, Mask(*window))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_attn_masks_forward_and_backward(data):
    draw = data.draw
    group, lengths = draw(st.integers(1, 2)), draw(st.tuples(*2 * [st.integers(1, 70)]))
    dtype = draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
    window = draw(st.sampled_from((Mask(), Mask(-1, 0), Mask(20, 3))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    q = torch.randn(2, lengths[0], 2 * group, 24, generator=generator).to(DEVICE, dtype)
    k, v = (torch.randn(2, lengths[1], 2, 24, generator=generator).to(DEVICE, dtype) for _ in "kv")
    mask = draw(attn_masks((2, 2 * group, *lengths), dtype))
    call = Call(q, k, v, 0.2, Terms(draw(st.sampled_from((0.0, 5.0))), attn_mask=mask))
    problem = Problem.of_call(call, window)
    out, lse = TRITON.bind(problem, TRITON.default_tile(problem, arch(DEVICE)))(call)

    def judge(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        exact = attention_reference(
            *leaves, 0.2, window, dtype, softcap=call.terms.softcap, attn_mask=mask
        )
        return *exact, *torch.autograd.grad(exact[0].sin().sum(), leaves)

    expected, same = judge(torch.float64), judge(dtype)
    assert_close(out, expected[0], same[0].nan_to_num())
    # Of rows that see only a mask's lowest values less is kept of softmax_lse, and so of gradients.
    kept = expected[1].nan_to_num(0.0, 0.0, 0.0) > -1e4
    torch.testing.assert_close(lse.double()[kept], expected[1][kept], rtol=2e-6, atol=1e-2)
    if not kept.all():
        return
    dout = expected[0].detach().cos().to(dtype)
    saved = Saved(dout, out, lse)
    problem = replace(problem, direction="bwd")
    tile = TRITON.default_tile(problem, arch(DEVICE))
    gradients = TRITON.bind_backward(problem, tile)(call, saved)
    for actual, exact, rounded in zip(gradients, expected[2:], same[2:], strict=True):
        assert_close(actual, exact, rounded.nan_to_num())
