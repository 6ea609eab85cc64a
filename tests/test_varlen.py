"""Packed batches through our functions: every sequence as if it were alone, and no other row."""

from __future__ import annotations

import numpy as np
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
    lengths,
    masks,
    on_device,
    packed_call,
    random_terms,
)
from support import DEVICE
from torch._dynamo.testing import CompileCounterWithBackend

import flashmoe
from flashmoe import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flashmoe.frontend import ops
from flashmoe.measure.reference import sequences_reference
from flashmoe.spec.problem import TERMS, Problem

NAN = float("nan")


def packed(rows, heads=2, head_dim=16, dtype=torch.float32, tail=0):
    """(rows + tail, heads, head_dim), the tail NaN."""
    x = torch.randn(rows + tail, heads, head_dim, device=DEVICE, dtype=dtype)
    x[rows:] = NAN
    return x


def arguments(lengths_q, lengths_k):
    """Those of flash_attn_varlen_func after q, k and v."""
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    return cumulative(lengths_q), cumulative(lengths_k), *longest


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(lengths(), lengths()), min_size=1, max_size=4),
    masks(),
    st.lists(st.sampled_from(TERMS), unique=True).map(tuple),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_sequence_as_if_alone(pairs, mask, names, group, tail, dtype):
    lengths_q, lengths_k = (list(x) for x in zip(*pairs, strict=True))
    q = packed(sum(lengths_q), 2 * group, dtype=dtype, tail=tail)
    k, v = (packed(sum(lengths_k), 2, dtype=dtype, tail=tail) for _ in "kv")
    terms = random_terms(names, 2 * group, len(pairs) if group == 2 else None)
    leaves = [x.requires_grad_() for x in (q, k, v, terms.sinks) if x is not None]
    out, lse, _ = flash_attn_varlen_func(
        *(q, k, v, *arguments(lengths_q, lengths_k)),
        window_size=(mask.left, mask.right),
        return_attn_probs=True,
        **keywords(terms),
    )
    # Gradients of what is in no sequence are 0 whatever it holds; the reference multiplies with it.
    clean = [x.detach().nan_to_num() for x in (q, k, v)]
    call = packed_call(*clean, lengths_q, lengths_k, terms)
    assert_forward_matches(out.detach(), lse.detach(), call, mask)
    douts = torch.randn_like(out), torch.randn_like(lse)
    actual = torch.autograd.grad((out, lse), leaves, douts)
    assert_gradients_of_call(actual, *douts, call, mask)
    for x, rows in zip(actual, map(sum, (lengths_q, lengths_k, lengths_k)), strict=False):
        assert not x[rows:].any()


@settings(deadline=None, max_examples=12)
@given(st.lists(st.tuples(lengths(), lengths(), st.floats(0, 1)), min_size=1, max_size=3), masks())
def test_only_used_keys_are_read(triples, mask):
    lengths_q, lengths_k, parts = (list(x) for x in zip(*triples, strict=True))
    used = [int(part * n) for part, n in zip(parts, lengths_k, strict=True)]
    q = packed(sum(lengths_q)).requires_grad_()
    k, v = packed(sum(lengths_k)), packed(sum(lengths_k))
    cu_seqlens_k = cumulative(lengths_k).tolist()
    for begin, end, n in zip(cu_seqlens_k, cu_seqlens_k[1:], used, strict=False):
        k[begin + n : end] = v[begin + n : end] = NAN
    k, v = k.requires_grad_(), v.requires_grad_()
    out, lse, _ = flash_attn_varlen_func(
        *(q, k, v, *arguments(lengths_q, lengths_k)),
        window_size=(mask.left, mask.right),
        return_attn_probs=True,
        seqused_k=int32(used),
    )
    clean = [x.detach().nan_to_num() for x in (q, k, v)]
    call = packed_call(*clean, lengths_q, lengths_k, seqused_k=int32(used))
    assert_forward_matches(out.detach(), lse.detach(), call, mask)
    douts = torch.randn_like(out), torch.zeros_like(lse)
    assert_gradients_of_call(torch.autograd.grad(out, (q, k, v), douts[0]), *douts, call, mask)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.tuples(lengths(), lengths()), min_size=1, max_size=4), st.integers(1, 33))
