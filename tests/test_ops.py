"""What torch's machinery sees: opcheck, torch.compile, autocast, fake tensors."""

from __future__ import annotations

import pytest
import torch
from support import DEVICE

import flashmoe
from flashmoe import _extension, flash_attn_func
from flashmoe.frontend import ops
from flashmoe.planning import plan
from flashmoe.tiles import PLAIN


def qkv(requires_grad=False, dtype=torch.bfloat16):
    q = torch.randn(2, 17, 4, 64, device=DEVICE, dtype=dtype, requires_grad=requires_grad)
    k, v = (
        torch.randn(2, 23, 2, 64, device=DEVICE, dtype=dtype, requires_grad=requires_grad)
        for _ in range(2)
    )
    return q, k, v


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the op of the cpu")
def test_opcheck_fwd_cpu():
    torch.library.opcheck(torch.ops.flashmoe.fwd_cpu.default, (*qkv(), 0.2, -1, 0, 32, 32))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the op of CUDA devices")
@pytest.mark.parametrize("kernel", ["sm80", "sm90"])
def test_opcheck_fwd_cuda(kernel):
    handles = _extension.load().handles
    found = [
        handle
        for (d, tile, variant), handle in handles.items()
        if (d, tile.kernel, variant) == (64, kernel, PLAIN)
    ]
    if not found or (kernel == "sm90" and torch.cuda.get_device_capability(DEVICE)[0] != 9):
        pytest.skip(f"{kernel} kernels do not run here")
    torch.library.opcheck(torch.ops.flashmoe.fwd_cuda.default, (*qkv(), 0.2, -1, 0, found[0]))


@pytest.mark.parametrize("scale", [0.0, -0.2, float("nan")])
def test_fwd_refuses_a_scale_that_is_not_positive(scale):
    cpu = DEVICE.type == "cpu"
    fwd = torch.ops.flashmoe.fwd_cpu if cpu else torch.ops.flashmoe.fwd_cuda
    with pytest.raises(RuntimeError, match=r"softmax_scale must be .*positive, got "):
        fwd(*qkv(), scale, -1, 0, *([32, 32] if cpu else [0]))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", [ops.attention, ops.attention_without_lse], ids=str)
def test_opcheck_attention(op, requires_grad):
    torch.library.opcheck(op, (*qkv(requires_grad), 0.2, -1, 0, "", ""))


