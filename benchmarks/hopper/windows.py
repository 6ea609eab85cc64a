"""Sliding windows, forward and backward, beside plain causal attention and FlashAttention-4.

    python benchmarks/hopper/windows.py --output benchmarks/results/hopper-windows-DEVICE.json
    python benchmarks/hopper/windows.py --tiles 64x64-stages4-q1-ctas2-serial 128x64-stages2-q2

Each row: causal, with a window of W keys to the left; ours by the plan and by other `--tiles`, ours
without the window, and FlashAttention-4 where it is installed (its listed times are of another run
on an H200). `share` is the time over what the visible pairs' share of the plain causal time would
be, 20 us apart. Before it is timed, a row is checked: a few blocks of rows against float64.
`--shrink 64` tries it all on small sequences, on a CPU if need be.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmoe import Problem, flash_attn_func
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.reference import attention_reference, error_bound
from flashmoe.measure.stats import median_interval
from flashmoe.measure.timing import measure
from flashmoe.spec.mask import CAUSAL, Mask

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAUNCH = 20e-6  # seconds that the share leaves out


class Row(NamedTuple):
    """A problem, and what FlashAttention-4 4.0.0b36 took on an H200, milliseconds forward and
    backward (29 November 2026, one run; 0 where it was not measured)."""

    problem: Problem
    forward: float
    backward: float


# By head_dim: (batch, heads, seqlen, [(W, forward, backward), ...]).
_LISTED = {
    64: (
        (2, 32, 8192, ((128, 0.183, 0.389), (1024, 0.370, 0.852), (4096, 0.835, 2.069))),
        (1, 32, 32768, ((128, 0.349, 0.763), (1024, 0.745, 1.740), (4096, 1.995, 5.278))),
    ),
    128: (
        (2, 16, 8192, ((128, 0.118, 0.341), (1024, 0.258, 0.712), (4096, 0.625, 1.733))),
        (1, 16, 32768, ((128, 0.221, 0.663), (1024, 0.508, 1.447), (4096, 1.494, 4.381))),
    ),
    256: (
        (2, 8, 8192, ((128, 0.106, 0.428), (1024, 0.245, 1.118), (4096, 0.610, 2.873))),
        (1, 8, 32768, ((128, 0.191, 0.832), (1024, 0.473, 2.282), (4096, 0.0, 0.0))),
    ),
}
ROWS = tuple(
    Row(
        Problem(batch, heads, heads, seqlen, seqlen, head_dim, "bfloat16", Mask(width, 0)),
        forward,
        backward,
    )
    for head_dim, shapes in _LISTED.items()
    for batch, heads, seqlen, widths in shapes
    for width, forward, backward in widths
)


def shrunk(problem: Problem, by: int) -> Problem:
    seqlen = max(problem.seqlen_q // by, 16)
    mask = Mask(max(problem.mask.left // by, 1), 0)
    return replace(problem, seqlen_q=seqlen, seqlen_kv=seqlen, mask=mask)


def inputs(problem: Problem, grad: bool) -> tuple[Tensor, ...]:
    """q, k and v, and dout."""
    torch.manual_seed(0)
    shape = (problem.batch, problem.seqlen_q, problem.heads_q, problem.head_dim)
    q, k, v, dout = (torch.randn(shape, device=DEVICE).bfloat16() for _ in range(4))
    return (*(x.requires_grad_(grad) for x in (q, k, v)), dout)


def attend(problem: Problem, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    window = problem.mask.left, problem.mask.right
    out = flash_attn_func(q, k, v, window_size=window, **options)
    assert isinstance(out, Tensor)
    return out


def wrong(problem: Problem, tile: str | None) -> str:
    """What is wrong with the output; empty where nothing is."""
    q, k, v, _ = inputs(problem, grad=False)
    out = attend(problem, q, k, v, **({"tile": tile} if tile else {}))
    length = problem.seqlen_q
    for start in (0, length // 2, max(length - 64, 0)):
        stop = min(start + 64, length)
        first, last, mask = problem.mask.of_rows(start, stop, length, length)
        part = (q[:1, start:stop, :1], k[:1, first:last, :1], v[:1, first:last, :1])
        exact, _ = attention_reference(*part, mask=mask)
        same, _ = attention_reference(*part, mask=mask, dtype=q.dtype)
        error = (out[:1, start:stop, :1].double() - exact).abs().max().item()
        same_error = (same.double() - exact).abs().max().item()
        if not error <= error_bound(q.dtype, same_error, exact.abs().max().item()):
            return f"rows from {start} are off by {error:.3g}"
    return ""


def flash_attention_4() -> Callable[..., Any] | None:
    try:
        function: Callable[..., Any] = importlib.import_module("flash_attn.cute").flash_attn_func
    except ImportError:
        return None
    return function


def calls_of(problem: Problem, backward: bool, tiles: list[str]) -> dict[str, Callable[[], object]]:
    x = inputs(problem, grad=backward)
    q, k, v, dout = x
    plain = replace(problem, mask=CAUSAL)

    def call(f: Callable[[], Tensor]) -> Callable[[], object]:
        if not backward:
            return f
        out = f()  # its graph is kept: the backward alone is timed
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    calls = {
        "ours": call(lambda: attend(problem, q, k, v)),
        "plain causal": call(lambda: attend(plain, q, k, v)),
    }
    if not backward:
        for tile in tiles:
            calls[tile] = lambda tile=tile: attend(problem, q, k, v, tile=f"sm90:{tile}")
    if (fa4 := flash_attention_4()) is not None:
        window = problem.mask.left, 0

        def other() -> Tensor:
            out = fa4(q, k, v, causal=True, window_size=window)
            result: Tensor = out[0] if isinstance(out, tuple) else out
            return result

        calls["FA4"] = call(other)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiles", nargs="*", default=[], metavar="TILE")
    parser.add_argument("--shrink", type=int, default=1, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    samples = []
    for row in ROWS:
        problem = row.problem if arguments.shrink == 1 else shrunk(row.problem, arguments.shrink)
        faults = {tile: wrong(problem, f"sm90:{tile}") for tile in arguments.tiles}
        if fault := wrong(problem, None):
            raise SystemExit(f"{problem.label}: {fault}")
        pairs = problem.visible_pairs / replace(problem, mask=CAUSAL).visible_pairs
        for backward, listed in ((False, row.forward), (True, row.backward)):
            tiles = [tile for tile in arguments.tiles if not faults[tile]]
            measured = measure(calls_of(problem, backward, tiles), DEVICE, rounds=arguments.rounds)
            if bad := {n: m.reason for n, m in measured.items() if m.status != "ok"}:
                raise SystemExit(f"{problem.label}: {bad}")
            times = {n: median_interval(m.samples).value for n, m in measured.items()}
            ours = min(time for n, time in times.items() if n not in ("plain causal", "FA4"))
            share = (times["ours"] - LAUNCH) / (pairs * times["plain causal"])
            shown = "  ".join(f"{n} {time * 1e3:.4f}" for n, time in times.items())
            other = times.get("FA4", listed * 1e-3)
            print(
                f"{problem.label} {'backward' if backward else 'forward'}: {shown} ms; share "
                f"{share:.2f}; over FA4 {other / times['ours']:.2f}, best {other / ours:.2f}",
                flush=True,
            )
            microseconds = {n: [round(s * 1e6, 2) for s in m.samples] for n, m in measured.items()}
            direction = "bwd" if backward else "fwd"
            samples.append(
                {"problem": problem.to_json() | {"direction": direction}, "us": microseconds}
            )
        for tile, fault in faults.items():
            if fault:
                print(f"{problem.label}: {tile}: {fault}", flush=True)
    if arguments.output:
        document = {
            "command": " ".join(["python", *sys.argv]),
            "fingerprint": fingerprint(DEVICE).to_json(),
            "rows": samples,
        }
        arguments.output.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
