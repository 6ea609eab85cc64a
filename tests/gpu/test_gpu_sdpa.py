"""Torch's SDPA kernels on a real GPU: given what they can read and launch, in linear memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LAYOUTS, assert_matches_reference, guarded, run_backward

import flashmoe
from flashmoe import flash_attn_func
from flashmoe.measure.reference import attention_reference
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.mask import CAUSAL, causal_if

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_layout_of_a_few_queries(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    head_dim = 8 * data.draw(st.integers(1, 32))
    group, heads_kv = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.integers(1, 3))
    batch = data.draw(st.integers(0, 3))
    seqlen_q, seqlen_kv = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 400))
    causal = data.draw(st.booleans())
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in "qkv"]
    seqlen_kv = seqlen_q if causal else seqlen_kv
    q = guarded((batch, seqlen_q, heads_kv * group, head_dim), dtype, layouts[0], DEVICE)
    k, v = (
        guarded((batch, seqlen_kv, heads_kv, head_dim), dtype, layout, DEVICE)
        for layout in layouts[1:]
    )
    out = flash_attn_func(q, k, v, causal=causal, backend="sdpa")
    torch.cuda.synchronize()
    assert out.is_contiguous()
    if seqlen_kv:
        # As close as torch's kernels come.
        expected, _ = attention_reference(q, k, v, mask=causal_if(causal))
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    else:
        assert not out.any()


@pytest.mark.parametrize("head_dim", [64, 136])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_unaligned_call_after_an_aligned_one(dtype, head_dim):
    q, k, v = (torch.randn(1, n, 2, head_dim, device=DEVICE).to(dtype) for n in (1, 359, 359))
    expected = flash_attn_func(q, k, v, backend="sdpa")
    moved = [x.new_empty(x.numel() + 3)[3:].view(x.shape).copy_(x) for x in (q, k, v)]
    torch.testing.assert_close(flash_attn_func(*moved, backend="sdpa"), expected)
    # Planned on another kernel, perhaps.
    out = flashmoe.scaled_dot_product_attention(*(x.transpose(1, 2) for x in moved))
    assert_matches_reference(out.transpose(1, 2), None, q, k, v)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_float32_groups_take_linear_memory(causal, requires_grad):
    q = torch.randn(1, 8192, 8, 64, device=DEVICE, requires_grad=requires_grad)
    k, v = (torch.randn(1, 8192, 2, 64, device=DEVICE) for _ in "kv")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    out = flash_attn_func(q, k, v, causal=causal, backend="sdpa")
    if requires_grad:
        out.sum().backward()
    torch.cuda.synchronize()
    # The scores of one head alone are 256 MiB.
    assert torch.cuda.max_memory_allocated(DEVICE) - before < 256 << 20
    assert_matches_reference(out[:, -64:], None, q[:, -64:], k, v, causal=causal)


@pytest.mark.parametrize("shape", [(1, 5, 70_000, 16), (66_000, 5, 1, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_sequences_or_heads_than_a_grid_holds(dtype, shape):
    q, k, v = (torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for _ in "qkv")
    with torch.no_grad():
        assert_matches_reference(flash_attn_func(q, k, v), None, q, k, v)
    out = flash_attn_func(q, k, v)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.float().sum(), (q, k, v)))


def test_tf32_changes_nothing_in_float32():
    q, k, v = (torch.randn(1, 300, 2, 64, device=DEVICE, requires_grad=True) for _ in "qkv")
    dout = torch.randn_like(q)

    def results():
        out = flash_attn_func(q, k, v, causal=True)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    def blocked():
        out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        call = Call(*(x.detach() for x in (q, k, v)), 64**-0.5)
        return run_backward("blocked", call, Saved(dout, out.detach(), lse), CAUSAL)

    expected = results() + blocked()
    torch.set_float32_matmul_precision("high")
    try:
        actual = results() + blocked()
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
