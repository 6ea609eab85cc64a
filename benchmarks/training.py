"""Packed against dense calls of equal lengths, the backward against SDPA, and forward and backward
as one step at short lengths, through the API.

    python benchmarks/training.py packed
    python benchmarks/training.py backward
    python benchmarks/training.py step

Medians of device time between CUDA events, the host being ahead, us; bfloat16, heads * head_dim
2048. Packed outputs and gradients are compared with the dense ones on the way. `backward` has
autograd alone, plain and deterministic, `step` 16384 tokens; both the faster of SDPA's cuDNN and
FlashAttention-2 with contiguous heads-first tensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe import flash_attn_func, flash_attn_varlen_func

DEVICE = torch.device("cuda", 0)
SDPA = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
ROUNDS = 12


def microseconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        torch.cuda._sleep(1_000_000)  # or what the host takes to launch would count
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[ROUNDS // 2]


def leaves(*shape: int) -> list[Tensor]:
    kind = {"device": DEVICE, "dtype": torch.bfloat16, "requires_grad": True}
    return [torch.randn(*shape, **kind) for _ in "qkv"]


def backward_of(out: Tensor, inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, dout, retain_graph=True)


def packed(head_dim: int, seqlen: int, causal: bool) -> str:
    heads, batch = 2048 // head_dim, 32768 // seqlen
    dense = leaves(batch, seqlen, heads, head_dim)
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in dense]
    ends = torch.arange(0, batch * seqlen + 1, seqlen, dtype=torch.int32, device=DEVICE)
    lengths = (ends, ends, seqlen, seqlen)
    with torch.no_grad():
        forward = microseconds(lambda: flash_attn_func(*dense, causal=causal))
        forward_packed = microseconds(
            lambda: flash_attn_varlen_func(*flat, *lengths, causal=causal)
        )
    out = flash_attn_func(*dense, causal=causal)
    out_packed = flash_attn_varlen_func(*flat, *lengths, causal=causal)
    dout = torch.randn_like(out)
    pairs = [(out, out_packed)]
    pairs += zip(
        backward_of(out, dense, dout),
        backward_of(out_packed, flat, dout.flatten(0, 1)),
        strict=True,
    )
    error = max((x.flatten(0, 1) - y).abs().max().item() for x, y in pairs)
    back = microseconds(lambda: backward_of(out, dense, dout))
    back_packed = microseconds(lambda: backward_of(out_packed, flat, dout.flatten(0, 1)))
    return (
        f"forward {forward:.0f}, packed {forward_packed:.0f} ({forward / forward_packed:.3f}); "
        f"backward {back:.0f}, packed {back_packed:.0f} ({back / back_packed:.3f}); "
        f"largest difference {error:.4f}"
    )


def backward(head_dim: int, batch: int, seqlen: int, causal: bool) -> str:
    inputs = leaves(batch, seqlen, 2048 // head_dim, head_dim)
    dout = torch.randn_like(inputs[0])
    found = []
    for deterministic in (False, True):
        out = flash_attn_func(*inputs, causal=causal, deterministic=deterministic)
        found.append(microseconds(lambda out=out: backward_of(out, inputs, dout)))
    swapped = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs]
    dout = dout.transpose(1, 2).contiguous()
    best = float("inf")
    for backend in SDPA:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*swapped, is_causal=causal)
            best = min(best, microseconds(lambda out=out: backward_of(out, swapped, dout)))
    ours, repeatable = found
    return (
        f"ours {ours:.0f}, deterministic {repeatable:.0f} ({ours / repeatable:.2f}), "
        f"SDPA {best:.0f} ({best / ours:.2f})"
    )


def step(head_dim: int, seqlen: int, causal: bool) -> str:
    inputs = leaves(16384 // seqlen, seqlen, 2048 // head_dim, head_dim)
    dout = torch.randn_like(inputs[0])
    ours = microseconds(
        lambda: torch.autograd.grad(flash_attn_func(*inputs, causal=causal), inputs, dout)
    )
    swapped = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs]
    dout = dout.transpose(1, 2).contiguous()

    def by_sdpa() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(*swapped, is_causal=causal)
        return torch.autograd.grad(out, swapped, dout)

    best = float("inf")
    for backend in SDPA:
        with sdpa_kernel(backend):
            best = min(best, microseconds(by_sdpa))
    return f"ours {ours:.0f}, SDPA {best:.0f} ({best / ours:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("packed", "backward", "step"))
    what = parser.parse_args().what
    if what == "step":
        for head_dim in (64, 128):
            for seqlen in (64, 128, 256, 512):
                for causal in (False, True):
                    row = step(head_dim, seqlen, causal)
                    print(f"{head_dim}, {seqlen}{' causal' * causal}: {row}", flush=True)
        return
    if what == "packed":
        for head_dim in (64, 128):
            for seqlen in (1024, 4096, 16384):
                for causal in (False, True):
                    row = packed(head_dim, seqlen, causal)
                    print(f"{head_dim}, {seqlen}{' causal' * causal}: {row}", flush=True)
        return
    for head_dim in (64, 128, 256):
        for batch, seqlen in ((16, 1024), (4, 4096), (1, 16384)):
            for causal in (False, True):
                row = backward(head_dim, batch, seqlen, causal)
                print(f"{head_dim}, {batch} x {seqlen}{' causal' * causal}: {row}", flush=True)


if __name__ == "__main__":
    main()
