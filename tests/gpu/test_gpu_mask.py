"""attn_mask on a real GPU: the Hopper forward, which is compiled here, and Triton's, with masks of
any kind and strides; and gradients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_calls import assert_forward_matches, assert_gradients_of_call, attn_masks, random_terms
from support import LAYOUTS, guarded

from flashmoe import flash_attn_func
from flashmoe.backends import BACKENDS, jit
from flashmoe.machine.device import arch
from flashmoe.spec.call import Call
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import TERMS, Problem

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
DTYPES = [torch.float16, torch.bfloat16]
LOCAL = Mask(100, 40)
# What the Hopper kernel is compiled for here: head_dim, whether it has windows, and further terms.
ALL = tuple(name for name in TERMS if name != "mask")
COMPILED = [(64, False, ()), (128, False, ()), (256, False, ()), (128, True, ()), (64, False, ALL)]


def like(head_dim, is_local, terms, dtype="bfloat16"):
    mask = LOCAL if is_local else CAUSAL
    sizes = (2, 8, 4, 512, 512, head_dim)
    return Problem(*sizes, dtype, mask, terms=(*terms, "mask"))


@pytest.fixture(scope="module")
def kernels():
    """By COMPILED the Hopper tile of each; all at once, for each takes seconds. Empty where nothing
    compiles, and no kernel with masks is compiled in."""
    if torch.cuda.get_device_capability()[0] != 9 or jit.unavailable():
        return {}
    cuda, tiles = BACKENDS["cuda"], {}
    for key in COMPILED:
        tiles[key] = cuda.default_tile(like(*key), arch(DEVICE))
    wanted = [
        (tile, like(*key, str(dtype).removeprefix("torch.")))
        for key, tile in tiles.items()
        for dtype in DTYPES
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda x: cuda.precompile(*x, DEVICE), wanted))
    return tiles


def runs(kernels, head_dim, call, mask):
    """The results of each backend that has a kernel for it here."""
    terms = tuple(name for name in call.terms.names if name != "mask")
    problem = Problem.of_call(call, mask)
    tile = kernels.get((head_dim, mask.is_local, terms))
    found = []
    if tile is not None:
        found.append(BACKENDS["cuda"].bind(problem, tile)(call))
    triton = BACKENDS["triton"]
    if not triton.unsupported(problem, arch(DEVICE)):
        found.append(triton.bind(problem, triton.default_tile(problem, arch(DEVICE)))(call))
    assert found
    return found


def tensors(batch, seqlen_q, seqlen_kv, heads, head_dim, dtype, layouts=("padded",) * 3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((seqlen_q, heads[0]), (seqlen_kv, heads[1]), (seqlen_kv, heads[1]))
    return [
        guarded((batch, rows, h, head_dim), dtype, layout, DEVICE, generator)
        for (rows, h), layout in zip(sizes, layouts, strict=True)
    ]


@pytest.mark.parametrize("mask", [FULL, CAUSAL, LOCAL], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_random_masks(kernels, head_dim, mask, data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    heads_kv, group, batch = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4])), 2
    seqlen_q, seqlen_kv = draw(st.integers(1, 500)), draw(st.integers(1, 700))
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in "qkv"]
    heads = (heads_kv * group, heads_kv)
    seed = draw(st.integers(0, 2**31))
    q, k, v = tensors(batch, seqlen_q, seqlen_kv, heads, head_dim, dtype, layouts, seed)
    attn_mask = draw(attn_masks((batch, heads[0], seqlen_q, seqlen_kv), dtype))
    terms = random_terms((), heads[0])._replace(attn_mask=attn_mask)
    call = Call(q, k, v, head_dim**-0.5, terms)
    reduced = mask.reduced(seqlen_q, seqlen_kv)
    for out, lse in runs(kernels, head_dim, call, reduced):
        assert_forward_matches(out, lse, call, mask)


def padding(lengths, seqlen_kv, left=False):
    """(batch, 1, 1, seqlen_kv): so many keys of each are kept, the first or the last."""
    place = torch.arange(seqlen_kv, device=DEVICE)
    place = place.flip(0) if left else place
    return (place < torch.tensor(lengths, device=DEVICE)[:, None])[:, None, None]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_padded_keys_are_whole_tiles_that_nobody_visits(kernels, head_dim, causal, left):
    """As if each sequence were cut to its length; one has no key at all."""
    lengths, seqlen = [2048, 1000, 129, 1, 0], 2048
    q, k, v = tensors(len(lengths), seqlen, seqlen, (4, 2), head_dim, torch.bfloat16)
    attn_mask = padding(lengths, seqlen, left)
    call = Call(q, k, v, head_dim**-0.5, random_terms((), 4)._replace(attn_mask=attn_mask))
    mask = CAUSAL if causal else FULL
    for out, lse in runs(kernels, head_dim, call, mask):
        assert_forward_matches(out, lse, call, mask)
        assert not out[-1].any()
        assert (lse[-1] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_beside_other_terms(kernels, dtype):
    """ALiBi, softcap, sinks and dropout, the bias added last; long rows, odd lengths."""
    q, k, v = tensors(2, 777, 1301, (4, 2), 64, dtype)
    bias = torch.randn(1, 4, 777, 1301, device=DEVICE).to(dtype)
    call = Call(q, k, v, 0.125, random_terms(ALL, 4)._replace(attn_mask=bias))
    for out, lse in runs(kernels, 64, call, CAUSAL):
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


def test_hopper_has_its_own_kernel(kernels):
    """Or else Triton's alone was tested."""
    if not kernels:
        pytest.skip(jit.unavailable() or "needs a Hopper GPU")
    assert [tile.kernel for tile in kernels.values()] == ["sm90"] * len(COMPILED)
