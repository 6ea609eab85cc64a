"""Host time of a call on tiny inputs, beside SDPA's: forward, a training step, packed, decoding.

    python benchmarks/overhead.py --output benchmarks/results/overhead-DEVICE.json

A sample is the wall time of many calls back to back, over their number; the sides take turns. A
GPU has finished such a call before the host has launched the next one. SDPA's backends are chosen
outside of what is timed. --shrink has fewer calls a sample.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from decode import in_cache
from tables import Row, Table, parser_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flashmoe.backends.sdpa import torch_sdpa
from flashmoe.measure.inputs import make_inputs
from flashmoe.spec.mask import CAUSAL, FULL
from flashmoe.spec.problem import Problem

PLAIN = Problem(1, 8, 8, 128, 128, 64, "bfloat16", FULL)
PACKED = Problem(4, 8, 8, 64, 64, 64, "bfloat16", CAUSAL, layout="packed")
DECODE = Problem(4, 32, 8, 1, 64, 128, "bfloat16", FULL)
BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA FA2": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CALLS = 1000  # of a sample

# What is timed, and what it is timed under.
Side = tuple[Callable[[], object], Callable[[], AbstractContextManager[Any]]]


def cost_row(
    table: Table, section: str, problem: Problem, sides: Mapping[str, Side], calls: int
) -> Row | None:
    """Seconds a call, one sample a round. A side that raises is left out."""
    running, failed = dict(sides), {}
    for name, (call, context) in sides.items():
        try:
            with context():
                for _ in range(20):
                    call()
        except RuntimeError as error:
            failed[name] = str(error)
            del running[name]
    if "ours" not in running:
        table.fail(f"{section}, {problem.label}", failed["ours"])
        return None
    samples: dict[str, list[float]] = {name: [] for name in running}
    order = list(running)
    for _ in range(table.arguments.rounds):
        random.shuffle(order)
        for name in order:
            call, context = running[name]
            with context():
                if table.device.type == "cuda":
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(calls):
                    call()
                samples[name].append((time.perf_counter() - begin) / calls)
    found = {name: tuple(times) for name, times in samples.items()}
    return table.add(Row(section, problem.label, 0.0, found, failed, problem=problem))


def leaves_of(table: Table) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and dout of PLAIN in our layout, and in SDPA's."""
    inputs = make_inputs(PLAIN, table.device)
    tensors = [*inputs.call[:3], torch.randn_like(inputs.call.q)]
    swapped = [x.transpose(1, 2).contiguous() for x in tensors]
    return tensors, swapped


def of_forward(table: Table) -> dict[str, Side]:
    (q, k, v, _), (q_, k_, v_, _) = leaves_of(table)
    sides: dict[str, Side] = {"ours": (lambda: flash_attn_func(q, k, v), nullcontext)}
    sides["SDPA"] = (lambda: torch_sdpa(q_, k_, v_), nullcontext)
    for name, backend in BACKENDS.items():
        sides[name] = (lambda: torch_sdpa(q_, k_, v_), lambda b=backend: sdpa_kernel(b))
    return sides


def of_step(table: Table) -> dict[str, Side]:
    tensors, swapped = leaves_of(table)
    for x in (*tensors[:3], *swapped[:3]):
        x.requires_grad_()
    q, k, v, dout = tensors
    q_, k_, v_, dout_ = swapped

    def step(options: Mapping[str, Any]) -> object:
        out = flash_attn_func(q, k, v, **options)
        return torch.autograd.grad(out, (q, k, v), dout)

    def theirs() -> object:
        return torch.autograd.grad(torch_sdpa(q_, k_, v_), (q_, k_, v_), dout_)

    sides: dict[str, Side] = {"ours": (lambda: step({}), nullcontext)}
    if table.device.type == "cuda":
        sides["ours, triton"] = (lambda: step({"backend": "triton"}), nullcontext)
    sides["SDPA"] = (theirs, nullcontext)
    for name, backend in BACKENDS.items():
        sides[name] = (theirs, lambda b=backend: sdpa_kernel(b))
    return sides


def of_packed(table: Table) -> dict[str, Side]:
    call = make_inputs(PACKED, table.device).call
    s = call.sequences
    given = (*call[:3], s.cu_seqlens_q, s.cu_seqlens_k, s.max_seqlen_q, s.max_seqlen_k)
    return {"ours": (lambda: flash_attn_varlen_func(*given, causal=True), nullcontext)}


def of_decode(table: Table) -> dict[str, Side]:
    """A step of a paged cache; also with a key appended and rotated."""
    call = in_cache(make_inputs(DECODE, table.device), 16).call
    paged = {
        "cache_seqlens": call.sequences.seqused_k,
        "block_table": call.sequences.block_table,
        "causal": True,
    }
    new = torch.randn(4, 1, 8, 128, device=table.device).bfloat16()
    table_of = torch.rand(64, 64, device=table.device)
    more = {"k": new, "v": new, "rotary_cos": table_of.cos(), "rotary_sin": table_of.sin()}
    function: Callable[..., Any] = flash_attn_with_kvcache
    return {
        "ours": (lambda: function(*call[:3], **paged), nullcontext),
        "ours, appending": (lambda: function(*call[:3], **more, **paged), nullcontext),
    }


def main() -> int:
    parser = parser_of(__doc__, rounds=9, seconds=60)
    table = Table(parser.parse_args())
    calls = max(CALLS // table.arguments.shrink, 2)

    def microseconds(row: Row | None) -> float | None:
        return None if row is None else row.seconds() * 1e6

    def of_fastest(row: Row | None, name: str, peers: tuple[str, ...]) -> float | None:
        if row is None or name not in row.samples:
            return None
        return row.seconds(name) / min(row.seconds(p) for p in peers if p in row.samples)

    with torch.no_grad():
        if table.wants("forward"):
            row = cost_row(table, "forward", PLAIN, of_forward(table), calls)
            table.one("a plain call: us", microseconds(row), at_most=15)
            table.one("a plain call: of SDPA's", of_fastest(row, "ours", ("SDPA",)), at_most=0.83)
        if table.wants("packed"):
            row = cost_row(table, "packed", PACKED, of_packed(table), calls)
            table.one("a packed call: us", microseconds(row), at_most=20)
        if table.wants("decode"):
            row = cost_row(table, "decode", DECODE, of_decode(table), calls)
            table.one("a step on a paged cache: us", microseconds(row), at_most=18)
    if table.wants("step"):
        row = cost_row(table, "step", PLAIN, of_step(table), max(calls // 5, 1))
        for name in ("ours", "ours, triton"):
            line = f"forward and backward, {name}: of SDPA's fastest backend's"
            share = of_fastest(row, name, ("SDPA", *BACKENDS))
            table.one(line, share, at_most=0.75)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
