"""Which keys a query sees, against trying each pair."""

from __future__ import annotations

import argparse

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.spec.mask import CAUSAL, FULL, Mask, parse
from flashmoe.spec.options import parse_window

limits = st.integers(-1, 15)
lengths = st.integers(0, 12)


def sees(mask: Mask, i: int, j: int, seqlen_q: int, seqlen_kv: int) -> bool:
    """By the words of flash-attn's documentation."""
    place = i + seqlen_kv - seqlen_q
    before = mask.left == -1 or j >= place - mask.left
    return before and (mask.right == -1 or j <= place + mask.right)


@given(limits, limits, lengths, lengths)
def test_pairs_are_counted_hidden_and_reduced(left, right, seqlen_q, seqlen_kv):
    mask, sizes = Mask(left, right), (seqlen_q, seqlen_kv)
    seen = [[sees(mask, i, j, *sizes) for j in range(seqlen_kv)] for i in range(seqlen_q)]
    assert mask.pairs(*sizes) == sum(map(sum, seen))
    i, j = torch.arange(seqlen_q).unsqueeze(1), torch.arange(seqlen_kv)
    for same in (mask, mask.reduced(*sizes)):
        assert (~same.hides(i, j, *sizes)).tolist() == seen


@given(limits, limits, lengths, lengths, st.data())
def test_rows_are_a_problem_of_their_own(left, right, seqlen_q, seqlen_kv, data):
    mask, sizes = Mask(left, right), (seqlen_q, seqlen_kv)
    start = data.draw(st.integers(0, seqlen_q))
    stop = data.draw(st.integers(start, seqlen_q))
    keys = [
        j for j in range(seqlen_kv) if any(sees(mask, i, j, *sizes) for i in range(start, stop))
    ]
    first, last, part = mask.of_rows(start, stop, *sizes)
    assert mask.visible(start, stop, *sizes) == (first, last)
    if start < stop:
        assert list(range(first, last)) == keys
        for i in range(start, stop):
            for j in keys:
                inside = sees(part, i - start, j - first, stop - start, last - first)
                assert inside == sees(mask, i, j, *sizes)


@given(limits, limits)
def test_texts_are_read_back(left, right):
    mask = Mask(left, right)
    assert parse(str(mask)) == mask
    assert parse_window(f"{left},{right}") == mask
    assert (mask.is_full, mask.is_causal) == (mask == FULL, mask == CAUSAL)
    assert mask.is_local == (mask not in (FULL, CAUSAL))


def test_how_it_is_written():
    assert [str(m) for m in (FULL, CAUSAL, Mask(128, 0), Mask(-1, 3))] == [
        *("full", "causal", "window-128-0", "window-any-3"),
    ]


@pytest.mark.parametrize("limit", [-2, 1.0, True, None, 2**63])
def test_limits_are_integers(limit):
    with pytest.raises(ValueError, match="left must be an integer of at least -1, got"):
        Mask(limit)


@pytest.mark.parametrize("text", ["", "1", "1,x", "1,2,3", "-2,0"])
def test_a_window_on_the_command_line(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be two integers LEFT,RIGHT"):
        parse_window(text)


@pytest.mark.parametrize("text", ["none", "window", "window-1", "window--1-0", "causal-1"])
def test_a_text_that_is_no_mask(text):
    with pytest.raises(ValueError, match="mask must be full, causal or window-LEFT-RIGHT, got"):
        parse(text)
