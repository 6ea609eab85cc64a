"""Packed batches on a Hopper GPU: every sequence as if it were alone, forward and backward."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_calls import (
    assert_forward_matches,
    assert_gradients_of_call,
    cumulative,
    int32,
    keywords,
    packed_call,
    random_terms,
)
from support import LAYOUTS, guarded

from flashmoe import _extension, flash_attn_func, flash_attn_varlen_func
from flashmoe.backends import BACKENDS
from flashmoe.planning.plan import planned
from flashmoe.spec.call import Saved
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import Problem

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
CUDA = BACKENDS["cuda"]
DTYPES = [torch.float16, torch.bfloat16]
INFO = _extension.load()
# head_dim, tile, variant
FORWARD = [key for key in INFO.handles if key[2].packed]
BACKWARD = [key for key in INFO.backward_handles if key[2].packed]
MASKS = [FULL, CAUSAL, Mask(63, 0), Mask(100, 40), Mask(-1, 20)]
# Of one tile and several; nothing, one row; queries alone and keys alone; more queries than keys.
LENGTHS = [
    ([700, 0, 1, 333, 128, 50], [700, 0, 1, 500, 40, 0]),
    ([0, 1300, 64], [200, 1300, 64]),
    ([34] * 40, [34] * 40),
    (list(range(0, 70, 3)), list(range(69, -1, -3))),
]


def tensors(lengths_q, lengths_k, heads_q, heads_kv, head_dim, dtype, layouts, tail=5, seed=0):
    """Packed q, k, v, with NaN around their rows and in those behind the last sequence."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    sizes = ((lengths_q, heads_q), (lengths_k, heads_kv), (lengths_k, heads_kv))
    for (lengths, heads), layout in zip(sizes, layouts, strict=True):
        rows = sum(lengths)
        x = guarded((1, rows + tail, heads, head_dim), dtype, layout, DEVICE, generator)[0]
        x[rows:] = float("nan")
        found.append(x)
    return found


def clean(call):
    """The call as the reference can take it: no NaN to multiply by 0."""
    q, k, v = (x.nan_to_num() for x in call[:3])
    return call._replace(q=q, k=k, v=v)


def masks_of(variant):
    return [mask for mask in MASKS if mask.is_local == variant.local]


def problem_of(call, mask, direction="fwd"):
    return Problem.of_call(call, mask, direction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "tile", "variant"), FORWARD, ids=lambda x: str(x))
def test_compiled_in_kernels(head_dim, tile, variant, dtype):
    for mask, lengths in itertools.product(masks_of(variant), LENGTHS):
        call = packed_call(
            *tensors(*lengths, 8, 4, head_dim, dtype, ["padded", "packed", "heads_first"]),
            *lengths,
        )
        out, lse = CUDA.bind(problem_of(call, mask), tile)(call)
        assert_forward_matches(out, lse, clean(call), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "tile", "variant"), BACKWARD, ids=lambda x: str(x))
def test_gradients_of_compiled_in_kernels(head_dim, tile, variant, dtype):
    for mask, lengths in itertools.product(masks_of(variant), LENGTHS):
        call = packed_call(
            *tensors(*lengths, 4, 2, head_dim, dtype, ["padded", "packed", "heads_first"]),
            *lengths,
        )
        out, lse = planned(problem_of(call, mask), DEVICE, "cuda").run(call)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        saved = Saved(dout.clone(), out, lse, dlse.masked_fill(lse == -torch.inf, torch.nan))
        saved.dout[sum(lengths[0]) :] = float("nan")
        actual = CUDA.bind_backward(problem_of(call, mask, "bwd"), tile)(call, saved)
        assert_gradients_of_call(actual, dout, dlse, clean(call), mask)
        for x, rows in zip(actual, map(sum, (lengths[0], *lengths[1:] * 2)), strict=True):
            assert not x[rows:].any()


# What is planned; whatever layout rows have, and terms too.
@pytest.mark.parametrize("terms", [(), ("sink",)], ids="-".join)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_random_batches(terms, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    head_dim = data.draw(st.sampled_from([8, 40, 64, 128, 192, 256]))
    group, heads_kv = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.integers(1, 2))
    length = st.one_of(st.integers(0, 3), st.integers(0, 300), st.integers(0, 1500))
    pairs = data.draw(st.lists(st.tuples(length, length), min_size=1, max_size=6))
    lengths = [list(x) for x in zip(*pairs, strict=True)]
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in "qkv"]
    tail, seed = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2**31))
    heads_q = heads_kv * group
    mask = data.draw(st.sampled_from(MASKS[:2] if terms else MASKS))
    x = tensors(*lengths, heads_q, heads_kv, head_dim, dtype, layouts, tail, seed)
    used = None
    if data.draw(st.booleans()):
        used = int32([data.draw(st.integers(0, n)) for n in lengths[1]])
    call = packed_call(*x, *lengths, random_terms(terms, heads_q), used)
    out, lse = planned(problem_of(call, mask), DEVICE).run(call)
    assert_forward_matches(out, lse, clean(call), mask)
    if dtype == torch.bfloat16 and not terms:
        dout, dlse = torch.randn_like(out), torch.zeros_like(lse)
        run = planned(problem_of(call, mask, "bwd"), DEVICE, "cuda").run
        gradients = run(call, Saved(dout, out, lse))
        assert_gradients_of_call(gradients, dout, dlse, clean(call), mask)


NAMES = [("softcap",), ("alibi",), ("sink",), ("dropout",), ("softcap", "alibi", "sink", "dropout")]


