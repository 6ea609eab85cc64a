"""SDPA's attn_mask through our functions, and what nothing else tests of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_calls import attn_masks, backends_for
from support import DEVICE

import flashmoe
from flashmoe import flash_attn_func
from flashmoe.backends import BACKENDS, sdpa
from flashmoe.backends.sdpa import torch_sdpa
from flashmoe.frontend import ops
from flashmoe.machine.device import arch
from flashmoe.measure.reference import attention_reference
from flashmoe.spec.call import Call, Terms
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import Problem

# Of (batch 2, heads 4, seqlen_q 5, seqlen_kv 7), as qkv makes them.
SHAPES = [(7,), (5, 7), (5, 1), (1,), (4, 5, 7), (2, 1, 1, 7), (1, 4, 1, 7), (2, 4, 5, 7)]


def qkv(seqlen_q=5, seqlen_kv=7, dtype=torch.float32, **more):
    q = torch.randn(2, seqlen_q, 4, 16, device=DEVICE, dtype=dtype, **more)
    k, v = (torch.randn(2, seqlen_kv, 2, 16, device=DEVICE, dtype=dtype, **more) for _ in "kv")
    return q, k, v


def added(shape, **more):
    """Of a normal distribution, a third of it -inf."""
    mask = torch.randn(shape, device=DEVICE)
    return mask.masked_fill_(torch.rand(shape, device=DEVICE) < 1 / 3, -torch.inf).requires_grad_(
        more.get("requires_grad", False)
    )


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1)])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_with_an_added_mask(shape, softcap, window):
    leaves = (*qkv(requires_grad=True), added(shape, requires_grad=True))
    sinks = torch.randn(4, device=DEVICE)
    out, lse, _ = flash_attn_func(
        *leaves[:3],
        window_size=window,
        softcap=softcap,
        sinks=sinks,
        attn_mask=leaves[3],
        return_attn_probs=True,
    )
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected, expected_lse = attention_reference(
        *exact[:3], mask=Mask(*window), softcap=softcap, sinks=sinks, attn_mask=exact[3]
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-5)
    actual = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), leaves)
    wanted = torch.autograd.grad(expected.sin().sum() + expected_lse.cos().sum(), exact)
    for x, leaf, y in zip(actual, leaves, wanted, strict=True):
        assert (x.shape, x.dtype) == (leaf.shape, leaf.dtype)
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 1, 37), (35, 37), (2, 4, 35, 37)], ids=str)
@pytest.mark.parametrize("is_added", [False, True])
def test_dropout_and_a_mask(shape, is_added):
    leaves = qkv(35, 37, requires_grad=True)
    mask = added(shape)
    mask[..., :18] = -torch.inf  # keys that padding cuts off, of which dropout counts columns
    mask = mask.requires_grad_() if is_added else mask > -torch.inf
    state = torch.tensor([3, -4], device=DEVICE)
    terms = {"dropout_p": 0.4, "rng_state": state, "sinks": torch.randn(4, device=DEVICE)}
    out = flash_attn_func(*leaves, attn_mask=mask, **terms)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    exact_mask = mask.detach().double().requires_grad_() if is_added else mask
    expected, _ = attention_reference(*exact, attn_mask=exact_mask, **terms)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    given, wanted = ((*leaves, mask), (*exact, exact_mask)) if is_added else (leaves, exact)
    actual = torch.autograd.grad(out.sin().sum(), given)
    for x, y in zip(actual, torch.autograd.grad(expected.sin().sum(), wanted), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


def test_torchs_function_has_dropout_under_a_mask():
    q, k, v = qkv()
    mask = added((5, 7))
    torch.manual_seed(0)
    expected = flash_attn_func(q, k, v, 0.4, attn_mask=mask)
    swapped = (x.transpose(1, 2) for x in (q, k, v))
    torch.manual_seed(0)
    out = flashmoe.scaled_dot_product_attention(*swapped, mask, 0.4, enable_gqa=True)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_signed_weights_of_dropout_know_a_mask():
    q, k, v = qkv()
    mask = added((2, 1, 5, 7))
    *_, weights = flash_attn_func(q, k, v, dropout_p=0.4, attn_mask=mask, return_attn_probs=True)
    assert torch.equal(weights == 0, (mask == -torch.inf).expand(2, 4, 5, 7))


def test_a_mask_of_the_inputs_dtype_gets_a_gradient_of_it():
    q, k, v = qkv(dtype=torch.bfloat16)
    mask = torch.randn(1, 4, 5, 7, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    flash_attn_func(q, k, v, attn_mask=mask).float().sin().sum().backward()
    exact = mask.detach().double().requires_grad_()
    out, _ = attention_reference(q, k, v, attn_mask=exact)
    (expected,) = torch.autograd.grad(out.sin().sum(), exact)
    assert mask.grad.dtype == torch.bfloat16
    torch.testing.assert_close(mask.grad.double(), expected, rtol=2e-2, atol=2e-3)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_scaled_dot_product_attention_is_torchs(data):
    """But for rows that see nothing, which torch's kernels make 0 or NaN."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    group = data.draw(st.integers(1, 2))
    seqlen_q, seqlen_kv = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 90)))
    full = (2, 2 * group, seqlen_q, seqlen_kv)
    q = torch.randn(*full[:3], 32, device=DEVICE, dtype=dtype)
    k, v = (torch.randn(2, 2, seqlen_kv, 32, device=DEVICE, dtype=dtype) for _ in "kv")
    mask = data.draw(attn_masks(full, dtype))
    options = {"attn_mask": mask, "enable_gqa": group > 1, "scale": data.draw(st.just(0.2))}
    out = flashmoe.scaled_dot_product_attention(q, k, v, **options)
    hides = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    seen = ~hides.expand(full).all(-1)
    assert out.shape == q.shape
    if DEVICE.type == "cpu":  # where it is torch's they may be NaN
        assert not out[~seen].any()
    if mask.dtype != torch.bool and mask.dtype != dtype:
        mask = mask.double()
        expected = torch_sdpa(
            *(x.double() for x in (q, k, v)), mask, scale=0.2, enable_gqa=group > 1
        )
    else:
        expected = torch_sdpa(q, k, v, **options).double()
    error = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double()[seen], expected[seen], rtol=error, atol=error)


