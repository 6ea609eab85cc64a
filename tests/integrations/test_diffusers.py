"""Tiny random transformers of diffusers: flashmoe's results are those of the native backend."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import DEVICE, library
from torch import Tensor

library("diffusers")

from tiny_diffusers import CELLS, MODELS  # noqa: E402

import flashmoe  # noqa: E402
from flashmoe.integrations import diffusers as ours  # noqa: E402


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    ours.register()
    yield
    ours.unregister()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of flashmoe's functions that are called."""
    names: list[str] = []

    def counted(name: str) -> Any:
        run = getattr(flashmoe, name)

        def call(*given: Any, **more: Any) -> Any:
            names.append(name)
            return run(*given, **more)

        return call

    for name in (
        "flash_attn_func",
        "flash_attn_varlen_func",
        "flash_attn_with_kvcache",
        "scaled_dot_product_attention",
    ):
        monkeypatch.setattr(flashmoe, name, counted(name))
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cell", ["forward", "train"])
def test_table(cell: str, name: str, dtype: torch.dtype, seen: list[str]) -> None:
    CELLS[cell](name, dtype)
    assert seen
    if name in ("qwen_image", "hunyuan_video"):
        assert "flash_attn_varlen_func" in seen
    if name == "sd3":  # by torch, patched
        assert set(seen) == {"scaled_dot_product_attention"}


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_compile(name: str) -> None:
    CELLS["compile"](name, torch.float32)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE)


@pytest.mark.parametrize("shape", [(2, 9), (1, 1, 1, 9), (2, 1, 1, 9)])
def test_masks_of_keys(shape: tuple[int, ...], seen: list[str]) -> None:
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    q, k, v = _random(2, 5, 4, 16), _random(2, 9, 4, 16), _random(2, 9, 4, 16).flip(1)
    for inside in (slice(0, 6), slice(2, 9), slice(0, 9, 2), slice(0, 9)):
        mask = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
        mask[..., inside] = True
        with torch.no_grad():
            with attention_backend("native"):
                want = dispatch_attention_fn(q, k, v, mask)
            seen.clear()
            with attention_backend("flashmoe"), warnings.catch_warnings():
                warnings.simplefilter("error")
                got = [dispatch_attention_fn(q, k, v, mask) for _ in range(2)]
                again = mask.logical_not_().logical_not_()
                got.append(dispatch_attention_fn(q, k, v, again))
        for each in got:
            torch.testing.assert_close(each, want, rtol=1e-4, atol=1e-5)
        assert seen
        assert "scaled_dot_product_attention" not in seen


def test_a_mask_that_is_changed_is_read_again() -> None:
    q, k, v = _random(1, 5, 4, 16), _random(1, 9, 4, 16), _random(1, 9, 4, 16).flip(1)
    mask = torch.ones(1, 9, dtype=torch.bool, device=DEVICE)
    first = ours.attention(q, k, v, mask)
    mask[0, 4:] = False
    torch.testing.assert_close(ours.attention(q, k, v, mask), ours.attention(q, k[:, :4], v[:, :4]))
    assert not torch.equal(first, ours.attention(q, k, v, mask))


def test_other_masks() -> None:
    q, k, v = _random(2, 5, 4, 16), _random(2, 9, 4, 16), _random(2, 9, 4, 16).flip(1)
    mask = torch.rand(2, 1, 5, 9, device=DEVICE) > 0.3
    mask[..., 0] = True
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    for given in (mask, torch.randn(1, 4, 5, 9, device=DEVICE)):
        got = ours.attention(q, k, v, given)
        want = torch.nn.functional.scaled_dot_product_attention(*swapped, given).transpose(1, 2)
        torch.testing.assert_close(got, want)


def test_errors_and_unregister() -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    q = _random(1, 5, 4, 16)
    with pytest.raises(TypeError, match="does not know window_size"):
        dispatch_attention_fn(
            q,
            q,
            q,
            attention_kwargs={"window_size": (4, 0)},
            backend=AttentionBackendName("flashmoe"),
        )
    model, _ = MODELS["flux"]()
    model.set_attention_backend("flashmoe")
    before = len(AttentionBackendName)
    ours.unregister()
    ours.unregister()
    assert len(AttentionBackendName) == before - 1
    with pytest.raises(ValueError, match="flashmoe"):
        model.set_attention_backend("flashmoe")
    with pytest.raises(ValueError, match="flashmoe"):
        AttentionBackendName("flashmoe")
    dispatch_attention_fn(q, q, q)  # by the native backend again
