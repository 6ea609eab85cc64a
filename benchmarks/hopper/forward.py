"""The Hopper kernel through the library: default and best tiles beside SDPA, with their limits.

    python benchmarks/hopper/forward.py --output benchmarks/results/hopper-library-DEVICE.json
    python benchmarks/hopper/forward.py --set uneven --output ...

A first pass chooses each problem's tile among TILES (compiled here where they are not compiled in),
a second, of fresh samples, times that one beside the default and SDPA's cuDNN and FlashAttention-2.
Efficiency is the floor over the time, the floor from the limits measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import torch.nn.functional as F
from rows import ROWS, UNEVEN
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe import Problem, Tile, flash_attn_func
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.stats import median_interval
from flashmoe.measure.timing import measure, measure_limits

DEVICE = torch.device("cuda", 0)
SDPA = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION}
# By the head dimension from which on they are tried.
TILES = {
    16: (
        "256x64-stages4-q2-pingpong",
        "256x64-stages4-q1-pingpong",
        "256x64-stages4-q2-serial",
        "128x64-stages3-q1-ctas2-serial",
        "192x128-stages2-q1-pingpong",
        "192x112-stages3-q1-pingpong",
        "128x128-stages2-q2-pingpong",
    ),
    65: (
        "256x64-stages4-q1-serial",
        "256x64-stages3-q2-serial",
        "256x64-stages3-q2-pingpong-serial",
        "192x112-stages2-q1-pingpong",
        "192x112-stages2-q2-pingpong",
        "192x112-stages3-q1-pingpong",
        "192x96-stages2-q2-pingpong",
        "192x96-stages3-q1-pingpong",
        "192x64-stages4-q1-qreg",
        "128x128-stages2-q2-pingpong",
    ),
    97: (
        "192x96-stages2-q1-pingpong",
        "192x96-stages2-q2-pingpong",
        "256x48-stages4-q2-pingpong-serial",
        "192x80-stages3-q1-pingpong",
        "192x64-stages4-q1",
        "192x64-stages3-q1-pingpong",
        "192x64-stages3-q2-pingpong",
        "192x64-stages4-q1-qreg-serial",
        "128x128-stages2-q2-pingpong-qreg",
    ),
    129: (
        "128x64-stages3-q1-qreg",
        "128x80-stages2-q2-pingpong",
        "128x80-stages2-q1-pingpong",
    ),
    193: ("128x80-stages2-q1-pingpong", "128x64-stages2-q1-pingpong"),
}


def tiles_of(problem: Problem) -> list[Tile]:
    """The default first, then those of TILES that are legal."""
    here = arch(DEVICE)
    first = max(d for d in TILES if d <= problem.head_dim)
    default = BACKENDS["cuda"].default_tile(problem, here)
    assert default is not None
    tiles = [default, *(Tile.parse(f"sm90:{text}") for text in TILES[first])]
    return [t for t in dict.fromkeys(tiles) if not t.violations(here, problem)]


def compile_all(problems: Iterable[Problem]) -> None:
    wanted = {(t, p.head_dim): (t, p) for p in problems for t in tiles_of(p)}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda x: BACKENDS["cuda"].precompile(*x, DEVICE), wanted.values()))


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=causal,
            enable_gqa=q.shape[2] != k.shape[2],
        )


def medians(
    calls: dict[str, Callable[[], object]], rounds: int, microseconds: dict[str, Any]
) -> dict[str, float]:
    """Median seconds by name; the samples go into `microseconds`."""
    found = {}
    for name, result in measure(calls, DEVICE, rounds=rounds).items():
        if result.status != "ok":
            raise SystemExit(f"{name}: {result.reason}")
        found[name] = median_interval(result.samples).value
        microseconds[name] = [round(s * 1e6, 2) for s in result.samples]
    return found


def time_problem(problem: Problem, rounds: int) -> tuple[dict[str, float], Tile, dict[str, Any]]:
    """Median seconds of "default", "tuned", "cuDNN" and "FA2", the tuned tile, and all samples."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(
            problem.batch, problem.seqlen_q, heads, problem.head_dim, device=DEVICE
        ).bfloat16()
        for heads in (problem.heads_q, problem.heads_kv, problem.heads_kv)
    )

    def ours(tile: Tile | None) -> Callable[[], object]:
        where: dict[str, Any] = {"backend": "cuda"} if tile is None else {"tile": tile}
        return lambda: flash_attn_func(q, k, v, causal=problem.mask.is_causal, **where)

    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    chosen = medians({str(t): ours(t) for t in tiles_of(problem)}, max(rounds // 2, 5), first)
    tuned = Tile.parse(min(chosen, key=lambda name: chosen[name]))
    calls = {"default": ours(None), "tuned": ours(tuned)}
    for name, backend in SDPA.items():
        calls[name] = lambda backend=backend: sdpa(q, k, v, problem.mask.is_causal, backend)
    times = medians(calls, rounds, second)
    return times, tuned, {"chosen_from": first, "measured": second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("rows", "uneven"), default="rows")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    problems = [row.problem for row in ROWS]
    if arguments.set == "uneven":
        problems = list(dict.fromkeys(p for pair in UNEVEN for p in pair))
    with torch.no_grad():
        compile_all(problems)
        limits = measure_limits(DEVICE, torch.bfloat16)
        print(
            f"{torch.cuda.get_device_name()}: {limits.matmul_flops / 1e12:.0f} TFLOP/s, "
            f"{limits.copy_bytes / 1e12:.2f} TB/s"
        )
        found: dict[Problem, dict[str, float]] = {}
        samples = []
        for p in problems:
            times, tile, raw = time_problem(p, arguments.rounds)
            floor = limits.floor(p.flops, p.bytes)
            found[p] = {name: floor / seconds for name, seconds in times.items()}
            samples.append({"problem": p.to_json(), "tuned": str(tile), "microseconds": raw})
            line = "  ".join(f"{name} {found[p][name]:.3f}" for name in found[p])
            print(f"{p.label}: {times['tuned'] * 1e3:.4f} ms  {line}  {tile}", flush=True)
    if arguments.set == "rows":
        print_rows(found)
    else:
        print_uneven(found)
    document = {
        "command": " ".join(["python", *sys.argv]),
        "fingerprint": fingerprint(DEVICE).to_json(),
        "matmul_flops": limits.matmul_flops,
        "copy_bytes": limits.copy_bytes,
        "problems": samples,
    }
    arguments.output.write_text(json.dumps(document) + "\n", encoding="utf-8")


def print_rows(found: dict[Problem, dict[str, float]]) -> None:
    """Against the better of SDPA's backends in this run and the peers' listed efficiency."""
    for row in ROWS:
        here = found[row.problem]
        best = max(here["cuDNN"], here["FA2"])
        over = {"SDPA here": here["tuned"] / best, row.peer: here["tuned"] / row.peer_efficiency}
        behind = ", ".join(f"{ratio:.3f} of {name}" for name, ratio in over.items() if ratio < 1)
        print(f"{row.problem.label}: {min(over.values()):.3f} {behind}")
    means = {
        name: geometric_mean(found[r.problem][name] for r in ROWS)
        for name in ("tuned", "default", "cuDNN", "FA2")
    }
    print("geometric means: " + "  ".join(f"{name} {mean:.3f}" for name, mean in means.items()))
    print(f"default over tuned: {means['default'] / means['tuned']:.3f}")


def print_uneven(found: dict[Problem, dict[str, float]]) -> None:
    for odd, even in UNEVEN:
        o, e = found[odd], found[even]
        print(
            f"{odd.label}: tuned {o['tuned'] / e['tuned']:.3f}, default "
            f"{o['default'] / e['default']:.3f} of {even.label}; "
            f"{o['tuned'] / max(o['cuDNN'], o['FA2']):.3f} of SDPA"
        )


if __name__ == "__main__":
    main()