def test_torch_computes_what_is_not_ours():
    """And raises its own errors."""
    q, k, v = (torch.randn(2, 4, n, 16, device=DEVICE) for n in (5, 7, 7))
    mask = torch.ones(5, 7, dtype=torch.bool, device=DEVICE)
    results = []
    for compute in (torch_sdpa, flashmoe.scaled_dot_product_attention):
        try:
            results.append(compute(q, k, v, mask, is_causal=True))
        except RuntimeError as error:  # whether it is one depends on the kernel that torch chooses
            results.append(str(error))
    assert str(results[0]) == str(results[1])
    with pytest.raises(RuntimeError, match="attn_mask"):
        flashmoe.scaled_dot_product_attention(q, k, v, mask.double())
    with pytest.raises(RuntimeError):
        flashmoe.scaled_dot_product_attention(q, k, v, mask[:, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_not_read(dtype):
    """What a mask of keys hides in front and behind is cut off on the CPU, NaN and all."""
    if DEVICE.type != "cpu":
        pytest.skip("GPUs read whole tiles")
    q, k, v = qkv(40, 300, dtype=dtype)
    mask = torch.zeros(2, 1, 1, 300, dtype=torch.bool)
    mask[0, ..., 37:190] = mask[1, ..., 120:] = True
    added_mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    expected, _ = attention_reference(q, k, v, attn_mask=mask)
    hidden = ~mask[:, 0, 0]
    k[hidden], v[hidden] = torch.nan, torch.nan
    for given_mask in (mask, added_mask):
        out = flash_attn_func(q, k, v, attn_mask=given_mask)
        assert out.isfinite().all()
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_hidden_keys_may_be_nan_under_a_boolean_mask():
    q, k, v = qkv(40, 60)
    mask = torch.rand(40, 60, device=DEVICE) < 0.5
    mask[:, ::3] = False
    expected, _ = attention_reference(q, k, v, attn_mask=mask)
    k[:, ::3] = torch.nan
    out = flash_attn_func(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="float32 on the CPU keeps what others round")
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -3e38])
def test_rows_that_see_only_the_lowest_values_are_means(lowest):
    """As in eager attention, whose models say so of padding."""
    q, k, v = qkv()
    q = q * 1e-3
    mask = torch.full((5, 7), lowest)
    mask[0, 2] = 0
    call = Call(q, k, v, 0.25, Terms(attn_mask=mask[None, None]))
    expected, expected_lse = attention_reference(q, k, v, attn_mask=mask)
    for name, tile in backends_for(Problem.of_call(call)):
        out, lse = BACKENDS[name].bind(Problem.of_call(call), tile)(call)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (4, 5, 7), (1, 1, 5, 7)], ids=str)
def test_masks_compile_without_graph_breaks(shape, requires_grad):
    def f(q, k, v, mask):
        ours = flash_attn_func(q * 1.0, k, v, softcap=5.0, attn_mask=mask)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        sdpa = flashmoe.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return ours.sin() + sdpa.transpose(1, 2)

    leaves = (*qkv(requires_grad=requires_grad), added(shape, requires_grad=requires_grad))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*leaves), f(*leaves)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    if requires_grad:
        actual, wanted = (torch.autograd.grad(x.cos().sum(), leaves) for x in (out, expected))
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", [ops.attention, ops.attention_without_lse], ids=str)
def test_opcheck(op, requires_grad):
    mask = added((1, 4, 5, 7), requires_grad=requires_grad)
    fixed = (0.2, -1, 0, "", "", False, 0.0, None, None, 0.0, None, mask)
    torch.library.opcheck(op, (*qkv(requires_grad=requires_grad), *fixed))


