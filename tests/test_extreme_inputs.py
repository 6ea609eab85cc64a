"""A finite reference means a finite result: inputs at the edge of what their dtype holds, on every
backend that runs here."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from support import DEVICE, run_backward
from torch import Tensor

from flashmoe import flash_attn_func
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.measure.reference import attention_reference
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import Problem

ON_GPU = DEVICE.type == "cuda"
SEQLEN = 2048 if ON_GPU else 400

Inputs = tuple[Tensor, Tensor, Tensor]


def growing(dtype: torch.dtype, head_dim: int, growth: float, size: float) -> Inputs:
    """Scores that grow steadily by `growth` towards the first key, which blocks of keys may visit
    last, under values of the given size."""
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(1, SEQLEN, 2, head_dim)
    k = torch.zeros_like(q)
    q[..., 0] = 1
    k[..., 0] = torch.linspace(growth * math.sqrt(head_dim), 0, SEQLEN)[:, None]
    v = size * (0.5 + torch.rand(q.shape, generator=generator) / 2)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def equal(dtype: torch.dtype, head_dim: int, seqlen: int, size: float) -> Inputs:
    """One rounding of a score times the scale exceeds the exponent's range."""
    x = torch.full((1, seqlen, 2, head_dim), size, dtype=dtype)
    return x, x.clone(), x.clone()


def huge_negative(dtype: torch.dtype, head_dim: int, size: float) -> Inputs:
    """As `equal`, but all scores far below 0, and causal rows of every length."""
    q, k, v = equal(dtype, head_dim, 70, size)
    return -q, k, v


def huge_values(dtype: torch.dtype, head_dim: int) -> Inputs:
    """Random scores over values whose plain sum overflows."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, SEQLEN, 2, head_dim, generator=generator)
    largest = 0.98 * torch.finfo(dtype).max
    return q.to(dtype), k.to(dtype), (largest * torch.sign(v)).to(dtype)


HALF, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
CASES: dict[str, Callable[[], Inputs]] = {
    **{
        f"growing by {growth} under {size:g}, head_dim {head_dim}": partial(
            growing, BFLOAT16, head_dim, growth, size
        )
        for growth, size in ((40, 1e30), (54, 1e20), (56, 1e20), (56, 1e37), (80, 1e20), (200, 1))
        for head_dim in (64, 128, 256)
    },
    "growing, float16": lambda: growing(HALF, 128, 60, 6e4),
    "growing, float32": lambda: growing(FLOAT32, 64, 60, 1e38),
    "65504 everywhere": lambda: equal(HALF, 64, 257, 65504),
    "65504 everywhere, few keys": lambda: equal(HALF, 64, 33, 65504),
    "65504 everywhere, one key": lambda: equal(HALF, 64, 1, 65504),
    **{
        f"133120 everywhere, head_dim {d}, seqlen {n}": partial(equal, BFLOAT16, d, n, 133120)
        for d, n in ((64, 17), (64, 257), (128, 128), (136, 300), (256, 65))
    },
    "1e7 everywhere, float32": lambda: equal(FLOAT32, 64, 257, 1e7),
    "all scores -1e12, bfloat16": lambda: huge_negative(BFLOAT16, 128, 133120),
    "all scores -3e11, float16": lambda: huge_negative(HALF, 64, 65504),
    "values of 65504": lambda: huge_values(HALF, 64),
    "values of 3e38, bfloat16": lambda: huge_values(BFLOAT16, 64),
    "values of 3e38, bfloat16, head_dim 128": lambda: huge_values(BFLOAT16, 128),
    "values of 3e38, float32": lambda: huge_values(FLOAT32, 64),
}


def problem(q: Tensor, mask: Mask, direction: str = "fwd") -> Problem:
    dtype = str(q.dtype).removeprefix("torch.")
    batch, seqlen, heads, head_dim = q.shape
    return Problem(batch, heads, heads, seqlen, seqlen, head_dim, dtype, mask, direction)


def skip_unless_runs(backend: str, q: Tensor, mask: Mask, direction: str = "fwd") -> None:
    candidate = BACKENDS[backend]
    reason = candidate.unavailable(DEVICE) or candidate.unsupported(
        problem(q, mask, direction), arch(DEVICE)
    )
    if reason:
        pytest.skip(reason)
    if backend == "triton" and not ON_GPU and q.numel() > 1 << 14:
        pytest.skip("takes long where Triton is interpreted")


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, Mask(25, 3)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_finite_reference_means_a_finite_result(case: str, mask: Mask, backend: str) -> None:
    q, k, v = (x.to(DEVICE) for x in CASES[case]())
    skip_unless_runs(backend, q, mask)
    expected, expected_lse = attention_reference(q, k, v, mask=mask)
    assert expected.isfinite().all()
    window = (mask.left, mask.right)
    out, lse, _ = flash_attn_func(
        q, k, v, window_size=window, return_attn_probs=True, backend=backend
    )
    assert out.isfinite().all()
    # Relative to what is added up: P is rounded to the dtype.
    terms, _ = attention_reference(q, k, v.abs(), mask=mask)
    eps = max(torch.finfo(q.dtype).eps, 1e-5)
    assert ((out.double() - expected).abs() <= 2 * eps * terms).all()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=1e-3)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("case", ["65504 everywhere", "133120 everywhere, head_dim 64, seqlen 257"])
def test_every_compiled_tile_bears_them(case: str) -> None:
    q, k, v = (x.to(DEVICE) for x in CASES[case]())
    for tile in BACKENDS["cuda"].compiled_in(problem(q, FULL), arch(DEVICE)):
        out = flash_attn_func(q, k, v, tile=tile)
        assert (out == v).all(), tile


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("case", [name for name in CASES if "everywhere" in name or "-" in name])
def test_gradients_are_finite(case: str, backend: str) -> None:
    q, k, v = (x.to(DEVICE) for x in CASES[case]())
    skip_unless_runs(backend, q, CAUSAL, "bwd")
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    call = Call(q, k, v, q.shape[-1] ** -0.5)
    saved = Saved(torch.ones_like(out), torch.zeros_like(out), lse)
    tile = BACKENDS[backend].default_tile(problem(q, CAUSAL, "bwd"), arch(DEVICE))
    for gradient in run_backward(backend, call, saved, CAUSAL, tile):
        # dS is a sum of products of what is finite, and may exceed float16.
        assert not gradient.isnan().any()
