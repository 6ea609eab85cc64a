"""What torch's machinery sees: opcheck, torch.compile, autocast, fake tensors."""

from __future__ import annotations

import pytest
import torch
from support import DEVICE

import flashmoe
from flashmoe import _extension, flash_attn_func, ops


def qkv(requires_grad=False, dtype=torch.bfloat16):
    q = torch.randn(2, 17, 4, 64, device=DEVICE, dtype=dtype, requires_grad=requires_grad)
    k, v = (
        torch.randn(2, 23, 2, 64, device=DEVICE, dtype=dtype, requires_grad=requires_grad)
        for _ in range(2)
    )
    return q, k, v


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the op of the cpu")
def test_opcheck_fwd_cpu():
    torch.library.opcheck(torch.ops.flashmoe.fwd_cpu.default, (*qkv(), 0.2, True, 32, 32))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the op of CUDA devices")
@pytest.mark.parametrize("kernel", ["sm80", "sm90"])
def test_opcheck_fwd_cuda(kernel):
    handles = _extension.load().handles
    found = [handle for (d, tile), handle in handles.items() if d == 64 and tile.kernel == kernel]
    if not found or (kernel == "sm90" and torch.cuda.get_device_capability(DEVICE)[0] != 9):
        pytest.skip(f"{kernel} kernels do not run here")
    torch.library.opcheck(torch.ops.flashmoe.fwd_cuda.default, (*qkv(), 0.2, True, found[0]))


@pytest.mark.parametrize("scale", [0.0, -0.2, float("nan")])
def test_fwd_refuses_a_scale_that_is_not_positive(scale):
    cpu = DEVICE.type == "cpu"
    fwd = torch.ops.flashmoe.fwd_cpu if cpu else torch.ops.flashmoe.fwd_cuda
    with pytest.raises(RuntimeError, match=r"softmax_scale must be .*positive, got "):
        fwd(*qkv(), scale, True, *([32, 32] if cpu else [0]))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_attention(requires_grad):
    arguments = (*qkv(requires_grad), 0.2, True, "", "")
    torch.library.opcheck(torch.ops.flashmoe.attention.default, arguments)


def test_opcheck_attention_backward():
    q, k, v = qkv()
    out, lse = ops.attention(q, k, v, 0.2, True, "", "")
    arguments = (torch.randn_like(out), q, k, v, out, lse, 0.2, True, "")
    torch.library.opcheck(torch.ops.flashmoe.attention_backward.default, arguments)


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


def test_inference_mode_and_parameters():
    q, k, v = (torch.nn.Parameter(x) for x in qkv())
    with torch.inference_mode():
        out = flash_attn_func(q, k, v)
    torch.testing.assert_close(out, flash_attn_func(q, k, v), rtol=0, atol=0)


def test_training_plans_a_problem_once():
    flashmoe.api.forget_plans()
    q, k, v = (torch.randn(1, 40, 2, 24, requires_grad=True) for _ in "qkv")
    for _ in range(3):
        flash_attn_func(q, k, v).sum().backward()
    planned = flashmoe.plan.remembered_plan.cache_info()
    assert (planned.misses, planned.hits) == (2, 4)  # forward and backward
    flashmoe.api.forget_plans()
    assert flashmoe.plan.remembered_plan.cache_info().currsize == 0
