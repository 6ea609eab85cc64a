"""Host time of a call against its bounds: forward, a training step, packed, decoding.

    python benchmarks/overhead.py --output benchmarks/results/overhead-DEVICE.json

The rows of benchmarks/host_cost.py, which says how they are timed, as a table with SDPA's beside
ours, and a step on Triton's backward. --shrink has fewer calls a sample.
"""

from __future__ import annotations

from functools import partial

import torch
from host_cost import measure, rows_of, step
from tables import Row, Table, parser_of

from flashmoe import flash_attn_func
from flashmoe.spec.mask import FULL
from flashmoe.spec.problem import Problem

CALLS = 200  # of a sample
PLAIN = Problem(1, 8, 8, 128, 128, 64, "bfloat16", FULL)


def main() -> int:
    table = Table(parser_of(__doc__, rounds=40, seconds=60).parse_args())
    rows = rows_of(table.device)
    if table.device.type == "cuda":
        q, k, v = (
            torch.randn(1, 128, 8, 64, device=table.device).bfloat16().requires_grad_()
            for _ in "qkv"
        )
        triton = partial(flash_attn_func, backend="triton")
        rows["step, triton"] = step(triton, [q, k, v], torch.randn_like(q))
    calls = max(CALLS // table.arguments.shrink, 2)
    taken = measure(rows, table.device, calls, table.arguments.rounds)
    found = {}
    for section in ("forward", "cache", "step"):
        samples = {}
        for name, times in taken.items():
            kind, _, rest = name.partition(", ")
            if kind == section:
                label = rest if rest.startswith("SDPA") else ", ".join(filter(None, ("ours", rest)))
                samples[label] = tuple(x * 1e-6 for x in times)
        if section == "cache":
            samples["ours"] = samples.pop("ours, paged")
        found[section] = table.add(Row(section, "a call", 0.0, samples, problem=PLAIN))

    def microseconds(section: str, name: str = "ours") -> float:
        return found[section].seconds(name) * 1e6

    def of_sdpa(section: str, name: str, default: bool = False) -> float | None:
        row = found[section]
        if name not in row.samples:
            return None
        peers = [x for x in row.samples if x == "SDPA default" or (not default and "SDPA" in x)]
        return row.seconds(name) / min(map(row.seconds, peers))

    table.one("a plain call: us", microseconds("forward"), at_most=15)
    table.one("a plain call: of SDPA's", of_sdpa("forward", "ours", default=True), at_most=0.83)
    table.one("a packed call: us", microseconds("forward", "ours, packed"), at_most=20)
    table.one("a step on a paged cache: us", microseconds("cache"), at_most=18)
    for name in ("ours", "ours, triton"):
        line = f"forward and backward, {name}: of SDPA's fastest backend's"
        table.one(line, of_sdpa("step", name), at_most=0.75)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
