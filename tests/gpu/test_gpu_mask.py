"""attn_mask on a real GPU: the Hopper forward with masks of any kind and strides, and its
gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_calls import assert_forward_matches, assert_gradients_of_call, attn_masks, random_terms
from support import LAYOUTS, guarded

from flashmoe import flash_attn_func
from flashmoe.backends import BACKENDS
from flashmoe.planning.plan import planned
from flashmoe.spec.call import Call
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import TERMS, Problem

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
DTYPES = [torch.float16, torch.bfloat16]
MASKS = [FULL, CAUSAL, Mask(63, 0), Mask(100, 40)]


def tensors(batch, seqlen_q, seqlen_kv, heads, head_dim, dtype, layouts=("padded",) * 3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((seqlen_q, heads[0]), (seqlen_kv, heads[1]), (seqlen_kv, heads[1]))
    return [
        guarded((batch, rows, h, head_dim), dtype, layout, DEVICE, generator)
        for (rows, h), layout in zip(sizes, layouts, strict=True)
    ]


def planned_run(call, mask):
    return planned(Problem.of_call(call, mask), DEVICE, "cuda").run(call)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_random_masks(head_dim, mask, data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    heads_kv, group, batch = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4])), 2
    seqlen_q, seqlen_kv = draw(st.integers(1, 500)), draw(st.integers(1, 700))
    head_dim -= 8 * draw(st.integers(0, 3))
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in "qkv"]
    heads = (heads_kv * group, heads_kv)
    seed = draw(st.integers(0, 2**31))
    q, k, v = tensors(batch, seqlen_q, seqlen_kv, heads, head_dim, dtype, layouts, seed)
    attn_mask = draw(attn_masks((batch, heads[0], seqlen_q, seqlen_kv), dtype))
    names = draw(st.sampled_from([(), ("sink",), ("softcap",)]))
    terms = random_terms(names, heads[0])._replace(attn_mask=attn_mask)
    call = Call(q, k, v, head_dim**-0.5, terms)
    out, lse = planned_run(call, mask)
    assert_forward_matches(out, lse, call, mask)


def padding(lengths, seqlen_kv, left=False):
    """(batch, 1, 1, seqlen_kv): so many keys of each are kept, the first or the last."""
    place = torch.arange(seqlen_kv, device=DEVICE)
    place = place.flip(0) if left else place
    return (place < torch.tensor(lengths, device=DEVICE)[:, None])[:, None, None]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_padded_keys_are_whole_tiles_that_nobody_visits(head_dim, causal, left):
    """As if each sequence were cut to its length; one has no key at all."""
    lengths, seqlen = [2048, 1000, 129, 1, 0], 2048
    q, k, v = tensors(len(lengths), seqlen, seqlen, (4, 2), head_dim, torch.bfloat16)
    attn_mask = padding(lengths, seqlen, left)
    call = Call(q, k, v, head_dim**-0.5, random_terms((), 4)._replace(attn_mask=attn_mask))
    out, lse = planned_run(call, CAUSAL if causal else FULL)
    assert_forward_matches(out, lse, call, CAUSAL if causal else FULL)
    assert not out[-1].any()
    assert (lse[-1] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_bias_beside_other_terms(head_dim, dtype):
    """ALiBi, softcap, sinks and dropout, the bias added last; long rows, odd lengths."""
    q, k, v = tensors(2, 777, 1301, (4, 2), head_dim, dtype)
    names = tuple(name for name in TERMS if name != "mask")
    bias = torch.randn(1, 4, 777, 1301, device=DEVICE).to(dtype)
    call = Call(q, k, v, head_dim**-0.5, random_terms(names, 4)._replace(attn_mask=bias))
    out, lse = planned_run(call, CAUSAL)
    assert_forward_matches(out, lse, call, CAUSAL)


@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients(head_dim, causal, is_added):
    """Through what users call; the bias's own gradient, too."""
    q, k, v = (x.requires_grad_() for x in tensors(2, 300, 333, (4, 2), head_dim, torch.bfloat16))
    attn_mask = torch.rand(2, 4, 300, 333, device=DEVICE) > 0.3
    leaves = [q, k, v]
    if is_added:
        attn_mask = torch.randn(1, 4, 300, 333, device=DEVICE).masked_fill(~attn_mask[:1], -1e4)
        leaves.append(attn_mask.requires_grad_())
    out = flash_attn_func(q, k, v, causal=causal, attn_mask=attn_mask)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, dout)
    terms = random_terms((), 4)._replace(attn_mask=attn_mask.detach())
    call = Call(*(x.detach() for x in (q, k, v)), head_dim**-0.5, terms)
    mask = CAUSAL if causal else FULL
    dlse = torch.zeros(2, 4, 300, device=DEVICE)
    assert_gradients_of_call(gradients[:3], dout, dlse, call, mask)
    if is_added:
        # Each row of dS has the sum 0.
        sums = gradients[3].double().sum(-1)
        assert sums.abs().max() < 2e-2 * gradients[3].double().abs().sum(-1).max()


def test_a_graph_replays_with_another_mask():
    q, k, v = tensors(2, 500, 700, (4, 2), 128, torch.bfloat16)
    attn_mask = torch.rand(2, 1, 500, 700, device=DEVICE) > 0.5
    flash_attn_func(q, k, v, attn_mask=attn_mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, attn_mask=attn_mask)
    for share in (0.9, 0.0, 0.5):
        attn_mask.copy_(torch.rand(2, 1, 500, 700, device=DEVICE) < share)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, flash_attn_func(q, k, v, attn_mask=attn_mask))


def test_nothing_waits_for_the_gpu():
    q, k, v = tensors(2, 300, 300, (4, 2), 64, torch.bfloat16)
    attn_mask = padding([300, 20], 300)
    flash_attn_func(q, k, v, attn_mask=attn_mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_func(q, k, v, attn_mask=attn_mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_hopper_kernel_takes_masks():
    """Or else another kernel was tested."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    problem = Problem(2, 4, 2, 512, 512, 128, "bfloat16", terms=("mask",))
    plan = planned(problem, DEVICE, "cuda").plan
    assert plan.backend == "cuda"
    assert "mask" in BACKENDS["cuda"].features["fwd"]