def test_opcheck_attention_without_lse_by_sdpa():
    q, k, v = (torch.randn(2, 4, 9, 64, device=DEVICE).transpose(1, 2) for _ in "qkv")
    torch.library.opcheck(ops.attention_without_lse, (q, k, v, 0.2, -1, 0, "sdpa", ""))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_attention_backward(requires_grad):
    q, k, v = qkv(requires_grad)
    out, lse = (x.detach() for x in ops.attention(q, k, v, 0.2, -1, 0, "", ""))
    arguments = (torch.randn_like(out), q, k, v, out, lse, None, 0.2, -1, 0, "")
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:  # the gradients' gradients do not exist
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.attention_backward, arguments, test_utils=checks)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_op_without_lse_is_the_op_with_it(requires_grad):
    q, k, v = qkv(requires_grad)
    out = ops.attention_without_lse(q, k, v, 0.2, -1, 0, "", "")
    expected, lse = ops.attention(q, k, v, 0.2, -1, 0, "", "")
    assert torch.equal(out, expected)
    assert lse.requires_grad == requires_grad
    if requires_grad:
        actual = torch.autograd.grad(out.float().sin().sum(), (q, k, v))
        wanted = torch.autograd.grad(expected.float().sin().sum(), (q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


def test_double_backward_is_refused():
    q, k, v = qkv(requires_grad=True)
    dq, *_ = torch.autograd.grad(flash_attn_func(q, k, v).sin().sum(), (q, k, v), create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        dq.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_without_graph_breaks(requires_grad):
    def f(q, k, v):
        return flash_attn_func(q * 1.0, k, v, causal=True).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    q, k, v = qkv(requires_grad)
    out, expected = compiled(q, k, v), f(q, k, v)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    if requires_grad:
        actual = torch.autograd.grad(out.sum(), (q, k, v))
        torch.testing.assert_close(actual, torch.autograd.grad(expected.sum(), (q, k, v)))


def test_compiles_with_dynamic_shapes_and_sdpa_signature():
    compiled = torch.compile(
        lambda q, k, v: flashmoe.scaled_dot_product_attention(q, k, v, is_causal=True),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for seqlen in (16, 24, 40):
        q, k, v = (torch.randn(2, 4, seqlen, 64, device=DEVICE) for _ in range(3))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(compiled(q, k, v), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lse", [False, True])
def test_compiled_inference_may_run_a_plan_without_lse(monkeypatch, lse):
    needed = []

    def planned(problem, device, backend, tile, need_lse, *others):
        needed.append(need_lse)
        return plan.planned(problem, device, "" if need_lse else "sdpa", tile, need_lse, *others)

    monkeypatch.setattr(ops, "planned", planned)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(q, k, v):
        out = flash_attn_func(q, k, v, causal=True, return_attn_probs=lse)
        return out[0] if lse else out

    q = torch.randn(1, 1, 2, 64, device=DEVICE)
    k, v = (torch.randn(1, 64, 2, 64, device=DEVICE) for _ in "kv")
    torch.testing.assert_close(f(q, k, v), flash_attn_func(q, k, v), rtol=1e-4, atol=1e-5)
    assert needed == [lse]


def test_autocast_computes_in_its_dtype():
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = flash_attn_func(q, k, v)
    assert out.dtype == torch.bfloat16
    expected = flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert torch.equal(out, expected)
    assert flash_attn_func(q, k, v).dtype == torch.float32


def test_autocast_gradients_arrive_in_float32():
    q, k, v = qkv(requires_grad=True, dtype=torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = flash_attn_func(q, k, v)
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    q, k, v = qkv(dtype=torch.float64)
    with (
        torch.autocast(DEVICE.type, dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"q must be float32, .*got torch.float64"),
    ):
        flash_attn_func(q, k, v)


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_inside_autocast_is_as_accurate_as_outside(compiled):
    q, k, v = qkv(requires_grad=True, dtype=torch.float32)
    dout = torch.randn_like(q)
    f = torch.compile(flash_attn_func, backend="aot_eager") if compiled else flash_attn_func
    outside = torch.autograd.grad(f(q, k, v, causal=True), (q, k, v), dout)
    out = f(q, k, v, causal=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = torch.autograd.grad(out, (q, k, v), dout)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_the_ops_compute_in_their_inputs_dtype_inside_autocast():
    q, k, v = qkv(dtype=torch.float32)
    arguments = (q, k[:, :17], v[:, :17], 0.2, -1, -1, "sdpa", "")
    expected = ops.attention_without_lse(*arguments)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = ops.attention_without_lse(*arguments)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_inference_mode_and_parameters():
    # Of a dtype that no CPU has another plan for where there is no gradient.
    q, k, v = (torch.nn.Parameter(x) for x in qkv(dtype=torch.float16))
    with torch.inference_mode():
        out = flash_attn_func(q, k, v)
    torch.testing.assert_close(out, flash_attn_func(q, k, v), rtol=0, atol=0)


def test_training_plans_a_problem_once():
    flashmoe.api.forget_plans()
    q, k, v = (torch.randn(1, 40, 2, 24, requires_grad=True) for _ in "qkv")
    for _ in range(3):
        flash_attn_func(q, k, v).sum().backward()
    planned = flashmoe.planning.plan.planned.cache_info()
    assert (planned.misses, planned.hits) == (2, 0)  # forward and backward
    flashmoe.api.forget_plans()
    assert flashmoe.planning.plan.planned.cache_info().currsize == 0
