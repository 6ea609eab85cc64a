"""A KV cache through our function: append, rotate and attend, against loops over sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_calls import (
    assert_forward_matches,
    cumulative,
    int32,
    masks,
    on_device,
    random_terms,
)
from support import DEVICE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flashmoe
from flashmoe import flash_attn_with_kvcache
from flashmoe.planning import plan
from flashmoe.spec.call import Call, Sequences, Terms
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import TERMS

IN_CACHES = [term for term in TERMS if term != "dropout"]

NAN = float("nan")
HEADS_KV, HEAD_DIM = 2, 16


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


class Cache:
    """A cache of `batch` sequences with room for so many keys each, in batches or pages in any
    order, NaN but for the keys that there are."""

    def __init__(
        self, lengths: list[int], room: int, page_size: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.page_size, batch = page_size, len(lengths)
        pages = -(-room // page_size) if page_size else 1
        self.room = pages * page_size if page_size else room
        self.order = torch.randperm(batch * pages + 2)[: batch * pages].reshape(batch, pages)
        shape = (batch * pages + 2, page_size or room, HEADS_KV, HEAD_DIM)
        self.k, self.v = (torch.full(shape, NAN, device=DEVICE, dtype=dtype) for _ in "kv")
        for i, length in enumerate(lengths):
            for position in range(length):
                for x in (self.k, self.v):
                    x[self.place(i, position)] = randn(HEADS_KV, HEAD_DIM, dtype=dtype)

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        if not self.page_size:
            return int(self.order[sequence, 0]), position
        page = self.order[sequence, position // self.page_size]
        return int(page), position % self.page_size

    def where(self) -> dict[str, Tensor]:
        if self.page_size:
            return {"block_table": int32(self.order.tolist())}
        return {"cache_batch_idx": int32(self.order[:, 0].tolist())}

    def appended(self, sequence: int, position: int, k: Tensor, v: Tensor) -> None:
        if 0 <= position < self.room:
            self.k[self.place(sequence, position)] = k
            self.v[self.place(sequence, position)] = v


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (heads, head_dim) by one row of cos and sin, in float64, pair by pair."""
    result, half = x.double().clone(), cos.shape[0]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        result[:, a] = x[:, a].double() * cos[i] - x[:, b].double() * sin[i]
        result[:, b] = x[:, a].double() * sin[i] + x[:, b].double() * cos[i]
    return result.to(x.dtype)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, equal_nan=True)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_append_rotate_and_attend(data):
    draw = data.draw
    seqlen_q, seqlen_new = draw(st.integers(0, 20)), draw(st.integers(0, 5))
    room = draw(st.integers(seqlen_new, 60))
    fill = st.integers(0, room - seqlen_new)
    lengths = draw(st.lists(fill, min_size=1, max_size=4))
    page_size = draw(st.sampled_from([0, 0, 1, 7, 16]))
    mask, group = draw(masks()), draw(st.integers(1, 3))
    names = tuple(draw(st.lists(st.sampled_from(IN_CACHES), unique=True)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    rotary, interleaved = draw(st.sampled_from([0, 4, 8])), draw(st.booleans())
    ragged_q = draw(st.booleans())

    batch, heads = len(lengths), 2 * group
    actual = Cache(lengths, room, page_size, dtype)
    k, v = (randn(batch, seqlen_new, HEADS_KV, HEAD_DIM, dtype=dtype) for _ in "kv")
    q = randn(batch, seqlen_q, heads, HEAD_DIM, dtype=dtype)
    terms = random_terms(names, heads, batch if group == 2 else None)
    options, expected_q, expected_k = {}, q.clone(), k.clone()
    if rotary:
        angles = torch.rand(actual.room + 3, rotary, device=DEVICE) * 6
        cos, sin = angles.cos(), angles.sin()
        options = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        for i, length in enumerate(lengths):
            for x, steps in ((expected_q, not mask.is_full), (expected_k, True)):
                for j in range(x.shape[1]):
                    at = length + steps * j
                    row = min(at, len(cos) - 1)
                    x[i, j] = turned(x[i, j], cos[row], sin[row], interleaved)
    actual_k, actual_v = actual.k.clone(), actual.v.clone()
    for i, length in enumerate(lengths):
        for j in range(seqlen_new):
            actual.appended(i, length + j, expected_k[i, j], v[i, j])

    leftpad = None
    if draw(st.booleans()):
        leftpad = int32([draw(st.integers(0, n + seqlen_new)) for n in lengths])
        options["cache_leftpad"] = leftpad
    if ragged_q:
        options |= {"cu_seqlens_q": cumulative([seqlen_q] * batch), "max_seqlen_q": seqlen_q}
    given = options | {x: getattr(terms, x) for x in ("softcap", "alibi_slopes", "sinks")}
    given |= {"cache_seqlens": int32(lengths), "window_size": (mask.left, mask.right)}
    given["return_softmax_lse"] = True
    where = actual.where()
    actual_before = actual_k.clone(), actual_v.clone()
    out, lse = flash_attn_with_kvcache(
        *(q.flatten(0, 1) if ragged_q else q, actual_k, actual_v, k, v), **given | where
    )
    if page_size:
        # The same by another table, of which cache_batch_idx says the rows.
        rows = torch.randperm(batch + 1)
        table = torch.full((batch + 1, where["block_table"].shape[1]), -1, dtype=torch.int32)
        table[rows[:batch]] = where["block_table"].cpu()
        where = {"block_table": table.to(DEVICE), "cache_batch_idx": int32(rows[:batch].tolist())}
        again_k, again_v = actual_before
        again = flash_attn_with_kvcache(
            *(q.flatten(0, 1) if ragged_q else q, again_k, again_v, k, v), **given | where
        )
        same(again[0], out)
        same(again_k, actual_k)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(actual_k, actual.k, equal_nan=True, rtol=tolerance, atol=1e-6)
    same(actual_v, actual.v)
    where = actual.where()
    sequences = Sequences(
        cumulative([seqlen_q] * batch) if ragged_q else None,
        seqused_k=int32(lengths) + seqlen_new,
        leftpad_k=leftpad,
        cache_batch_idx=where.get("cache_batch_idx"),
        block_table=where.get("block_table"),
        max_seqlen_q=seqlen_q,
    )
    # What the kernel was given, whose rounding is judged elsewhere.
    if rotary and dtype != torch.float32:
        return
    given_q = expected_q.flatten(0, 1) if ragged_q else expected_q
    clean = [x.nan_to_num() for x in (actual_k, actual_v)]
    assert_forward_matches(out, lse, Call(given_q, *clean, HEAD_DIM**-0.5, terms, sequences), mask)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), min_size=1, max_size=4),
    st.sampled_from([0, 4, 16]),
    st.booleans(),
    st.integers(0, 2),
)
def test_prefill_and_decode_in_one_call(pairs, page_size, rotary, tail):
    """Each sequence brings its own number of queries, and as many keys."""
    new, lengths = (list(x) for x in zip(*pairs, strict=True))
    total, room = sum(new) + tail, 32
    cache = Cache(lengths, room, page_size)
    one_by_one = cache.k.clone(), cache.v.clone()
    q, k, v = randn(total, 4, HEAD_DIM), *(randn(total, HEADS_KV, HEAD_DIM) for _ in "kv")
    options = {}
    if rotary:
        angles = torch.rand(room, 3, device=DEVICE)
        options = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    cu_seqlens = cumulative(new)
    out = flash_attn_with_kvcache(
        *(q, cache.k, cache.v, k, v),
        cache_seqlens=int32(lengths),
        causal=True,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k_new=cu_seqlens,
        max_seqlen_q=max(new),
        **cache.where(),
        **options,
    )
    assert not out[sum(new) :].any()
    for i, (begin, count) in enumerate(zip(cu_seqlens.tolist(), new, strict=False)):
        rows = slice(begin, begin + count)
        where = {name: x[i : i + 1] for name, x in cache.where().items()}
        expected = flash_attn_with_kvcache(
            *(q[None, rows], *one_by_one, k[None, rows], v[None, rows]),
            cache_seqlens=int32(lengths[i : i + 1]),
            causal=True,
            **where,
            **options,
        )
        torch.testing.assert_close(out[rows], expected[0])
    same(cache.k, one_by_one[0])
    same(cache.v, one_by_one[1])


