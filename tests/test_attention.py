"""flash_attn_func and scaled_dot_product_attention: values, shapes, gradients, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DEVICE,
    LAYOUTS,
    assert_gradients_match,
    assert_matches_reference,
    guarded,
)

import flashmoe
from flashmoe import Problem, Tile, flash_attn_func
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.measure.fingerprint import kernel_hash
from flashmoe.measure.reference import attention_reference
from flashmoe.planning import database
from flashmoe.planning.plan import why_not
from flashmoe.spec.mask import Mask, causal_if

PROBLEM = Problem(1, 1, 1, 16, 16, 64, "bfloat16")
FORWARD_BACKENDS = [name for name in BACKENDS if not why_not(name, PROBLEM, DEVICE)]
LSE_BACKENDS = [name for name in FORWARD_BACKENDS if name != "sdpa"]
# Interpreted, Triton takes seconds for what others do in milliseconds; test_triton_kernels.py has
# the small problems that suit it.
INTERPRETED = {"triton"} if DEVICE.type == "cpu" else set()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def runs(backend: str, q: torch.Tensor, k: torch.Tensor, causal: bool) -> bool:
    problem = Problem.of(q, k, causal_if(causal))
    return not why_not(backend, problem, q.device)


@pytest.mark.parametrize("backend", LSE_BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_kv", "head_dim"),
    [(1, 1, 8), (17, 33, 40), (65, 31, 64), (130, 257, 72), (3, 129, 256)],
)
def test_forward_matches_reference(backend, dtype, causal, seqlen_q, seqlen_kv, head_dim):
    q = guarded((2, seqlen_q, 4, head_dim), dtype)
    k, v = (guarded((2, seqlen_kv, 2, head_dim), dtype) for _ in range(2))
    if not runs(backend, q, k, causal):
        pytest.skip(f"{backend} does not run {dtype}")
    if backend in INTERPRETED and (seqlen_q, head_dim) != (17, 40):
        pytest.skip("too slow interpreted")
    out, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True, backend=backend)
    assert_matches_reference(out, lse, q, k, v, causal=causal)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads are the cpu backend's")
def test_any_number_of_threads_gives_the_same_bits():
    q, k, v = (torch.randn(2, n, heads, 40) for n, heads in ((130, 4), (257, 2), (257, 2)))
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            found.append(flash_attn_func(q, k, v, causal=True, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert_matches_reference(found[0], None, q, k, v, causal=True)
    assert all(torch.equal(out, found[0]) for out in found[1:])


# On a GPU every float32 shape compiles a Triton kernel of its own.
@settings(max_examples=60 if DEVICE.type == "cpu" else 20, deadline=None)
@given(data=st.data())
def test_forward_on_random_problems(data):
    group = data.draw(st.sampled_from([1, 2, 3]), "group")
    heads_kv = data.draw(st.integers(1, 3), "heads_kv")
    batch = data.draw(st.integers(1, 3), "batch")
    seqlen_q = data.draw(st.integers(1, 150), "seqlen_q")
    seqlen_kv = data.draw(st.integers(1, 150), "seqlen_kv")
    head_dim = 8 * data.draw(st.integers(1, 32), "head_dim / 8")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    causal = data.draw(st.booleans(), "causal")
    scale = data.draw(st.sampled_from([None, 0.01, 1.5]), "softmax_scale")
    layouts = [data.draw(st.sampled_from(LAYOUTS), f"layout of {x}") for x in "qkv"]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    q = guarded((batch, seqlen_q, heads_kv * group, head_dim), dtype, layouts[0], DEVICE, generator)
    k = guarded((batch, seqlen_kv, heads_kv, head_dim), dtype, layouts[1], DEVICE, generator)
    v = guarded((batch, seqlen_kv, heads_kv, head_dim), dtype, layouts[2], DEVICE, generator)
    out, lse, _ = flash_attn_func(
        q, k, v, softmax_scale=scale, causal=causal, return_attn_probs=True
    )
    assert_matches_reference(out, lse, q, k, v, scale, causal)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FORWARD_BACKENDS)
def test_strides_are_honoured_without_reading_between_rows(backend, layout):
    q, k, v = (guarded((2, 37, 4, 40), torch.bfloat16, layout) for _ in range(3))
    out = flash_attn_func(q, k, v, causal=True, backend=backend)
    assert_matches_reference(out, None, q, k, v, causal=True)


@pytest.mark.parametrize("backend", FORWARD_BACKENDS)
def test_last_dimension_may_be_strided(backend):
    q, k, v = (torch.randn(2, 9, 64, 4, device=DEVICE).bfloat16().transpose(2, 3) for _ in "qkv")
    out = flash_attn_func(q, k, v, backend=backend)
    assert_matches_reference(out, None, q, k, v)


@pytest.mark.parametrize("backend", LSE_BACKENDS)
@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_kv"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_empty_dimensions(backend, batch, seqlen_q, seqlen_kv):
    q = torch.randn(batch, seqlen_q, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    k = v = torch.randn(batch, seqlen_kv, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, backend=backend)
    assert out.shape == q.shape
    assert lse.shape == (batch, 2, seqlen_q)
    assert not out.any()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("backend", LSE_BACKENDS)
def test_rows_that_see_nothing_are_zero(backend):
    q = guarded((1, 9, 2, 32), torch.bfloat16)
    k, v = (guarded((1, 4, 2, 32), torch.bfloat16) for _ in range(2))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, backend=backend)
    assert (lse[:, :, :5] == float("-inf")).all()
    assert torch.isfinite(lse[:, :, 5:]).all()
    assert_matches_reference(out, lse, q, k, v, causal=True)


@pytest.mark.parametrize("backend", LSE_BACKENDS)
def test_nan_reaches_the_rows_that_see_it(backend):
    q, k, v = (guarded((1, 8, 1, 32), torch.bfloat16) for _ in range(3))
    q[0, 3] = float("nan")
    out = flash_attn_func(q, k, v, backend=backend)
    assert out[0, 3].isnan().all()
    assert not out[0, [0, 1, 2, 4, 5, 6, 7]].isnan().any()


@pytest.mark.parametrize("backend", LSE_BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, k, v = (guarded((1, 70, 2, 64), torch.float16) for _ in range(3))
    out, lse, _ = flash_attn_func(
        q, k, v, softmax_scale=40.0, return_attn_probs=True, backend=backend
    )
    assert torch.isfinite(out).all()
    assert_matches_reference(out, lse, q, k, v, softmax_scale=40.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_kv", "heads_kv"), [(33, 33, 4), (20, 70, 2), (50, 20, 1)]
)
def test_gradients_match_reference(seqlen_q, seqlen_kv, heads_kv, causal):
    q = guarded((2, seqlen_q, 4, 40), torch.bfloat16, "padded").requires_grad_()
    k, v = (
        guarded((2, seqlen_kv, heads_kv, 40), torch.bfloat16, "packed").requires_grad_()
        for _ in range(2)
    )
    out = flash_attn_func(q, k, v, causal=causal)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert_gradients_match(gradients, dout, q, k, v, causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_gradients_through_autograd(dtype):
    """On a CPU the planned backward is another."""
    if "triton" not in LSE_BACKENDS:
        pytest.skip("triton does not run here")
    q, k, v = (guarded((1, 19, heads, 24), dtype).requires_grad_() for heads in (2, 1, 1))
    out = flash_attn_func(q, k, v, causal=True, backend="triton")
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert_gradients_match(gradients, dout, q, k, v, causal=True)


def test_gradients_are_bitwise_repeatable():
    q, k, v = (guarded((1, 300, 2, 64), torch.bfloat16).requires_grad_() for _ in range(3))
    first, second = (
        torch.autograd.grad(flash_attn_func(q, k, v, deterministic=flag).sum(), (q, k, v))
        for flag in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_in_float32_are_float32_accurate():
    q, k, v = (guarded((1, 300, 2, 32), torch.float32).requires_grad_() for _ in range(3))
    out = flash_attn_func(q, k, v, causal=True)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert_gradients_match(gradients, dout, q, k, v, causal=True)


@pytest.mark.parametrize("backend", FORWARD_BACKENDS)
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_kv"), [(0, 5, 5), (0, 0, 0), (2, 0, 5), (2, 5, 0)]
)
def test_gradients_of_nothing_are_empty_or_zero(backend, batch, seqlen_q, seqlen_kv):
    q = torch.randn(batch, seqlen_q, 2, 16, device=DEVICE).bfloat16()
    k, v = (torch.randn(batch, seqlen_kv, 1, 16, device=DEVICE).bfloat16() for _ in "kv")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, backend=backend)
    for x, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()


def test_gradients_of_empty_rows_and_dimensions_are_zero():
    q = torch.randn(1, 6, 2, 32, device=DEVICE, requires_grad=True)
    for seqlen_kv in (0, 3):
        k, v = (torch.randn(1, seqlen_kv, 2, 32, device=DEVICE, requires_grad=True) for _ in "kv")
        dq, dk, dv = torch.autograd.grad(flash_attn_func(q, k, v, causal=True).sum(), (q, k, v))
        assert not dq[:, : 6 - seqlen_kv].any()
        assert dk.shape == dv.shape == k.shape
        assert torch.isfinite(dk).all()


def test_sdpa_by_name_is_differentiated_by_torch(monkeypatch):
    q, k, v = (torch.randn(1, 20, 2, 32, device=DEVICE, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(flash_attn_func(q, k, v, causal=True).sum(), (q, k, v))
    by_argument = flash_attn_func(q, k, v, causal=True, backend="sdpa")
    monkeypatch.setenv("FLASHMOE_BACKEND", "sdpa")
    by_environment = flash_attn_func(q, k, v, causal=True)
    with pytest.raises(ValueError, match="deterministic must be False with backend 'sdpa'"):
        flash_attn_func(q, k, v, deterministic=True)
    for out in (by_argument, by_environment):
        actual = torch.autograd.grad(out.sum(), (q, k, v))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["eager", "grad", "compiled", "op"])
def test_a_single_query_sees_every_key_with_sdpa_too(how):
    q = torch.randn(1, 1, 2, 32, device=DEVICE, requires_grad=how == "grad")
    k, v = (torch.randn(1, 7, 2, 32, device=DEVICE) for _ in "kv")

    def f(q, k, v):
        return flash_attn_func(q, k, v, causal=True, backend="sdpa")

    if how == "compiled":
        f = torch.compile(f, fullgraph=True, backend="aot_eager")
    if how == "op":
        out = flashmoe.frontend.ops.attention_without_lse(q, k, v, 32**-0.5, -1, 0, "sdpa", "")
    else:
        out = f(q, k, v)
    torch.testing.assert_close(out, flash_attn_func(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_inference_with_sdpa_is_deterministic(compiled):
    q, k, v = (torch.randn(1, 7, 2, 32, device=DEVICE) for _ in "qkv")

    def f(q, k, v):
        return flash_attn_func(q, k, v, deterministic=True, backend="sdpa")

    out = (torch.compile(f, backend="aot_eager") if compiled else f)(q, k, v)
    torch.testing.assert_close(out, flash_attn_func(q, k, v), rtol=1e-4, atol=1e-5)


def test_gradients_of_a_single_causal_query():
    q = guarded((2, 1, 4, 32), torch.float32).requires_grad_()
    k, v = (guarded((2, 13, 2, 32), torch.float32).requires_grad_() for _ in range(2))
    out = flash_attn_func(q, k, v, causal=True)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert_gradients_match(gradients, dout, q, k, v, causal=True)


def test_repeated_calls_are_bitwise_identical():
    q, k, v = (guarded((2, 200, 4, 64), torch.bfloat16) for _ in range(3))
    first = flash_attn_func(q, k, v, causal=True)
    for _ in range(5):
        assert torch.equal(flash_attn_func(q, k, v, causal=True), first)


def test_plans_follow_the_shape_of_each_call():
    for seqlen in (5, 7, 5, 64):
        q, k, v = (guarded((1, seqlen, 2, 64), torch.bfloat16) for _ in range(3))
        assert_matches_reference(flash_attn_func(q, k, v), None, q, k, v)
        out = flash_attn_func(q, k, v, causal=True)
        assert_matches_reference(out, None, q, k, v, causal=True)


def test_forget_plans_reads_what_a_tuner_wrote(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path))
    cpu = torch.device("cpu")
    problem = Problem(1, 2, 2, 21, 21, 24, "float32")
    flashmoe.api.forget_plans()
    assert flashmoe.make_plan(problem, cpu).source == "heuristic"
    entry = database.Entry(problem, "cpu", "cpu:64x64", "", judged=kernel_hash("cpu"))
    database.update(database.user_path(arch(cpu).name), {problem.bucket: entry})
    assert flashmoe.make_plan(problem, cpu).source == "heuristic"
    flashmoe.api.forget_plans()
    plan = flashmoe.make_plan(problem, cpu)
    assert (plan.source, str(plan.tile)) == ("user database", str(Tile("cpu", 64, 64)))
    monkeypatch.undo()
    flashmoe.api.forget_plans()


class TestScaledDotProductAttention:
    @pytest.mark.parametrize(
        ("seqlen_q", "seqlen_kv"), [(33, 33), (20, 41), (41, 20)], ids=["square", "wide", "tall"]
    )
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("heads_kv", [4, 2])
    def test_matches_torch(self, seqlen_q, seqlen_kv, is_causal, heads_kv):
        q = torch.randn(2, 4, seqlen_q, 32, device=DEVICE)
        k, v = (torch.randn(2, heads_kv, seqlen_kv, 32, device=DEVICE) for _ in range(2))
        options = {"is_causal": is_causal, "scale": 0.3, "enable_gqa": heads_kv != 4}
        actual = flashmoe.scaled_dot_product_attention(q, k, v, **options)
        expected = F.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    def test_odd_shapes_go_to_torch_and_a_mask_is_as_there(self):
        q, k, v = (torch.randn(2, 4, 9, 32, device=DEVICE) for _ in range(3))
        mask = torch.rand(9, 9, device=DEVICE) > 0.3
        for arguments, options in (
            ((q, k, v, mask), {}),
            ((q[0], k[0], v[0]), {}),
            ((q[..., :20], k[..., :20], v[..., :20]), {}),
            ((q, k, v[..., :16]), {}),
            ((q.double(), k.double(), v.double()), {}),
            ((q, k, v), {"scale": -0.5}),
            ((q, k, v), {"scale": 0.0}),
            ((q, k, v), {"scale": 1e-60}),
            ((q, k, v), {"scale": np.float16(0.0)}),
        ):
            actual = flashmoe.scaled_dot_product_attention(*arguments, **options)
            expected = F.scaled_dot_product_attention(*arguments, **options)
            torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("scale", [2, np.float32(0.3), np.float64(0.3), torch.tensor(0.3)])
    def test_scale_may_be_any_number(self, scale):
        q, k, v = (torch.randn(2, 4, 9, 32, device=DEVICE) for _ in range(3))
        actual = flashmoe.scaled_dot_product_attention(q, k, v, scale=scale)
        expected = F.scaled_dot_product_attention(q, k, v, scale=float(scale))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    def test_errors_are_torchs(self):
        q = torch.randn(2, 4, 9, 32, device=DEVICE)
        with pytest.raises(RuntimeError):
            flashmoe.scaled_dot_product_attention(q, q[:, :3], q[:, :3])


@pytest.mark.parametrize("through", ["lse", "both"])
@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (7, 3)])
def test_softmax_lse_is_differentiable(window, how, through):
    """A z-loss adds up its squares; context parallelism merges parts by it."""
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.float32
    q = torch.randn(2, 40, 4, 32, device=DEVICE, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, 56, 2, 32, device=DEVICE, dtype=dtype, requires_grad=True) for _ in "kv")
    dout = torch.randn_like(q) if through == "both" else torch.zeros_like(q)

    def loss(out, lse):
        z = lse.square().sum()
        return z if through == "lse" else z + (out * dout).sum()

    def f(q, k, v):
        return flash_attn_func(q, k, v, window_size=window, return_attn_probs=True)[:2]

    if how == "compiled":
        f = torch.compile(f, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(loss(*f(q, k, v)), (q, k, v), allow_unused=True)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(
        loss(*attention_reference(*leaves, mask=Mask(*window))), leaves, allow_unused=True
    )
    tolerance = 2e-2 if dtype == torch.float16 else 2e-5
    for x, wanted in zip(gradients, expected, strict=True):
        wanted = torch.zeros_like(v).double() if wanted is None else wanted
        torch.testing.assert_close(x.double(), wanted, rtol=tolerance, atol=tolerance)


def test_rows_that_see_nothing_pass_on_no_gradient_of_their_lse():
    q, k, v = (torch.randn(1, n, 2, 32, device=DEVICE, requires_grad=True) for n in (9, 4, 4))
    _, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (lse[..., :5] == -torch.inf).all()
    gradients = torch.autograd.grad(lse.exp().sum() + lse.square().sum(), (q, k))
    assert all(x.isfinite().all() for x in gradients)
