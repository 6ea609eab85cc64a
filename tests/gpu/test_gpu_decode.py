"""The decode kernel on a real GPU: caches, pages, lengths, masks, terms and splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_matches_reference, guarded

from flashmoe import _extension, flash_attn_func, flash_attn_with_kvcache
from flashmoe.backends import BACKENDS
from flashmoe.backends.base import BATCH_INVARIANT
from flashmoe.machine.device import arch
from flashmoe.measure.reference import error_bound, sequences_reference
from flashmoe.spec.call import Call, Sequences, Terms
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import Problem
from flashmoe.spec.sequence import sequences_of
from flashmoe.tiles import PLAIN

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
    pytest.skip("needs a GPU of compute capability 8.0", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
DECODE = BACKENDS["decode"]
TILES = [
    (head_dim, tile)
    for (_, head_dim, variant), tiles in _extension.load().decode_instances.items()
    if variant == PLAIN
    for tile in tiles
    if not tile.violations(arch(DEVICE), Problem(1, 1, 1, 1, 1, head_dim, "float16"))
]


@dataclass
class Cache:
    """A cache whose sequences have some lengths; NaN where no key is. Its keys are in pages of
    page_size in random order, or else in rows of a larger batch."""

    lengths: list[int]
    seqlen_kv: int
    heads_kv: int = 2
    group: int = 4
    seqlen_q: int = 1
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 0
    leftpad: list[int] | None = None
    ragged: list[int] | None = None  # numbers of queries, one behind the other
    mask: Mask = CAUSAL
    terms: Terms = field(default_factory=Terms)
    layout: str = "padded"
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        batch, heads_q = len(self.lengths), self.heads_kv * self.group
        pages = -(-self.seqlen_kv // self.page_size) if self.page_size else 1
        rows = self.page_size or self.seqlen_kv
        kv = (batch * pages + 2, rows, self.heads_kv, self.head_dim)
        self.k, self.v = (guarded(kv, self.dtype, self.layout, DEVICE, generator) for _ in "kv")
        order = torch.randperm(kv[0], generator=generator)[: batch * pages].reshape(batch, pages)
        exists = torch.zeros(kv[:2], dtype=torch.bool)
        for b, length in enumerate(self.lengths):
            pad = self.leftpad[b] if self.leftpad else 0
            positions = torch.arange(pad, length)
            exists[order[b][positions // rows], positions % rows] = True
        for x in (self.k, self.v):
            x[~exists.to(DEVICE)] = torch.nan
        if self.page_size:  # what stands behind the last page is nobody's business
            used = (torch.tensor(self.lengths) + rows - 1) // rows
            order = order.where(torch.arange(pages) < used.unsqueeze(1), 2**31 - 1)
        counts = self.ragged
        q = (batch, self.seqlen_q, heads_q, self.head_dim)
        self.q = guarded(q, self.dtype, self.layout, DEVICE, generator)
        if counts is not None:
            self.q = guarded((1, sum(counts), *q[2:]), self.dtype, self.layout, DEVICE, generator)[
                0
            ]
        self.sequences = Sequences(
            cu_seqlens_q=None if counts is None else ints([0, *counts]).cumsum(0).int(),
            seqused_k=ints(self.lengths),
            leftpad_k=None if self.leftpad is None else ints(self.leftpad),
            cache_batch_idx=None if self.page_size else order[:, 0].int().to(DEVICE),
            block_table=order.int().to(DEVICE) if self.page_size else None,
            max_seqlen_q=0 if counts is None else self.seqlen_q,
        )

    @property
    def call(self) -> Call:
        scale = float(self.head_dim**-0.5)
        return Call(self.q, self.k, self.v, scale, self.terms, self.sequences)

    @property
    def problem(self) -> Problem:
        names = {"softcap": self.terms.softcap > 0, "alibi": self.terms.alibi_slopes is not None}
        names["sink"] = self.terms.sinks is not None
        return Problem(
            *(len(self.lengths), self.heads_kv * self.group, self.heads_kv, self.seqlen_q),
            *(self.seqlen_kv, self.head_dim, str(self.dtype).removeprefix("torch.")),
            mask=self.mask,
            terms=tuple(name for name, there in names.items() if there),
            layout="paged" if self.page_size else "cache",
        )

    def run(self, tile: Any = None, num_splits: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        tile = tile or DECODE.default_tile(self.problem, arch(DEVICE))
        return DECODE.bind_split(self.problem, tile, num_splits)(self.call)

    def check(self, tile: Any = None, num_splits: int = 0) -> None:
        out, lse = self.run(tile, num_splits)
        expected, expected_lse = sequences_reference(self.call, self.mask)
        same, _ = sequences_reference(self.call, self.mask, self.dtype)
        if not out.numel():
            return
        error = (out.double() - expected).abs().max().item()
        same_error = (same.double() - expected).abs().max().item()
        largest = max(1.0, expected.abs().max().item())
        assert error <= error_bound(self.dtype, same_error, largest)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-5)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def terms_of(softcap: bool, alibi: bool, sinks: bool, heads_q: int, batch: int) -> Terms:
    slopes = torch.rand(batch, heads_q, device=DEVICE) * 0.1 if alibi else None
    return Terms(
        20.0 if softcap else 0.0, slopes, torch.randn(heads_q, device=DEVICE) if sinks else None
    )


@pytest.mark.parametrize(("head_dim", "tile"), TILES, ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_caches(head_dim, tile, data):
    draw = data.draw
    batch, heads_kv = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    group, seqlen_kv = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.integers(1, 1500))
    seqlen_q = draw(st.integers(1, 20))
    lengths = [draw(st.integers(0, seqlen_kv)) for _ in range(batch)]
    some = st.booleans()
    limits = st.integers(-1, seqlen_kv)
    cache = Cache(
        lengths,
        seqlen_kv,
        heads_kv,
        group,
        seqlen_q,
        head_dim - 8 * draw(st.integers(0, 3)),
        draw(st.sampled_from([torch.float16, torch.bfloat16])),
        draw(st.sampled_from([0, 16, 64, 256, 48, 7])),
        [draw(st.integers(0, n)) for n in lengths] if draw(some) else None,
        [draw(st.integers(0, seqlen_q)) for _ in range(batch)] if draw(some) else None,
        Mask(draw(limits), draw(limits)) if draw(some) else CAUSAL,
        terms_of(draw(some), draw(some), draw(some), heads_kv * group, batch),
        draw(st.sampled_from(["contiguous", "heads_first", "padded"])),
        draw(st.integers(0, 2**31)),
    )
    cache.check(tile, draw(st.sampled_from([0, BATCH_INVARIANT, 1, 3, 50])))


@pytest.mark.parametrize("num_splits", [0, BATCH_INVARIANT, 1, 7, 300])
@pytest.mark.parametrize("page_size", [0, 16])
def test_long_caches(page_size, num_splits):
    """With splits of several levels of merging."""
    Cache([40_001, 0, 3, 16_384], 40_960, page_size=page_size).check(num_splits=num_splits)
    Cache([65_536], 65_536, 1, 8, page_size=page_size).check(num_splits=num_splits)


def test_chunks_of_a_prompt():
    """Queries of any number see what is before them: blocks of rows take turns."""
    Cache([900, 256, 1024], 1024, seqlen_q=256, page_size=16).check()


@pytest.mark.parametrize("layout", ["contiguous", "heads_first", "unaligned"])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, Mask(100, 0)])
def test_without_a_cache(mask, layout):
    q = guarded((3, 4, 8, 128), torch.float16, layout, DEVICE)
    k, v = (guarded((3, 777, 2, 128), torch.float16, layout, DEVICE) for _ in "kv")
    out, lse, _ = flash_attn_func(
        q, k, v, window_size=(mask.left, mask.right), return_attn_probs=True, backend="decode"
    )
    window = (mask.left, mask.right)
    assert_matches_reference(out, lse, q, k, v, window=window)


@pytest.mark.parametrize("page_size", [0, 16])
def test_the_same_bits_whatever_else_is_in_the_batch(page_size):
    lengths = [5000, 17, 2049, 800]
    cache = Cache(lengths, 5008, page_size=page_size)
    out, lse = cache.run(num_splits=BATCH_INVARIANT)
    for b in range(len(lengths)):
        q, sequences = cache.q, cache.sequences
        cache.q, cache.lengths = q[b : b + 1], lengths[b : b + 1]
        cache.sequences = Sequences(
            *(x if x is None or isinstance(x, int) else x[b : b + 1] for x in sequences)
        )
        alone, alone_lse = cache.run(num_splits=BATCH_INVARIANT)
        assert torch.equal(alone[0], out[b])
        assert torch.equal(alone_lse[0], lse[b])
        cache.q, cache.sequences, cache.lengths = q, sequences, lengths


def through_the_api(cache: Cache, batches: slice = slice(None), **options: Any) -> Any:
    """(out, softmax_lse) of some sequences, as users call it."""
    sequences = cache.sequences
    where = {
        name: None if x is None else x[batches]
        for name, x in (
            ("cache_batch_idx", sequences.cache_batch_idx),
            ("block_table", sequences.block_table),
        )
    }
    return flash_attn_with_kvcache(
        *(cache.q[batches], cache.k, cache.v),
        cache_seqlens=sequences.seqused_k[batches],
        causal=True,
        return_softmax_lse=True,
        **where,
        **options,
    )


@pytest.mark.parametrize("num_splits", [0, 1, 4, 128, 4095])
@pytest.mark.parametrize("page_size", [0, 16, 256])
def test_num_splits_of_users(page_size, num_splits):
    """Any number gives the right result; one more than there are steps is no error."""
    cache = Cache([9000, 17, 0, 4100], 9216, page_size=page_size)
    out, lse = through_the_api(cache, num_splits=num_splits)
    expected, expected_lse = sequences_reference(cache.call, CAUSAL)
    same, _ = sequences_reference(cache.call, CAUSAL, cache.dtype)
    error, same_error = ((x.double() - expected).abs().max().item() for x in (out, same))
    assert error <= error_bound(cache.dtype, same_error, max(1.0, expected.abs().max().item()))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("page_size", [0, 16])
def test_deterministic_calls_do_not_depend_on_the_batch(page_size, seqlen_q, num_splits):
    """Nor on its size: of one sequence, of two, of all, by what users call."""
    cache = Cache([20000, 17, 2049, 800, 6000], 20480, page_size=page_size, seqlen_q=seqlen_q)
    options = {"deterministic": True, "num_splits": num_splits}
    whole = through_the_api(cache, **options)
    for first in range(5):
        for count in (1, 2):
            batches = slice(first, first + count)
            for x, y in zip(through_the_api(cache, batches, **options), whole, strict=True):
                assert torch.equal(x, y[batches])


@pytest.mark.parametrize("page_size", [0, 16])
def test_a_graph_follows_lengths_and_pages(page_size):
    cache = Cache([1000, 2000, 30], 2048, page_size=page_size, ragged=[1, 1, 1])
    cache.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = cache.run()
    for seed, lengths in enumerate(([1, 2, 3], [2048, 0, 555], [1000, 2000, 30])):
        other = Cache(lengths, 2048, page_size=page_size, ragged=[1, 1, 1], seed=seed)
        for name in ("q", "k", "v"):
            getattr(cache, name).copy_(getattr(other, name))
        for mine, its in zip(cache.sequences, other.sequences, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(its)
        for _ in range(3):
            out.fill_(torch.nan)
            graph.replay()
        expected, expected_lse = other.run()
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


def test_streams_at_once_and_memory_that_held_anything():
    """Workspaces are not cleared: what was there before must not matter."""
    caches = [Cache([3000 - i, 100 * i + 1], 3008, page_size=16, seed=i) for i in range(4)]
    expected = [cache.run(num_splits=0) for cache in caches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in caches]
    found: list[Any] = []
    for turn in range(20):
        for cache, stream in zip(caches, streams, strict=True):
            with torch.cuda.stream(stream):
                torch.full((1 << 20,), turn - 5, dtype=torch.int32, device=DEVICE)
                found.append(cache.run(num_splits=0))
    torch.cuda.synchronize()
    for i, (out, lse) in enumerate(found):
        assert torch.equal(out, expected[i % 4][0])
        assert torch.equal(lse, expected[i % 4][1])


@pytest.mark.parametrize("page_size", [0, 64])
def test_caches_at_the_start_and_the_end_of_mapped_memory(page_size):
    """What lies beside a cache of whole mappings need not be mapped: 32 MiB each."""
    torch.cuda.empty_cache()
    heads, seqlen = 8, 16384
    shape = (seqlen // page_size, page_size) if page_size else (1, seqlen)
    k, v = (torch.randn(*shape, heads, 128, device=DEVICE, dtype=torch.bfloat16) for _ in "kv")
    q = torch.randn(1, 1, 32, 128, device=DEVICE, dtype=torch.bfloat16)
    options = {"block_table": ints(list(range(seqlen // page_size)))[None]} if page_size else {}
    for length in (seqlen, seqlen - 1, 1):
        out = flash_attn_with_kvcache(q, k, v, cache_seqlens=length, causal=True, **options)
        dense = (x.reshape(1, seqlen, heads, 128)[:, :length] for x in (k, v))
        assert_matches_reference(out, None, q, *dense)


def test_nothing_waits_for_the_gpu():
    cache = Cache([1000, 2000], 2048, page_size=16)
    cache.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_splits", [0, 5])
def test_wrong_pages_read_nothing_outside(num_splits):
    """Page and batch numbers that do not exist, and lengths past the table, are clamped."""
    cache = Cache([64, 64], 64, page_size=16)
    cache.sequences.block_table.copy_(ints([[0, -1, 2**31 - 1, 5], [-(2**31), 3, 3, 99]]))
    cache.sequences.seqused_k.copy_(ints([2**31 - 1, -5]))
    out, _ = cache.run(num_splits=num_splits)
    torch.cuda.synchronize()
    assert out.shape == cache.q.shape
    assert not out[1].any()


def test_the_reference_sees_what_the_kernel_does():
    """Lengths of the test's caches are those of its sequences."""
    cache = Cache([5, 0], 64, leftpad=[2, 0])
    assert [s.seqlen_kv for s in sequences_of(cache.call)] == [3, 0]