def decode(batch=2, heads=4, seqlen_q=1, room=9):
    return randn(batch, seqlen_q, heads, HEAD_DIM), *(
        randn(batch, room, HEADS_KV, HEAD_DIM) for _ in "kv"
    )


@pytest.mark.parametrize("kind", [int, np.int64])
def test_one_length_for_all(kind):
    q, k_cache, v_cache = decode(seqlen_q=3)
    caches = [(k_cache.clone(), v_cache.clone()) for _ in "12"]
    k, v = randn(2, 3, HEADS_KV, HEAD_DIM), randn(2, 3, HEADS_KV, HEAD_DIM)
    out = flash_attn_with_kvcache(q, *caches[0], k, v, cache_seqlens=kind(4), causal=True)
    each = flash_attn_with_kvcache(q, *caches[1], k, v, cache_seqlens=int32([4, 4]), causal=True)
    assert torch.equal(out, each)
    for one, other, cache, new in zip(*caches, (k_cache, v_cache), (k, v), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, torch.cat((cache[:, :4], new, cache[:, 7:]), 1))
    assert torch.equal(
        flash_attn_with_kvcache(q, *caches[0], cache_seqlens=kind(7), causal=True), out
    )


def test_a_whole_cache_without_lengths():
    q, k, v = decode(seqlen_q=2)
    out = flash_attn_with_kvcache(q, k, v, causal=True)
    torch.testing.assert_close(out, flashmoe.flash_attn_func(q, k, v, causal=True))
    into = torch.empty_like(q)
    found, lse = flash_attn_with_kvcache(q, k, v, causal=True, out=into, return_softmax_lse=True)
    assert found is into
    assert torch.equal(into, out)
    assert lse.shape == (2, 4, 2)


