"""What is read from transformers' mask functions is what they say."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import library
from torch import Tensor

library("transformers")
from transformers import masking_utils as theirs  # noqa: E402

from flashmoe.integrations.keys import KeyMask, visible  # noqa: E402
from flashmoe.integrations.transformers_masks import key_mask  # noqa: E402

FUNCTIONS = {
    "causal": theirs.causal_mask_function,
    "full": theirs.bidirectional_mask_function,
    "window": theirs.sliding_window_causal_mask_function(3),
    "both sides": theirs.sliding_window_bidirectional_mask_function(2),
    "chunked": theirs.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.long)),
    "or": theirs.or_masks(theirs.causal_mask_function, lambda b, h, q, k: k < 2),
}


def _compare(found: KeyMask | Tensor | None, batch: int, seqlen_q: int, seqlen_kv: int, **how: Any):
    want = theirs.sdpa_mask(
        batch, seqlen_q, seqlen_kv, allow_is_causal_skip=False, use_vmap=False, **how
    )
    want = want.expand(batch, 1, seqlen_q, seqlen_kv)
    if found is None:
        assert want.all()
        return
    if isinstance(found, Tensor):
        assert torch.equal(found.expand_as(want), want)
        return
    got = visible(found, batch, seqlen_q, seqlen_kv, "cpu").expand_as(want)
    if found.packing is not None and found.packing.rows_q is not None:
        # Queries of padding are left out.
        rows = found.packing.rows_q
        left_out = torch.ones(batch * seqlen_q, dtype=torch.bool).index_fill(0, rows, False)
        assert not got.reshape(-1, seqlen_kv)[left_out].any()
        got, want = got.reshape(-1, seqlen_kv)[rows], want.reshape(-1, seqlen_kv)[rows]
    assert torch.equal(got, want)


@settings(max_examples=500)
@given(
    st.sampled_from(sorted(FUNCTIONS)),
    st.integers(1, 6),
    st.integers(0, 6),
    st.integers(0, 3),
    st.sampled_from(["none", "left", "right", "any"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_masks(
    name: str,
    seqlen_q: int,
    before: int,
    unfilled: int,
    padding: str,
    static: bool,
    grad: bool,
    seed: int,
) -> None:
    batch, last = 3, before + seqlen_q
    seqlen_kv = last + (unfilled if static else 0)
    generator = torch.Generator().manual_seed(seed)
    mask = None
    if padding != "none":
        lengths = torch.randint(1, last + 1, (batch, 1), generator=generator)
        mask = torch.arange(last) < lengths
        if padding == "left":
            mask = mask.flip(1)
        if padding == "any":
            mask = torch.rand(batch, last, generator=generator) > 0.4
    how = {
        "q_offset": torch.tensor(before) if static else before,
        "mask_function": FUNCTIONS[name],
        "attention_mask": mask,
    }
    with torch.set_grad_enabled(grad):
        found = key_mask(batch, seqlen_q, seqlen_kv, **how)
    if name in ("causal", "full", "window") and padding != "any":
        assert not isinstance(found, Tensor)
    if isinstance(found, KeyMask) and grad:
        assert found.lengths is None
    _compare(found, batch, seqlen_q, seqlen_kv, **how)


@given(st.sampled_from(["causal", "window"]), st.integers(1, 3), st.integers(0, 2**31))
def test_packed_sequences(name: str, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.zeros(batch, 12, dtype=torch.long)
    for row in positions:
        for i in range(1, 12):
            starts = torch.rand((), generator=generator) < 0.3
            row[i] = 0 if starts else row[i - 1] + 1
    ids = theirs.find_packed_sequence_indices(positions)
    function = FUNCTIONS[name]
    if ids is not None:
        function = theirs.and_masks(
            theirs.remap_positions_for_packed_sequence(function, positions),
            theirs.packed_sequence_mask_function(ids),
        )
    found = key_mask(batch, 12, 12, mask_function=function)
    assert isinstance(found, KeyMask)
    assert (found.packing is None) == (ids is None)
    _compare(found, batch, 12, 12, mask_function=function)
