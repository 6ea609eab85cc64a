"""The CUDA and Triton kernels on a real GPU: every compiled tile, streams, graphs, huge tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LAYOUTS, assert_gradients_match, assert_matches_reference, guarded, run_forward

import flashmoe
from flashmoe import Problem, _extension, flash_attn_func
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.spec.mask import causal_if
from flashmoe.tiles import PLAIN

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
CUDA = BACKENDS["cuda"]
TRITON = BACKENDS["triton"]
COMPILED = [
    (head_dim, tile)
    for (_, head_dim, variant), tiles in _extension.load().instances.items()
    for tile in tiles
    if variant == PLAIN
]


@pytest.mark.parametrize(("head_dim", "tile"), COMPILED, ids=lambda x: str(x))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(1, 1), (127, 260), (300, 129), (257, 257)])
def test_every_compiled_tile(head_dim, tile, dtype, causal, seqlen_q, seqlen_kv):
    q = guarded((2, seqlen_q, 4, head_dim), dtype, "padded", DEVICE)
    k, v = (guarded((2, seqlen_kv, 2, head_dim), dtype, "packed", DEVICE) for _ in range(2))
    if tile.violations(arch(DEVICE), Problem.of(q, k, causal_if(causal))):
        pytest.skip("does not fit this GPU")
    out, lse = run_forward("cuda", q, k, v, causal_if(causal), tile)
    assert_matches_reference(out, lse, q, k, v, causal=causal)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_cuda_on_random_problems(data):
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16]))
    head_dim = 8 * data.draw(st.integers(1, 32))
    causal = data.draw(st.booleans())
    group, heads_kv = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.integers(1, 3))
    seqlen_q, seqlen_kv = data.draw(st.integers(1, 600)), data.draw(st.integers(0, 600))
    batch = data.draw(st.integers(1, 3))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    shape_kv = (batch, seqlen_kv, heads_kv, head_dim)
    shape_q = (batch, seqlen_q, heads_kv * group, head_dim)
    q = guarded(shape_q, dtype, layouts[0], DEVICE, generator)
    k, v = (guarded(shape_kv, dtype, layout, DEVICE, generator) for layout in layouts[1:])
    problem, instances = Problem.of(q, k, causal_if(causal)), _extension.load().instances
    instance = min(d for kernel, d, _ in instances if kernel == "sm80" and d >= head_dim)
    compiled = instances["sm80", instance, PLAIN]
    tiles = [tile for tile in compiled if not tile.violations(arch(DEVICE), problem)]
    tile = data.draw(st.sampled_from(tiles))
    out, lse = run_forward("cuda", q, k, v, causal_if(causal), tile)
    assert_matches_reference(out, lse, q, k, v, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_triton_gradients(head_dim, causal):
    """The same bits every time, which is what deterministic asks for."""
    q = guarded((2, 300, 4, head_dim), torch.bfloat16, "padded", DEVICE).requires_grad_()
    k, v = (
        guarded((2, 417, 2, head_dim), torch.bfloat16, "packed", DEVICE).requires_grad_()
        for _ in range(2)
    )
    out = flash_attn_func(q, k, v, causal=causal, deterministic=True)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    assert_gradients_match(gradients, dout, q, k, v, causal=causal)
    again = torch.autograd.grad(out, (q, k, v), dout)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def _qkv(batch=4, seqlen=777, heads=8, head_dim=64):
    return [
        torch.randn(batch, seqlen, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(3)
    ]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_runs_on_the_current_stream(backend):
    q, k, v = _qkv()
    expected = flash_attn_func(q, k, v, backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        k2 = k * 1.0  # available on this stream only, and late
        out = flash_attn_func(q, k2, v, backend=backend)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_captures_into_a_cuda_graph(backend):
    q, k, v = _qkv()
    flash_attn_func(q, k, v, causal=True, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, causal=True, backend=backend)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, flash_attn_func(q, k, v, causal=True, backend=backend))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_offsets_past_two_to_the_31_elements(backend):
    """A batch stride beyond 2^31 elements, and rows far beyond it in the second batch."""
    stride = 2**31 + 64
    buffer = torch.zeros(stride + 4096 * 64, dtype=torch.bfloat16, device=DEVICE)
    q, k, v = (
        buffer.as_strided((2, 256, 2, 64), (stride, 128, 64, 1), i * 65536) for i in range(3)
    )
    for x in (q, k, v):
        x.copy_(torch.randn(2, 256, 2, 64, device=DEVICE))
    out = flash_attn_func(q, k, v, causal=True, backend=backend)
    assert_matches_reference(out, None, q, k, v, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tensors_at_the_start_and_the_end_of_mapped_memory(head_dim, causal):
    """What lies beside tensors of whole mappings, 32 MiB each, need not be mapped."""
    torch.cuda.empty_cache()
    heads = 8192 // head_dim
    q, k, v, dout = (
        torch.randn(1, 2048, heads, head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in "qkvd"
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, causal=causal)
    gradients = torch.autograd.grad(out, leaves, dout)
    torch.cuda.synchronize()
    for head in (0, heads - 1):
        part = [x[:, :, head : head + 1].detach() for x in (q, k, v)]
        assert_matches_reference(out[:, :, head : head + 1], None, *part, causal=causal)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_repeated_runs_are_bitwise_identical(backend):
    q, k, v = _qkv()
    first = flash_attn_func(q, k, v, causal=True, backend=backend)
    assert all(
        torch.equal(flash_attn_func(q, k, v, causal=True, backend=backend), first)
        for _ in range(20)
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_two_gpus_at_once(backend):
    q, k, v = _qkv()
    expected = flash_attn_func(q, k, v, backend=backend)
    moved = [x.to("cuda:1") for x in (q, k, v)]
    outs = []
    for _ in range(10):
        outs.append(flash_attn_func(q, k, v, backend=backend))
        outs.append(flash_attn_func(*moved, backend=backend))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(out.to(DEVICE), expected) for out in outs)


def test_without_tuning_a_small_problem_goes_to_the_cuda_kernel():
    plan = flashmoe.planning.plan.heuristic(Problem(1, 8, 8, 128, 128, 64, "bfloat16"), DEVICE)
    assert plan.backend == "cuda"
    decode = Problem(16, 32, 8, 1, 8192, 128, "bfloat16")
    for need_lse in (False, True):
        plan = flashmoe.planning.plan.heuristic(decode, DEVICE, need_lse=need_lse)
        assert plan.backend == "decode"


@pytest.mark.parametrize("heads_kv", [8, 2])
def test_one_causal_query_sees_every_key(heads_kv):
    q = guarded((2, 1, 8, 128), torch.bfloat16, "padded", DEVICE)
    k, v = (guarded((2, 333, heads_kv, 128), torch.bfloat16, "packed", DEVICE) for _ in range(2))
    assert_matches_reference(flash_attn_func(q, k, v, causal=True), None, q, k, v, causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_compiled_with_inductor(causal):
    compiled = torch.compile(
        lambda q, k, v: flash_attn_func(q * 2, k, v, causal=causal) + 1, fullgraph=True
    )
    q, k, v = (x.requires_grad_() for x in _qkv())
    expected = flash_attn_func(q * 2, k, v, causal=causal) + 1
    torch.testing.assert_close(compiled(q, k, v), expected)