def test_names_of_flash_attention_3():
    q, k, v = decode()
    pages, table, used = randn(4, 3, HEADS_KV, HEAD_DIM), int32([[2, 0], [1, 3]]), int32([5, 2])
    expected = flash_attn_with_kvcache(
        q, pages, pages, cache_seqlens=used, block_table=table, num_splits=1
    )
    found = flash_attn_with_kvcache(q, pages, pages, page_table=table, seqused_k=used)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="block_table and page_table are two names"):
        flash_attn_with_kvcache(q, pages, pages, page_table=table, block_table=table)
    with pytest.raises(ValueError, match="cache_seqlens and seqused_k are two names"):
        flash_attn_with_kvcache(q, k, v, cache_seqlens=3, seqused_k=used)


@pytest.mark.parametrize("paged", [False, True])
def test_what_has_no_place_is_not_written(paged):
    """Past the end, before the beginning, and in pages or batches that there are not."""
    q, k_cache, v_cache = decode(4, room=4)
    k, v = randn(4, 3, HEADS_KV, HEAD_DIM), randn(4, 3, HEADS_KV, HEAD_DIM)
    lengths, where = [2, 4, -1, 0], {}
    places = {(0, 0): (0, 2), (0, 1): (0, 3), (2, 1): (2, 0), (2, 2): (2, 1)}
    if paged:
        where["block_table"] = int32([[0], [1], [2], [-1]])
    else:
        where["cache_batch_idx"] = int32([0, 1, 2, 4])
    expected = [x.clone() for x in (k_cache, v_cache)]
    for (i, j), place in places.items():
        expected[0][place], expected[1][place] = k[i, j], v[i, j]
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=int32(lengths), **where)
    assert torch.equal(k_cache, expected[0])
    assert torch.equal(v_cache, expected[1])
    none = {name: torch.full_like(x, -1) for name, x in where.items()}
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=int32(lengths), **none)
    assert torch.equal(k_cache, expected[0])


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_growing_caches_compile_once(paged, rotary):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend=counter)
    cache = Cache([3, 0, 7], 32, 8 if paged else 0)
    other = cache.k.clone(), cache.v.clone()
    options = cache.where()
    if rotary:
        angles = torch.rand(32, 4, device=DEVICE)
        options |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    lengths = int32([3, 0, 7])
    for _ in range(4):
        q, k, v = (randn(3, 1, heads, HEAD_DIM) for heads in (4, HEADS_KV, HEADS_KV))
        given = {"cache_seqlens": lengths, "causal": True, **options}
        with torch.no_grad():
            out = compiled(q, cache.k, cache.v, k, v, **given)
        torch.testing.assert_close(out, flash_attn_with_kvcache(q, *other, k, v, **given))
        same(cache.k, other[0])
        same(cache.v, other[1])
        lengths += 1
    assert counter.frame_count == 1