def test_keys_in_pages_are_keys(pairs, page_size):
    lengths_q, lengths_k = (list(x) for x in zip(*pairs, strict=True))
    q, k, v = packed(sum(lengths_q), 4), packed(sum(lengths_k)), packed(sum(lengths_k))
    cu_q, cu_k, max_q, max_k = arguments(lengths_q, lengths_k)
    expected = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=True)
    pages = -(-max_k // page_size) + 1
    order = torch.randperm(pages * len(pairs)).reshape(len(pairs), pages)
    paged = [torch.full((order.numel(), page_size, 2, 16), NAN, device=DEVICE) for _ in "kv"]
    for i, (begin, n) in enumerate(zip(cu_k.tolist(), lengths_k, strict=False)):
        for j in range(n):
            for x, cache in zip((k, v), paged, strict=True):
                cache[order[i, j // page_size], j % page_size] = x[begin + j]
    table = int32(order.tolist())
    by_lengths = flash_attn_varlen_func(
        q, *paged, cu_q, cu_k, max_q, max_k, causal=True, block_table=table
    )
    used = flash_attn_varlen_func(
        *(q, *paged, cu_q, None, max_q, 0),
        causal=True,
        block_table=table,
        seqused_k=int32(lengths_k),
    )
    # A GPU may run another kernel where keys are in pages.
    torch.testing.assert_close(by_lengths, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(used, by_lengths, rtol=1e-5, atol=1e-5)


def test_packed_tensors_are_read_where_they_lie():
    qkv = torch.randn(30, 3, 2, 16, device=DEVICE, requires_grad=True)
    cu_seqlens = cumulative([10, 0, 20])
    out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 20, causal=True)
    call = packed_call(*qkv.detach().unbind(1), [10, 0, 20], [10, 0, 20])
    assert_forward_matches(out.detach(), None, call, flashmoe.Mask(right=0))
    q, k, v = qkv.unbind(1)
    expected = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 20, 20, causal=True)
    assert torch.equal(out, expected)
    (actual,) = torch.autograd.grad(out.sin().sum(), qkv)
    torch.testing.assert_close(actual, torch.autograd.grad(expected.sin().sum(), qkv)[0])
    kv = qkv.detach()[:, 1:]
    again = flash_attn_varlen_kvpacked_func(
        q.detach(), kv, cu_seqlens, cu_seqlens, 20, 20, causal=True
    )
    assert torch.equal(again, out)


def test_dense_packed_tensors():
    qkv = torch.randn(2, 9, 3, 4, 16, device=DEVICE, requires_grad=True)
    out = flash_attn_qkvpacked_func(qkv, causal=True, softcap=2.0)
    q, k, v = qkv.unbind(2)
    assert torch.equal(out, flash_attn_func(q, k, v, causal=True, softcap=2.0))
    assert torch.equal(
        flash_attn_kvpacked_func(q, qkv[:, :, 1:], 0.0, None, True, softcap=2.0), out
    )
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


@pytest.mark.parametrize(("heads", "head_dims"), [((4, 2), (20, 12)), ((2, 2), (24, 64))])
def test_any_head_dims(heads, head_dims):
    q, k = packed(7, heads[0], head_dims[0]), packed(9, heads[1], head_dims[0])
    v = packed(9, heads[1], head_dims[1])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_varlen_func(*leaves, *arguments([3, 4], [4, 5]), causal=True)
    both = [
        flash_attn_func(q[None, a], k[None, b], v[None, b], causal=True)[0]
        for a, b in ((slice(3), slice(4)), (slice(3, 7), slice(4, 9)))
    ]
    torch.testing.assert_close(out, torch.cat(both))
    actual = torch.autograd.grad(out.sin().sum(), leaves)
    expected = torch.autograd.grad(torch.cat(both).sin().sum(), leaves)
    torch.testing.assert_close(actual, expected)


def test_no_sequences_at_all():
    q, k = packed(3).requires_grad_(), packed(2)
    out, lse, _ = flash_attn_varlen_func(
        q, k, k, int32([0]), int32([0]), 0, 0, return_attn_probs=True
    )
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not torch.autograd.grad(out.sum(), q)[0].any()


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_max_seqlen_of_any_kind(kind):
    q, k = packed(7), packed(9)
    cu_q, cu_k, max_q, max_k = arguments([3, 4], [4, 5])
    expected = flash_attn_varlen_func(q, k, k, cu_q, cu_k, max_q, max_k)
    assert torch.equal(
        flash_attn_varlen_func(q, k, k, cu_q, cu_k, kind(max_q), kind(max_k)), expected
    )


def test_out_is_written():
    q, k = packed(7), packed(9)
    into = torch.full_like(q, NAN)
    found = flash_attn_varlen_func(q, k, k, *arguments([3, 4], [4, 5]), out=into)
    assert found is into
    assert torch.equal(into, flash_attn_varlen_func(q, k, k, *arguments([3, 4], [4, 5])))
    with pytest.raises(NotImplementedError, match="out must be None where gradients"):
        flash_attn_varlen_func(q.requires_grad_(), k, k, *arguments([3, 4], [4, 5]), out=into)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("max_as_tensor", [False, True])
def test_changing_lengths_compile_once(requires_grad, max_as_tensor):
    sinks = torch.randn(4, device=DEVICE, requires_grad=requires_grad)

    def f(q, k, v, cu_q, cu_k, max_q, max_k):
        out = flash_attn_varlen_func(
            q * 1.0, k, v, cu_q, cu_k, max_q, max_k, causal=True, sinks=sinks
        )
        return out.sin()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for total_q, total_k, batch in ((20, 30, 3), (50, 60, 4), (77, 31, 7), (91, 92, 2), (12, 5, 9)):
        q, k, v = (
            packed(n, h).requires_grad_(requires_grad)
            for n, h in ((total_q, 4), (total_k, 2), (total_k, 2))
        )
        cu_q, cu_k = (int32(np.linspace(0, n, batch + 1).astype(int)) for n in (total_q, total_k))
        longest = [int(x.diff().max()) for x in (cu_q, cu_k)]
        if max_as_tensor:
            longest = [torch.tensor(x) for x in longest]
        out, expected = compiled(q, k, v, cu_q, cu_k, *longest), f(q, k, v, cu_q, cu_k, *longest)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        if requires_grad:
            actual = torch.autograd.grad(out.sum(), (q, k, v, sinks))
            wanted = torch.autograd.grad(expected.sum(), (q, k, v, sinks))
            torch.testing.assert_close(actual, wanted)
    assert counter.frame_count == 2  # as it comes, and with symbols for what changed


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    q, k, v = (packed(n, h).requires_grad_(requires_grad) for n, h in ((7, 4), (9, 2), (9, 2)))
    terms = (False, *random_terms(TERMS, 4, 2))
    terms[3].requires_grad_(requires_grad)
    sequences = (cumulative([3, 4]), cumulative([4, 5]), None, None, None, None, 4, 5)
    forward = (q, k, v, 0.2, -1, 0, "", "", *terms, *sequences)
    torch.library.opcheck(ops.attention_packed, forward)
    out, lse = (x.detach() for x in ops.attention_packed(*forward))
    backward = (torch.randn_like(out), q, k, v, out, lse, None, 0.2, -1, 0, "", *terms, *sequences)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.attention_packed_backward, backward, test_utils=checks)


def test_lengths_changed_before_the_backward_are_an_error():
    q, k = packed(7).requires_grad_(), packed(9)
    cu_q, cu_k, *longest = arguments([3, 4], [4, 5])
    out = flash_attn_varlen_func(q, k, k, cu_q, cu_k, *longest)
    cu_q[1] = 4
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_backward_is_refused():
    q, k = packed(7).requires_grad_(), packed(9)
    out = flash_attn_varlen_func(q, k, k, *arguments([3, 4], [4, 5]))
    (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        dq.sum().backward()


def test_changing_lengths_are_one_problem():
    flashmoe.api.forget_plans()
    for n in (33, 40, 50, 61):
        q, k = packed(3 * n), packed(3 * n)
        flash_attn_varlen_func(q, k, k, *arguments([n, n, n], [n, n, n]), causal=True)
    assert flashmoe.planning.plan.planned.cache_info().misses == 1
    call = packed_call(packed(63), packed(63), packed(63), [20, 43], [20, 43])
    problem = Problem.of_call(call)
    assert (problem.batch, problem.seqlen_q, problem.seqlen_kv) == (2, 64, 64)
    assert problem.features == {"packed"}


def test_recorded_problems_are_packed(tmp_path):
    with flashmoe.record_problems(tmp_path / "shapes.json"):
        flash_attn_varlen_func(
            packed(7, 4, 20), packed(9, 2, 20), packed(9, 2, 12), *arguments([3, 4], [4, 5])
        )
    ((problem, weight),) = flashmoe.spec.shapes.read(tmp_path / "shapes.json")
    assert (problem.layout, problem.head_dim, weight) == ("packed", 24, 1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.randn(1, 7, 4, 16)}, ValueError, r"q must have 3 dimensions \(total_q, heads"),
        ({"k": torch.randn(1, 9, 2, 16)}, ValueError, r"k must have 3 dimensions \(total_k, heads"),
        (
            {"k": torch.randn(9, 2, 8)},
            ValueError,
            r"k must have q's head_dim 16, got .*\(9, 2, 8\)",
        ),
        ({"v": torch.randn(8, 2, 16)}, ValueError, r"v must have k's shape .*\(8, 2, 16\)"),
        ({"v": torch.randn(9, 2, 16).half()}, TypeError, "v must have q's dtype .*float16"),
        ({"cu_seqlens_q": [0, 3, 7]}, TypeError, r"cu_seqlens_q must be a torch\.Tensor, got list"),
        ({"cu_seqlens_k": None}, TypeError, r"cu_seqlens_k must be a torch\.Tensor without block"),
        (
            {"cu_seqlens_q": torch.tensor([0, 3, 7])},
            TypeError,
            "cu_seqlens_q must be int32, .*int64",
        ),
        (
            {"cu_seqlens_k": int32([0, 9])},
            ValueError,
            r"cu_seqlens_k must be \(batch \+ 1,\), here \(3,\), got shape \(2,\)",
        ),
        (
            {"cu_seqlens_q": int32([[0, 3, 7]])},
            ValueError,
            r"cu_seqlens_q must be \(batch \+ 1,\), got shape \(1, 3\)",
        ),
        (
            {"cu_seqlens_q": int32([0, 3, 7]).to("meta")},
            ValueError,
            "cu_seqlens_q must be on q's device",
        ),
        ({"seqused_k": int32([1])}, ValueError, r"seqused_k must be \(batch,\), here \(2,\)"),
        ({"seqused_k": torch.ones(2)}, TypeError, "seqused_k must be int32, got torch.float32"),
        ({"max_seqlen_q": 4.0}, TypeError, "max_seqlen_q must be an integer, got 4.0"),
        ({"max_seqlen_q": True}, TypeError, "max_seqlen_q must be an integer, got True"),
        ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be at least 0, got -1"),
        (
            {"max_seqlen_k": torch.ones(2)},
            TypeError,
            r"max_seqlen_k must be an integer or a tensor of one .*\(2,\)",
        ),
        ({"max_seqlen_k": None}, TypeError, "max_seqlen_k must be an integer, got None"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be from 0 to less than 1, got 1.0"),
        ({"out": torch.randn(7, 4, 8)}, ValueError, r"out must be \(7, 4, 16\) .*\(7, 4, 8\)"),
        (
            {"out": torch.randn(7, 4, 16).half()},
            TypeError,
            r"out must be torch\.float32, .*float16",
        ),
        (
            {"block_table": int32([[0], [1]])},
            ValueError,
            r"k must have 4 dimensions \(num_pages, page",
        ),
        (
            {"alibi_slopes": torch.ones(3, 4)},
            ValueError,
            r"alibi_slopes must be .*\(batch=2, heads=4\)",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, error, message, grad):
    q, k, v = (packed(n, h).requires_grad_(grad) for n, h in ((7, 4), (9, 2), (9, 2)))
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    given = dict(zip(names, arguments([3, 4], [4, 5]), strict=True))
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**{"q": q, "k": k, "v": v, **given, **on_device(changes)})


def test_wrong_packed_tensors_are_named():
    with pytest.raises(ValueError, match=r"qkv must be \(batch, seqlen, 3, heads, head_dim\), got"):
        flash_attn_qkvpacked_func(torch.randn(2, 9, 2, 4, 16, device=DEVICE))
    with pytest.raises(ValueError, match=r"kv must be \(total_k, 2, heads_kv, head_dim\), got"):
        flash_attn_varlen_kvpacked_func(packed(7), packed(7), *arguments([7], [7]))
    with pytest.raises(TypeError, match=r"qkv must be a torch\.Tensor, got list"):
        flash_attn_varlen_qkvpacked_func([1], int32([0, 1]), 1)


def test_pages_have_no_gradients():
    q, pages = packed(7).requires_grad_(), torch.randn(2, 8, 2, 16, device=DEVICE)
    cu_q, cu_k, *longest = arguments([3, 4], [4, 5])
    table = int32([[0], [1]])
    with pytest.raises(NotImplementedError, match=r"pages \(block_table\) have no gradients"):
        flash_attn_varlen_func(q, pages, pages, cu_q, cu_k, *longest, block_table=table)


@pytest.mark.parametrize("compiled", [False, True])
class TestCheckedLengths:
    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch):
        flashmoe.api.forget_plans()
        monkeypatch.setenv("FLASHMOE_CHECK", "1")
        yield
        flashmoe.api.forget_plans()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"cu_seqlens_q": int32([1, 3, 7])}, "cu_seqlens_q must start at 0, got 1"),
            (
                {"cu_seqlens_q": int32([0, 5, 3])},
                "cu_seqlens_q must not decrease, got 3 behind 5 at 2",
            ),
            ({"cu_seqlens_k": int32([0, 4, 10])}, "cu_seqlens_k must end at most at 9, got 10"),
            ({"max_seqlen_k": 4}, "max_seqlen_k must be at least the longest sequence's 5, got 4"),
            ({"seqused_k": int32([4, 6])}, r"seqused_k must be from 0 to .* \(5\), got 6 at 1"),
            ({"seqused_k": int32([-1, 5])}, r"seqused_k must be from 0 to .* \(4\), got -1 at 0"),
        ],
    )
    def test_are_named(self, changes, message, compiled):
        q, k, v = packed(7, 4), packed(9), packed(9)
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        given = dict(zip(names, arguments([3, 4], [4, 5]), strict=True))
        f = (
            torch.compile(flash_attn_varlen_func, backend="aot_eager")
            if compiled
            else flash_attn_varlen_func
        )
        assert f(q, k, v, **given).any()
        with pytest.raises(ValueError, match=message):
            f(q, k, v, **{**given, **changes})


def test_wild_lengths_reach_nothing_outside():
    q, k, v = packed(7, 4), packed(9), packed(9)
    wild = [-(2**31), -1, 0, 5, 8, 2**31 - 1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        cu_q, cu_k = (
            int32([wild[i] for i in torch.randint(0, 6, (4,), generator=generator)]) for _ in "qk"
        )
        out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 9)
        assert out.isfinite().all()
        call = packed_call(q, k, v, [], [])
        sequences = call.sequences._replace(
            cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=7, max_seqlen_k=9
        )
        if (cu_q.diff() >= 0).all():  # otherwise sequences share rows
            expected, _ = sequences_reference(call._replace(sequences=sequences))
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
