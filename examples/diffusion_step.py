"""Denoises with a small random Flux transformer of Hugging Face diffusers, by flashmoe's attention
and by the default one, on the CPU or a GPU. Downloads nothing.

python examples/diffusion_step.py [--steps 4] [--size 32]
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from flashmoe.integrations import diffusers as flashmoe_diffusers

CHANNELS, TEXT, TEXT_WIDTH, POOLED = 16, 32, 64, 48


@torch.inference_mode()
def denoised(model: FluxTransformer2DModel, size: int, steps: int) -> torch.Tensor:
    """A latent image (1, size * size, channels) from noise, as a Flux pipeline does it."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(model.device, model.dtype)

    latents = random(1, size * size, CHANNELS)
    prompt = {"encoder_hidden_states": random(1, TEXT, TEXT_WIDTH)}
    prompt |= {"pooled_projections": random(1, POOLED)}
    prompt["txt_ids"] = torch.zeros(TEXT, 3, device=model.device)
    rows = torch.arange(size, device=model.device).float()
    grid = torch.cartesian_prod(rows, rows)
    prompt["img_ids"] = torch.nn.functional.pad(grid, (1, 0))

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps, device=model.device)
    for t in scheduler.timesteps:
        timestep = (t / 1000).expand(1).to(model.dtype)
        noise = model(hidden_states=latents, timestep=timestep, **prompt).sample
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=32)
    arguments = parser.parse_args()

    flashmoe_diffusers.register()
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(16, 24, 24),
    )
    model = model.to(device, dtype).eval()

    images = {}
    for backend in ("native", "flashmoe"):
        model.set_attention_backend(backend)
        denoised(model, arguments.size, 1)  # warm up
        began = time.perf_counter()
        images[backend] = denoised(model, arguments.size, arguments.steps).cpu().float()
        print(f"{backend}: {arguments.steps} steps in {time.perf_counter() - began:.2f} s")
    worst = (images["flashmoe"] - images["native"]).abs().max() / images["native"].abs().max()
    print(f"largest difference: {worst:.1e} of the largest value")
    if worst > (5e-2 if on_gpu else 1e-4):
        raise SystemExit("flashmoe's image differs from the default's")


if __name__ == "__main__":
    main()
