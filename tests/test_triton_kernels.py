"""The Triton kernels against float64 mathematics: on the GPU, or interpreted on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmoe.measure.reference import attention_reference

pytest.importorskip("triton")

from flashmoe.backends import triton_fwd
from flashmoe.backends.triton_bwd import attention_backward
from flashmoe.backends.triton_fwd import attention_forward, can_use_tma, heads_per_section
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.mask import CAUSAL, FULL, Mask, causal_if

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter needs no hardware for descriptors.
HAS_TMA = not ON_GPU or torch.cuda.get_device_capability() >= (9, 0)

pytestmark = pytest.mark.skipif(
    not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1",
)


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Every torch.empty is filled with NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def guarded(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int, order: int) -> Tensor:
    """Random (batch, seqlen, heads, head_dim) inside a larger buffer of NaN, batch, seqlen and
    heads laid out in memory in one of the six orders."""
    dims = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)][order]
    # Eight more elements keep rows 16-byte aligned for the tensor memory accelerator.
    big = torch.full([shape[d] + 2 for d in dims] + [shape[3] + 8], float("nan"), dtype=dtype)
    inner = big[1:-1, 1:-1, 1:-1, : shape[3]].permute(*(dims.index(d) for d in range(3)), 3)
    inner.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    big = big.to(DEVICE)
    return big[1:-1, 1:-1, 1:-1, : shape[3]].permute(*(dims.index(d) for d in range(3)), 3)


def within_bound(actual: Tensor, gold: Tensor, same_dtype: Tensor, magnitude: float = 10.0) -> None:
    """At most twice the error of PyTorch in the same dtype, plus rounding: of the result, and of
    the float32 intermediates, of the `magnitude` of scores, whose difference may be exactly 0."""
    assert actual.shape == gold.shape
    assert actual.dtype == same_dtype.dtype
    assert actual.is_contiguous()
    error = (actual.double() - gold).abs().max().item()
    reference_error = (same_dtype.double() - gold).abs().max().item()
    rounding = 4 * torch.finfo(actual.dtype).eps * gold.abs().max().item()
    rounding += 3.2 * magnitude * torch.finfo(torch.float32).eps
    assert error <= 2 * reference_error + rounding


def gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float, mask: Mask, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out, _ = attention_reference(*leaves, scale, mask, dtype)
    return torch.autograd.grad(out, leaves, dout.to(dtype))


def check(
    batch: int = 1,
    heads_q: int = 2,
    heads_kv: int = 2,
    seqlen_q: int = 32,
    seqlen_kv: int = 32,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    mask: Mask = FULL,
    scale: float | None = None,
    tile: tuple[int, int] = (32, 16),
    use_tma: bool = False,
    order: int = 0,
    seed: int = 0,
) -> None:
    scale = head_dim**-0.5 if scale is None else scale
    q_shape = (batch, seqlen_q, heads_q, head_dim)
    kv_shape = (batch, seqlen_kv, heads_kv, head_dim)
    q, k, v, dout = (
        guarded(shape, dtype, seed + i, (order + i) % 6)
        for i, shape in enumerate((q_shape, kv_shape, kv_shape, q_shape))
    )
    call = Call(q, k, v, scale)
    block_m, block_n = tile
    options = {"num_stages": 1, "num_warps": 4, "use_tma": use_tma}
    out, lse = attention_forward(call, mask, block_m=block_m, block_n=block_n, **options)
    gold, gold_lse = attention_reference(q, k, v, scale, mask)
    same, _ = attention_reference(q, k, v, scale, mask, dtype)
    scores = max(10.0, gold_lse[gold_lse.isfinite()].abs().max().item())
    within_bound(out, gold, same, scores)
    assert lse.shape == (batch, heads_q, seqlen_q)
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    torch.testing.assert_close(lse.double(), gold_lse, rtol=1e-5, atol=1e-5)
    computed = attention_backward(
        call, Saved(dout, out, lse), mask, block_m=block_n, block_n=block_m, **options
    )
    expected = gradients(q, k, v, dout, scale, mask, torch.float64)
    same_dtype = gradients(q, k, v, dout, scale, mask, dtype)
    for a, g, s in zip(computed, expected, same_dtype, strict=True):
        within_bound(a, g, s, scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, Mask(18, 5)], ids=str)
@pytest.mark.parametrize("use_tma", [False, True])
def test_odd_lengths(dtype: torch.dtype, mask: Mask, use_tma: bool) -> None:
    check(1, 1, 1, 37, 45, dtype=dtype, mask=mask, use_tma=use_tma)


@pytest.mark.parametrize("head_dim", [8, 16, 40, 96, 256])
def test_head_dims(head_dim: int) -> None:
    check(1, 1, 1, 19, 21, head_dim, mask=CAUSAL, dtype=torch.float16)


@pytest.mark.parametrize(
    "window", [(7, 0), (0, 0), (40, 0), (3, 9), (29, 18), (21, -1), (-1, 6)], ids=str
)
@pytest.mark.parametrize("seqlens", [(64, 64), (34, 67), (61, 26)])
def test_windows(window: tuple[int, int], seqlens: tuple[int, int]) -> None:
    """Narrower than a tile or as wide as several, of one side or both; in the last problem many
    rows see nothing, in the second no row sees the first keys."""
    check(1, 2, 1, *seqlens, head_dim=16, mask=Mask(*window), tile=(16, 16))


@pytest.mark.parametrize("tile", [(16, 32), (32, 16), (64, 32)])
@pytest.mark.parametrize("use_tma", [False, True])
def test_windows_and_tiles(tile: tuple[int, int], use_tma: bool) -> None:
    check(
        2, 2, 1, 70, 75, 24, torch.float16, Mask(45, 13), tile=tile, use_tma=use_tma, order=4
    )  # fmt: skip


@pytest.mark.parametrize("tile", [(16, 16), (16, 32), (64, 32)])
@pytest.mark.parametrize("seqlens", [(64, 64), (50, 64), (64, 50), (1, 40), (40, 1)])
def test_tiles_and_lengths(tile: tuple[int, int], seqlens: tuple[int, int]) -> None:
    check(heads_q=1, heads_kv=1, seqlen_q=seqlens[0], seqlen_kv=seqlens[1], mask=CAUSAL, tile=tile)


@pytest.mark.parametrize("heads", [(3, 1), (4, 2)])
@pytest.mark.parametrize("use_tma", [False, True])
def test_query_heads_share_key_heads(heads: tuple[int, int], use_tma: bool) -> None:
    check(1, *heads, 17, 20, dtype=torch.float16, mask=CAUSAL, use_tma=use_tma)


@pytest.mark.skipif(not HAS_TMA, reason="needs the tensor memory accelerator of Hopper")
@pytest.mark.parametrize(("causal", "order"), [(False, 0), (True, 2), (True, 5)])
def test_tensor_memory_accelerator(causal: bool, order: int) -> None:
    check(
        batch=2, heads_q=2, heads_kv=1, seqlen_q=23, seqlen_kv=33, head_dim=24, dtype=torch.float16,
        mask=causal_if(causal), use_tma=True, order=order,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1e-3, 2.0])
def test_any_scale(scale: float) -> None:
    check(1, 1, 1, seqlen_q=21, seqlen_kv=25, scale=scale, mask=CAUSAL)


@pytest.mark.parametrize("use_tma", [False, True])
def test_rows_that_see_no_key(use_tma: bool) -> None:
    q, k, v, dout = (
        torch.randn(1, n, 2, 16, device=DEVICE, dtype=torch.float16) for n in (40, 5, 5, 40)
    )
    options = {"block_m": 16, "block_n": 16, "num_stages": 1, "num_warps": 4, "use_tma": use_tma}
    out, lse = attention_forward(Call(q, k, v, 0.25), CAUSAL, **options)
    assert torch.equal(out[:, :35], torch.zeros_like(out[:, :35]))
    assert (lse[:, :, :35] == float("-inf")).all()
    assert lse[:, :, 35:].isfinite().all()
    dq, dk, dv = attention_backward(Call(q, k, v, 0.25), Saved(dout, out, lse), CAUSAL, **options)
    assert torch.equal(dq[:, :35], torch.zeros_like(dq[:, :35]))
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0), (2, 0, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    batch, seqlen_q, seqlen_kv = shape
    q = torch.randn(batch, seqlen_q, 2, 16, device=DEVICE)
    k = torch.randn(batch, seqlen_kv, 2, 16, device=DEVICE)
    options = {"block_m": 16, "block_n": 16, "num_stages": 1, "num_warps": 4}
    out, lse = attention_forward(Call(q, k, k, 0.25), FULL, **options)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((batch, 2, seqlen_q), float("-inf"), device=DEVICE))
    grads = attention_backward(Call(q, k, k, 0.25), Saved(q, out, lse), FULL, **options)
    for grad, x in zip(grads, (q, k, k), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_tiles_above_the_diagonal_are_not_read() -> None:
    q, k, v = (torch.randn(1, 48, 1, 16, device=DEVICE) for _ in range(3))
    k[:, 32:] = float("nan")
    v[:, 32:] = float("nan")
    options = {"block_m": 16, "block_n": 16, "num_stages": 1, "num_warps": 4}
    out, lse = attention_forward(Call(q, k, v, 0.25), CAUSAL, **options)
    assert out[:, :32].isfinite().all()
    assert lse[:, :, :32].isfinite().all()
    assert out[:, 32:].isnan().all()


@pytest.mark.parametrize("use_tma", [False, True])
def test_tiles_outside_a_window_are_not_read(use_tma: bool) -> None:
    """Tiles of keys that no query sees, and of queries that see no key."""
    dtype = torch.float16
    q, dout = (torch.randn(1, 20, 1, 16, device=DEVICE, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(1, 90, 1, 16, device=DEVICE, dtype=dtype) for _ in range(2))
    # The first row sees the keys from 90 - 20 - 9 on: 61, and 48 is the first of its tile.
    k[:, :48] = v[:, :48] = float("nan")
    options = {"block_m": 16, "block_n": 16, "num_stages": 1, "num_warps": 4, "use_tma": use_tma}
    call, mask = Call(q, k, v, 0.25), Mask(9, 2)
    out, lse = attention_forward(call, mask, **options)
    assert out.isfinite().all()
    grads = attention_backward(call, Saved(dout, out, lse), mask, **options)
    assert all(x.isfinite().all() for x in grads)
    assert torch.equal(grads[1][:, :61], torch.zeros_like(grads[1][:, :61]))
    # Query 70 of 90 stands level with key 0 of 20; two further ahead, 68 is the first to see one.
    q, dout = (torch.randn(1, 90, 1, 16, device=DEVICE, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(1, 20, 1, 16, device=DEVICE, dtype=dtype) for _ in range(2))
    q[:, :64] = dout[:, :64] = float("nan")
    call = Call(q, k, v, 0.25)
    out, lse = attention_forward(call, mask, **options)
    assert torch.equal(out[:, :68], torch.zeros_like(out[:, :68]))
    assert out[:, 68:].isfinite().all()
    grads = attention_backward(call, Saved(dout, out, lse), mask, **options)
    assert all(x.isfinite().all() for x in grads[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dout_with_any_strides(dtype: torch.dtype) -> None:
    """Also those that the accelerator cannot follow: it was asked for, pointers take over."""
    q, k, v = (torch.randn(1, 20, 2, 16, device=DEVICE, dtype=dtype) for _ in range(3))
    options = {"block_m": 16, "block_n": 16, "num_stages": 1, "num_warps": 4, "use_tma": True}
    out, lse = attention_forward(Call(q, k, v, 0.25), FULL, **options)
    strided = torch.randn(16, 2, 20, 1, device=DEVICE, dtype=dtype).permute(3, 2, 1, 0)
    for dout in (torch.ones((), device=DEVICE, dtype=dtype).expand(out.shape), strided):
        computed = attention_backward(Call(q, k, v, 0.25), Saved(dout, out, lse), FULL, **options)
        expected = gradients(q, k, v, dout, 0.25, FULL, torch.float64)
        same_dtype = gradients(q, k, v, dout, 0.25, FULL, dtype)
        for a, g, s in zip(computed, expected, same_dtype, strict=True):
            within_bound(a, g, s)


@pytest.mark.parametrize("mask", [FULL, CAUSAL, Mask(12, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_log_sum_exp(mask: Mask, dtype: torch.dtype) -> None:
    """With any strides, and NaN where a row sees no key."""
    q, dout = (guarded((2, 37, 4, 16), dtype, seed, 0) for seed in (0, 1))
    k, v = (guarded((2, 29, 2, 16), dtype, seed, 0) for seed in (2, 3))
    dlse = torch.randn(37, 4, 2, device=DEVICE).permute(2, 1, 0)
    options = {"block_m": 16, "block_n": 16, "num_stages": 1, "num_warps": 4}
    out, lse = attention_forward(Call(q, k, v, 0.25), mask, **options)
    empty = lse == float("-inf")
    assert empty.any() == (mask != FULL)

    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = attention_reference(*leaves, 0.25, mask, dtype)
        lse = lse.masked_fill(empty, 0.0)
        return torch.autograd.grad((out, lse), leaves, (dout.to(dtype), dlse.to(dtype)))

    saved = Saved(dout, out, lse, dlse.masked_fill(empty, float("nan")))
    computed = attention_backward(Call(q, k, v, 0.25), saved, mask, **options)
    golds = expected(torch.float64)
    for a, g, s in zip(computed, golds, expected(dtype), strict=True):
        within_bound(a, g, s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_bitwise_repeatable(dtype: torch.dtype) -> None:
    seqlen = 2000 if ON_GPU else 40
    q, k, v, dout = (torch.randn(1, seqlen, 4, 16, device=DEVICE, dtype=dtype) for _ in range(4))
    options = {"block_m": 32, "block_n": 32, "num_stages": 1, "num_warps": 4, "use_tma": True}
    out, lse = attention_forward(Call(q, k, v, 0.25), CAUSAL, **options)
    first, second = (
        attention_backward(Call(q, k, v, 0.25), Saved(dout, out, lse), CAUSAL, **options)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("budget", [1, 2 * 2 * 33 * 16 * 4, 2**25])
def test_every_order_of_programs_covers_every_tile(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sections of one, two (the last one short) and all five heads."""
    monkeypatch.setattr(triton_fwd, "_L2_BUDGET_BYTES", budget)
    check(1, 5, 5, 33, 33, 16, mask=CAUSAL)


