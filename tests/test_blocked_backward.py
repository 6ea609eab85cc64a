"""The backward in torch operations: empty problems, scores of any size, torch's modes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support import DEVICE, run_backward
from torch.utils._python_dispatch import TorchDispatchMode

from flashmoe import flash_attn_func
from flashmoe.measure.reference import attention_reference
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.mask import causal_if


def backward(dout, q, k, v, softmax_scale, causal=False):
    """dq, dk, dv from a forward's out and softmax_lse in the dtypes that they have."""
    mask = causal_if(causal)
    out, lse = attention_reference(q, k, v, softmax_scale, mask)
    saved = Saved(dout, out.to(q.dtype), lse.float())
    return run_backward("blocked", Call(q, k, v, softmax_scale), saved, mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_kv", [2, 1])
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_kv"), [(0, 5, 5), (0, 0, 0), (2, 0, 5), (2, 5, 0), (2, 0, 0)]
)
def test_gradients_of_nothing_are_zero(batch, seqlen_q, seqlen_kv, heads_kv, causal):
    q = torch.randn(batch, seqlen_q, 2, 16, device=DEVICE)
    k, v = (torch.randn(batch, seqlen_kv, heads_kv, 16, device=DEVICE) for _ in "kv")
    for x, gradient in zip(
        (q, k, v), backward(torch.ones_like(q), q, k, v, 0.25, causal), strict=True
    ):
        assert gradient.shape == x.shape
        assert not gradient.any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "value", "head_dim"),
    [(torch.float16, 65504, 64), (torch.bfloat16, 133120, 64), (torch.bfloat16, 133120, 136)],
    ids=str,
)
def test_equal_scores_of_any_size_share_the_gradient(dtype, value, head_dim, causal):
    """One rounding of such a score is thousands: exp(score - softmax_lse) is 0 or infinite."""
    q = k = v = torch.full((1, 257, 1, head_dim), value, dtype=dtype, device=DEVICE)
    dout = torch.randn(1, 257, 1, head_dim, device=DEVICE).to(dtype)
    dq, dk, dv = backward(dout, q, k, v, head_dim**-0.5, causal)
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    share = torch.ones(257, 257, device=DEVICE, dtype=torch.float64)
    share = share.tril() if causal else share
    expected = (share / share.sum(1, keepdim=True)).T @ dout[0, :, 0].double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dv[0, :, 0].double(), expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("softmax_scale", [1e4, 1e30, 2.3e38])
def test_gradients_of_the_steepest_softmax(softmax_scale):
    """All of each row goes to one key, so nothing depends on the scores."""
    q, k, v, dout = (torch.randn(1, 70, 2, 32, device=DEVICE) for _ in range(4))
    dq, dk, dv = backward(dout, q, k, v, softmax_scale, causal=True)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double())
    hidden = torch.ones(70, 70, dtype=torch.bool, device=DEVICE).triu(1)
    chosen = scores.masked_fill(hidden, -torch.inf).argmax(-1)
    expected = torch.zeros_like(v).transpose(1, 2)
    expected.scatter_add_(2, chosen[..., None].expand_as(expected), dout.transpose(1, 2))
    torch.testing.assert_close(dv, expected.transpose(1, 2), rtol=1e-6, atol=1e-5)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-20


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def filled_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def reduced_precision():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


MODES = {
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
    "filled memory": filled_memory,
    "reduced precision": reduced_precision,
}


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.parametrize("backend", [None, "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_what_torch_is_set_to_changes_nothing(mode, dtype, backend):
    inputs = [torch.randn(2, 300, h, 32, device=DEVICE).to(dtype) for h in (4, 4, 2, 2)]
    dout, *leaves = (x.requires_grad_() for x in inputs)

    def results():
        out = flash_attn_func(*leaves, causal=True, backend=backend)
        return out, *torch.autograd.grad(out, leaves, dout)

    expected = results()
    with MODES[mode]():
        actual = results()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=20 * eps)


class Matmuls(TorchDispatchMode):
    """Collects the dtypes in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's TF32 holds 16-bit operands")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("mode", "exact"), [(contextlib.nullcontext, torch.float32), (reduced_precision, torch.float64)]
)
def test_matmuls_that_torch_would_round_are_made_in_float64(mode, exact, dtype):
    q, k, v, dout = (torch.randn(1, 9, 2, 32).to(dtype) for _ in range(4))
    with mode(), Matmuls() as matmuls:
        run_backward("blocked", Call(q, k, v, 0.2), Saved(dout, q, q))
    assert matmuls.dtypes == {exact}
