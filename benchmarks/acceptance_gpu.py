"""Forward, backward and host cost on one GPU against SDPA and FlexAttention, in one run.

    python benchmarks/acceptance_gpu.py --output benchmarks/results/DEVICE.json

Prints a table and writes raw samples with the fingerprint and the limits measured beside them. A
comparison is interleaved in one process (flashmoe.measure.timing); ratios above 1 mean ours is
faster.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flashmoe
from flashmoe import _extension, flash_attn_func
from flashmoe.backends.sdpa import torch_sdpa
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.stats import median_interval, paired_ratio
from flashmoe.measure.timing import Limits, measure, measure_limits
from flashmoe.spec.mask import causal_if
from flashmoe.spec.problem import Problem
from flashmoe.tiles import PLAIN

Shape = tuple[int, int, int, int, bool]
DEVICE = torch.device("cuda", 0)
# batch, heads, seqlen, head_dim, causal
FORWARD = (
    (2, 16, 8192, 128, False),
    (2, 16, 8192, 128, True),
    (2, 32, 8192, 64, False),
    (32, 8, 512, 64, False),
)
TRAINING = ((4, 16, 4096, 128, False), (4, 16, 4096, 128, True))


def qkv(shape: Shape, requires_grad: bool = False) -> list[Tensor]:
    batch, heads, seqlen, head_dim, _ = shape
    return [
        torch.randn(
            batch, seqlen, heads, head_dim, device=DEVICE, dtype=torch.bfloat16
        ).requires_grad_(requires_grad)
        for _ in range(3)
    ]


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch_sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal)


def flex(causal: bool, seqlen: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # dynamic=False: after a few shapes torch.compile would generalize over them, and slow down.
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    mask = None
    if causal:
        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, seqlen, seqlen, device=DEVICE, _compile=True
        )
    return lambda q, k, v: compiled(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask
    )


def compare(
    label: str,
    shape: Shape,
    candidates: dict[str, Callable[[], object]],
    limits: Limits,
    rounds: int,
    backward: bool = False,
) -> dict[str, object]:
    q, k, _ = qkv(shape)
    problem = Problem.of(q, k, causal_if(shape[4]))
    flops, nbytes = problem.flops * (3.5 if backward else 1), problem.bytes
    measured = measure(candidates, DEVICE, rounds=rounds, warmup=5)
    print(f"{label}: {problem.label}")
    for name, result in measured.items():
        if result.status != "ok":
            raise SystemExit(f"{name} failed: {result.reason}")
        time_s = median_interval(result.samples).value
        line = f"  {name:24} {time_s * 1e3:8.4f} ms {flops / time_s / 1e12:6.1f} TFLOP/s"
        line += f" efficiency {limits.floor(flops, nbytes) / time_s:.3f}"
        if name.startswith("flashmoe"):
            for peer in candidates:
                if not peer.startswith("flashmoe"):
                    ratio = paired_ratio(measured[peer].samples, result.samples)
                    line += f" | {ratio.value:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}] {peer}"
        print(line, flush=True)
    return {
        "label": label,
        "problem": problem.to_json(),
        "samples": {name: result.samples for name, result in measured.items()},
    }


def forward_case(shape: Shape, limits: Limits, rounds: int) -> dict[str, object]:
    q, k, v = qkv(shape)
    causal = shape[4]
    flexed = flex(causal, shape[2])
    sm80 = _extension.load().instances["sm80", shape[3], PLAIN][0]
    candidates = {
        "flashmoe sm80": lambda: flash_attn_func(q, k, v, causal=causal, tile=sm80),
        "flashmoe cuda": lambda: flash_attn_func(q, k, v, causal=causal, backend="cuda"),
        "flashmoe triton": lambda: flash_attn_func(q, k, v, causal=causal, backend="triton"),
        "sdpa flash": lambda: flash_attention_2(q, k, v, causal),
        "flex_attention": lambda: flexed(q, k, v),
    }
    with torch.no_grad():
        return compare("forward", shape, candidates, limits, rounds)


def training_case(shape: Shape, limits: Limits, rounds: int) -> dict[str, object]:
    q, k, v = qkv(shape, requires_grad=True)
    causal = shape[4]
    dout = torch.randn_like(q)

    def step(out: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), gradient)

    candidates = {
        "flashmoe triton": lambda: step(
            flash_attn_func(q, k, v, causal=causal, backend="triton"), dout
        ),
        "sdpa flash": lambda: step(flash_attention_2(q, k, v, causal), dout.transpose(1, 2)),
    }
    return compare("forward + backward", shape, candidates, limits, rounds, backward=True)


def host_cost(calls: int = 1000, repeats: int = 9) -> dict[str, list[float]]:
    """Microseconds of host time a call on tiny inputs, `repeats` means of `calls` in a row."""
    q, k, v = qkv((1, 8, 128, 64, False))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    candidates = {
        "flashmoe": lambda: flash_attn_func(q, k, v),
        "sdpa": lambda: torch_sdpa(*heads_first),
    }
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        for number in range(-1, repeats):
            for name, call in candidates.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                seconds = time.perf_counter() - start
                if number >= 0:
                    samples[name].append(seconds / calls * 1e6)
    print("host cost of one forward call, us:", end="")
    for name, values in samples.items():
        print(f"  {name} {sorted(values)[repeats // 2]:.2f}", end="")
    print(f"  (plan: {flashmoe.make_plan(Problem.of(q, k), DEVICE)})", flush=True)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to write the raw samples")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    limits = measure_limits(DEVICE, torch.bfloat16)
    print(
        f"{fingerprint(DEVICE).device}: matmul {limits.matmul_flops / 1e12:.0f} TFLOP/s, "
        f"copy {limits.copy_bytes / 1e12:.2f} TB/s"
    )
    host = host_cost()
    cases = [forward_case(shape, limits, arguments.rounds) for shape in FORWARD]
    cases += [training_case(shape, limits, arguments.rounds) for shape in TRAINING]
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "command": f"python benchmarks/acceptance_gpu.py --rounds {arguments.rounds}",
            "fingerprint": fingerprint(DEVICE).to_json(),
            "limits": {
                "matmul_flops": limits.matmul_flops,
                "copy_bytes": limits.copy_bytes,
            },
            "host_cost_us": host,
            "cases": cases,
        }
        arguments.output.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
