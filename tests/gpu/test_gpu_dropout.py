"""Dropout on a real GPU: one mask in both passes, new ones in every launch and replay."""

from __future__ import annotations

import itertools

import pytest
import torch
from random_calls import cumulative

from flashmoe import flash_attn_func, flash_attn_varlen_func
from flashmoe.spec.dropout import kept_weights

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
HEAD_DIMS = [64, 128, 256]


def qkv(batch=2, seqlen=700, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, grad=False):
    return [
        torch.randn(batch, seqlen, h, head_dim, device=DEVICE, dtype=dtype).requires_grad_(grad)
        for h in (heads[0], heads[1], heads[1])
    ]


def apart(out, dv, v, dout):
    """How far the backward's mask is from the forward's, by what is linear in v: of each column of
    a sequence and a head of v, <dout, out> = <dv, v>."""
    grouped = (dout.double() * out.double()).sum(1).unflatten(1, (v.shape[2], -1)).sum(2)
    return ((grouped - (dv.double() * v.double()).sum(1)).norm() / grouped.norm()).item()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_backwards_mask_is_the_forwards(head_dim, causal):
    q, k, v = qkv(head_dim=head_dim, grad=True)
    out = flash_attn_func(q, k, v, dropout_p=0.5, causal=causal)
    dout = torch.randn_like(out)
    *_, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert apart(out, dv, v, dout) < 0.05
    assert apart(flash_attn_func(q, k, v, dropout_p=0.5, causal=causal), dv, v, dout) > 0.3


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_seeds_repeat_and_launches_differ(head_dim):
    q, k, v = qkv(head_dim=head_dim)
    torch.manual_seed(3)
    first, second = (flash_attn_func(q, k, v, dropout_p=0.3) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(flash_attn_func(q, k, v, dropout_p=0.3), first)
    assert torch.equal(flash_attn_func(q, k, v, dropout_p=0.3), second)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_mean_and_variance_of_long_rows(head_dim, dropout_p):
    """With scores of 0 and values of 1 a row is the share of kept keys over the expected one."""
    seqlen, heads = 4096, 4
    q = torch.zeros(1, seqlen, heads, head_dim, device=DEVICE, dtype=torch.float16)
    state = torch.tensor([5, 6], device=DEVICE)
    ones = torch.ones_like(q)
    out = flash_attn_func(q, q, ones, dropout_p=dropout_p, rng_state=state).float()
    rows = out.mean(-1)
    deviation = (dropout_p / (1 - dropout_p) / seqlen) ** 0.5
    assert abs(rows.mean() - 1) < 6 * deviation / rows.numel() ** 0.5 + 2**-12
    assert rows.std().item() == pytest.approx(deviation, rel=0.1)
    kept = kept_weights(state, dropout_p, 1, heads, (0, 512), (0, seqlen)).float().mean(-1)
    expected = (kept / (1 - dropout_p)).transpose(1, 2)
    torch.testing.assert_close(rows[:, :512], expected, rtol=2e-3, atol=0)


def test_packed_sequences_are_dropped_as_batches():
    lengths = [300, 300, 300]
    q, k, v = qkv(3, 300)
    state = torch.tensor([1, 2], device=DEVICE)
    options = {"dropout_p": 0.4, "causal": True, "rng_state": state}
    dense = flash_attn_func(q, k, v, **options)
    ends = cumulative(lengths)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    packed = flash_attn_varlen_func(*flat, ends, ends, 300, 300, **options)
    torch.testing.assert_close(packed.view_as(dense), dense, rtol=2e-2, atol=2e-2)


def test_a_graph_draws_at_each_replay():
    q, k, v = qkv(grad=True)
    dout = torch.randn_like(q)

    def step():
        out = flash_attn_func(q, k, v, dropout_p=0.5, causal=True)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, *_, dv = step()
    found = []
    for _ in range(3):
        graph.replay()
        assert apart(out, dv, v, dout) < 0.05
        found.append(out.detach().clone())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(found))


def test_nothing_waits_for_the_gpu():
    q, k, v = qkv(grad=True)
    flash_attn_func(q, k, v, dropout_p=0.5).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_func(q, k, v, dropout_p=0.5).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
