"""window_size through the public function, on every backend and in both directions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICE, LAYOUTS, assert_gradients_match, assert_matches_reference, guarded

from flashmoe import Problem, flash_attn_func
from flashmoe.backends import BACKENDS
from flashmoe.frontend import ops
from flashmoe.planning.plan import why_not
from flashmoe.spec.mask import CAUSAL, FULL, Mask

WINDOWED = Problem(1, 1, 1, 64, 64, 32, "bfloat16", Mask(3, 2))
BOTH = [
    name
    for name in BACKENDS
    if not why_not(name, WINDOWED, DEVICE)
    # Interpreted, Triton takes seconds for what others do in milliseconds; test_triton_kernels.py
    # has the small problems that suit it.
    and not (name == "triton" and DEVICE.type == "cpu")
]


def qkv(
    seqlen_q: int = 40, seqlen_kv: int = 56, heads: tuple[int, int] = (4, 2), grad: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(2, seqlen_q, heads[0], 32, device=DEVICE)
    k, v = (torch.randn(2, seqlen_kv, heads[1], 32, device=DEVICE) for _ in "kv")
    return tuple(x.requires_grad_(grad) for x in (q, k, v))


@st.composite
def windows(draw, seqlen_q: int, seqlen_kv: int) -> tuple[int, int]:
    narrow, any_width = st.integers(-1, 8), st.integers(-1, max(seqlen_q, seqlen_kv) + 5)
    return draw(st.one_of(narrow, any_width)), draw(st.one_of(narrow, any_width))


# On a GPU as many as the other random tests have; a CPU takes long over the references.
@settings(max_examples=200 if DEVICE.type == "cuda" else 60, deadline=None)
@given(data=st.data())
def test_random_problems(data):
    backend = data.draw(st.sampled_from(BOTH))
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    dtype = data.draw(st.sampled_from(dtypes if backend != "cuda" else dtypes[1:]))
    seqlen_q, seqlen_kv = data.draw(st.integers(1, 250)), data.draw(st.integers(1, 250))
    group, heads_kv = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 2))
    head_dim, batch = 8 * data.draw(st.integers(1, 16)), data.draw(st.integers(1, 2))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in "qkv"]
    window = data.draw(windows(seqlen_q, seqlen_kv))
    causal = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    q = guarded((batch, seqlen_q, heads_kv * group, head_dim), dtype, layouts[0], DEVICE, generator)
    shape = (batch, seqlen_kv, heads_kv, head_dim)
    k, v = (guarded(shape, dtype, layout, DEVICE, generator) for layout in layouts[1:])
    options = {"causal": causal, "window_size": window, "backend": backend}
    out, lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert_matches_reference(out, lse, q, k, v, causal=causal, window=window)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(q.shape, generator=generator).to(DEVICE, dtype)
    gradients = torch.autograd.grad(flash_attn_func(*leaves, **options), leaves, dout)
    assert_gradients_match(gradients, dout, q, k, v, causal=causal, window=window)


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({"window_size": (-1, 0)}, CAUSAL),
        ({"window_size": (None, 0)}, CAUSAL),
        ({"window_size": [None, None], "causal": True}, CAUSAL),
        ({"window_size": (-1, 7), "causal": True}, CAUSAL),
        ({"window_size": (55, 39)}, FULL),
        ({"window_size": None}, FULL),
        ({"window_size": (9, 5), "causal": True}, Mask(9, 0)),
        ({"window_size": (9, None)}, Mask(9, -1)),
    ],
)
def test_the_words_of_flash_attn(options, mask):
    q, k, v = qkv()
    same = flash_attn_func(q, k, v, window_size=(mask.left, mask.right))
    assert torch.equal(flash_attn_func(q, k, v, **options), same)
    assert_matches_reference(same, None, q, k, v, window=(mask.left, mask.right))


def test_rows_that_see_nothing():
    """The first 20 rows of 40 lie before the first key, and see none."""
    q, k, v = qkv(seqlen_q=40, seqlen_kv=20, grad=True)
    out, lse, _ = flash_attn_func(q, k, v, window_size=(3, 0), return_attn_probs=True)
    assert not out[:, :20].any()
    assert (lse[:, :, :20] == -torch.inf).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert not dq[:, :20].any()
    assert all(x.isfinite().all() for x in (dk, dv))


def test_keys_that_nobody_sees_get_no_gradient():
    """The last query stands at the last key and sees two keys before it."""
    q, k, v = qkv(seqlen_q=1, seqlen_kv=30, grad=True)
    out = flash_attn_func(q, k, v, window_size=(2, 0))
    _, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not dk[:, :27].any()
    assert not dv[:, :27].any()
    assert dv[:, 27:].any()


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_for_any_length(grad):
    f = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((40, 56), (33, 70)):
        q, k, v = qkv(*lengths, grad=grad)
        out = f(q, k, v, causal=True, window_size=(5, -1))
        expected = flash_attn_func(q, k, v, causal=True, window_size=(5, -1))
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        if grad:
            gradients, wanted = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected))
            assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


def test_opcheck():
    q, k, v = qkv(grad=True)
    torch.library.opcheck(ops.attention, (q, k, v, 0.2, 5, 2, "", ""))


def test_sdpa_refuses_windows_by_name():
    with pytest.raises(ValueError, match=r"'sdpa' cannot run .*window-3-0 on .*: has no window"):
        flash_attn_func(*qkv(), window_size=(3, 0), backend="sdpa")
