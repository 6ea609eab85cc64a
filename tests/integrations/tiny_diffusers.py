"""Tiny random transformers of diffusers and what they read: the cells of a table of models and
uses. A cell raises AssertionError where flashmoe's results are not those of the native backend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from support import DEVICE
from torch import Tensor

from flashmoe.integrations import torch as ours_of_torch


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE)


def _made(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).to(DEVICE).eval()


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
        "img_ids": torch.randint(0, 4, (16, 3), device=DEVICE),
        "txt_ids": torch.zeros(7, 3, device=DEVICE),
        "timestep": torch.tensor([0.3, 0.7], device=DEVICE),
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
        "timestep": torch.tensor([3, 7], device=DEVICE),
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
        "timestep": torch.tensor([3, 7], device=DEVICE),
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
    mask = torch.ones(2, 7, dtype=torch.bool, device=DEVICE)
    mask[1, 4:] = False
    return model, {
        "hidden_states": _random(2, 16, 16),
        "encoder_hidden_states": _random(2, 7, 24),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.3, 0.7], device=DEVICE),
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
    mask = torch.ones(2, 7, dtype=torch.long, device=DEVICE)
    mask[1, 4:] = 0
    return model, {
        "hidden_states": _random(2, 4, 2, 8, 8),
        "encoder_hidden_states": _random(2, 7, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": _random(2, 20),
        "timestep": torch.tensor([3, 7], device=DEVICE),
        "guidance": torch.tensor([6.0, 6.0], device=DEVICE)
        if "guidance_embeds" in model.config
        else None,
    }


MODELS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "flux": _flux,
    "sd3": _sd3,
    "wan": _wan,
    "qwen_image": _qwen_image,
    "hunyuan_video": _hunyuan_video,
}


# Whose processors ask torch, whatever backend is set.
BY_TORCH = ("sd3",)


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    dtype = next(model.parameters()).dtype
    found: Tensor = model(**{k: _as(dtype, x) for k, x in inputs.items()}).sample
    return found


def _as(dtype: torch.dtype, x: Any) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _by_ours(name: str, model: Any, run: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
    if name not in BY_TORCH:
        model.set_attention_backend("flashmoe")
        return run(model)
    ours_of_torch.patch_sdpa()
    try:
        return run(model)
    finally:
        ours_of_torch.unpatch_sdpa()


def check(name: str, dtype: torch.dtype, run: Callable[[Any], dict[str, Tensor]]) -> None:
    """Judge what `run` gives with flashmoe: no further from the native backend in float32 than
    twice what the native backend in the model's dtype is."""
    exact, _ = MODELS[name]()
    model = copy.deepcopy(exact).to(dtype)
    for each in (exact, model):
        each.set_attention_backend("native")
    native, wanted = run(model), run(exact)
    got = _by_ours(name, model, run)
    rounding = max(64 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 4)
    scale = max(torch.linalg.vector_norm(want) for want in wanted.values())
    for key, want in wanted.items():
        norm = torch.linalg.vector_norm
        allowed = 2 * norm(native[key].float() - want) + rounding * scale
        error = norm(got[key].float() - want)
        assert error <= allowed, f"{key}: {error:.3g} > {allowed:.3g}"


def forward(name: str, dtype: torch.dtype) -> None:
    inputs = MODELS[name]()[1]

    @torch.no_grad()
    def run(model: Any) -> dict[str, Tensor]:
        return {"output": output(model, inputs)}

    check(name, dtype, run)


def train(name: str, dtype: torch.dtype) -> None:
    inputs = MODELS[name]()[1]

    def run(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        output(model, inputs).float().square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    check(name, dtype, run)


def compiled(name: str, dtype: torch.dtype, backend: str = "eager") -> None:
    inputs = MODELS[name]()[1]

    @torch.no_grad()
    def run(model: Any) -> dict[str, Tensor]:
        torch._dynamo.reset()
        return {"output": output(torch.compile(model, backend=backend), inputs)}

    check(name, dtype, run)


CELLS: dict[str, Callable[[str, torch.dtype], None]] = {
    "forward": forward,
    "train": train,
    "compile": compiled,
}