@pytest.mark.parametrize("mask", [CAUSAL, Mask(100, 40)], ids=str)
@pytest.mark.parametrize("names", NAMES, ids="-".join)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_terms_with_gradients(head_dim, names, mask):
    """Through what users call, sinks' gradient included."""
    lengths = ([300, 0, 1, 129], [300, 17, 40, 200])
    layouts = ["padded", "packed", "heads_first"]
    x = tensors(*lengths, 8, 4, head_dim, torch.bfloat16, layouts, tail=0)
    call = clean(packed_call(*x, *lengths, random_terms(names, 8)))
    leaves = [x.detach().requires_grad_() for x in call[:3]]
    terms = call.terms
    if terms.sinks is not None:
        terms = terms._replace(sinks=terms.sinks.clone().requires_grad_())
        leaves.append(terms.sinks)
    options = keywords(terms) | {"window_size": (mask.left, mask.right)}
    cu_q, cu_k = call.sequences[:2]
    longest = map(max, lengths)
    out, lse, _ = flash_attn_varlen_func(
        *leaves[:3], cu_q, cu_k, *longest, return_attn_probs=True, **options
    )
    assert_forward_matches(out.detach(), lse.detach(), call, mask)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, dout)
    assert_gradients_of_call(gradients, dout, torch.zeros_like(lse), call, mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_equal_lengths_are_a_dense_batch(head_dim, causal):
    """Large enough for every scheduler; against the dense kernels, which other tests judge."""
    q, k, v = (
        torch.randn(6, 1000, heads, head_dim, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        for heads in (16, 4, 4)
    )
    ends = int32(range(0, 6001, 1000))
    dense = flash_attn_func(q, k, v, causal=causal)
    packed = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), ends, ends, 1000, 1000, causal=causal
    )
    torch.testing.assert_close(packed.view_as(dense), dense, rtol=2e-2, atol=2e-2)
    dout = torch.randn_like(dense)
    expected = torch.autograd.grad(dense, (q, k, v), dout)
    for x, y in zip(
        torch.autograd.grad(packed, (q, k, v), dout.flatten(0, 1)), expected, strict=True
    ):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=5e-2)


def test_a_graph_replays_with_other_lengths():
    q, k, v = (torch.randn(4000, 8, 64, device=DEVICE, dtype=torch.bfloat16) for _ in "qkv")
    ends = int32([0, 1000, 2000, 3000, 4000])

    def run():
        return flash_attn_varlen_func(q, k, v, ends, ends, 4000, 4000, causal=True)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for lengths in ([0, 0, 4000, 4000, 4000], [0, 7, 7, 100, 3990], [0, 1, 2, 3, 4]):
        ends.copy_(int32(lengths))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, run())


def test_tensors_at_the_start_of_mapped_memory():
    """What lies in front of a tensor need not be mapped."""
    torch.cuda.empty_cache()
    lengths_q, lengths_k = [1] * 40 + [512] + [1] * 23, [512] * 64
    # Large enough to be a mapping each.
    q = torch.randn(sum(lengths_q), 96, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(sum(lengths_k), 2, 128, device=DEVICE, dtype=torch.bfloat16) for _ in "kv")
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    q.requires_grad_()
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 512, 512)
    (dq,) = torch.autograd.grad(out, q, torch.ones_like(out))
    torch.cuda.synchronize()
    last = q[-1:, :4].unsqueeze(0), k[-512:, :1].unsqueeze(0), v[-512:, :1].unsqueeze(0)
    expected = flash_attn_func(*(x.detach() for x in last))
    torch.testing.assert_close(out[-1:, :4].unsqueeze(0), expected, rtol=0.02, atol=0.002)
    assert dq.isfinite().all()


def test_nothing_waits_for_the_gpu():
    x = [
        torch.randn(600, 4, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in "qkv"
    ]
    ends = int32([0, 200, 600])
    flash_attn_varlen_func(*x, ends, ends, 400, 400).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_varlen_func(*x, ends, ends, 400, 400).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_that_are_none_stay_in_the_tensors(causal):
    """Whatever they say: what is written lies in the tensors, and it ends."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(700, 4, 64, device=DEVICE, dtype=torch.bfloat16) for _ in "qkv"]
    x = [y.requires_grad_() for y in x]
    for _ in range(50):
        bad = torch.randint(-1000, 2000, (2, 40), generator=generator, dtype=torch.int32)
        q_ends, k_ends = bad.to(DEVICE)
        out = flash_attn_varlen_func(*x, q_ends, k_ends, 700, 700, causal=causal)
        torch.autograd.grad(out, x, torch.randn_like(out))
    torch.cuda.synchronize()


def test_a_packed_kernel_refuses_a_dense_call():
    head_dim, tile, variant = FORWARD[0]
    q = torch.randn(1, 100, 2, head_dim, device=DEVICE, dtype=torch.bfloat16)
    handle = INFO.handles[head_dim, tile, variant]
    with pytest.raises(RuntimeError, match="invalid argument"):
        torch.ops.flashmoe.fwd_cuda(q, q, q, 0.1, -1, -1, handle)
    plain = replace(variant, packed=False)
    ends = int32([0, 100])
    handle = next(h for key, h in INFO.handles.items() if key[::2] == (head_dim, plain))
    with pytest.raises(RuntimeError, match="invalid argument"):
        torch.ops.flashmoe.fwd_cuda(
            *(q[0], q[0], q[0], 0.1, -1, -1, handle),
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=100,
            max_seqlen_k=100,
        )
