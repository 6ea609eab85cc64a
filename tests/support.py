"""What tests share: hostile tensors, the judgement of results, and scripts as modules."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from flashmoe.backends import BACKENDS
from flashmoe.frontend.validation import mask_of
from flashmoe.measure.reference import attention_reference, error_bound
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.mask import FULL, Mask
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

# How q, k and v lie in memory. All have a contiguous last dimension but `transposed_last`.
LAYOUTS = ("contiguous", "heads_first", "packed", "padded", "unaligned")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def guarded(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: str = "contiguous",
    device: torch.device = DEVICE,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Standard normal (batch, seqlen, heads, head_dim) in the given layout, with NaN in every
    element around and between its rows."""
    _, seqlen, heads, head_dim = shape
    strides = {
        "contiguous": (seqlen * heads * head_dim, heads * head_dim, head_dim),
        "heads_first": (heads * seqlen * head_dim, head_dim, seqlen * head_dim),
        "packed": (seqlen * 3 * heads * head_dim, 3 * heads * head_dim, head_dim),
        "padded": (seqlen * heads * (head_dim + 8) + 64, heads * (head_dim + 8), head_dim + 8),
        "unaligned": (seqlen * heads * (head_dim + 3) + 1, heads * (head_dim + 3), head_dim + 3),
    }[layout]
    offset = 1 if layout == "unaligned" else 64
    extent = sum((n - 1) * s for n, s in zip(shape[:3], strides, strict=True)) + head_dim
    buffer = torch.full((offset + max(extent, 0) + 256,), float("nan"), dtype=dtype, device=device)
    view = buffer.as_strided(shape, (*strides, 1), offset)
    values = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    view.copy_(values.to(device))
    return view


def same_dtype_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    mask: Mask,
    expected: Tensor,
    seen: Tensor,
) -> float:
    """The largest error of PyTorch's computation in q's dtype over the rows `seen`.

    The largest of few elements is a matter of luck, and one computation may be lucky throughout;
    the same one with head_dim and, where no mask tells them apart, the keys in other orders tells
    what rounding does to this problem.
    """
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(8 if expected.numel() < 1 << 20 else 1):
        order = torch.randperm(q.shape[-1], generator=generator).to(q.device)
        keys = torch.arange(k.shape[1], device=q.device)
        if mask.is_full:
            keys = torch.randperm(k.shape[1], generator=generator).to(q.device)
        same, _ = attention_reference(
            q[..., order], k[:, keys][..., order], v[:, keys], softmax_scale, mask, q.dtype
        )
        errors.append((same.double() - expected)[seen].abs().max().item())
    return max(errors)


def assert_matches_reference(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
) -> None:
    """Error at most twice that of the same-dtype PyTorch computation, plus rounding; empty rows
    exactly 0 with lse -inf."""
    mask = mask_of(causal, window)
    expected, expected_lse = attention_reference(q, k, v, softmax_scale, mask)
    assert out.shape == (*q.shape[:-1], v.shape[-1])
    assert out.dtype == q.dtype
    empty = expected_lse.transpose(1, 2) == float("-inf")
    assert not out[empty].any(), "a row that sees no key must be 0"
    if lse is not None:
        assert lse.shape == expected_lse.shape
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-5)
    if out.numel() == 0 or empty.all():
        return
    seen = ~empty
    error = (out.double() - expected)[seen].abs().max().item()
    same_error = same_dtype_error(q, k, v, softmax_scale, mask, expected, seen)
    bound = error_bound(q.dtype, same_error, max(1.0, expected.abs().max().item()))
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"


def assert_gradients_match(
    actual: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
) -> None:
    """dq, dk, dv against autograd through the reference, by the same rule as the forward."""

    def gradients(dout: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out, _ = attention_reference(*leaves, softmax_scale, mask_of(causal, window), dtype)
        return torch.autograd.grad(out, leaves, dout.to(dtype))

    def errors(dout: Tensor) -> list[float]:
        pairs = zip(gradients(dout, q.dtype), gradients(dout, torch.float64), strict=True)
        return [
            (same.double() - exact).nan_to_num().abs().max().item() if exact.numel() else 0.0
            for same, exact in pairs
        ]

    # As in same_dtype_error: rows of dout with other signs are rounded alike, with other luck.
    generator = torch.Generator().manual_seed(0)
    tried = [errors(dout)]
    while dout.numel() < 1 << 15 and len(tried) < 4:
        signs = torch.randint(0, 2, dout.shape[:3], generator=generator) * 2 - 1
        tried.append(errors(dout * signs.to(dout).unsqueeze(-1)))
    for name, x, expected, same_error, sums in zip(
        ("dq", "dk", "dv"),
        actual,
        gradients(dout, torch.float64),
        map(max, zip(*tried, strict=True)),
        _sums_of_magnitudes(dout, q, k, v, softmax_scale, mask_of(causal, window)),
        strict=True,
    ):
        assert x.shape == expected.shape
        assert x.dtype == q.dtype
        if x.numel() == 0:
            continue
        error = (x.double() - expected).abs().max().item()
        bound = error_bound(q.dtype, same_error, max(1.0, expected.abs().max().item()))
        bound += torch.finfo(torch.float32).eps * sums
        assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}"


def _sums_of_magnitudes(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, mask: Mask
) -> list[float]:
    """The largest sum of magnitudes of the terms of dq, dk and dv: what float32 rounds them by,
    whose order of summation is anybody's choice."""
    group = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    qh, doh = (x.double().transpose(1, 2) for x in (q, dout))
    kh, vh = (x.double().transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    i, j = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
    hidden = mask.hides(i.unsqueeze(1), j, q.shape[1], k.shape[1])
    scores = (qh @ kh.transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf)
    p = torch.softmax(scores, dim=-1).nan_to_num()
    ds = p * (doh.abs() @ vh.abs().transpose(-1, -2)) * scale
    dq, dk, dv = ds @ kh.abs(), ds.transpose(-1, -2) @ qh.abs(), p.transpose(-1, -2) @ doh.abs()
    grouped = (x.unflatten(1, (k.shape[2], group)).sum(2) for x in (dk, dv))
    return [x.max().item() if x.numel() else 0.0 for x in (dq, *grouped)]


def run_forward(
    backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask = FULL, tile: Tile | None = None
) -> tuple[Tensor, Tensor | None]:
    """out and softmax_lse of a backend, past the plan, with the usual scale."""
    call = Call(q, k, v, float(q.shape[3] ** -0.5))
    return BACKENDS[backend].bind(Problem.of(q, k, mask), tile)(call)


def run_backward(
    backend: str,
    call: Call,
    saved: Saved,
    mask: Mask = FULL,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of a backend, past the plan."""
    problem = Problem.of(call.q, call.k, mask, "bwd")
    return BACKENDS[backend].bind_backward(problem, tile)(call, saved)


def missing(what: str) -> NoReturn:
    """Skip a test for want of a program, or fail it where everything must be there (.ci/run)."""
    if os.environ.get("FLASHMOE_REQUIRE_ALL"):
        pytest.fail(what)
    pytest.skip(what, allow_module_level=True)


def library(name: str) -> ModuleType:
    """A library that flashmoe works inside of, for a test that is skipped or fails without it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing(f"{name} is not installed: {error}")


def load_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/NAME.py as a module, found by its neighbours and by processes it starts."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(path.parent))
    spec.loader.exec_module(module)
    return module
