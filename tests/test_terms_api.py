"""softcap, ALiBi and sinks through our functions, and head dimensions of any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_calls import (
    assert_forward_matches,
    assert_gradients_of_call,
    dense_call,
    keywords,
    masks,
    on_device,
    random_terms,
)
from support import DEVICE

import flashmoe
from flashmoe import flash_attn_func
from flashmoe.frontend import ops
from flashmoe.measure.reference import attention_reference
from flashmoe.spec.mask import CAUSAL, FULL
from flashmoe.spec.problem import TERMS

term_names = st.lists(st.sampled_from(TERMS), min_size=1, unique=True).map(tuple)


def qkv(batch=2, seqlen_q=5, seqlen_kv=7, heads=(4, 2), head_dim=16, dtype=torch.float32, **more):
    more = {"device": DEVICE, "dtype": dtype, **more}
    q = torch.randn(batch, seqlen_q, heads[0], head_dim, **more)
    k, v = (torch.randn(batch, seqlen_kv, heads[1], head_dim, **more) for _ in "kv")
    return q, k, v


@settings(deadline=None, max_examples=40)
@given(
    term_names,
    masks(),
    st.integers(1, 2),
    st.integers(0, 40),
    st.integers(0, 90),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_terms_match_the_reference(names, mask, group, seqlen_q, seqlen_kv, by_batch, dtype):
    q, k, v = qkv(2, seqlen_q, seqlen_kv, (2 * group, 2), dtype=dtype, requires_grad=True)
    terms = random_terms(names, 2 * group, 2 if by_batch else None)
    sinks = None if terms.sinks is None else terms.sinks.requires_grad_()
    out, lse, _ = flash_attn_func(
        *(q, k, v),
        window_size=(mask.left, mask.right),
        return_attn_probs=True,
        **keywords(terms),
    )
    call = dense_call(q.detach(), k.detach(), v.detach(), terms)
    assert_forward_matches(out.detach(), lse.detach(), call, mask)
    douts = torch.randn_like(out), torch.randn_like(lse)
    leaves = [x for x in (q, k, v, sinks) if x is not None]
    assert_gradients_of_call(torch.autograd.grad((out, lse), leaves, douts), *douts, call, mask)
    with torch.no_grad():
        alone = flash_attn_func(q, k, v, window_size=(mask.left, mask.right), **keywords(terms))
    # On a GPU another kernel may run where nobody asks for softmax_lse.
    assert_forward_matches(alone, None, call, mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sinks_of_any_dtype_get_gradients_of_theirs(dtype):
    q, k, v = qkv()
    sinks = torch.randn(4, dtype=dtype, device=DEVICE, requires_grad=True)
    exact = sinks.detach().double().requires_grad_()
    flash_attn_func(q, k, v, sinks=sinks).sin().sum().backward()
    out, _ = attention_reference(q, k, v, sinks=exact)
    (expected,) = torch.autograd.grad(out.sin().sum(), exact)
    assert sinks.grad.dtype == dtype
    torch.testing.assert_close(sinks.grad.double(), expected, rtol=1e-2, atol=1e-3)


def test_rows_that_see_nothing_have_their_sinks():
    q, k, v = qkv(seqlen_q=6, seqlen_kv=2)
    sinks = torch.tensor([1.0, -torch.inf, 0.0, 2.0], device=DEVICE, requires_grad=True)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, sinks=sinks, return_attn_probs=True)
    assert not out[:, :4].any()
    torch.testing.assert_close(lse[:, :, :4], sinks[None, :, None].expand(2, 4, 4))
    (gradient,) = torch.autograd.grad(lse[:, :, :4].sum() + out.sum() * 0, sinks)
    torch.testing.assert_close(gradient, torch.tensor([8.0, 0.0, 8.0, 8.0], device=DEVICE))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70), st.booleans(), st.booleans())
def test_any_head_dims(head_dim, head_dim_v, causal, lse_too):
    q, k, _ = qkv(head_dim=head_dim, requires_grad=True)
    v = torch.randn(2, 7, 2, head_dim_v, device=DEVICE, requires_grad=True)
    result = flash_attn_func(q, k, v, causal=causal, return_attn_probs=lse_too)
    out = result[0] if lse_too else result
    expected, lse = attention_reference(q, k, v, mask=CAUSAL if causal else FULL)
    assert out.shape == (2, 5, 4, head_dim_v)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    if lse_too:
        torch.testing.assert_close(result[1].double(), lse, rtol=1e-5, atol=1e-5)
    actual = torch.autograd.grad(out.sin().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.sin().sum(), (q, k, v))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dims", [(192, 128), (128, 256), (20, 20)])
def test_head_dims_of_models_under_compile(head_dims):
    q, k, _ = qkv(head_dim=head_dims[0])
    v = torch.randn(2, 7, 2, head_dims[1], device=DEVICE)
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
    expected, _ = attention_reference(q, k, v)
    torch.testing.assert_close(compiled(q, k, v).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("names", [("softcap",), ("alibi", "sink"), TERMS])
def test_terms_compile_without_graph_breaks(names, requires_grad):
    terms = random_terms(names, 4)
    if terms.sinks is not None:
        terms.sinks.requires_grad_(requires_grad)

    def f(q, k, v):
        return flash_attn_func(q * 1.0, k, v, causal=True, **keywords(terms)).sin()

    q, k, v = qkv(requires_grad=requires_grad)
    out, expected = torch.compile(f, fullgraph=True, backend="aot_eager")(q, k, v), f(q, k, v)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    if requires_grad:
        leaves = [x for x in (q, k, v, terms.sinks) if x is not None]
        actual = torch.autograd.grad(out.sum(), leaves)
        torch.testing.assert_close(actual, torch.autograd.grad(expected.sum(), leaves))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_with_terms(requires_grad):
    q, k, v = qkv(requires_grad=requires_grad)
    softcap, slopes, sinks, *others = random_terms(TERMS, 4, 2)
    sinks.requires_grad_(requires_grad)
    terms = (False, softcap, slopes, sinks, *others)
    for op in (ops.attention, ops.attention_without_lse):
        torch.library.opcheck(op, (q, k, v, 0.2, -1, 0, "", "", *terms))
    out, lse = (x.detach() for x in ops.attention(q, k, v, 0.2, -1, 0, "", "", *terms))
    arguments = (torch.randn_like(out), q, k, v, out, lse, None, 0.2, -1, 0, "", *terms)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(ops.attention_backward, arguments, test_utils=checks)


def test_another_kind_of_term_is_another_call():
    q, k, v = qkv()
    sinks = torch.zeros(4, device=DEVICE)
    plain = flash_attn_func(q, k, v)
    assert not torch.allclose(flash_attn_func(q, k, v, sinks=sinks), plain)
    assert not torch.allclose(flash_attn_func(q, k, v, softcap=0.1), plain)
    assert torch.equal(flash_attn_func(q, k, v), plain)
    torch.testing.assert_close(
        flash_attn_func(q, k, v, sinks=sinks),
        attention_reference(q, k, v, sinks=sinks)[0].float(),
    )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("softcap", -1.0, ValueError, "softcap must be 0 for none, or from .*, got -1.0"),
        ("softcap", float("nan"), ValueError, "softcap must be .*, got nan"),
        ("softcap", "30", TypeError, "softcap must be a number, got str"),
        ("softcap", None, TypeError, "softcap must be a number, got NoneType"),
        ("alibi_slopes", [1.0], TypeError, r"alibi_slopes must be a torch\.Tensor .*, got list"),
        (
            "alibi_slopes",
            torch.ones(4).half(),
            TypeError,
            "alibi_slopes must be float32, .*float16",
        ),
        (
            "alibi_slopes",
            torch.ones(3),
            ValueError,
            r"alibi_slopes must be \(heads=4,\) or \(batch=2, heads=4\), got shape \(3,\)",
        ),
        ("alibi_slopes", torch.ones(4, device="meta"), ValueError, "alibi_slopes must be on q's"),
        ("sinks", torch.ones(5), ValueError, r"sinks must be \(heads=4,\), got shape \(5,\)"),
        ("sinks", torch.ones(4).int(), TypeError, "sinks must be of a floating-point .*int32"),
        ("sinks", 1.0, TypeError, r"sinks must be a torch\.Tensor or None, got float"),
    ],
)
def test_wrong_terms_are_named(argument, value, error, message, grad):
    q, k, v = qkv(requires_grad=grad)
    with pytest.raises(error, match=message):
        flash_attn_func(q, k, v, **on_device({argument: value}))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_slopes_are_refused(compiled):
    slopes = torch.ones(4, device=DEVICE, requires_grad=True)
    f = torch.compile(flash_attn_func, backend="aot_eager") if compiled else flash_attn_func
    error = (NotImplementedError, RuntimeError) if compiled else NotImplementedError
    with pytest.raises(error, match="alibi_slopes must not require a gradient"):
        f(*qkv(), alibi_slopes=slopes)
    with torch.no_grad():
        assert f(*qkv(), alibi_slopes=slopes).any()


def test_terms_are_never_sdpas():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"'sdpa' cannot run .*has no softcap"):
        flash_attn_func(q, k, v, softcap=1.0, backend="sdpa")
    q, k, v = qkv(1, 1, 4096, (4, 4))  # which SDPA runs on a CPU
    problem = flashmoe.Problem.of_call(dense_call(q, k, v, random_terms(("sink",), 4)))
    assert flashmoe.make_plan(problem, DEVICE).backend != "sdpa"


def test_terms_under_autocast():
    q, k, v = qkv(requires_grad=True)
    sinks = torch.randn(4, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = flash_attn_func(q, k, v, sinks=sinks)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert (q.grad.dtype, sinks.grad.dtype) == (torch.float32, torch.float32)
