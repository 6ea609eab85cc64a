"""The kernel that appends to a cache, beside what torch's ops do, and in graphs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe import flash_attn_with_kvcache
from flashmoe.frontend.append import _append_by_torch, append

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
    pytest.skip("needs a GPU of compute capability 8.0", allow_module_level=True)

DEVICE = torch.device("cuda", 0)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def offset(lengths, first=0):
    return ints([first, *lengths]).cumsum(0).int()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_it_writes_what_torch_would(data):
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    batch, heads_kv, group = (draw(st.integers(1, n)) for n in (5, 3, 4))
    head_dim = draw(st.sampled_from([128, 64, 256, 80, 8, 7]))
    head_dim_v = draw(st.sampled_from([head_dim, 64, 3]))
    page_size = draw(st.sampled_from([0, 16, 64, 7]))
    pages = draw(st.integers(1, 4)) if page_size else 1
    rows = page_size or draw(st.integers(1, 90))
    room, some = rows * pages, st.booleans()
    generator = torch.Generator(DEVICE).manual_seed(draw(st.integers(0, 2**31)))

    def randn(*shape):
        return torch.randn(*shape, device=DEVICE, generator=generator).to(dtype)

    num_pages = batch * pages + 1
    caches = [randn(num_pages, rows, heads_kv, d) for d in (head_dim, head_dim_v)]
    if draw(some):  # heads in front
        caches = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches]
    order = torch.randperm(num_pages, device=DEVICE, generator=generator)[: batch * pages].int()
    if draw(some):
        order[draw(st.integers(0, batch * pages - 1))] = draw(st.sampled_from([-1, num_pages]))
    table = order.reshape(batch, pages) if page_size else None
    batch_idx = None if page_size or draw(some) else order
    lengths = [draw(st.integers(-2, room + 1)) for _ in range(batch)]
    new, queries = ([draw(st.integers(0, 9)) for _ in range(batch)] for _ in "kq")
    ragged_k, ragged_q = draw(some), draw(some)
    k_rows = (sum(new) + 2,) if ragged_k else (batch, new[0])
    q_rows = (sum(queries) + 2,) if ragged_q else (batch, queries[0])
    q = randn(*q_rows, heads_kv * group, head_dim)
    k, v = (randn(*k_rows, heads_kv, d) for d in (head_dim, head_dim_v))
    cos = sin = None
    if draw(some) and head_dim > 1:
        half = draw(st.integers(1, head_dim // 2))
        tables = torch.randn(2, room + 3, half, device=DEVICE, generator=generator)
        cos, sin = tables.to(draw(st.sampled_from([dtype, torch.float32])))
    arguments = (
        ints(lengths),
        offset(queries) if ragged_q else None,
        offset(new, draw(st.integers(0, 1))) if ragged_k else None,
        batch_idx,
        table,
        cos,
        sin,
        draw(some),
        draw(some),
    )
    expected = [x.clone() for x in caches]
    found = append(q, k, v, *caches, *arguments)
    wanted = _append_by_torch(q, k, v, *expected, *arguments)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 2**-6}
    for x, y in zip((*found, *caches), (*wanted, *expected), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def serving(paged):
    """Keyword arguments of a step, of fixed buffers."""
    pages, batch = 8, 4
    kind = {"device": DEVICE, "dtype": torch.bfloat16}
    angles = torch.rand(pages * 16, 32, device=DEVICE) * 6
    step = {
        "q": torch.randn(batch, 1, 8, 64, **kind),
        "k": torch.randn(batch, 1, 2, 64, **kind),
        "v": torch.randn(batch, 1, 2, 64, **kind),
        "rotary_cos": angles.cos(),
        "rotary_sin": angles.sin(),
        "cache_seqlens": ints([0, 5, 16, 100]),
    }
    shape = (batch * pages, 16, 2, 64) if paged else (batch, pages * 16, 2, 64)
    for name in ("k_cache", "v_cache"):
        step[name] = torch.zeros(shape, **kind)
    if paged:
        order = torch.randperm(batch * pages, device=DEVICE)
        step["block_table"] = order.reshape(batch, pages).int()
    return step


@pytest.mark.parametrize("paged", [False, True])
def test_a_graph_appends_at_each_replay(paged):
    step = serving(paged)
    first = [step[name].clone() for name in ("k_cache", "v_cache")]
    lengths = step["cache_seqlens"]
    start = lengths.clone()
    flash_attn_with_kvcache(**step, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_with_kvcache(**step, causal=True)
        lengths += 1
    lengths.copy_(start)
    inputs = [{n: torch.randn_like(step[n]) for n in "qkv"} for _ in range(5)]
    found = []
    for given_now in inputs:
        for name, x in given_now.items():
            step[name].copy_(x)
        graph.replay()
        found.append(out.clone())
    eager = dict(step, k_cache=first[0], v_cache=first[1], cache_seqlens=start)
    for given_now, of_graph in zip(inputs, found, strict=True):
        assert torch.equal(flash_attn_with_kvcache(**{**eager, **given_now}, causal=True), of_graph)
        eager["cache_seqlens"] = eager["cache_seqlens"] + 1
    assert torch.equal(step["k_cache"], eager["k_cache"])
    assert torch.equal(step["v_cache"], eager["v_cache"])


@pytest.mark.parametrize("paged", [False, True])
def test_it_is_one_launch_that_nobody_waits_for(paged):
    step = serving(paged)
    flash_attn_with_kvcache(**step, causal=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_with_kvcache(**step, causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        flash_attn_with_kvcache(**step, causal=True)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if "kernel" in e.name]
    assert len(kernels) == 2, kernels
    assert "append_kernel" in kernels[0]


@pytest.mark.parametrize("page_size", [0, 16])
def test_rows_at_the_end_of_mapped_memory(page_size):
    """The last key of a cache of whole mappings, and none past it: 32 MiB each."""
    torch.cuda.empty_cache()
    heads, seqlen = 8, 16384
    shape = (seqlen // page_size, page_size) if page_size else (1, seqlen)
    kind = {"device": DEVICE, "dtype": torch.bfloat16}
    caches = [torch.zeros(*shape, heads, 128, **kind) for _ in "kv"]
    q, k, v = (torch.randn(1, n, h, 128, **kind) for n, h in ((3, 32), (3, heads), (3, heads)))
    pages = seqlen // page_size if page_size else 0
    options = {"block_table": ints([list(range(pages))])} if pages else {}
    for start, kept in ((seqlen - 3, 3), (seqlen - 1, 1), (seqlen, 0)):
        for x in caches:
            x.zero_()
        lengths = ints([start])
        flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, causal=True, **options)
        torch.cuda.synchronize()
        for cache, new in zip(caches, (k, v), strict=True):
            rows = cache.reshape(seqlen, heads, 128)
            assert torch.equal(rows[start:], new[0, :kept])
            assert not rows[:start].any()


def test_opcheck():
    step = serving(True)
    torch.library.opcheck(
        torch.ops.flashmoe.append_cuda.default,
        (
            *(step[name] for name in ("q", "k", "v", "k_cache", "v_cache", "cache_seqlens")),
            *(None, None, None, step["block_table"], step["rotary_cos"], step["rotary_sin"]),
            *(False, True),
        ),
    )