@pytest.mark.parametrize("layout", ["cache", "paged", "packed-paged"])
def test_opcheck(layout):
    q, k, v = decode()
    names = dict.fromkeys(Sequences._fields[:6])
    names |= {"seqused_k": int32([5, 9]), "max_seqlen_q": 1, "max_seqlen_k": 0}
    if layout == "cache":
        names |= {"leftpad_k": int32([1, 0]), "cache_batch_idx": int32([1, 0])}
    else:
        names["block_table"] = int32([[1], [0]])
    if layout.startswith("packed"):
        q, names["cu_seqlens_q"] = q[:, 0], int32([0, 1, 2])
    sequences = Sequences(**names)
    assert sequences.layout == layout
    terms = (False, *random_terms(TERMS, 4, 2))
    op = flashmoe.frontend.ops.attention_packed
    torch.library.opcheck(op, (q, k, v, 0.2, -1, 0, "", "", *terms, *sequences))


def test_the_ops_of_a_cache():
    q, k_cache, v_cache = decode(seqlen_q=2)
    k, v, used = randn(2, 2, HEADS_KV, HEAD_DIM), randn(2, 2, HEADS_KV, HEAD_DIM), int32([5, 3])
    cos, sin, op = randn(9, 4), randn(9, 4), flashmoe.frontend.ops.append
    torch.library.opcheck(op, (q, k, v, k_cache, v_cache, used, *[None] * 6, False, True))
    packed = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    lengths, table = int32([0, 1, 4]), int32([[1], [0]])
    arguments = used, lengths, lengths, None, table, cos, sin, True, True
    torch.library.opcheck(op, (*packed, k_cache, v_cache, *arguments))
    sequences = Sequences(seqused_k=used, block_table=table)
    arguments = 0.2, -1, -1, "", "", True, *Terms(), *sequences, 3
    op = flashmoe.frontend.ops.attention_split
    torch.library.opcheck(op, (q, k_cache, v_cache, *arguments))


def test_traced_calls_split_keys_as_asked(monkeypatch):
    asked = []

    def planned(*arguments):
        asked.append(arguments[5:])
        return plan.planned(*arguments)

    monkeypatch.setattr(flashmoe.frontend.ops, "planned", planned)
    q, k, v = decode()
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, num_splits=3, deterministic=True)
    torch.testing.assert_close(out, flash_attn_with_kvcache(q, k, v))
    assert asked == [(True, 3)]


@pytest.mark.parametrize("by_torch", [False, True])
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_a_sequence_has_the_same_bits_whatever_else_is_in_the_batch(by_torch, data):
    draw = data.draw
    queries = draw(st.lists(st.integers(0, 40), min_size=2, max_size=4))
    lengths = [draw(st.integers(n, 300)) for n in queries]
    page_size, group = draw(st.sampled_from([0, 16])), draw(st.sampled_from([1, 4]))
    cache = Cache(lengths, 304, page_size)
    q, cu_seqlens = randn(sum(queries), HEADS_KV * group, HEAD_DIM), cumulative(queries)
    options = {"causal": True, "deterministic": not by_torch, "return_softmax_lse": True}

    def attend(rows, lengths, where, cu_seqlens):
        return flash_attn_with_kvcache(
            *(q[rows], cache.k, cache.v),
            cache_seqlens=int32(lengths),
            cu_seqlens_q=cu_seqlens,
            max_seqlen_q=int(cu_seqlens.diff().max()),
            **where,
            **options,
        )

    torch.use_deterministic_algorithms(by_torch)
    try:
        out, lse = attend(slice(None), lengths, cache.where(), cu_seqlens)
        for i, count in enumerate(queries):
            rows = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
            where = {name: x[i : i + 1] for name, x in cache.where().items()}
            alone, alone_lse = attend(rows, lengths[i : i + 1], where, cumulative([count]))
            assert torch.equal(alone, out[rows])
            assert torch.equal(alone_lse, lse[:, rows])
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_are_refused():
    q, k, v = decode()
    with pytest.raises(NotImplementedError, match=r"k_cache must not require a gradient: flash"):
        flash_attn_with_kvcache(q, k.requires_grad_(), v)
    with torch.no_grad():
        assert flash_attn_with_kvcache(q, k, v).any()


