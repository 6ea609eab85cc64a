"""torch.func, forward-mode AD, tracers and subclasses: right, refused by name, or torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import flashmoe
from flashmoe import flash_attn_func
from flashmoe.frontend import ops

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

# Another backend's forward may differ in the last bits.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# The math backend has a formula for everything.
MATH = torch.nn.attention.SDPBackend.MATH


def qkv(*leading: int) -> list[torch.Tensor]:
    """Of a shape that both signatures understand."""
    return [torch.randn(*leading, 2, 4, 4, 8, device=DEVICE) for _ in "qkv"]


def warm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """With a ready-made call, validation is skipped."""
    flash_attn_func(q, k, v)
    flashmoe.scaled_dot_product_attention(q, k, v)


def dual(f, q, k, v, requires_grad=False):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(q.clone().requires_grad_(requires_grad), torch.ones_like(q))
        return forward_ad.unpack_dual(f(x, k, v)).tangent


def jvp(f, q, k, v):
    return torch.func.jvp(lambda q: f(q, k, v), (q,), (torch.ones_like(q),))[1]


FORWARD_MODE = {
    "dual": dual,
    "dual of a leaf": lambda f, q, k, v: dual(f, q, k, v, requires_grad=True),
    "jvp": jvp,
    "jacfwd": lambda f, q, k, v: torch.func.jacfwd(lambda q: f(q, k, v))(q),
    "vmap(jvp)": lambda f, q, k, v: torch.vmap(lambda *x: jvp(f, *x))(q[None], k[None], v[None]),
    "jvp(vmap)": lambda f, q, k, v: jvp(torch.vmap(f), q[None], k[None], v[None]),
    "compiled jvp": lambda f, q, k, v: torch.compile(
        lambda q: jvp(f, q, k, v), backend="aot_eager"
    )(q),
}


@pytest.mark.parametrize("mode", FORWARD_MODE)
class TestForwardMode:
    def test_is_refused(self, mode):
        warm(*qkv())
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            FORWARD_MODE[mode](flash_attn_func, *qkv())

    @pytest.mark.parametrize("op", [ops.attention, ops.attention_without_lse], ids=str)
    def test_is_refused_by_the_ops(self, mode, op):
        def out(q, k, v):
            found = op(q, k, v, 0.3, -1, -1, "", "")
            return found if isinstance(found, torch.Tensor) else found[0]

        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            FORWARD_MODE[mode](out, *qkv())

    def test_of_scaled_dot_product_attention_is_torchs(self, mode):
        q, k, v = qkv()
        warm(q, k, v)
        with torch.nn.attention.sdpa_kernel(MATH):
            actual = FORWARD_MODE[mode](flashmoe.scaled_dot_product_attention, q, k, v)
            expected = FORWARD_MODE[mode](F.scaled_dot_product_attention, q, k, v)
        assert expected.any()
        torch.testing.assert_close(actual, expected)


def test_the_backward_op_refuses_tangents():
    q, k, v = qkv()
    out, lse = ops.attention(q, k, v, 0.3, -1, -1, "", "")
    with forward_ad.dual_level():
        dout = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            ops.attention_backward(dout, q, k, v, out, lse, None, 0.3, -1, -1, "")


def test_without_a_tangent_a_dual_level_changes_nothing():
    q, k, v = qkv()
    expected = flash_attn_func(q, k, v)
    with forward_ad.dual_level():
        torch.testing.assert_close(flash_attn_func(q, k, v), expected)


def grad(f, q, k, v):
    return torch.func.grad(lambda q: f(q, k, v).sin().sum())(q)


REVERSE_MODE = {
    "grad": grad,
    "vjp": lambda f, q, k, v: torch.func.vjp(lambda q: f(q, k, v), q)[1](v)[0],
    "jacrev": lambda f, q, k, v: torch.func.jacrev(lambda q: f(q, k, v).sum((0, 1)))(q),
    "vmap(grad)": lambda f, q, k, v: torch.vmap(lambda *x: grad(f, *x))(q[None], k[None], v[None]),
    "grad(vmap)": lambda f, q, k, v: grad(torch.vmap(f), q[None], k[None], v[None]),
    "compiled grad": lambda f, q, k, v: torch.compile(
        lambda q: grad(f, q, k, v), backend="aot_eager", fullgraph=True
    )(q),
}


@pytest.mark.parametrize("mode", REVERSE_MODE)
class TestReverseMode:
    def test_is_refused(self, mode):
        warm(*qkv())
        error = RuntimeError if mode.startswith("compiled") else NotImplementedError
        with pytest.raises(error, match=r"torch\.func\.grad, vjp and jacrev are not supported"):
            REVERSE_MODE[mode](flash_attn_func, *qkv())

    def test_of_scaled_dot_product_attention_is_torchs(self, mode):
        q, k, v = qkv()
        warm(q, k, v)
        # torch's memory-efficient kernel has no gradient under vmap for so few queries (CUDA).
        with torch.nn.attention.sdpa_kernel(MATH):
            actual = REVERSE_MODE[mode](flashmoe.scaled_dot_product_attention, q, k, v)
            expected = REVERSE_MODE[mode](F.scaled_dot_product_attention, q, k, v)
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("f", [flash_attn_func, flashmoe.scaled_dot_product_attention])
def test_vmap_and_its_gradients(f):
    q, k, v = (x.requires_grad_() for x in qkv(3))
    with torch.nn.attention.sdpa_kernel(MATH):
        out = torch.vmap(f)(q, k, v)
        expected = torch.stack([f(*x) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(out, expected, **CLOSE)
    actual = torch.autograd.grad(out.sin().sum(), (q, k, v))
    torch.testing.assert_close(
        actual, torch.autograd.grad(expected.sin().sum(), (q, k, v)), **CLOSE
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("f", [flash_attn_func, flashmoe.scaled_dot_product_attention])
def test_fake_tensors_need_no_device(f, inside, device):
    with FakeTensorMode():
        x = torch.empty(2, 4, 4, 8, device=device)
        if inside:
            out = f(x, x, x)
    if not inside:
        out = f(x, x, x)
    assert (out.shape, out.device.type, out.dtype) == (x.shape, device, x.dtype)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("f", [flash_attn_func, flashmoe.scaled_dot_product_attention])
def test_make_fx(f, mode):
    q, k, v = qkv()
    warm(q, k, v)
    graph = make_fx(lambda q, k, v: f(q, k, v), tracing_mode=mode)(q, k, v)
    q, k, v = qkv()
    torch.testing.assert_close(graph(q, k, v), f(q, k, v), **CLOSE)
    kernels = {str(node.target) for node in graph.graph.nodes}
    assert not any("fwd_cpu" in name or "fwd_cuda" in name for name in kernels)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("f", [flash_attn_func, flashmoe.scaled_dot_product_attention])
def test_export_keeps_the_op(f, strict):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return f(q * 2.0, k, v)

    q, k, v = qkv()
    exported = torch.export.export(Module(), (q, k, v), strict=strict)
    assert ops.attention_without_lse in [node.target for node in exported.graph.nodes]
    torch.testing.assert_close(exported.module()(q, k, v), f(q * 2.0, k, v), **CLOSE)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("f", [flash_attn_func, flashmoe.scaled_dot_product_attention])
def test_jit_trace_follows_other_shapes(f, requires_grad):
    q, k, v = qkv()
    warm(q, k, v)
    traced = torch.jit.trace(lambda q, k, v: f(q, k, v), (q.requires_grad_(requires_grad), k, v))
    q, k, v = (torch.randn(1, 9, 9, 8, device=DEVICE) for _ in "qkv")
    torch.testing.assert_close(traced(q, k, v), f(q, k, v), **CLOSE)


def test_subclasses_of_scaled_dot_product_attention_go_to_torch(monkeypatch):
    q, k, v = qkv()
    monkeypatch.setattr(flashmoe.api, "attend", None)
    two = (TwoTensor(x, 2 * x) for x in (q, k, v))
    out = flashmoe.scaled_dot_product_attention(*two)
    assert isinstance(out, TwoTensor)
    torch.testing.assert_close(out.a, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(out.b, F.scaled_dot_product_attention(2 * q, 2 * k, 2 * v))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_of_scaled_dot_product_attention_go_to_torch(layout):
    rows = [torch.randn(n, 4, 8, device=DEVICE) for n in (3, 5)]
    x = torch.nested.nested_tensor(rows, layout=layout).transpose(1, 2)
    if layout == torch.strided:
        x = x.contiguous()
    out = flashmoe.scaled_dot_product_attention(x, x, x)
    for row, found in zip(rows, out.transpose(1, 2).unbind(), strict=True):
        heads = row.transpose(0, 1)[None]
        expected = F.scaled_dot_product_attention(heads, heads, heads)[0].transpose(0, 1)
        torch.testing.assert_close(found, expected, **CLOSE)
