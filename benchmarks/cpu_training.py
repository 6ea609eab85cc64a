"""Training on a CPU beside torch: the backward kernel alone, and a step through both functions.

    python benchmarks/cpu_training.py [--threads N] [--tiles] [--rounds N] [--output FILE]

Milliseconds are the least of the rounds, in which everybody takes turns. `--tiles` times the
backward with each tile of a few.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flashmoe import flash_attn_func
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.mask import causal_if
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

CPU = torch.device("cpu")
_aten = torch.ops.aten
# batch, heads, seqlen, head_dim, dtype, causal
ROWS = [
    (2, 8, 256, 64, torch.float32, False),
    (2, 8, 1024, 64, torch.float32, True),
    (1, 8, 1024, 128, torch.float32, False),
    (1, 8, 2048, 128, torch.float32, True),
    (2, 8, 1024, 64, torch.bfloat16, True),
    (1, 8, 1024, 128, torch.bfloat16, False),
    (1, 4, 512, 256, torch.float32, False),
    (8, 12, 128, 64, torch.float32, False),
]
TILES = [Tile("cpu", m, n) for m in (64, 128, 256, 512) for n in (64, 128)]


def least(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name] = min(found[name], (time.perf_counter() - start) * 1e3)
    return found


def backwards(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, tiles: list[Tile]
) -> tuple[Problem, dict[str, Callable[[], object]]]:
    qt, kt, vt, dt = (x.detach().transpose(1, 2) for x in (q, k, v, dout))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(qt, kt, vt, 0.0, causal)
    scale = q.shape[-1] ** -0.5
    call = Call(q.detach(), k.detach(), v.detach(), scale)
    problem = Problem.of_call(call, causal_if(causal), "bwd")
    batch, seqlen, heads, _ = q.shape
    rows = lse if lse.shape == (batch, heads, seqlen) else lse.transpose(1, 2)
    saved = Saved(dout, out.transpose(1, 2), rows.contiguous())
    own = BACKENDS["cpu"]
    runs = {"ours": own.bind_backward(problem, own.default_tile(problem, arch(CPU)))}
    runs |= {str(tile): own.bind_backward(problem, tile) for tile in tiles}
    torchs = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    calls: dict[str, Callable[[], object]] = {
        "torch": lambda: torchs(dt, qt, kt, vt, out, lse, 0.0, causal)
    }
    return problem, calls | {name: (lambda r=run: r(call, saved)) for name, run in runs.items()}


def steps(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool
) -> dict[str, Callable[[], object]]:
    # torch's own layout, as a user of SDPA has it.
    qt, kt, vt, dt = (x.detach().transpose(1, 2).contiguous() for x in (q, k, v, dout))
    for x in (qt, kt, vt):
        x.requires_grad_()
    return {
        "ours": lambda: torch.autograd.grad(
            flash_attn_func(q, k, v, causal=causal), (q, k, v), dout
        ),
        "torch": lambda: torch.autograd.grad(
            F.scaled_dot_product_attention(qt, kt, vt, is_causal=causal), (qt, kt, vt), dt
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--shrink", type=int, default=1, help="divides the lengths")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows, ratios = [], []
    print("problem: backward, ours and torch's ms; GFLOP/s; step, ours and torch's ms")
    for batch, heads, seqlen, head_dim, dtype, causal in ROWS:
        shape = batch, seqlen // given.shrink, heads, head_dim
        q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in "qkv")
        dout = torch.randn(shape, dtype=dtype)
        problem, calls = backwards(q, k, v, dout, causal, TILES if given.tiles else [])
        alone = least(calls, given.rounds)
        step = least(steps(q, k, v, dout, causal), given.rounds)
        ratios.append((alone["torch"] / alone["ours"], step["torch"] / step["ours"]))
        rows.append({"problem": problem.label, "backward_ms": alone, "step_ms": step})
        print(
            f"{problem.label}: {alone['ours']:.2f} {alone['torch']:.2f} ({ratios[-1][0]:.2f}), "
            f"{problem.flops / alone['ours'] / 1e6:.0f} GFLOP/s; step {step['ours']:.2f} "
            f"{step['torch']:.2f} ({ratios[-1][1]:.2f})"
        )
        for name, ms in alone.items() if given.tiles else ():
            print(f"    {name}: {ms:.2f}")
    for what, values in zip(("backward", "step"), zip(*ratios, strict=True), strict=True):
        mean = torch.tensor(values).log().mean().exp()
        print(f"{what}: {mean:.2f} times as fast as torch in the mean, least {min(values):.2f}")
    if given.output:
        data = {"machine": fingerprint(CPU).to_json(), "threads": given.threads, "rows": rows}
        given.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
