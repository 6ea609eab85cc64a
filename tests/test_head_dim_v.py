"""Values of another head_dim than queries and keys: one vocabulary, every backend, through our
functions."""

from __future__ import annotations

import pytest
import torch
from random_calls import (
    assert_forward_matches,
    assert_gradients_of_call,
    check_backward,
    check_forward,
    cumulative,
    int32,
    packed_call,
)
from support import DEVICE, guarded

from flashmoe import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flashmoe.backends import BACKENDS
from flashmoe.frontend import ops
from flashmoe.machine.device import Arch
from flashmoe.measure.inputs import make_inputs, ragged
from flashmoe.measure.reference import sequences_reference
from flashmoe.spec.call import Call, Saved, Sequences
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.options import problems_of
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile, Variant

H200 = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
DEEPSEEK = Problem(2, 16, 16, 4096, 4096, 192, "bfloat16", CAUSAL, head_dim_v=128)
DIMS = ((192, 128), (64, 32), (40, 24), (128, 256))
MASKS = (FULL, CAUSAL, Mask(9, 3))


def qkv(dims, dtype=torch.float32, heads=(4, 2), seqlens=(19, 27), layout="padded"):
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (2, seqlens[0], heads[0], dims[0]),
        (2, seqlens[1], heads[1], dims[0]),
        (2, seqlens[1], heads[1], dims[1]),
    )
    return [guarded(shape, dtype, layout, DEVICE, generator) for shape in shapes]


def test_a_problem_counts_both():
    one = Problem(2, 16, 4, 1000, 3000, 192, "float16", head_dim_v=128)
    pairs = 2 * 16 * 1000 * 3000
    assert one.flops == 2 * pairs * (192 + 128)
    # q, out, k and v; softmax_lse.
    rows, keys = 2 * 1000 * 16, 2 * 3000 * 4
    assert one.bytes == 2 * (192 + 128) * (rows + keys) + 4 * rows
    back = Problem(2, 16, 4, 1000, 3000, 192, "float16", direction="bwd", head_dim_v=128)
    # Q K^T, dQ and dK; P V's gradients dP and dV.
    assert back.flops == 2 * pairs * (3 * 192 + 2 * 128)
    assert back.bytes == 2 * 2 * (192 + 128) * (rows + keys) + 4 * rows
    assert (one.value_dim, one.padded_dim, one.dims) == (128, 192, "192v128")
    assert one.features == {"head_dim_v"}
    assert "-d192v128-" in one.bucket
    assert " d192v128 " in one.label
    assert Problem.from_json(one.to_json()) == one


def test_one_problem_has_one_spelling():
    plain = Problem(1, 1, 1, 8, 8, 64, "float32")
    assert Problem(1, 1, 1, 8, 8, 64, "float32", head_dim_v=64) == plain
    assert (plain.value_dim, plain.padded_dim, plain.dims) == (64, 64, "64")
    assert "head_dim_v" not in plain.to_json()
    for bad in (0, 12, 264, 64.0):
        with pytest.raises(ValueError, match=rf"head_dim_v must be .*, got {bad}"):
            Problem(1, 1, 1, 8, 8, 64, "float32", head_dim_v=bad)


def test_the_command_line_names_it():
    (named,) = problems_of({"head_dim": 192, "head_dim_v": 128}, "cuda")
    assert (named.head_dim, named.head_dim_v) == (192, 128)


