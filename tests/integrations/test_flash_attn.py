"""flash-attn's module names resolve to flashmoe, and nothing of it stays behind."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import DEVICE, library
from torch import Tensor

import flashmoe
from flashmoe.integrations import flash_attn as ours
from flashmoe.measure.reference import attention_reference
from flashmoe.spec.dropout import kept_weights
from flashmoe.spec.mask import CAUSAL

if importlib.util.find_spec("flash_attn") is not None:
    pytest.skip("a real flash-attn is installed", allow_module_level=True)

DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4} if torch.float32 == DTYPE else {"rtol": 2e-2, "atol": 2e-2}


@pytest.fixture
def installed() -> Iterator[None]:
    assert ours.install() == ("flash_attn", "flash_attn_interface")
    yield
    ours.uninstall()


def _qkv(batch: int = 2, seqlen: int = 13, heads: int = 4, heads_kv: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(batch, seqlen, h, 16) for h in (heads, heads_kv, heads_kv)]
    return [torch.randn(x, device=DEVICE, dtype=DTYPE, requires_grad=True) for x in shapes]


def _close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.usefixtures("installed")
def test_names() -> None:
    flash_attn = importlib.import_module("flash_attn")
    from flash_attn import flash_attn_func  # noqa: F401
    from flash_attn.bert_padding import pad_input  # noqa: F401
    from flash_attn.flash_attn_interface import _flash_attn_forward  # noqa: F401
    from flash_attn.layers.rotary import apply_rotary_emb  # noqa: F401
    from flash_attn.ops.triton.rotary import apply_rotary  # noqa: F401

    assert flash_attn.__version__ == importlib.metadata.version("flash-attn") == "2.8.3"
    assert importlib.metadata.version("flash_attn") == "2.8.3"
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    assert importlib.metadata.packages_distributions()["flash_attn_interface"] == ["flash-attn-3"]
    assert importlib.util.find_spec("flash_attn_interface") is not None
    assert importlib.util.find_spec("flash_attn.cute") is None
    with pytest.raises(ImportError, match="flash_attn_unpadded_func"):
        from flash_attn import flash_attn_unpadded_func  # noqa: F401
    with pytest.raises(AttributeError, match="flash_attn_3_cuda is not supported"):
        _ = flash_attn.flash_attn_3_cuda
    with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.losses"):
        importlib.import_module("flash_attn.losses")


def test_undone() -> None:
    ours.install()
    importlib.import_module("flash_attn.layers.rotary")
    ours.uninstall()
    assert not [name for name in sys.modules if name.startswith("flash_attn")]
    assert importlib.util.find_spec("flash_attn") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")


def test_a_real_one_stays_unless_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    real = types.ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", real)
    assert ours.install() == ("flash_attn_interface",)
    assert importlib.import_module("flash_attn") is real
    ours.uninstall()
    assert ours.install(replace=True) == ("flash_attn", "flash_attn_interface")
    assert importlib.import_module("flash_attn").__version__ == "2.8.3"
    ours.uninstall()
    assert sys.modules["flash_attn"] is real


@pytest.mark.usefixtures("installed")
def test_sinks_by_s_aux() -> None:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    # transformers passes a model's sinks on only to a function with that argument.
    assert "s_aux" in inspect.signature(flash_attn_varlen_func).parameters
    q, k, v = _qkv()
    sinks = torch.randn(4, device=DEVICE)
    got = flash_attn_func(q, k, v, causal=True, s_aux=sinks)
    assert torch.equal(got, flashmoe.flash_attn_func(q, k, v, causal=True, sinks=sinks))
    assert not torch.equal(got, flash_attn_func(q, k, v, causal=True))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (4, 2)])
def test_the_private_pair(packed: bool, window: tuple[int, int]) -> None:
    from flash_attn import flash_attn_interface as fa

    q, k, v = _qkv()
    how = {"softmax_scale": 0.3, "causal": False, "softcap": 2.0}
    dout = torch.randn_like(q)
    gradients = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    if packed:
        ends = torch.tensor([0, 13, 26], dtype=torch.int32, device=DEVICE)
        lengths = (ends, ends, 13, 13)
        q_, k_, v_, dout_ = (x.detach().flatten(0, 1) for x in (q, k, v, dout))
        rest = (0.0, how["softmax_scale"], how["causal"], *window, how["softcap"], None)
        out, lse, _, state = fa._flash_attn_varlen_forward(q_, k_, v_, *lengths, *rest, False)
        places = [x.flatten(0, 1) for x in gradients]
        saved = (dout_, q_, k_, v_, out, lse, *places)
        sums = fa._flash_attn_varlen_backward(*saved, *lengths, *rest, False, state)
        assert sums.shape == lse.shape == (4, 26)
        out = out.unflatten(0, (2, 13))
    else:
        rest = (0.0, how["softmax_scale"], how["causal"], *window, how["softcap"], None)
        out, lse, _, state = fa._flash_attn_forward(q, k, v, *rest, False)
        assert not out.requires_grad
        sums = fa._flash_attn_backward(dout, q, k, v, out, lse, *gradients, *rest, False, state)
        assert sums.shape == lse.shape == (2, 4, 13)
    want = flashmoe.flash_attn_func(q, k, v, window_size=window, **how)
    _close(out, want)
    wanted = torch.autograd.grad(want, (q, k, v), dout)
    for got, expected in zip(gradients, wanted, strict=True):
        _close(got, expected)
    with pytest.raises(NotImplementedError, match="return_softmax must be False"):
        fa._flash_attn_forward(q, k, v, 0.0, 0.3, False, -1, -1, 0.0, None, True)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("packed", [False, True])
def test_the_pair_with_dropout(packed: bool) -> None:
    """The backward's mask is the forward's, by its state; S_dmask has it."""
    import flash_attn.flash_attn_interface as fa

    q, k, v, dout = (
        torch.randn(2, 13, heads, 16, device=DEVICE, dtype=DTYPE) for heads in (4, 2, 2, 4)
    )
    rest = (0.4, 0.3, True, -1, -1, 0.0, None)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    if packed:
        q, k, v, dout, *gradients = (x.flatten(0, 1) for x in (q, k, v, dout, *gradients))
        cu_seqlens = torch.tensor([0, 13, 26], dtype=torch.int32, device=DEVICE)
        lengths = (cu_seqlens, cu_seqlens, 13, 13)
        out, lse, weights, state = fa._flash_attn_varlen_forward(q, k, v, *lengths, *rest, True)
        fa._flash_attn_varlen_backward(
            *(dout, q, k, v, out, lse, *gradients, *lengths, *rest, False, state)
        )
    else:
        out, lse, weights, state = fa._flash_attn_forward(q, k, v, *rest, True)
        fa._flash_attn_backward(dout, q, k, v, out, lse, *gradients, *rest, False, state)
    leaves = [x.unflatten(0, (-1, 13)) if packed else x for x in (q, k, v)]
    leaves = [x.double().requires_grad_() for x in leaves]
    want, _ = attention_reference(*leaves, 0.3, CAUSAL, dropout_p=0.4, rng_state=state)
    _close(out.double(), want.reshape(out.shape))
    wanted = torch.autograd.grad(want, leaves, dout.double().reshape(want.shape))
    for got, expected in zip(gradients, wanted, strict=True):
        _close(got.double(), expected.reshape(got.shape))
    kept = kept_weights(state, 0.4, 2, 4, (0, 13), (0, 13))
    seen = torch.ones(13, 13, device=DEVICE).tril().bool()
    assert torch.equal((weights > 0)[..., seen], kept[..., seen])


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("packed", [False, True])
def test_the_compiled_extension(packed: bool) -> None:
    import flash_attn_2_cuda as extension
    from flash_attn.flash_attn_interface import flash_attn_gpu

    assert flash_attn_gpu is extension
    q, k, v = (x.detach() for x in _qkv())
    slopes = torch.rand(4, device=DEVICE)
    wanted = [x.clone().requires_grad_() for x in (q, k, v)]
    how = {"softmax_scale": 0.3, "window_size": (4, 2), "alibi_slopes": slopes}
    want, want_lse, _ = flashmoe.flash_attn_func(*wanted, return_attn_probs=True, **how)
    dout = torch.randn_like(want)
    gradients = torch.autograd.grad(want, wanted, dout)
    out, dq = torch.full_like(q, float("nan")), torch.full_like(q, float("nan"))
    if packed:
        q, k, v, out, dq, dout = (x.flatten(0, 1) for x in (q, k, v, out, dq, dout))
        ends = torch.tensor([0, 13, 26], dtype=torch.int32, device=DEVICE)
        lengths = (ends, ends, None, None, None, slopes, 13, 13)
        rest = (0.0, 0.3, False, False, 4, 2, 0.0)
        found = extension.varlen_fwd(q, k, v, out, *lengths, *rest, False, None)
        saved = (dout, q, k, v, out, found[1], dq, None, None, ends, ends, slopes, 13, 13)
        found_gradients = extension.varlen_bwd(*saved, *rest, False, None, found[3])
        want, want_lse = want.flatten(0, 1), want_lse.transpose(0, 1).flatten(1)
        gradients = tuple(x.flatten(0, 1) for x in gradients)
    else:
        rest = (0.0, 0.3, False, 4, 2, 0.0)
        found = extension.fwd(q, k, v, out, slopes, *rest, False, None)
        saved = (dout, q, k, v, out, found[1], dq, None, None, slopes)
        found_gradients = extension.bwd(*saved, *rest, False, None, found[3])
    assert found[0] is out
    assert found_gradients[0] is dq
    _close(out, want)
    _close(found[1], want_lse)
    for got, expected in zip(found_gradients, gradients, strict=False):
        _close(got, expected)
    with pytest.raises(RuntimeError, match="`generator` argument is no longer supported"):
        extension.fwd(*(q, k, v, None, slopes, 0.0, 0.3, False, 4, 2, 0.0, False), q)


@pytest.mark.usefixtures("installed")
def test_the_compiled_extensions_cache() -> None:
    import flash_attn_2_cuda as extension

    q, k, v = (x.detach()[:, :1] for x in _qkv(heads=4))
    k_cache, v_cache = (torch.randn(2, 9, 2, 16, device=DEVICE, dtype=DTYPE) for _ in "kv")
    lengths = torch.tensor([3, 0], dtype=torch.int32, device=DEVICE)
    copies = k_cache.clone(), v_cache.clone()
    want, want_lse = flashmoe.flash_attn_with_kvcache(
        *(q, *copies, k, v), cache_seqlens=lengths, causal=True, return_softmax_lse=True
    )
    nothing = (None,) * 6
    rest = (None, 0.25, True, -1, -1, 0.0, True, 0)
    out, lse = extension.fwd_kvcache(q, k_cache, v_cache, k, v, lengths, *nothing, *rest)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert torch.equal(k_cache, copies[0])


@pytest.mark.usefixtures("installed")
def test_a_window_may_be_a_tensor() -> None:
    import flash_attn_interface as fa3
    from flash_attn import flash_attn_func

    q, k, v = _qkv()
    want = flashmoe.flash_attn_func(q, k, v, window_size=(3, 1))
    for function in (flash_attn_func, fa3.flash_attn_func):
        assert torch.equal(function(q, k, v, window_size=torch.tensor([3, 1])), want)


@pytest.mark.usefixtures("installed")
def test_pages_have_a_forward_where_gradients_are_recorded() -> None:
    from flash_attn import flash_attn_varlen_func

    q, k, v = _qkv(seqlen=16)
    ends = torch.tensor([0, 16, 32], dtype=torch.int32, device=DEVICE)
    pages = torch.tensor([[0, 2], [3, 1]], dtype=torch.int32, device=DEVICE)
    rows = pages.flatten().argsort()
    k_pages, v_pages = (x.reshape(4, 8, 2, 16)[rows] for x in (k, v))
    call = (q.flatten(0, 1), k_pages, v_pages, ends, ends, 16, 16)
    out, lse, _ = flash_attn_varlen_func(*call, block_table=pages, return_attn_probs=True)
    want, want_lse, _ = flashmoe.flash_attn_func(q, k, v, return_attn_probs=True)
    _close(out, want.flatten(0, 1))
    _close(lse, want_lse.transpose(0, 1).flatten(1))
    rest = (0.0, None, False, (-1, -1), 0.0, None, False, False, pages)
    assert torch.equal(flash_attn_varlen_func(*call, *rest), out)
    with pytest.raises(NotImplementedError, match="block_table"):
        out.sum().backward()


@pytest.mark.usefixtures("installed")
def test_what_flash_attn_splits_is_refused() -> None:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    q, k, v = (x.detach().flatten(0, 1) for x in _qkv())
    ends = torch.tensor([0, 13, 26], dtype=torch.int32, device=DEVICE)
    rest = (ends, ends, 13, 13, 0.0, 0.25, True)
    with pytest.raises(RuntimeError, match="num_splits > 1 is not supported, got 2"):
        _flash_attn_varlen_forward(q, k, v, *rest, num_splits=2)


@pytest.mark.usefixtures("installed")
def test_padding_and_back() -> None:
    from flash_attn import bert_padding

    x = torch.arange(24.0, device=DEVICE).view(2, 4, 3)
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]], device=DEVICE)
    rows, indices, ends, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(rows, x[mask.bool()])
    assert (ends.tolist(), longest, used.tolist()) == ([0, 2, 5], 3, [2, 3])
    assert torch.equal(bert_padding.pad_input(rows, indices, 2, 4), x * mask.unsqueeze(-1))
    unused = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]], device=DEVICE)
    _, _, ends, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert (ends.tolist(), longest, used.tolist()) == ([0, 3, 6], 3, [2, 3])
    lengths = torch.tensor([[2, 1, 0, 0], [4, 0, 0, 0]], device=DEVICE)
    rows, indices, ends, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert (ends.tolist(), longest, len(rows)) == ([0, 2, 3, 7], 4, 7)
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, "each"])
def test_rotary(interleaved: bool, offsets: int | str) -> None:
    from flash_attn.layers.rotary import apply_rotary_emb
    from flash_attn.ops.triton.rotary import apply_rotary

    # Pairs of columns as complex numbers, turned by the position's angle.
    angles = torch.outer(torch.arange(20.0), torch.tensor([1.0, 0.1, 0.01])).to(DEVICE)
    start = torch.tensor([5, 0], device=DEVICE) if offsets == "each" else offsets
    x = torch.randn(2, 7, 3, 8, device=DEVICE)
    pairs = x[..., :6].unflatten(-1, (3, 2) if interleaved else (2, 3))
    if not interleaved:
        pairs = pairs.transpose(-1, -2)
    first = start.tolist() if isinstance(start, Tensor) else [start, start]
    turn = torch.stack([angles[n : n + 7] for n in first]).unsqueeze(2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(turn), turn)
    turned = torch.view_as_real(turned)
    if not interleaved:
        turned = turned.transpose(-1, -2)
    want = torch.cat([turned.flatten(-2), x[..., 6:]], -1)
    got = apply_rotary_emb(x, angles.cos(), angles.sin(), interleaved, False, start)
    torch.testing.assert_close(got, want)
    back = apply_rotary(
        got, angles.cos(), angles.sin(), start, None, None, interleaved, False, True
    )
    torch.testing.assert_close(back, x)
    ends = torch.tensor([0, 7, 7, 14], dtype=torch.int32, device=DEVICE)
    if isinstance(start, Tensor):
        start = torch.tensor([5, 9, 0], device=DEVICE)
    rows = torch.cat([x.flatten(0, 1), torch.full((2, 3, 8), 9.0, device=DEVICE)])
    packed = apply_rotary_emb(rows, angles.cos(), angles.sin(), interleaved, True, start, ends)
    torch.testing.assert_close(packed[:14].view_as(x), want)
    assert packed.data_ptr() == rows.data_ptr()
    assert torch.equal(packed[14:], torch.full_like(packed[14:], 9.0))


@pytest.mark.usefixtures("installed")
def test_rotary_of_packed_tensors() -> None:
    from flash_attn.layers import rotary

    angles = torch.rand(9, 4, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(2, 9, 3, 2, 8, device=DEVICE)
    want = qkv.clone()
    for i in range(2):
        want[:, :, i] = rotary.apply_rotary_emb(qkv[:, :, i], cos, sin)
    flat = torch.cat([qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]], 2)
    kv = qkv[:, :, 1:].clone()
    torch.testing.assert_close(rotary.apply_rotary_emb_qkv_(qkv, cos, sin), want)
    flat = rotary.apply_rotary_emb_qkv_(flat, cos, sin, num_heads_q=2)
    torch.testing.assert_close(flat, want.flatten(2, 3))
    torch.testing.assert_close(rotary.apply_rotary_emb_kv_(kv, cos, sin), want[:, :, 1:])


@pytest.mark.usefixtures("installed")
def test_flash_attention_3() -> None:
    import flash_attn_interface as fa3

    q, k, v = _qkv()
    want, lse, _ = flashmoe.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    got = fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], lse)
    ends = torch.tensor([0, 13, 26], dtype=torch.int32, device=DEVICE)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    got = fa3.flash_attn_varlen_func(*flat, ends, ends, 13, 13, causal=True)
    _close(got, want.flatten(0, 1))
    qkv = torch.cat([q, k, v], 2)
    assert torch.equal(fa3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4), want)
    detached = [x.detach() for x in (q, k, v)]
    got = fa3.flash_attn_with_kvcache(*detached, cache_seqlens=13, causal=True)
    _close(got, want.detach())
    for name in ("qv", "q_descale"):
        with pytest.raises(NotImplementedError, match=f"{name} must be None"):
            fa3.flash_attn_func(q, k, v, **{name: q})
    with pytest.raises(NotImplementedError, match="attention_chunk must be 0, got 4"):
        fa3.flash_attn_func(q, k, v, attention_chunk=4)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_3s_private_pair(packed: bool) -> None:
    from flash_attn_3 import flash_attn_interface as fa3  # as TransformerEngine imports it

    q, k, v = _qkv()
    how: dict[str, Any] = {"softmax_scale": 0.3, "softcap": 2.0}
    want, want_lse, _ = flashmoe.flash_attn_func(
        q, k, v, window_size=(4, 0), return_attn_probs=True, **how
    )
    dout = torch.randn_like(want)
    wanted = torch.autograd.grad(want, (q, k, v), dout)
    lengths: dict[str, Any] = {}
    if packed:
        ends = torch.tensor([0, 13, 26], dtype=torch.int32, device=DEVICE)
        lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        lengths |= {"max_seqlen_q": 13, "max_seqlen_k": 13}
        q, k, v, dout, want = (x.detach().flatten(0, 1) for x in (q, k, v, dout, want))
        want_lse = want_lse.transpose(0, 1).flatten(1)
        wanted = tuple(x.flatten(0, 1) for x in wanted)
    given = torch.empty_like(q)
    out, lse, *_ = fa3._flash_attn_forward(
        q, k, v, out_=given, causal=True, window_size_left=4, **how, **lengths
    )
    assert out is given
    assert not lse.requires_grad
    _close(out, want)
    _close(lse, want_lse)
    gradients = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    places = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    sums = fa3._flash_attn_backward(
        *(dout, q, k, v, out, lse), is_causal=True, window_size_left=4, **how, **lengths, **places
    )
    assert sums.shape == lse.shape
    for got, expected in zip(gradients, wanted, strict=True):
        _close(got, expected)
    with pytest.raises(NotImplementedError, match="sequed_k must be None"):
        fa3._flash_attn_backward(dout, q, k, v, out, lse, sequed_k=lse)


@pytest.mark.usefixtures("installed")
def test_flash_attention_3s_forward_of_a_cache() -> None:
    import flash_attn_interface as fa3

    q, k, v = (x.detach()[:, :1] for x in _qkv())
    pages = [torch.randn(4, 8, 2, 16, device=DEVICE, dtype=DTYPE) for _ in "kv"]
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([9, 0], dtype=torch.int32, device=DEVICE)
    want, want_lse = flashmoe.flash_attn_with_kvcache(
        *(q, *(x.clone() for x in pages), k, v),
        cache_seqlens=lengths,
        block_table=table,
        return_softmax_lse=True,
    )
    out, lse, *_ = fa3._flash_attn_forward(q, *pages, k, v, seqused_k=lengths, page_table=table)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    with pytest.raises(NotImplementedError, match="seqused_q must be None with a cache"):
        fa3._flash_attn_forward(q, *pages, seqused_k=lengths, seqused_q=lengths, page_table=table)


@pytest.mark.usefixtures("installed")
def test_queries_that_are_not_used() -> None:
    """FlashAttention-3's seqused_q: of each sequence's rows so many count, the first ones."""
    import flash_attn_interface as fa3

    q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in _qkv(seqlen=12))
    ends_q = torch.tensor([0, 9, 9, 20], dtype=torch.int32, device=DEVICE)  # 4 rows are in none
    ends_k = torch.tensor([0, 10, 14, 24], dtype=torch.int32, device=DEVICE)
    used_q, used_k = [5, 0, 11], [10, 3, 4]
    how = {"causal": True, "return_attn_probs": True}
    out, lse = fa3.flash_attn_varlen_func(
        *(q, k, v, ends_q, ends_k, 11, 10),
        *(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (used_q, used_k)),
        **how,
    )
    assert torch.equal(
        out,
        fa3.flash_attn_varlen_func(
            *(q, k, v, ends_q, ends_k, 11, 10),
            *(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (used_q, used_k)),
            causal=True,
        ),
    )
    want, want_lse = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    for i, (length_q, length_k) in enumerate(zip(used_q, used_k, strict=True)):
        rows = slice(int(ends_q[i]), int(ends_q[i]) + length_q)
        keys = slice(int(ends_k[i]), int(ends_k[i]) + length_k)
        one, one_lse, _ = flashmoe.flash_attn_func(
            q[None, rows], k[None, keys], v[None, keys], **how
        )
        want[rows], want_lse[:, rows] = one[0], one_lse[0]
    _close(out, want)
    _close(lse, want_lse)
    dout = torch.randn_like(out)
    for got, expected in zip(
        *(torch.autograd.grad(x, (q, k, v), dout) for x in (out, want)), strict=True
    ):
        _close(got, expected)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_positions_of_ones_own(causal: bool, ragged: bool) -> None:
    """FlashAttention-3's rotary_seqlens: shifted with what is in the cache, nothing changes."""
    import flash_attn_interface as fa3

    q, k, v = (x.detach() for x in _qkv(seqlen=3))
    caches = [torch.randn(2, 9, 2, 16, device=DEVICE, dtype=DTYPE) for _ in range(2)]
    angles = torch.rand(20, 4, device=DEVICE)
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    shifted = {name: torch.cat([x.flip(0)[:5], x]) for name, x in tables.items()}
    lengths = torch.tensor([6, 2], dtype=torch.int32, device=DEVICE)
    how: dict[str, Any] = {"cache_seqlens": lengths, "causal": causal}
    if ragged:
        ends = torch.tensor([0, 3, 6], dtype=torch.int32, device=DEVICE)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        how |= {"cu_seqlens_q": ends, "cu_seqlens_k_new": ends, "max_seqlen_q": 3}
    want = fa3.flash_attn_with_kvcache(q, *(x.clone() for x in caches), k, v, **how, **tables)
    same = how | {"rotary_seqlens": lengths}
    got = fa3.flash_attn_with_kvcache(q, *(x.clone() for x in caches), k, v, **same, **tables)
    assert torch.equal(got, want)
    moved = how | {"rotary_seqlens": lengths + 5}
    got = fa3.flash_attn_with_kvcache(q, *(x.clone() for x in caches), k, v, **moved, **shifted)
    _close(got, want)
    plain = fa3.flash_attn_with_kvcache(q, *(x.clone() for x in caches), k, v, **moved)
    assert not torch.equal(plain, got)


