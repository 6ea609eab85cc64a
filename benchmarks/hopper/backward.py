"""The Hopper backward through the library: every tile beside Triton's and SDPA's, with limits.

    python benchmarks/hopper/backward.py --output benchmarks/results/hopper-backward-DEVICE.json

First gradients are checked against float32: their error is at most twice that of PyTorch in the
same dtype. Then the rows are timed: medians of interleaved rounds. Efficiency is the floor over the
time, the floor from the limits measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe import Problem, Tile
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import Arch, arch
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.stats import median_interval
from flashmoe.measure.timing import Limits, measure, measure_limits
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.mask import causal_if

DEVICE = torch.device("cuda", 0)
SDPA = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION}


class Row(NamedTuple):
    """A problem, and what FlashAttention-3, FlashAttention-4 (its sm90 path) and cuDNN reached in
    one run on an H200 (791 TFLOP/s, 4.23 TB/s, torch 2.11+cu130, cuDNN 9.19)."""

    problem: Problem
    fa3: float
    fa4: float
    cudnn: float

    @property
    def peer(self) -> float:
        return max(self.fa3, self.fa4, self.cudnn)


# head_dim: of batch 16, 4, 1 and seqlen 1024, 4096, 16384, each not causal and causal.
_PEERS = {
    64: (
        (0.541, 0.556, 0.461),
        (0.379, 0.405, 0.313),
        (0.690, 0.695, 0.572),
        (0.638, 0.623, 0.483),
        (0.734, 0.736, 0.601),
        (0.750, 0.732, 0.566),
    ),
    128: (
        (0.615, 0.624, 0.560),
        (0.452, 0.461, 0.398),
        (0.779, 0.797, 0.710),
        (0.713, 0.702, 0.607),
        (0.846, 0.868, 0.753),
        (0.833, 0.845, 0.732),
    ),
    256: (
        (0.478, 0.385, 0.368),
        (0.371, 0.310, 0.320),
        (0.585, 0.465, 0.498),
        (0.558, 0.432, 0.468),
        (0.615, 0.483, 0.461),
        (0.623, 0.483, 0.515),
    ),
}
_SIZES = tuple(
    (batch, seqlen, causal)
    for batch, seqlen in ((16, 1024), (4, 4096), (1, 16384))
    for causal in (False, True)
)
ROWS = tuple(
    Row(
        Problem(
            batch,
            2048 // d,
            2048 // d,
            seqlen,
            seqlen,
            d,
            "bfloat16",
            causal_if(causal),
            "bwd",
        ),
        *peers,
    )
    for d, rows in _PEERS.items()
    for (batch, seqlen, causal), peers in zip(_SIZES, rows, strict=True)
)


def random_problems(count: int) -> list[Problem]:
    draw = random.Random(0)
    problems = []
    for _ in range(count):
        kv, group = draw.choice((1, 2, 3)), draw.choice((1, 1, 2, 4))
        seqlen_q = int(2 ** draw.uniform(0, 11.2))
        seqlen_kv = seqlen_q if draw.random() < 0.4 else int(2 ** draw.uniform(0, 11.2))
        problems.append(
            Problem(
                draw.choice((1, 2, 3)),
                kv * group,
                kv,
                seqlen_q,
                seqlen_kv,
                8 * draw.randint(1, 32),
                draw.choice(("float16", "bfloat16")),
                causal_if(draw.random() < 0.6),
                "bwd",
            )
        )
    return problems


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def inputs_of(p: Problem, strided: bool = False) -> Inputs:
    """With `strided`, heads before rows, and each row longer than head_dim."""

    def tensor(seqlen: int, heads: int) -> Tensor:
        dtype = getattr(torch, p.dtype)
        if strided:
            base = torch.randn(p.batch, heads, seqlen, p.head_dim + 8, device=DEVICE, dtype=dtype)
            return base[..., : p.head_dim].transpose(1, 2)
        return torch.randn(p.batch, seqlen, heads, p.head_dim, device=DEVICE, dtype=dtype)

    return Inputs(
        tensor(p.seqlen_q, p.heads_q),
        tensor(p.seqlen_kv, p.heads_kv),
        tensor(p.seqlen_kv, p.heads_kv),
        tensor(p.seqlen_q, p.heads_q),
    )


def plain_gradients(x: Inputs, causal: bool) -> tuple[Tensor, ...]:
    """By PyTorch's own operations, in the inputs' dtype."""
    q, k, v = (t.detach().transpose(1, 2).requires_grad_() for t in x[:3])
    group = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if causal:
        m, n = scores.shape[-2:]
        seen = torch.ones(m, n, dtype=torch.bool, device=DEVICE).tril(n - m)
        scores = scores.masked_fill(~seen, float("-inf"))
        # Rows that see nothing: 0, not NaN.
        probabilities = scores.softmax(-1).masked_fill(~seen.any(-1)[:, None], 0.0)
    else:
        probabilities = scores.softmax(-1)
    out = probabilities @ values
    gradients = torch.autograd.grad(out, (q, k, v), x.dout.transpose(1, 2))
    return tuple(g.transpose(1, 2) for g in gradients)


def backward_call(x: Inputs, causal: bool, backend: str, tile: Tile | None) -> Callable[[], Any]:
    call, mask = Call(x.q, x.k, x.v, x.q.shape[-1] ** -0.5), causal_if(causal)
    forward, cuda = Problem.of(x.q, x.k, mask), BACKENDS["cuda"]
    out, lse = cuda.bind(forward, cuda.compiled_in(forward, arch(DEVICE))[0])(call)
    assert lse is not None
    run = BACKENDS[backend].bind_backward(Problem.of(x.q, x.k, mask, "bwd"), tile)
    return functools.partial(run, call, Saved(x.dout, out, lse))


def check(p: Problem, tile: Tile, strided: bool) -> str:
    """What is wrong with the gradients of a tile; empty when they are right."""
    torch.manual_seed(p.seqlen_q)
    x = inputs_of(p, strided)
    exact = plain_gradients(Inputs(*(t.float() for t in x)), p.mask.is_causal)
    plain = plain_gradients(x, p.mask.is_causal)
    got = backward_call(x, p.mask.is_causal, "cuda", tile)()
    wrong = []
    for name, ours, same, want in zip(("dq", "dk", "dv"), got, plain, exact, strict=True):
        error = (ours.float() - want).abs().max().item()
        allowed = 2 * (same.float() - want).nan_to_num().abs().max().item() + 1e-5
        if not error <= allowed:
            wrong.append(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")
    return "; ".join(wrong)


def check_all(here: Arch, count: int) -> list[str]:
    """Every tile on small versions of the rows, and on random problems."""
    small = [
        Problem(
            1, 2, 2, r.problem.seqlen_q, r.problem.seqlen_kv, r.problem.head_dim, "bfloat16",
            r.problem.mask, "bwd",
        )
        for r in ROWS
    ]  # fmt: skip
    failures, done = [], 0
    for number, p in enumerate([*small, *random_problems(count)]):
        for tile in BACKENDS["cuda"].compiled_in(p, here):
            wrong = check(p, tile, strided=number % 3 == 2)
            done += 1
            if wrong:
                failures.append(f"{p} with {tile}: {wrong}")
                print("WRONG", failures[-1], flush=True)
    print(f"{done} checks, {len(failures)} failures", flush=True)
    return failures


def sdpa_backward(x: Inputs, causal: bool, backend: SDPBackend) -> Callable[[], Any]:
    leaves = tuple(t.detach().transpose(1, 2).requires_grad_() for t in x[:3])
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=False)
    dout = x.dout.transpose(1, 2)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def time_row(row: Row, limits: Limits, here: Arch, rounds: int, peers: bool) -> dict[str, Any]:
    p = row.problem
    torch.manual_seed(0)
    x = inputs_of(p)
    tiles = BACKENDS["cuda"].compiled_in(p, here)
    calls = {str(tile): backward_call(x, p.mask.is_causal, "cuda", tile) for tile in tiles}
    if peers:
        default = BACKENDS["triton"].default_tile(p, here)
        calls["triton"] = backward_call(x, p.mask.is_causal, "triton", default)
        for name, backend in SDPA.items():
            calls[name] = sdpa_backward(x, p.mask.is_causal, backend)
    floor = limits.floor(p.flops, p.bytes)
    times = {}
    samples = {}
    for name, result in measure(calls, DEVICE, rounds=rounds).items():
        if result.status != "ok":
            print(f"{p.label}: {name}: {result.reason}", flush=True)
            continue
        times[name] = median_interval(result.samples).value
        samples[name] = [round(s * 1e6, 2) for s in result.samples]
    efficiency = {name: floor / seconds for name, seconds in times.items()}
    ours = max((e for name, e in efficiency.items() if name.startswith("sm90")), default=0.0)
    text = "  ".join(f"{name} {e:.3f}" for name, e in efficiency.items())
    print(f"{p.label}: floor {floor * 1e3:.4f} ms  {text}  best peer listed {row.peer}", flush=True)
    return {
        "problem": p.to_json(),
        "floor": floor,
        "efficiency": efficiency,
        "ours": ours or efficiency.get("triton", 0.0),
        "peer": max(row.peer, *(efficiency.get(name, 0.0) for name in SDPA)),
        "microseconds": samples,
    }


def print_kernels(row: Row, here: Arch) -> None:
    """How long each kernel of a backward takes, for every tile."""
    p = row.problem
    x = inputs_of(p)
    for tile in BACKENDS["cuda"].compiled_in(p, here):
        call = backward_call(x, p.mask.is_causal, "cuda", tile)
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(5):
                call()
            torch.cuda.synchronize()
        parts = []
        for event in profile.key_averages():
            name = next(
                (n for n in ("prepare", "attention_backward", "finish") if n in event.key), ""
            )
            if name:
                parts.append(f"{name} {event.device_time_total / event.count:.1f} us")
        print(f"{p.label} {tile}: {', '.join(sorted(parts))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--random", type=int, default=60, help="random problems to check")
    parser.add_argument("--head-dim", type=int, action="append", help="of the rows to time")
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--kernels", action="store_true", help="only print the kernels' times")
    parser.add_argument("--no-peers", action="store_true", help="time the tiles alone")
    parser.add_argument("--dry", action="store_true", help="only say what would run; no GPU needed")
    parser.add_argument("--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = [r for r in ROWS if not arguments.head_dim or r.problem.head_dim in arguments.head_dim]
    if arguments.dry:
        here = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
        for p in itertools.chain((r.problem for r in rows), random_problems(arguments.random)):
            print(p.label, *BACKENDS["cuda"].compiled_in(p, here))
        return
    here, began = arch(DEVICE), time.monotonic()
    if arguments.kernels:
        for row in rows:
            print_kernels(row, here)
        return
    failures = [] if arguments.skip_check else check_all(here, arguments.random)
    print(f"checked in {time.monotonic() - began:.0f} s", flush=True)
    if arguments.check_only:
        raise SystemExit(bool(failures))
    limits = measure_limits(DEVICE, torch.bfloat16)
    print(
        f"{torch.cuda.get_device_name()}: {limits.matmul_flops / 1e12:.0f} TFLOP/s, "
        f"{limits.copy_bytes / 1e12:.2f} TB/s"
    )
    found = [time_row(row, limits, here, arguments.rounds, not arguments.no_peers) for row in rows]
    for d in sorted({r.problem.head_dim for r in rows}):
        mine = [f for f in found if f["problem"]["head_dim"] == d]
        print(
            f"head_dim {d}: ours {geometric_mean(f['ours'] for f in mine):.3f}, "
            f"best peers {geometric_mean(f['peer'] for f in mine):.3f}"
        )
    print(
        f"all: ours {geometric_mean(f['ours'] for f in found):.3f}, "
        f"best peers {geometric_mean(f['peer'] for f in found):.3f}, "
        f"{time.monotonic() - began:.0f} s"
    )
    if arguments.output is not None:
        document = {
            "command": " ".join(["python", *sys.argv]),
            "fingerprint": fingerprint(DEVICE).to_json(),
            "matmul_flops": limits.matmul_flops,
            "copy_bytes": limits.copy_bytes,
            "failures": failures,
            "rows": found,
        }
        arguments.output.write_text(json.dumps(document) + "\n", encoding="utf-8")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
