"""The forward problems that the Hopper kernel is judged by, and what its peers reach there."""

from __future__ import annotations

from typing import NamedTuple

from flashmoe.spec.mask import causal_if
from flashmoe.spec.problem import Problem


class Row(NamedTuple):
    """The best of SDPA's cuDNN and FlashAttention-2, FlashAttention-3 and FlashAttention-4 (its
    sm90 path), by its efficiency as measured on an H200 (141 GB, 785 to 805 TFLOP/s, 4.26 TB/s,
    cuDNN 9.19, torch 2.11+cu130), each in a run of its own."""

    problem: Problem
    peer: str
    peer_efficiency: float


def _problem(
    batch: int, heads_q: int, heads_kv: int, seqlen: int, head_dim: int, causal: bool
) -> Problem:
    return Problem(
        batch,
        heads_q,
        heads_kv,
        seqlen,
        seqlen,
        head_dim,
        "bfloat16",
        mask=causal_if(causal),
    )


# head_dim: of batch 32, 8, 2, 1 and seqlen 512, 2048, 8192, 16384, each not causal and causal.
_PEERS = {
    64: (
        ("cuDNN", 0.469),
        ("cuDNN", 0.461),
        ("FA4", 0.622),
        ("FA3", 0.519),
        ("FA4", 0.730),
        ("FA3", 0.676),
        ("FA4", 0.745),
        ("FA4", 0.710),
    ),
    128: (
        ("cuDNN", 0.631),
        ("cuDNN", 0.596),
        ("FA3", 0.858),
        ("FA3", 0.749),
        ("FA3", 0.927),
        ("FA3", 0.911),
        ("FA3", 0.931),
        ("FA3", 0.940),
    ),
    256: (
        ("FA3", 0.649),
        ("FA3", 0.608),
        ("FA3", 0.933),
        ("FA3", 0.772),
        ("FA4", 0.999),
        ("FA3", 0.972),
        ("FA4", 1.008),
        ("FA3", 1.005),
    ),
}
_SIZES = tuple(
    (batch, seqlen, causal)
    for batch, seqlen in ((32, 512), (8, 2048), (2, 8192), (1, 16384))
    for causal in (False, True)
)
ROWS = (
    *(
        Row(_problem(batch, 2048 // d, 2048 // d, seqlen, d, causal), *peer)
        for d, peers in _PEERS.items()
        for (batch, seqlen, causal), peer in zip(_SIZES, peers, strict=True)
    ),
    Row(_problem(32, 8, 8, 512, 64, False), "cuDNN", 0.412),
    Row(_problem(4, 32, 8, 4096, 128, True), "FA3", 0.881),
    Row(_problem(1, 64, 8, 8192, 128, True), "FA3", 0.929),
)
# (not round, the next round one): seqlens beside head_dims 64 and 128, and head_dims.
UNEVEN = (
    *(
        (
            _problem(batch, 2048 // d, 2048 // d, odd, d, c),
            _problem(batch, 2048 // d, 2048 // d, even, d, c),
        )
        for d in (64, 128)
        for batch, odd, even in ((16, 1000, 1024), (6, 3000, 3072), (3, 5000, 5120))
        for c in (False, True)
    ),
    *(
        (_problem(batch, 16, 16, seqlen, odd, c), _problem(batch, 16, 16, seqlen, even, c))
        for odd, even in ((80, 96), (96, 128), (112, 128), (192, 256))
        for batch, seqlen in ((32, 512), (8, 2048), (2, 8192))
        for c in (False, True)
    ),
)
