"""The backward alone, and forward and backward as one step, beside SDPA and FlashAttention.

    python benchmarks/training.py --output benchmarks/results/training-DEVICE.json
    python benchmarks/training.py --only rows step --seconds 120

`rows`: 18 problems of heads * head_dim 2048, also deterministic; `gqa` and `windows` with these;
`step`: 16384 tokens of short sequences; `memory`: what the backward takes beside its gradients. All
through autograd; bfloat16; the gradients are compared with the float64 reference, or where that
takes too long those of each side with the others', before they are timed. Listed efficiencies of
peers are of another run on an H200 (29 November 2026). Whole models: benchmarks/models.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from hopper.backward import ROWS
from sides import SDPA, against, ours, timed
from tables import Row, Table, listed, measures, over_peers, run_sections
from windows import SPECS, WIDE, window_row

from flashmoe.measure.inputs import make_inputs
from flashmoe.measure.timing import SLEEP_CYCLES
from flashmoe.spec.mask import CAUSAL, FULL
from flashmoe.spec.problem import Problem

PEERS = (*SDPA, "FA3", "FA4")
DETERMINISTIC = {"deterministic": {"deterministic": True}}
# By head_dim, seqlen and mask (None: each) the efficiency on the way to the goal.
WAY_POINTS = (
    ((128, 16384, None), 0.90),
    ((128, 1024, FULL), 0.66),
    ((128, 1024, CAUSAL), 0.50),
    ((64, 16384, None), 0.77),
    ((256, 16384, None), 0.70),
    ((256, 1024, None), 0.52),
)
# What FlashAttention-4 and cuDNN took backward on an H200, ms.
GQA = (
    (Problem(4, 32, 8, 4096, 4096, 128, "bfloat16", CAUSAL, "bwd"), {"FA4": 2.522, "cuDNN": 2.807}),
    (Problem(1, 64, 8, 8192, 8192, 128, "bfloat16", CAUSAL, "bwd"), {"FA4": 4.433, "cuDNN": 5.046}),
)
STEPS = tuple(
    Problem(16384 // s, 2048 // d, 2048 // d, s, s, d, "bfloat16", mask, "bwd")
    for d in (64, 128)
    for s in (64, 128, 256, 512)
    for mask in (FULL, CAUSAL)
)
# Of the backwards that there are: options of the forward.
PATHS: dict[str, dict[str, Any]] = {
    "planned": {},
    "deterministic": {"deterministic": True},
    "triton": {"backend": "triton"},
}
MEMORY = (
    Problem(4, 16, 16, 4096, 4096, 128, "bfloat16", CAUSAL, "bwd"),
    Problem(4, 32, 8, 4096, 4096, 128, "bfloat16", CAUSAL, "bwd"),
    Problem(4, 8, 8, 4096, 4096, 256, "bfloat16", CAUSAL, "bwd"),
)


@measures
def backward_row(
    table: Table, section: str, problem: Problem, peers: Mapping[str, float]
) -> Row | None:
    """`peers`: listed efficiencies."""
    inputs = make_inputs(problem, table.device)
    calls, failed, wrong = against(inputs, table.peers(PEERS), options=DETERMINISTIC)
    return table.row(section, problem, calls, wrong=wrong, failed=failed, listed=peers)


@measures
def step_row(table: Table, section: str, problem: Problem) -> Row | None:
    inputs = make_inputs(problem, table.device)
    calls, failed, wrong = against(inputs, table.peers(PEERS), step=True)
    both = (problem, replace(problem, direction="fwd"))
    floor = sum(table.limits.floor(p.flops, p.bytes) for p in both)
    what = {"wrong": wrong, "failed": failed, "sleep_cycles": 4 * SLEEP_CYCLES}
    return table.row(section, problem, calls, floor=floor, **what)


def state_rows(table: Table) -> None:
    rows = [
        backward_row(
            table, "rows", row.problem, {"FA3": row.fa3, "FA4": row.fa4, "cuDNN": row.cudnn}
        )
        for row in ROWS
    ]
    table.mean("backward: mean efficiency (the goal)", rows, Row.efficiency, at_least=0.67)
    table.mean("backward: mean efficiency (enough)", rows, Row.efficiency, at_least=0.64)
    table.each("backward: ahead of the best peer (the goal)", rows, over_peers, at_least=1.0)
    table.each("backward: ahead of the best peer (enough)", rows, over_peers, at_least=0.97)
    for (head_dim, seqlen, mask), bound in WAY_POINTS:
        some = [
            found
            for found, row in zip(rows, ROWS, strict=True)
            if (row.problem.head_dim, row.problem.seqlen_q) == (head_dim, seqlen)
            and mask in (None, row.problem.mask)
        ]
        text = "" if mask is None else f", {mask}"
        line = f"backward: way point, head_dim {head_dim} at {seqlen}{text}: efficiency"
        table.each(line, some, Row.efficiency, at_least=bound)

    def kept(row: Row) -> float:
        return row.ratio("ours", "ours, deterministic").value

    line = "backward, deterministic: share of the default's speed"
    table.mean(f"{line}, mean (the goal)", rows, kept, at_least=0.95)
    table.mean(f"{line}, mean (enough)", rows, kept, at_least=0.85)


def state_gqa(table: Table) -> None:
    rows = [backward_row(table, "gqa", problem, listed(problem, times)) for problem, times in GQA]
    table.each("backward with GQA: ahead of the best peer", rows, over_peers, at_least=1.0)


def state_windows(table: Table) -> None:
    rows = [
        window_row(table, "windows", replace(spec.problem, direction="bwd"), spec)
        for spec in SPECS
        if spec.problem.mask.left >= WIDE
    ]
    table.each("backward with windows: ahead of the best peer", rows, over_peers, at_least=1.0)


def state_step(table: Table) -> None:
    rows = [step_row(table, "step", problem) for problem in STEPS]

    def over_sdpa(row: Row) -> float:
        times = [row.seconds(name) for name in SDPA if name in row.samples]
        return min(times, default=float("inf")) / row.seconds()

    table.each("a step of short sequences: ahead of SDPA", rows, over_sdpa, at_least=1.0)
    table.mean("a step of short sequences: times SDPA, mean", rows, over_sdpa, at_least=1.2)


def extra_bytes(call: Callable[[], Sequence[torch.Tensor]], device: torch.device) -> int:
    """Of a backward: the most that is allocated at once beside what it returns."""
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _, *gradients = call()
    torch.cuda.synchronize(device)
    sizes = sum(x.numel() * x.element_size() for x in gradients)
    return torch.cuda.max_memory_allocated(device) - before - sizes


def state_memory(table: Table) -> None:
    for problem in MEMORY:
        for path, options in PATHS.items():
            line = f"extra memory of the backward, {path}, {problem.label}: times q's bytes"
            share, note = None, "a GPU's"
            if table.device.type == "cuda":
                try:
                    inputs = make_inputs(problem, table.device)
                    q = inputs.call.q.numel() * inputs.call.q.element_size()
                    call = timed(ours(inputs, **options), inputs)
                    share, note = extra_bytes(call, table.device) / q, ""
                except RuntimeError as error:
                    note = " ".join(str(error).split())
            table.one(line, share, at_most=2.1, note=note)


SECTIONS = {
    "rows": state_rows,
    "step": state_step,
    "gqa": state_gqa,
    "windows": state_windows,
    "memory": state_memory,
}


def main() -> int:
    return run_sections(__doc__, SECTIONS, seconds=300)


if __name__ == "__main__":
    raise SystemExit(main())
