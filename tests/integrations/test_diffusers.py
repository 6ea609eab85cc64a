"""Tiny random transformers of diffusers: flashmoe's results are those of the native backend."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import library
from torch import Tensor

diffusers = library("diffusers")

import flashmoe  # noqa: E402
from flashmoe.integrations import diffusers as ours  # noqa: E402
from flashmoe.integrations import torch as ours_of_torch  # noqa: E402


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    ours.register()
    yield
    ours.unregister()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _made(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval()


def _flux() -> tuple[Any, dict[str, Any]]:
    model = _made(
        "FluxTransformer2DModel",
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    )
    return model, {
        "hidden_states": _random(2, 16, 4),
        "encoder_hidden_states": _random(2, 7, 24),
        "pooled_projections": _random(2, 20),
        "img_ids": torch.randint(0, 4, (16, 3)),
        "txt_ids": torch.zeros(7, 3),
        "timestep": torch.tensor([0.3, 0.7]),
    }


def _sd3() -> tuple[Any, dict[str, Any]]:
    model = _made(
        "SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return model, {
        "hidden_states": _random(2, 4, 8, 8),
        "encoder_hidden_states": _random(2, 7, 24),
        "pooled_projections": _random(2, 20),
        "timestep": torch.tensor([3, 7]),
    }


def _wan() -> tuple[Any, dict[str, Any]]:
    model = _made(
        "WanTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": _random(2, 4, 2, 8, 8),
        "encoder_hidden_states": _random(2, 7, 16),
        "timestep": torch.tensor([3, 7]),
    }


def _qwen_image() -> tuple[Any, dict[str, Any]]:
    model = _made(
        "QwenImageTransformer2DModel",
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    # Padding in the middle: the text comes before the image.
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    return model, {
        "hidden_states": _random(2, 16, 16),
        "encoder_hidden_states": _random(2, 7, 24),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.3, 0.7]),
        "img_shapes": [(1, 4, 4)] * 2,
    }


def _hunyuan_video() -> tuple[Any, dict[str, Any]]:
    model = _made(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 4, 4),
    )
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return model, {
        "hidden_states": _random(2, 4, 2, 8, 8),
        "encoder_hidden_states": _random(2, 7, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": _random(2, 20),
        "timestep": torch.tensor([3, 7]),
        "guidance": torch.tensor([6.0, 6.0]) if "guidance_embeds" in model.config else None,
    }


MODELS = {
    "flux": _flux,
    "wan": _wan,
    "qwen_image": _qwen_image,
    "hunyuan_video": _hunyuan_video,
}


def _output(model: Any, inputs: dict[str, Any]) -> Tensor:
    found: Tensor = model(**inputs).sample
    return found


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


@pytest.mark.parametrize("name", MODELS)
def test_as_native(name: str, seen: list[str]) -> None:
    model, inputs = MODELS[name]()
    model.set_attention_backend("native")
    want = _output(model, inputs)
    model.set_attention_backend("flashmoe")
    got = _output(model, inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert seen
    if name in ("qwen_image", "hunyuan_video"):
        assert "flash_attn_varlen_func" in seen
    wanted = torch.autograd.grad(want.square().sum(), model.parameters(), allow_unused=True)
    found = torch.autograd.grad(got.square().sum(), model.parameters(), allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-5)


def test_sd3_by_patched_torch(seen: list[str]) -> None:
    # Its processor calls torch, whatever backend is set.
    model, inputs = _sd3()
    with torch.no_grad():
        want = _output(model, inputs)
        ours_of_torch.patch_sdpa()
        try:
            got = _output(model, inputs)
        finally:
            ours_of_torch.unpatch_sdpa()
    assert seen == ["scaled_dot_product_attention"] * 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 9), (1, 1, 1, 9), (2, 1, 1, 9)])
def test_masks_of_keys(shape: tuple[int, ...], seen: list[str]) -> None:
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    q, k, v = _random(2, 5, 4, 16), _random(2, 9, 4, 16), torch.randn(2, 9, 4, 16)
    for inside in (slice(0, 6), slice(2, 9), slice(0, 9, 2), slice(0, 9)):
        mask = torch.zeros(shape, dtype=torch.bool)
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
    q, k, v = _random(1, 5, 4, 16), _random(1, 9, 4, 16), torch.randn(1, 9, 4, 16)
    mask = torch.ones(1, 9, dtype=torch.bool)
    first = ours.attention(q, k, v, mask)
    mask[0, 4:] = False
    torch.testing.assert_close(ours.attention(q, k, v, mask), ours.attention(q, k[:, :4], v[:, :4]))
    assert not torch.equal(first, ours.attention(q, k, v, mask))


def test_other_masks_are_torchs_and_say_so() -> None:
    q, k, v = _random(2, 5, 4, 16), _random(2, 9, 4, 16), torch.randn(2, 9, 4, 16)
    mask = torch.rand(2, 1, 5, 9) > 0.3
    mask[..., 0] = True
    ours.warn_of_torch.cache_clear()
    with pytest.warns(UserWarning, match="differs between queries"):
        got = ours.attention(q, k, v, mask)
    swapped = (x.transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*swapped, mask).transpose(1, 2)
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
    model, _ = _flux()
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