def test_opcheck_mask_backward():
    q, k, v = qkv()
    fixed = False, 0.0, None, None, 0.0, None, added((1, 4, 5, 7))
    out, lse = ops.attention(q, k, v, 0.2, -1, 0, "", "", *fixed)
    saved = (torch.randn_like(out), q, k, v, out, lse, None, 0.2, -1, 0, "")
    torch.library.opcheck(ops.attention_mask_backward, (*saved, *fixed))


def test_double_backward_of_a_mask_is_refused():
    leaves = (*qkv(requires_grad=True), added((5, 7), requires_grad=True))
    out = flash_attn_func(*leaves[:3], attn_mask=leaves[3])
    gradients = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.autograd.grad(gradients[0].sum(), leaves[0])


def test_a_mask_changed_before_the_backward_is_an_error():
    q, k, v = qkv(requires_grad=True)
    mask = added((5, 7))
    out = flash_attn_func(q, k, v, attn_mask=mask)
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_autocast_casts_a_mask_of_16_bits():
    q, k, v = qkv()
    mask = torch.randn(5, 7, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = flash_attn_func(q, k, v, attn_mask=mask.half())
    assert out.dtype == torch.bfloat16
    expected, _ = attention_reference(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out.double(), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_no_keys_and_no_queries(causal):
    for seqlen_q, seqlen_kv in ((0, 7), (5, 0), (0, 0)):
        leaves = qkv(seqlen_q, seqlen_kv, requires_grad=True)
        mask = torch.zeros(seqlen_q, seqlen_kv, device=DEVICE, requires_grad=True)
        out = flash_attn_func(*leaves, causal=causal, attn_mask=mask)
        assert not out.any()
        gradients = torch.autograd.grad(out.sum(), (*leaves, mask))
        assert not any(x.any() for x in gradients)


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        ("mask", TypeError, r"attn_mask must be a torch.Tensor or None, got str"),
        (torch.ones(5, 7, dtype=torch.int32), TypeError, r"attn_mask must be bool, .*int32"),
        (torch.ones(5, 7, dtype=torch.float64), TypeError, r"attn_mask must be bool, .*float64"),
        (torch.ones(5, 6), ValueError, r"must broadcast to .*\(2, 4, 5, 7\), got shape \(5, 6\)"),
        (torch.ones(2, 2, 5, 7), ValueError, r"got shape \(2, 2, 5, 7\)"),
        (torch.ones(1, 2, 4, 5, 7), ValueError, r"got shape \(1, 2, 4, 5, 7\)"),
    ],
    ids=str,
)
def test_errors(mask, error, match):
    mask = mask.to(DEVICE) if isinstance(mask, torch.Tensor) else mask
    with pytest.raises(error, match=match):
        flash_attn_func(*qkv(), attn_mask=mask)


def test_the_ops_check_a_mask():
    q, k, v = qkv()
    tensors = [x.cpu() for x in (q, k, v)]
    for mask in (torch.ones(5, 7), torch.ones(1, 1, 5, 6), torch.ones(1, 1, 5, 7).double()):
        with pytest.raises(RuntimeError, match="attn_mask must"):
            torch.ops.flashmoe.fwd_cpu(*tensors, 0.2, -1, -1, 32, 32, attn_mask=mask)


@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=str)
def test_head_dims_that_are_padded(mask):
    q, k, v = (x[..., :13] for x in qkv())
    attn_mask = torch.rand(5, 7, device=DEVICE) < 0.6
    out = flash_attn_func(q, k, v, causal=mask == CAUSAL, attn_mask=attn_mask)
    expected, _ = attention_reference(q, k, v, mask=mask, attn_mask=attn_mask)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_patched_sdpa_runs_masks():
    from flashmoe.integrations.torch import patch_sdpa, unpatch_sdpa

    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True).to(DEVICE)
    x = torch.randn(2, 9, 32, device=DEVICE)
    padding = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    padding[0, 6:] = True
    expected = layer(x, src_key_padding_mask=padding)
    patch_sdpa()
    try:
        assert F.scaled_dot_product_attention is flashmoe.scaled_dot_product_attention
        out = layer(x, src_key_padding_mask=padding)
    finally:
        unpatch_sdpa()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "scores", "capability", "why_no_compiler", "ours"),
    [
        (torch.bool, 1 << 26, (9, 0), "", True),
        (torch.bool, (1 << 26) - 1, (9, 0), "", False),
        (torch.bool, 1 << 26, (8, 0), "", False),
        (torch.bool, 1 << 26, (9, 0), "none", False),
        (torch.bfloat16, 1 << 26, (9, 0), "", False),
    ],
)
def test_masks_on_a_gpu_are_ours_where_that_is_faster(
    dtype, scores, capability, why_no_compiler, ours, monkeypatch
):
    here = replace(arch(torch.device("cpu")), capability=capability)
    monkeypatch.setattr(sdpa, "arch", lambda device: here)
    monkeypatch.setattr(sdpa.jit, "unavailable", lambda: why_no_compiler)
    mask = SimpleNamespace(is_cuda=True, dtype=dtype, device=None)
    assert sdpa.is_slower_under(mask, scores) is ours
    assert sdpa.is_slower_under(torch.ones(1, dtype=dtype), scores)
