"""What a serving engine holds, as one call: packed queries over keys in pages."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import flashmoe


def attend_to_pages(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attention of q (total_q, heads_q, head_dim), the last queries of each sequence, to all of its
    keys, which are in the pages already.

    k_pages, v_pages (num_pages, page_size, heads_kv, head_dim), seqlens_k (batch,) and block_table
    (batch, pages) int32, max_seqlen_q at least the longest of cu_seqlens_q's lengths. `options` are
    flash_attn_with_kvcache's. Where all sequences have as many queries, as in decoding, the batch
    is given as such, which runs without reading lengths on the host.
    """
    batch = seqlens_k.shape[0]
    options |= {"cache_seqlens": seqlens_k, "block_table": block_table}
    if q.shape[0] == batch * max_seqlen_q:  # then none has fewer
        shape = (batch, max_seqlen_q)
        given = None if out is None else out.view(*shape, *out.shape[1:])
        dense_q = q.view(*shape, *q.shape[1:])
        found = flashmoe.flash_attn_with_kvcache(dense_q, k_pages, v_pages, out=given, **options)
        assert isinstance(found, Tensor)
        return found.flatten(0, 1)
    options |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
    found = flashmoe.flash_attn_with_kvcache(q, k_pages, v_pages, out=out, **options)
    assert isinstance(found, Tensor)
    return found