@pytest.mark.parametrize(
    ("layout", "direction"),
    [("dense", "bwd"), ("packed", "bwd"), ("cache", "fwd"), ("packed-paged", "fwd")],
)
def test_inputs_of_a_problem(layout, direction):
    lengths = () if layout == "dense" else ((20, 30, 2), (8, 11, 2))
    if layout == "cache":
        lengths = ((32, 30, 2), (32, 11, 2))
    problem = Problem(
        *(4, 4, 2, 32, 32, 24, "float32"),
        direction=direction,
        layout=layout,
        lengths=lengths,
        head_dim_v=40,
    )
    for each in (problem, ragged(problem)):
        inputs = make_inputs(each, DEVICE, guard=3)
        q, k, v = inputs.call[:3]
        assert (q.shape[-1], k.shape[-1], v.shape[-1]) == (24, 24, 40)
        assert Problem.of_call(inputs.call, each.mask, direction).dims == "24v40"
        if inputs.dout is not None:
            assert inputs.dout.shape == (*q.shape[:-1], 40)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    ("dims", "dtype"),
    [
        ((192, 128), torch.bfloat16),
        ((64, 32), torch.float16),
        ((40, 24), torch.float32),
        ((128, 256), torch.float32),
    ],
    ids=str,
)
def test_forward_and_backward_of_every_backend(dims, dtype, mask):
    q, k, v = qkv(dims, dtype, heads=(2, 1))
    call = Call(q, k, v, dims[0] ** -0.5)
    check_forward(call, mask)
    out, lse = sequences_reference(call, mask, dtype)
    dout = guarded(tuple(out.shape), dtype, "heads_first")
    check_backward(call, Saved(dout, out, lse.float()), mask)


@pytest.mark.parametrize("dims", [(192, 128), (20, 30)], ids=str)
def test_gradients_through_our_function(dims):
    q, k, v = (x.requires_grad_() for x in qkv(dims))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    call = Call(q.detach(), k.detach(), v.detach(), dims[0] ** -0.5)
    assert_gradients_of_call(gradients, dout, dlse, call, CAUSAL)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_packed_sequences(dims):
    lengths_q, lengths_k = [5, 0, 33, 1], [9, 4, 33, 70]
    q, k, v = (
        torch.randn(sum(lengths), heads, dim, device=DEVICE, requires_grad=True)
        for lengths, heads, dim in (
            (lengths_q, 4, dims[0]),
            (lengths_k, 2, dims[0]),
            (lengths_k, 2, dims[1]),
        )
    )
    out, lse, _ = flash_attn_varlen_func(
        *(q, k, v, cumulative(lengths_q), cumulative(lengths_k), 33, 70),
        causal=True,
        return_attn_probs=True,
    )
    call = packed_call(q.detach(), k.detach(), v.detach(), lengths_q, lengths_k)
    assert_forward_matches(out, lse, call, CAUSAL)
    dout, dlse = torch.randn_like(out), torch.zeros_like(lse)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    assert_gradients_of_call(gradients, dout, dlse, call, CAUSAL)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_a_cache(dims, paged):
    """NaN behind its keys."""
    used = [7, 31]
    shape = (6, 16) if paged else (2, 48)
    k_cache, v_cache = (torch.full((*shape, 2, dim), float("nan"), device=DEVICE) for dim in dims)
    table = int32([[4, 1, 0], [2, 5, 3]]) if paged else None
    for i, length in enumerate(used):
        for x in (k_cache, v_cache):
            rows = x[table[i].long()].flatten(0, 1) if paged else x[i]
            rows[:length] = torch.randn(length, 2, x.shape[-1], device=DEVICE)
            if paged:
                x[table[i].long()] = rows.unflatten(0, (3, 16))
    q = torch.randn(2, 3, 4, dims[0], device=DEVICE)
    k, v = (torch.randn(2, 3, 2, dim, device=DEVICE) for dim in dims)
    where = {"block_table": table} if paged else {}
    out, lse = flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v),
        cache_seqlens=int32(used),
        causal=True,
        return_softmax_lse=True,
        **where,
    )
    sequences = Sequences(seqused_k=int32([n + 3 for n in used]), block_table=table)
    call = Call(q, k_cache, v_cache, dims[0] ** -0.5, sequences=sequences)
    assert_forward_matches(out, lse, call, CAUSAL)


@pytest.mark.parametrize("dims", [(192, 128), (40, 60)], ids=str)
def test_compiled_without_graph_breaks(dims):
    q, k, v = (x.requires_grad_() for x in qkv(dims, layout="contiguous"))
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
    out, expected = (f(q, k, v, causal=True) for f in (compiled, flash_attn_func))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    gradients = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    q, k, v = (x.requires_grad_(requires_grad) for x in qkv((24, 40), layout="contiguous"))
    fixed = (0.2, -1, 0, "", "")
    torch.library.opcheck(ops.attention, (q, k, v, *fixed))
    torch.library.opcheck(ops.attention_without_lse, (q, k, v, *fixed))