def test_a_section_of_heads_fits_in_l2() -> None:
    # 32 MiB hold four heads whose K and V have 8 MiB, each read by `group` query heads.
    assert heads_per_section(32, 1, 16384, 2 * 128, 2) == 4
    assert heads_per_section(32, 4, 16384, 2 * 128, 2) == 16
    assert heads_per_section(3, 1, 16, 2 * 16, 2) == 3
    assert heads_per_section(8, 2, 2**24, 2 * 128, 2) == 2


def test_the_accelerator_is_used_only_where_it_can_read() -> None:
    x = torch.randn(2, 16, 2, 24, device=DEVICE, dtype=torch.float16)
    assert can_use_tma(x) == HAS_TMA
    misaligned = torch.randn(2, 16, 2, 28, device=DEVICE, dtype=torch.float16)[..., 4:]
    assert not can_use_tma(misaligned)
    assert not can_use_tma(x, x[:1].expand(2, -1, -1, -1))
    assert not can_use_tma(x.float())


# In parts that run beside each other: on a GPU most of the time is Triton's compiler's.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@settings(
    max_examples=4 if not ON_GPU else 12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 2),
    heads_kv=st.integers(1, 2),
    group=st.integers(1, 3),
    seqlen_q=st.integers(1, 50),
    seqlen_kv=st.integers(1, 50),
    head_dim=st.integers(1, 8).map(lambda n: 8 * n),
    mask=st.sampled_from([FULL, CAUSAL, None]),
    window=st.tuples(st.integers(-1, 40), st.integers(-1, 40)),
    tile=st.sampled_from([(16, 16), (32, 16), (32, 32), (64, 32)]),
    use_tma=st.booleans(),
    order=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_any_problem(
    batch: int, heads_kv: int, group: int, seqlen_q: int, seqlen_kv: int, head_dim: int,
    dtype: torch.dtype, mask: Mask | None, window: tuple[int, int], tile: tuple[int, int],
    use_tma: bool, order: int, seed: int,
) -> None:  # fmt: skip
    check(
        batch, heads_kv * group, heads_kv, seqlen_q, seqlen_kv, head_dim, dtype,
        mask or Mask(*window), tile=tile, use_tma=use_tma, order=order, seed=seed,
    )  # fmt: skip
