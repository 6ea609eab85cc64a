"""The Hopper kernel on a real GPU: compiled-in tiles and tiles compiled here, in all its ways."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LAYOUTS, assert_gradients_match, assert_matches_reference, guarded, run_forward

from flashmoe import Tile, _extension, flash_attn_func
from flashmoe.api import forget_plans
from flashmoe.backends import BACKENDS, jit
from flashmoe.frontend import node
from flashmoe.machine.device import arch
from flashmoe.spec.mask import CAUSAL, Mask, causal_if
from flashmoe.spec.problem import Problem
from flashmoe.tiles import PLAIN, Variant

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
CUDA = BACKENDS["cuda"]
COMPILED, LOCAL = (
    {
        head_dim: tiles
        for (kernel, head_dim, variant), tiles in _extension.load().instances.items()
        if (kernel, variant) == ("sm90", wanted)
    }
    for wanted in (PLAIN, Variant(local=True))
)
PAIRS = [(head_dim, tile) for head_dim, tiles in COMPILED.items() for tile in tiles]
DTYPES = [torch.float16, torch.bfloat16]


def tensors(batch, seqlen_q, seqlen_kv, heads_q, heads_kv, head_dim, dtype, layouts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = guarded((batch, seqlen_q, heads_q, head_dim), dtype, layouts[0], DEVICE, generator)
    k, v = (
        guarded((batch, seqlen_kv, heads_kv, head_dim), dtype, layout, DEVICE, generator)
        for layout in layouts[1:]
    )
    return q, k, v


def run(q, k, v, causal, tile):
    return run_forward("cuda", q, k, v, causal_if(causal), tile)


# 200 problems in all, in parts that run beside each other.
@pytest.mark.parametrize("instance", COMPILED)
@pytest.mark.parametrize("causal", [False, True])
@settings(max_examples=-(-100 // len(COMPILED)), deadline=None)
@given(data=st.data())
def test_random_problems(causal, instance, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    lower = max((d for d in COMPILED if d < instance), default=0)
    head_dim = data.draw(st.sampled_from(range(lower + 8, instance + 1, 8)))
    group, heads_kv = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.integers(1, 3))
    # Long ones seldom: the reference takes its time.
    longest = data.draw(st.sampled_from([200, 600, 600, 4100]))
    seqlen_q, seqlen_kv = data.draw(st.integers(1, longest)), data.draw(st.integers(1, longest))
    batch = 1 if longest > 600 else data.draw(st.integers(1, 3))
    # Of the unaligned layout only the fall back to sm80 is to be seen.
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    q, k, v = tensors(
        batch,
        seqlen_q,
        seqlen_kv,
        heads_kv * group,
        heads_kv,
        head_dim,
        dtype,
        layouts,
        data.draw(st.integers(0, 2**31)),
    )
    out, lse = run(q, k, v, causal, data.draw(st.sampled_from(COMPILED[instance])))
    assert_matches_reference(out, lse, q, k, v, causal=causal)


@pytest.mark.parametrize(("head_dim", "tile"), PAIRS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_enough_blocks_for_every_scheduler(head_dim, tile, causal):
    """More blocks of rows than multiprocessors, so that thread blocks draw several."""
    q, k, v = tensors(4, 700, 650, 12, 4, head_dim, torch.bfloat16, ["packed"] * 3)
    out, lse = run(q, k, v, causal, tile)
    assert_matches_reference(out, lse, q, k, v, causal=causal)
    for _ in range(10):
        again, again_lse = run(q, k, v, causal, tile)
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)


# Narrower than a tile, of several, open on one side.
WINDOWS = [Mask(0, 0), Mask(63, 0), Mask(17, 40), Mask(300, 5), Mask(-1, 20), Mask(200, -1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", WINDOWS, ids=str)
@pytest.mark.parametrize("head_dim", LOCAL)
def test_windows(head_dim, mask, dtype):
    for tile in LOCAL[head_dim]:
        for seqlen_q, seqlen_kv in ((1500, 1500), (333, 1300), (1300, 333)):
            layouts = ["padded", "packed", "packed"]
            q, k, v = tensors(2, seqlen_q, seqlen_kv, 8, 4, head_dim, dtype, layouts)
            out, lse = run_forward("cuda", q, k, v, mask, tile)
            assert_matches_reference(out, lse, q, k, v, window=(mask.left, mask.right))


def test_a_plain_kernel_refuses_a_window():
    (tile, *_), handles = COMPILED[64], _extension.load().handles
    q, k, v = tensors(1, 100, 100, 2, 2, 64, torch.bfloat16, ["packed"] * 3)
    with pytest.raises(RuntimeError, match="launching the forward kernel failed: invalid argument"):
        torch.ops.flashmoe.fwd_cuda(q, k, v, 0.1, 10, 0, handles[64, tile, PLAIN])


def check_every_tile(batch, seqlens, heads_q, heads_kv, dtype, layout, causal, change=None):
    """`change` alters q and k in place."""
    for head_dim, tile in PAIRS:
        q, k, v = tensors(batch, *seqlens, heads_q, heads_kv, head_dim, dtype, [layout] * 3)
        if change is not None:
            change(q, k)
        out, lse = run(q, k, v, causal, tile)
        assert_matches_reference(out, lse, q, k, v, causal=causal)


@pytest.mark.parametrize("seqlens", [(1, 1), (1, 5000), (300, 1), (500, 129), (64, 0), (3000, 7)])
def test_rows_that_see_nothing(seqlens):
    check_every_tile(1, seqlens, 4, 2, torch.float16, "padded", True)


@pytest.mark.parametrize("seqlens", [(640, 512), (1100, 100)])
def test_many_blocks_that_see_nothing(seqlens):
    check_every_tile(8, seqlens, 16, 4, torch.bfloat16, "contiguous", True)


@pytest.mark.parametrize("causal", [False, True])
def test_scores_that_grow_by_more_than_a_lagging_maximum_may(causal):
    """Keys are visited from the last to the first."""

    def change(q, k):
        k *= torch.linspace(30, 1, 900, device=DEVICE)[None, :, None, None]

    check_every_tile(2, (300, 900), 4, 2, torch.bfloat16, "padded", causal, change)


@pytest.mark.parametrize("causal", [False, True])
def test_last_keys_that_score_minus_infinity(causal):
    """As padding by a bias does. They are visited first, and leave no maximum behind."""

    def change(q, k):
        q[:, :, :, -1] = 1
        k[:, 500:, :, -1] = float("-inf")
        # Where one row is computed again, others of its warp have no maximum yet.
        q[:, ::5] *= 20

    check_every_tile(2, (300, 900), 4, 2, torch.bfloat16, "padded", causal, change)


def test_no_keys_at_all():
    q = torch.randn(2, 300, 4, 128, dtype=torch.bfloat16, device=DEVICE)
    k = torch.empty(2, 0, 4, 128, dtype=torch.bfloat16, device=DEVICE)
    out, lse = run(q, k, k, False, COMPILED[128][0])
    assert not out.any()
    assert (lse == float("-inf")).all()


def test_broadcast_keys_fall_back():
    """A stride of 0 is nothing that the TMA can fetch; a batch of 1 has any."""
    q, k, v = tensors(3, 200, 300, 4, 4, 128, torch.bfloat16, ["contiguous"] * 3)
    k, v = (x[:1].expand(3, -1, -1, -1) for x in (k, v))
    out, lse = run(q, k, v, False, COMPILED[128][0])
    assert_matches_reference(out, lse, q, k, v)


@pytest.mark.parametrize("capture_first", [False, True])
def test_graphs_replay_with_new_inputs_beside_eager_launches(capture_first):
    q, k, v = tensors(4, 2000, 2000, 16, 16, 128, torch.bfloat16, ["contiguous"] * 3)
    tile = COMPILED[128][0]
    if not capture_first:
        run(q, k, v, True, tile)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        first, _ = run(q, k, v, True, tile)
        second, _ = run(first, k, v, True, tile)
    for seed in range(3):
        torch.manual_seed(seed)
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        beside, _ = run(q, k, v, True, tile)
        torch.cuda.synchronize()
        assert torch.equal(beside, first)
        assert torch.equal(second, run(first, k, v, True, tile)[0])


def test_launches_on_many_streams_and_threads_at_once():
    q, k, v = tensors(2, 1500, 1500, 16, 4, 64, torch.bfloat16, ["contiguous"] * 3)
    tile = COMPILED[64][0]
    expected, _ = run(q, k, v, True, tile)
    torch.cuda.synchronize()
    outs, lock = [], threading.Lock()

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            mine = [run(q, k, v, True, tile)[0] for _ in range(50)]
        with lock:
            outs.extend(mine)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(outs) == 200
    assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_at_once():
    q, k, v = tensors(2, 1500, 1500, 16, 4, 128, torch.bfloat16, ["contiguous"] * 3)
    expected, _ = run(q, k, v, True, COMPILED[128][0])
    moved = [x.to("cuda:1") for x in (q, k, v)]
    outs = []
    for _ in range(20):
        outs.append(run(q, k, v, True, COMPILED[128][0])[0])
        outs.append(run(*moved, True, COMPILED[128][0])[0])
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(out.to(DEVICE), expected) for out in outs)


def test_offsets_past_two_to_the_31_elements():
    """One tensor of more than 2^31 elements: rows at its end."""
    seqlen, heads, head_dim = 2**31 // (32 * 128) + 300, 32, 128
    if torch.cuda.mem_get_info()[0] < 6 * seqlen * heads * head_dim * 2:
        pytest.skip("needs more device memory")
    q = torch.randn(1, seqlen, heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    k, v = (torch.randn(1, 200, heads, head_dim, dtype=q.dtype, device=DEVICE) for _ in "kv")
    out, lse = run(q, k, v, False, COMPILED[128][0])
    last = slice(seqlen - 200, seqlen)
    assert_matches_reference(out[:, last], lse[:, :, last], q[:, last], k, v)
    out, lse = run(k, q, q, False, COMPILED[128][0])
    part_out, part_lse = run(k, q[:, : seqlen // 2], q[:, : seqlen // 2], False, COMPILED[128][0])
    rest_out, rest_lse = run(k, q[:, seqlen // 2 :], q[:, seqlen // 2 :], False, COMPILED[128][0])
    combined_lse = torch.logaddexp(part_lse, rest_lse)
    torch.testing.assert_close(lse, combined_lse, rtol=2e-6, atol=2e-5)
    weights = [(x - lse).exp().transpose(1, 2).unsqueeze(3) for x in (part_lse, rest_lse)]
    combined = part_out.float() * weights[0] + rest_out.float() * weights[1]
    torch.testing.assert_close(out.float(), combined, rtol=2e-2, atol=2e-4)


@pytest.mark.skipif(bool(jit.unavailable()), reason=jit.unavailable())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_compiled_here(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path))
    texts = {
        64: ("64x112-stages2", "128x96-stages3-q2-fma4", "64x64-stages2-qreg-ctas2"),
        80: ("128x144-stages2-pingpong", "192x96-stages1-q2"),
        128: ("64x144-stages2-qreg", "128x160-stages2-fma2", "192x64-stages3-pingpong"),
        256: ("64x80-stages2", "128x48-stages3-pingpong"),
    }
    for head_dim, names in texts.items():
        tiles = [Tile.parse(f"sm90:{name}") for name in names]
        q, k, v = tensors(2, 333, 417, 4, 2, head_dim, dtype, ["packed"] * 3)
        problem = Problem.of(q, k, CAUSAL)
        assert [tile.violations(arch(DEVICE), problem) for tile in tiles] == [[]] * len(tiles)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda tile, p=problem: CUDA.precompile(tile, p, DEVICE), tiles))
        for tile in tiles:
            for causal in (False, True):
                out, lse = run(q, k, v, causal, tile)
                assert_matches_reference(out, lse, q, k, v, causal=causal)
            assert torch.equal(flash_attn_func(q, k, v, causal=True, tile=tile), out)


# The planned backward of 16-bit problems.
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 88, 128, 192, 256])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_gradients_of_random_problems(head_dim, causal, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    group, heads_kv = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 2))
    longest = data.draw(st.sampled_from([70, 300, 900]))
    seqlen_q, seqlen_kv = data.draw(st.integers(1, longest)), data.draw(st.integers(1, longest))
    batch, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 1000))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in "qkv"]
    q, k, v = (
        x.requires_grad_()
        for x in tensors(
            *(batch, seqlen_q, seqlen_kv, heads_kv * group, heads_kv, head_dim, dtype),
            layouts,
            seed,
        )
    )
    out = flash_attn_func(q, k, v, causal=causal)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert_gradients_match(gradients, dout, q, k, v, causal=causal)


def test_the_first_call_of_a_thread_may_be_a_backward():
    """Autograd runs it in a thread of its own, which has no current context yet."""
    script = (
        "import torch, flashmoe\n"
        "x = torch.randn(2, 300, 4, 64, device='cuda', dtype=torch.bfloat16, requires_grad=True)\n"
        "flashmoe.flash_attn_func(x, x, x).backward(torch.ones_like(x))\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("where", ["here", "side stream", "graph"])
def test_later_steps_are_under_the_node_in_cpp(where, deterministic, monkeypatch):
    monkeypatch.setattr(node, "NODE_ON_GPUS", True)
    forget_plans()
    inputs = [
        torch.randn(2, 200, 4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in "qkv"
    ]
    dout = torch.randn_like(inputs[0])

    def step():
        out = flash_attn_func(*inputs, causal=True, deterministic=deterministic)
        return out, *torch.autograd.grad(out, inputs, dout)

    first = step()
    assert first[0].grad_fn.name() == "PlainAttentionBackward"
    # A graph of autograd that lives on binds its leaves to the stream it was made on.
    first = tuple(x.detach() for x in first)
    if where == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            second = step()
        graph.replay()
    else:
        stream = torch.cuda.current_stream() if where == "here" else torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            second = step()
    torch.cuda.synchronize()
    assert second[0].grad_fn.name() == "ScaledDotProductFusedAttentionOverrideableBackward0"
    tolerance = {"rtol": 0, "atol": 0} if deterministic else {}
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, **tolerance)