def test_the_gradient_of_an_added_mask():
    q, k, v = (x.requires_grad_() for x in qkv((24, 40)))
    mask = torch.randn(19, 27, device=DEVICE, requires_grad=True)
    out = flash_attn_func(q, k, v, attn_mask=mask)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 24**-0.5 + mask
    wanted = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.repeat_interleave(2, 2))
    actual, expected = (torch.autograd.grad(x.sin().sum(), (q, k, v, mask)) for x in (out, wanted))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_sdpa_by_name_is_padded_and_differentiable():
    q, k, v = (x.requires_grad_() for x in qkv((24, 40), heads=(2, 2), seqlens=(19, 19)))
    out = flash_attn_func(q, k, v, causal=True, backend="sdpa")
    expected = flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_variant_is_spelled_with_it():
    variant = Variant.of(DEEPSEEK)
    assert (variant.names, variant.flags) == (("v128",), ())
    assert Variant.named(variant.names) == variant
    # Rounded up to what wgmma multiplies; a backward is padded.
    assert Variant.of(Problem(1, 1, 1, 1, 1, 40, "float16", head_dim_v=24)).head_dim_v == 32
    back = Problem(1, 1, 1, 1, 1, 40, "float16", direction="bwd", head_dim_v=24)
    assert Variant.of(back) == Variant()


@pytest.mark.parametrize(
    ("tile", "head_dim", "head_dim_v", "message"),
    [
        ("128x128-stages2-pingpong-qreg", 192, 128, ""),
        ("128x128-stages2-pingpong-qreg", 192, None, "shared memory of"),
        ("128x128-stages3-pingpong", 192, 128, "shared memory of 295424"),
        ("192x96-stages2", 192, 128, "registers: a thread needs"),
        ("128x112-stages2-pingpong", 128, 256, "registers: a thread needs"),
        ("64x32-stages1-ctas2", 128, 256, "registers: a wgmma of 256 columns"),
        ("64x64-stages2-ctas2", 192, 128, ""),
    ],
)
def test_both_head_dims_say_which_tiles_are_legal(tile, head_dim, head_dim_v, message):
    problem = Problem(1, 1, 1, 1, 1, head_dim, "bfloat16", head_dim_v=head_dim_v)
    broken = Tile.parse(f"sm90:{tile}").violations(H200, problem)
    assert broken == [] if not message else any(message in each for each in broken), broken


def test_kernels_of_one_head_dim_count_the_larger():
    for kernel, direction in (("sm80:128x64-stages1-warps4", "fwd"), ("sm90_bwd:64x64", "bwd")):
        tile = Tile.parse(kernel)
        pairs = ((64, 256), (256, 64))
        told = [
            tile.violations(
                H200, Problem(1, 1, 1, 1, 1, d, "float16", direction=direction, head_dim_v=dv)
            )
            for d, dv in (*pairs, (256, None))
        ]
        assert told[0] == told[1] == told[2]


def test_features_name_it_where_a_backend_computes_it():
    for name, backend in BACKENDS.items():
        for direction, features in backend.features.items():
            assert "head_dim_v" in features, (name, direction)


def test_triton_pads_what_it_would_miscompile(monkeypatch):
    """On a GPU: 16-bit values narrower than their keys, at strides that are no multiple of 16."""
    seen = []

    def forward(call, mask, **options):
        seen.append((call.q.shape[-1], call.v.shape[-1]))
        return call.q.new_zeros((*call.q.shape[:3], call.v.shape[-1])), None

    monkeypatch.setattr("flashmoe.backends.triton_fwd.attention_forward", forward)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    tile = Tile.parse("triton:64x64-stages3-warps4")
    for dtype, layout in (
        (torch.float16, "padded"),
        (torch.float16, "contiguous"),
        (torch.float32, "padded"),
    ):
        call = Call(*qkv((64, 32), dtype, layout=layout), 0.125)
        out, _ = BACKENDS["triton"].bind(Problem.of_call(call, FULL), tile)(call)
        assert out.shape[-1] == 32
    assert seen == [(64, 64), (64, 32), (64, 32)]