NEW = {"k": randn(2, 1, HEADS_KV, HEAD_DIM), "v": randn(2, 1, HEADS_KV, HEAD_DIM)}
COS = {"rotary_cos": randn(9, 4), "rotary_sin": randn(9, 4)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": randn(2, 4, HEAD_DIM)}, ValueError, r"q must have 4 dimensions \(batch, seqlen"),
        (
            {"k_cache": randn(3, 9, 2, 16)},
            ValueError,
            r"k must have q's batch \(2\) without cache_b",
        ),
        ({"cache_seqlens": 10}, ValueError, "cache_seqlens must be from 0 to 9, got 10"),
        ({"cache_seqlens": -1}, ValueError, "cache_seqlens must be from 0 to 9, got -1"),
        ({"cache_seqlens": 1.0}, TypeError, "cache_seqlens must be an integer, an int32 .*got 1.0"),
        ({"cache_seqlens": torch.ones(2).long()}, TypeError, "seqused_k must be int32, .*int64"),
        ({**NEW}, ValueError, "cache_seqlens must be given with k, got None"),
        ({**NEW, "cache_seqlens": 9}, ValueError, r"cache_seqlens \+ seqlen_new must be at most 9"),
        ({"k": NEW["k"], "cache_seqlens": 1}, ValueError, "k and v must both be given"),
        ({**COS}, ValueError, "k and v must both be given where one is, or rotary_cos"),
        (
            {**NEW, "k": randn(1, 1, 2, 16), "cache_seqlens": 1},
            ValueError,
            r"k must be \(batch=2, seqlen_new, heads_kv=2, .*, got shape \(1, 1, 2, 16\)",
        ),
        (
            {**NEW, "v": randn(2, 2, 2, 16), "cache_seqlens": 1},
            ValueError,
            r"v must be .*, got shape \(2, 2, 2, 16\)",
        ),
        (
            {**NEW, "v": NEW["v"].half(), "cache_seqlens": 1},
            TypeError,
            "v must have the cache's dtype torch.float32, got torch.float16",
        ),
        (
            {**NEW, "cache_seqlens": 1, **COS, "rotary_cos": randn(8, 4)},
            ValueError,
            r"rotary_cos must be \(at least 9, at most 8\), got shape \(8, 4\)",
        ),
        (
            {**NEW, "cache_seqlens": 1, "rotary_cos": randn(9, 4)},
            TypeError,
            r"rotary_sin must be a floating-point tensor .*, got None",
        ),
        (
            {**NEW, "cache_seqlens": 1, **COS, "rotary_sin": randn(9, 3)},
            ValueError,
            r"rotary_sin must have rotary_cos's shape \(9, 4\), got \(9, 3\)",
        ),
        ({"cache_leftpad": int32([0])}, ValueError, r"leftpad_k must be \(batch,\), here \(2,\)"),
        (
            {"block_table": int32([[0], [1]]), "cache_batch_idx": torch.ones(2).long()},
            ValueError,
            r"cache_batch_idx must be int32 of 1 dimensions on .*, got torch\.int64",
        ),
        (
            {"block_table": int32([[0], [1]]), "cache_batch_idx": int32([0])},
            ValueError,
            r"block_table must be \(batch=2, pages\), got shape \(1, 1\)",
        ),
        (
            {"block_table": [[0], [1]], "cache_batch_idx": int32([0, 1])},
            TypeError,
            r"block_table must be a torch\.Tensor or None, got list",
        ),
        ({"block_table": int32([[0]])}, ValueError, r"block_table must be \(batch=2, pages\)"),
        (
            {"cache_batch_idx": [0, 1]},
            TypeError,
            r"cache_batch_idx must be a torch\.Tensor or None",
        ),
        ({"num_splits": -1}, ValueError, "num_splits must be an integer of at least 0, got -1"),
        ({"num_splits": 1.0}, TypeError, r"num_splits must be an integer, got 1\.0"),
        ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q must be None without cu_seqlens_q"),
        ({"window_size": 3}, TypeError, r"window_size must be \(left, right\)"),
        ({"softcap": -1}, ValueError, "softcap must be 0 for none"),
        ({"out": randn(2, 2, 4, 16)}, ValueError, r"out must be \(2, 1, 4, 16\)"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    q, k_cache, v_cache = decode()
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, **on_device(changes)}
    if changes.get("k_cache") is not None:
        given["v_cache"] = given["k_cache"]
    # What was valid before says nothing of these.
    flash_attn_with_kvcache(q, k_cache.clone(), v_cache.clone(), **NEW, **COS, cache_seqlens=1)
    flash_attn_with_kvcache(q, k_cache.clone(), v_cache.clone(), **NEW, cache_seqlens=1)
    before = given["k_cache"].clone()
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(**given)
    assert torch.equal(given["k_cache"], before)


def test_q_is_rotated_by_row_where_the_mask_says_so():
    cache, new = randn(1, 9, HEADS_KV, HEAD_DIM), randn(1, 2, HEADS_KV, HEAD_DIM)
    q, tables = randn(1, 2, HEADS_KV, HEAD_DIM), (randn(9, 4), randn(9, 4))
    masks = ({}, {"causal": True}, {"window_size": (9, 0)}, {})
    full, *masked, again = (
        flash_attn_with_kvcache(
            q, cache.clone(), cache.clone(), new, new, *tables, int32([3]), **mask
        )
        for mask in masks
    )
    assert torch.equal(full, again)
    assert torch.equal(*masked)
    # The last query sees all keys, and its row is not the first one's.
    assert not torch.equal(full[:, 1], masked[0][:, 1])


class TestCheckedLengths:
    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch):
        flashmoe.api.forget_plans()
        monkeypatch.setenv("FLASHMOE_CHECK", "1")
        yield
        flashmoe.api.forget_plans()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"cache_seqlens": int32([9, 10])},
                r"seqused_k must be from 0 to .*\(9\), got 10 at 1",
            ),
            (
                {"cache_seqlens": int32([9, 19]), "block_table": int32([[0, 1], [1, 0]])},
                r"seqused_k must be .* room for in the pages of block_table \(18\), got 19 at 1",
            ),
            (
                {"cache_seqlens": int32([5, 5]), "cache_leftpad": int32([6, 0])},
                r"leftpad_k must be from 0 to each sequence's keys \(5\), got 6 at 0",
            ),
            (
                {"cache_batch_idx": int32([0, 2])},
                r"cache_batch_idx must be from 0 to the last of k's batch \(1\), got 2 at 1",
            ),
            (
                {"block_table": int32([[0, 5], [1, -1]]), "cache_seqlens": int32([9, 10])},
                r"block_table must be from 0 to the last page \(1\), got -1 at 1, 1",
            ),
        ],
    )
    def test_are_named(self, options, message):
        q, k, v = decode()
        with pytest.raises(ValueError, match=message) as raised:
            flash_attn_with_kvcache(q, k, v, **options)
        assert isinstance(raised.value, RuntimeError)  # what flash-attn raises

    def test_pages_behind_the_keys_may_be_any(self):
        q, k, v = decode()
        table = int32([[1, -1], [0, 99]])
        assert flash_attn_with_kvcache(
            q, k, v, block_table=table, cache_seqlens=int32([9, 3])
        ).any()


def test_decoding_step_by_step_is_attention_at_once():
    """What a serving loop does: a prompt in chunks, then token by token, in pages."""
    tokens, heads = 29, 4
    q, k, v = (randn(1, tokens, h, HEAD_DIM) for h in (heads, HEADS_KV, HEADS_KV))
    cache = Cache([0], 32, 8)
    outs, at = [], 0
    for chunk in (16, 7, *([1] * 6)):
        rows = slice(at, at + chunk)
        outs.append(
            flash_attn_with_kvcache(
                *(q[:, rows], cache.k, cache.v, k[:, rows], v[:, rows]),
                cache_seqlens=int32([at]),
                causal=True,
                **cache.where(),
            )
        )
        at += chunk
    expected = flashmoe.flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(torch.cat(outs, 1), expected)
    call = Call(q, k, v, HEAD_DIM**-0.5)
    assert_forward_matches(torch.cat(outs, 1), None, call, Mask(right=0))
