"""Bad input: every argument's error names it, what it got and what is allowed."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashmoe
from flashmoe import Problem, Tile, flash_attn_func
from flashmoe.frontend import validation


def qkv(**overrides: torch.Tensor) -> list[torch.Tensor]:
    tensors = {name: torch.randn(2, 5, 4, 32) for name in "qkv"}
    return list({**tensors, **overrides}.values())


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"q": [1]}, TypeError, r"q must be a torch\.Tensor, got list"),
        ({"v": None}, TypeError, r"v must be a torch\.Tensor, got NoneType"),
        ({"q": torch.randn(5, 4, 32)}, ValueError, r"q must have 4 dimensions .* \(5, 4, 32\)"),
        ({"q": torch.randn(2, 5, 4, 32).double()}, TypeError, r"q must be float32, .*float64"),
        ({"k": torch.randn(2, 5, 4, 32).half()}, TypeError, r"k must have q's dtype .*float16"),
        ({"k": torch.randn(3, 5, 4, 32)}, ValueError, r"k must be \(batch=2, .*\(3, 5, 4, 32\)"),
        ({"k": torch.randn(2, 5, 4, 40)}, ValueError, r"k must be .*head_dim=32.*\(2, 5, 4, 40\)"),
        ({"v": torch.randn(2, 6, 4, 32)}, ValueError, r"v must have k's shape .*\(2, 6, 4, 32\)"),
        ({"v": torch.randn(2, 5, 4, 32, device="meta")}, ValueError, r"v must be on q's device"),
    ],
)
def test_tensor_errors(overrides, error, message):
    with pytest.raises(error, match=message):
        flash_attn_func(*qkv(**overrides))


@pytest.mark.parametrize("head_dim", [0, 257, 264])
def test_head_dim(head_dim):
    q, k, v = (torch.randn(1, 2, 1, head_dim) for _ in range(3))
    with pytest.raises(ValueError, match=f"^head_dim must be from 1 to 256, got {head_dim}"):
        flash_attn_func(q, k, v)
    q = k = torch.randn(1, 2, 1, 8)
    with pytest.raises(ValueError, match=f"v's head_dim must be from 1 to 256, got {head_dim}"):
        flash_attn_func(q, k, v)


def test_heads_must_be_a_multiple():
    k = v = torch.randn(2, 5, 3, 32)
    with pytest.raises(ValueError, match=r"q's heads must be .* multiple of k's \(3\), got 4"):
        flash_attn_func(*qkv(k=k, v=v))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-60, 3e38, 1e60, float("nan"), float("inf")])
def test_softmax_scale_must_be_what_kernels_can_hold(scale):
    message = rf"softmax_scale must be from 1\.18e-38 to 2\.3e\+38, got {re.escape(str(scale))}"
    with pytest.raises(ValueError, match=message):
        flash_attn_func(*qkv(), softmax_scale=scale)


@given(st.floats(1e-40, 1e40))
def test_a_scale_that_is_taken_can_be_multiplied_by_log2_e_in_float32(scale):
    product = torch.tensor(scale, dtype=torch.float32) * math.log2(math.e)
    if validation.is_normal(scale):
        assert torch.finfo(torch.float32).tiny <= product < math.inf
    else:  # not far from what is allowed
        assert product < 1.8e-38 or product > 3.3e38


@pytest.mark.parametrize("scale", [2e-38, 2.3e38])
def test_extreme_scales_of_scores_that_are_zero(scale):
    _, k, v = qkv()
    out = flash_attn_func(torch.zeros(2, 5, 4, 32), k, v, softmax_scale=scale)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))


@pytest.mark.parametrize("scale", [torch.tensor(1.0), np.ones(()), [1.0], "1"])
def test_softmax_scale_must_be_a_number(scale):
    message = f"softmax_scale must be a number, got {type(scale).__name__}"
    with pytest.raises(TypeError, match=message):
        flash_attn_func(*qkv(), softmax_scale=scale)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("window_size", "no", r"window_size must be \(left, right\), two integers or None .*'no'"),
        ("window_size", -1, r"window_size must be .*, got -1"),
        ("window_size", (-1,), r"window_size must be .*, got \(-1,\)"),
        ("window_size", (True, 0), r"window_size must be .*, got \(True, 0\)"),
        ("window_size", (0, 1.0), r"window_size must be .*, got \(0, 1.0\)"),
        ("window_size", torch.ones(2), r"window_size must be .*, got tensor"),
        ("causal", "no", "causal must be True or False, got 'no'"),
        ("causal", [], r"causal must be True or False, got \[\]"),
        ("causal", None, "causal must be True or False, got None"),
        ("backend", 7, "backend must be one of cuda, .* or None, got 7"),
        ("backend", ["cpu"], r"backend must be one of cuda, .* or None, got \['cpu'\]"),
        ("tile", 3, "tile must be a Tile, its text form or None, got 3"),
        ("tile", 0, "tile must be a Tile, its text form or None, got 0"),
        ("tile", ["x"], r"tile must be a Tile, its text form or None, got \['x'\]"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(argument, value, message, grad):
    tensors = [x.requires_grad_(grad) for x in qkv()]
    with pytest.raises(TypeError, match=message):
        flash_attn_func(*tensors, **{argument: value})


def test_what_flash_attn_takes_is_taken():
    expected = flash_attn_func(*qkv())
    assert flash_attn_func(*qkv(), window_size=[-1, -1], causal=0).shape == expected.shape
    assert flash_attn_func(*qkv(), causal=np.bool_(True), softmax_scale=np.float32(0.5)).any()


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_known_shape_on_another_device_is_refused(name):
    tensors = qkv()
    flash_attn_func(*tensors)
    tensors["qkv".index(name)] = torch.randn(2, 5, 4, 32, device="meta")
    with pytest.raises(ValueError, match=f"{name} must be on q's device cpu, got meta"):
        flash_attn_func(*tensors)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused(layout):
    x = torch.nested.nested_tensor([torch.randn(3, 4, 8), torch.randn(5, 4, 8)], layout=layout)
    with pytest.raises(NotImplementedError, match="q must be a dense tensor, got a nested tensor"):
        flash_attn_func(x, x, x)


@pytest.mark.parametrize("grad", [False, True])
class TestOverrides:
    def tensors(self, grad):
        return [x.requires_grad_(grad) for x in qkv()]

    def test_unknown_backend(self, grad):
        with pytest.raises(ValueError, match=r"backend must be one of cuda, .*, got 'magic'"):
            flash_attn_func(*self.tensors(grad), backend="magic")

    def test_backend_that_cannot_run_says_why(self, grad):
        with pytest.raises(ValueError, match=r"backend 'cuda' cannot run .* needs a CUDA device"):
            flash_attn_func(*self.tensors(grad), backend="cuda")
        with pytest.raises(ValueError, match=r"'blocked' cannot run .*has no forward kernel"):
            flash_attn_func(*self.tensors(grad), backend="blocked")

    def test_illegal_tile_says_why(self, grad):
        with pytest.raises(ValueError, match=r"num_warps must be 1 for the cpu kernel, got 4"):
            flash_attn_func(*self.tensors(grad), tile="cpu:64x64-stages1-warps4")

    def test_tile_of_another_backend(self, grad):
        with pytest.raises(ValueError, match=r"belongs to backend 'triton', got 'cpu'"):
            flash_attn_func(*self.tensors(grad), backend="cpu", tile="triton:64x64")

    def test_malformed_tile(self, grad):
        with pytest.raises(ValueError, match=r"tile must look like .*, got 'cpu:64'"):
            flash_attn_func(*self.tensors(grad), tile="cpu:64")

    def test_environment(self, grad, monkeypatch):
        flashmoe.api.forget_plans()
        monkeypatch.setenv("FLASHMOE_BACKEND", "nonsense")
        with pytest.raises(ValueError, match="got 'nonsense'"):
            flash_attn_func(*self.tensors(grad))
        monkeypatch.delenv("FLASHMOE_BACKEND")
        monkeypatch.setenv("FLASHMOE_TILE", "cpu:16x48")
        plan = flashmoe.make_plan(Problem(2, 4, 4, 5, 5, 32, "float32"), torch.device("cpu"))
        assert plan.tile == Tile("cpu", 16, 48)
        assert plan.source == "environment"
        flash_attn_func(*self.tensors(grad))
        flashmoe.api.forget_plans()


def test_lse_from_sdpa_is_refused():
    with pytest.raises(ValueError, match="softmax_lse"):
        flash_attn_func(*qkv(), backend="sdpa", return_attn_probs=True)


def test_device_must_be_cpu_or_cuda():
    tensors = [torch.randn(1, 2, 1, 32, device="meta") for _ in range(3)]
    with pytest.raises(ValueError, match="cpu or cuda device, got meta"):
        flash_attn_func(*tensors)


def test_the_op_itself_never_reads_wild_memory():
    q, k, v = qkv()
    fwd = torch.ops.flashmoe.fwd_cpu
    for bad_k, bad_v, message in (
        (k[:1], v, "one shape"),
        (k[:1], v[:1], "batch"),
        (k.half(), v, "one dtype"),
        (k[:, :, :3], v[:, :, :3], "multiple"),
        (k[0], v[0], "4 dimensions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fwd(q, bad_k, bad_v, 1.0, -1, -1, 64, 64)
    with pytest.raises(RuntimeError, match="block_m"):
        fwd(q, k, v, 1.0, -1, -1, 0, 64)
    with pytest.raises(RuntimeError, match="window_left"):
        fwd(q, k, v, 1.0, -2, -1, 64, 64)