@pytest.mark.usefixtures("installed")
def test_values_wider_than_kernels_take() -> None:
    import flash_attn_interface as fa3

    q, k, _ = _qkv()
    v = torch.randn(2, 13, 2, 300, device=DEVICE, dtype=DTYPE, requires_grad=True)
    out, lse = fa3.flash_attn_func(q, k, v, return_attn_probs=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)).float() * 0.25
    want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(DTYPE), v.repeat_interleave(2, 2))
    _close(out, want)
    _close(lse, scores.logsumexp(-1))
    assert torch.equal(fa3.flash_attn_func(q, k, v), out)
    dout = torch.randn_like(out)
    for got, expected in zip(
        *(torch.autograd.grad(x, (q, k, v), dout) for x in (out, want)), strict=True
    ):
        _close(got, expected)


@pytest.mark.usefixtures("installed")
def test_combined_parts() -> None:
    import flash_attn_interface as fa3

    q, k, v = (x.detach() for x in _qkv())
    parts = [
        flashmoe.flash_attn_func(q, k[:, part], v[:, part], return_attn_probs=True)[:2]
        for part in (slice(0, 5), slice(5, 13))
    ]
    outs = torch.stack([out.float() for out, _ in parts])
    lses = torch.stack([lse.transpose(1, 2) for _, lse in parts])
    want, lse, _ = flashmoe.flash_attn_func(q, k, v, return_attn_probs=True)
    out, combined = fa3.flash_attn_combine(outs, lses, out_dtype=DTYPE)
    _close(out, want)
    torch.testing.assert_close(combined, lse.transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_transformers_finds_it() -> None:
    library("transformers")
    script = """
import torch
from flashmoe.integrations import flash_attn
flash_attn.install()
torch.cuda.is_available = lambda: True
from transformers.utils import import_utils
assert import_utils.is_flash_attn_2_available()
assert import_utils.is_flash_attn_3_available()
assert not import_utils.is_flash_attn_4_available()
from transformers import modeling_flash_attention_utils as utils
for name in ("flash_attention_2", "flash_attention_3"):
    (dense, *_), (keywords, _) = utils.lazy_import_flash_attention(name)
    assert dense.__module__.startswith("flashmoe"), dense
    assert keywords.keywords["supports_mapping"]["s_aux"], name
"""
    subprocess.run([sys.executable, "-c", script], check=True)
