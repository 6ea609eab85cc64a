"""Packed batches, caches and pages, with windows and terms, on every backend that has them here.
What is in no sequence is NaN in all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_calls import (
    backends_for,
    cached_calls,
    check_backward,
    check_forward,
    int32,
    masks,
    packed_calls,
    saved,
)
from support import DEVICE

from flashmoe.backends import BACKENDS
from flashmoe.measure.reference import attention_reference, sequences_reference
from flashmoe.spec.call import Call, Saved, Sequences
from flashmoe.spec.mask import CAUSAL, FULL
from flashmoe.spec.problem import Problem


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_packed_batches(data):
    check_forward(data.draw(packed_calls()), data.draw(masks()))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_caches(data):
    check_forward(data.draw(cached_calls()), data.draw(masks()))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_gradients_of_random_packed_batches(data):
    call, mask = data.draw(packed_calls()), data.draw(masks())
    check_backward(call, data.draw(saved(call, mask)), mask)


def forwards(call, mask=FULL):
    problem = Problem.of_call(call, mask)
    results = [BACKENDS[name].bind(problem, tile)(call) for name, tile in backends_for(problem)]
    assert results or DEVICE.type != "cpu"
    return results


def random_tensors(*shapes):
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.float16
    return [torch.randn(*shape, 2, 32, device=DEVICE).to(dtype) for shape in shapes]


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(actual.isinf(), expected.isinf())


def test_rows_in_no_sequence():
    """In front, behind, and past the longest length that the call allows: out 0, lse -inf, no
    gradient."""
    q, k, v = random_tensors((20,), (20,), (20,))
    sequences = Sequences(int32([2, 9, 17]), int32([2, 9, 17]), max_seqlen_q=6, max_seqlen_k=6)
    call = Call(q, k, v, 0.2, sequences=sequences)
    outside = torch.ones(20, dtype=torch.bool, device=DEVICE)
    outside[2:8] = outside[9:15] = False
    for x in (q, k, v):
        x[outside] = torch.nan
    expected, expected_lse = sequences_reference(call, CAUSAL)
    for out, lse in forwards(call, CAUSAL):
        assert not out[outside].any()
        assert (lse[:, outside] == -torch.inf).all()
        close(out, expected)
        close(lse, expected_lse)
    problem = Problem.of_call(call, CAUSAL, "bwd")
    for name, tile in backends_for(problem):
        of_forward = Saved(torch.ones_like(q), expected.to(q.dtype), expected_lse.float())
        for x in BACKENDS[name].bind_backward(problem, tile)(call, of_forward):
            assert not x[outside].any()
            assert x[~outside].isfinite().all()


@pytest.mark.parametrize("batch", [0, 3])
def test_no_sequence_has_a_row(batch):
    q, k, v = random_tensors((5,), (5,), (5,))
    begins = int32([3] * (batch + 1))
    call = Call(q, k, v, 0.2, sequences=Sequences(begins, begins, max_seqlen_q=5, max_seqlen_k=5))
    for out, lse in forwards(call):
        assert not out.any()
        assert (lse == -torch.inf).all()


def test_lengths_beyond_the_tensors_are_clamped():
    q, k, v = random_tensors((12,), (14,), (14,))
    wild = Sequences(
        int32([-5, 4, 10**6]), int32([-(10**9), 9, 2**31 - 1]), int32([2**31 - 1, -7]),
        max_seqlen_q=12, max_seqlen_k=14,
    )  # fmt: skip
    out_of_reference = sequences_reference(Call(q, k, v, 0.2, sequences=wild))
    sane = Sequences(int32([0, 4, 12]), int32([0, 9, 14]), int32([9, 0]), None, None, None, 12, 14)
    expected = sequences_reference(Call(q, k, v, 0.2, sequences=sane))
    assert all(torch.equal(a, b) for a, b in zip(out_of_reference, expected, strict=True))
    for results in forwards(Call(q, k, v, 0.2, sequences=wild)):
        for x, wanted in zip(results, expected, strict=True):
            close(x, wanted)


@pytest.mark.parametrize("field", ["cache_batch_idx", "block_table"])
def test_indices_beyond_the_cache_are_clamped(field):
    """Of those that sequences use; they are never read."""
    q, k, v = random_tensors((4, 3), (3, 8), (3, 8))
    wild, sane = [-(2**31), -1, 3, 2**31 - 1], [0, 0, 2, 2]
    indices = [int32(x if field == "cache_batch_idx" else [[n] for n in x]) for x in (wild, sane)]
    calls = [Call(q, k, v, 0.2, sequences=Sequences()._replace(**{field: x})) for x in indices]
    expected, _ = attention_reference(q, k[sane], v[sane], 0.2, CAUSAL)
    for call in calls:
        for out, _ in forwards(call, CAUSAL):
            close(out, expected)


def test_a_cache_without_pages_has_no_keys():
    q, k, v = random_tensors((2, 3), (0, 8), (0, 8))
    for sequences in (
        Sequences(block_table=int32([[0, 1], [2, 3]])),
        Sequences(cache_batch_idx=int32([0, 1])),
    ):
        for out, lse in forwards(Call(q, k, v, 0.2, sequences=sequences)):
            assert not out.any()
            assert (lse == -torch.inf).all()


def test_the_op_refuses_keys_in_two_places():
    q, k, v = random_tensors((2, 3), (2, 8), (2, 8))
    if DEVICE.type != "cpu":
        pytest.skip("the op of the cpu")
    fwd = torch.ops.flashmoe.fwd_cpu
    with pytest.raises(RuntimeError, match="only one of cu_seqlens_k, block_table and cache"):
        fwd(
            q, k, v, 0.2, -1, -1, 8, 8, block_table=int32([[0], [1]]), cache_batch_idx=int32([0, 1])
        )
    with pytest.raises(RuntimeError, match="batch for each of 3 sequences, got 2"):
        fwd(
            q.flatten(0, 1),
            k,
            v,
            0.2,
            -1,
            -1,
            8,
            8,
            cu_seqlens_q=int32([0, 2, 4, 6]),
            max_seqlen_q=2,
        )
