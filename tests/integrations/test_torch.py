"""torch's own functions run flashmoe: patched, and through torch's hook."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support import DEVICE
from torch import Tensor

import flashmoe
from flashmoe.integrations import torch as ours
from flashmoe.measure.reference import attention_reference

TORCH_SDPA = F.scaled_dot_product_attention
needs_hook = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="torch before 2.11"
)


def _qkv(
    heads_q: int = 4, heads_kv: int = 2, seqlen_q: int = 19, seqlen_k: int = 19
) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = ((heads_q, seqlen_q), (heads_kv, seqlen_k), (heads_kv, seqlen_k))
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    shapes = [(2, h, s, 16) for h, s in sizes]
    return [torch.randn(x, device=DEVICE, dtype=dtype, requires_grad=True) for x in shapes]


def _close(got: Tensor, want: Tensor) -> None:
    # float32 on the CPU, bfloat16 elsewhere.
    tolerance = 1e-4 if got.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.fixture
def patched() -> Iterator[None]:
    ours.patch_sdpa()
    yield
    ours.unpatch_sdpa()


@pytest.mark.usefixtures("patched")
def test_patched_sdpa() -> None:
    assert F.scaled_dot_product_attention is flashmoe.scaled_dot_product_attention
    ours.patch_sdpa()  # once is enough
    for seqlen_k in (19, 30):
        q, k, v = _qkv(seqlen_k=seqlen_k)
        got = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        _close(got, TORCH_SDPA(q, k, v, is_causal=True, enable_gqa=True))  # top-left
        mask = torch.rand(19, seqlen_k, device=DEVICE) > 0.3
        mask[:, 0] = True
        got = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        _close(got, TORCH_SDPA(q, k, v, mask, enable_gqa=True))


@pytest.mark.usefixtures("patched")
def test_patched_sdpa_in_a_module() -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True, device=DEVICE)
    x = torch.randn(2, 9, 32, device=DEVICE)
    got = layer(x)
    ours.unpatch_sdpa()
    torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-4)
    ours.patch_sdpa()


def test_unpatching() -> None:
    ours.unpatch_sdpa()  # nothing to undo
    ours.patch_sdpa()
    later = F.scaled_dot_product_attention = lambda *given, **more: None  # type: ignore[assignment]
    try:
        with pytest.raises(RuntimeError, match="undo what was patched later"):
            ours.unpatch_sdpa()
        assert F.scaled_dot_product_attention is later
    finally:
        F.scaled_dot_product_attention = flashmoe.scaled_dot_product_attention  # type: ignore[assignment]
        ours.unpatch_sdpa()
    assert F.scaled_dot_product_attention is TORCH_SDPA


@pytest.fixture
def active() -> Iterator[None]:
    ours.register()
    torch.nn.attention.activate_flash_attention_impl("flashmoe")
    yield
    ours.unregister()


@needs_hook
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_by_the_hook(causal: bool) -> None:
    q, k, v = _qkv()
    op = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_, seed, offset, _ = op(q, k, v, 0.0, causal)
    want = TORCH_SDPA(q.float(), k.float(), v.float(), is_causal=causal, enable_gqa=True)
    _close(out, want.to(out.dtype))
    assert lse.shape == (2, 4, 19)
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(want, (q, k, v), dout.float())
    sizes = (19, 19, 0.0, causal, seed, offset)
    saved = (dout, *(x.detach() for x in (q, k, v, out)), lse.detach())
    got = torch.ops.aten._scaled_dot_product_flash_attention_backward(*saved, None, None, *sizes)
    for a, b in zip(got, wanted, strict=True):
        _close(a, b)


@needs_hook
@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (4, 0)])
def test_varlen_attn_by_the_hook(window: tuple[int, int]) -> None:
    from torch.nn.attention.varlen import varlen_attn

    lengths = [5, 0, 9, 1]
    ends = torch.tensor([0, 5, 5, 14, 15], dtype=torch.int32, device=DEVICE)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(15, 4, 16, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    out = varlen_attn(q, k, v, ends, ends, 9, 9, window_size=window)
    each = [
        flashmoe.flash_attn_func(a[None], b[None], c[None], window_size=window)[0]
        for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        if len(a)
    ]
    want = torch.cat(each)
    _close(out, want)
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(want, (q, k, v), dout)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), dout), wanted, strict=True):
        _close(a, b)


@needs_hook
def test_results_are_laid_out_as_torch_lays_them_out() -> None:
    heads_first = [x.detach() for x in _qkv(4, 4, 32, 32)]
    rows_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads_first]
    for q, k, v in (heads_first, rows_first):
        out, lse, *_ = ours._sdpa(q, k, v)
        assert out.stride() == q.stride()
        _close(out, F.scaled_dot_product_attention(q, k, v))
        state = (None, None, 32, 32, 0.0, False, torch.empty(0), torch.empty(0))
        for gradient in ours._sdpa_backward(torch.ones_like(out), q, k, v, out, lse, *state):
            assert gradient.stride() == q.stride()


def test_the_hook_has_dropout() -> None:
    q, k, v = _qkv()
    out, lse, *_, state, unused, _ = ours._sdpa(q, k, v, 0.5)
    lengths = (None, None, q.shape[2], k.shape[2])
    gradients = ours._sdpa_backward(
        *(torch.ones_like(out), q, k, v, out, lse, *lengths, 0.5, False, state, unused)
    )
    leaves = [x.detach().double().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    state = state.view(torch.int64)
    expected, _ = attention_reference(*leaves, dropout_p=0.5, rng_state=state)
    wanted = torch.autograd.grad(expected.sum(), leaves)
    for x, y in zip((out, *gradients), (expected, *wanted), strict=True):
        torch.testing.assert_close(x.double(), y.transpose(1, 2), rtol=2e-2, atol=2e-2)


def test_the_hook_is_undone() -> None:
    ours.register()
    assert "flashmoe" in torch.nn.attention.list_flash_attention_impls()
    torch.nn.attention.activate_flash_attention_impl("flashmoe")
    assert torch.nn.attention.current_flash_attention_impl() == "flashmoe"
    with pytest.raises(NotImplementedError, match="return_debug_mask must be False"):
        torch.ops.aten._scaled_dot_product_flash_attention(*_qkv(), 0.5, False, True)
    ours.unregister()
    assert torch.nn.attention.current_flash_attention_impl() is None
    with pytest.raises(ValueError, match="Unknown flash attention impl 'flashmoe'"):
        torch.nn.attention.activate_flash_attention_impl("flashmoe")
    if DEVICE.type == "cpu":  # where torch has none of its own
        with pytest.raises(NotImplementedError, match="CPU"):
            torch.ops.aten._scaled_dot_product_flash_attention(*_qkv())
