"""What rows cost that the Hopper kernel computes again: every row, none, or all merely looked at.

    python benchmarks/hopper/recompute.py --output FILE

Scores grow towards the first key, which is visited last, by so much that the lagging maximum cannot
follow (all rows are computed again), by a moderate amount (the sums of all rows are large, so O is
looked at and found right), or not at all.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median

import torch

from flashmoe import flash_attn_func
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.timing import measure

DEVICE = torch.device("cuda", 0)
GROWTH = {"none": 0.0, "looked at": 30.0, "all again": 200.0}  # in units of the softmax's exponent
SHAPES = ((32, 512, 16, 128), (2, 8192, 16, 128), (2, 8192, 32, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    rows = []
    for shape in SHAPES:
        torch.manual_seed(0)
        q, k, v = (torch.randn(shape, device=DEVICE).bfloat16() for _ in range(3))
        calls = {}
        for name, growth in GROWTH.items():
            ramp = torch.linspace(growth * shape[3] ** 0.5, 0, shape[1], device=DEVICE)
            grown_q, grown_k = q.clone(), k.clone()
            grown_q[..., 0], grown_k[..., 0] = 1, ramp[:, None].bfloat16()
            calls[name] = partial(flash_attn_func, grown_q, grown_k, v, backend="cuda")
        measured = measure(calls, DEVICE, rounds=arguments.rounds)
        seconds = {name: median(x.samples) for name, x in measured.items()}
        over = {name: seconds[name] / seconds["none"] for name in seconds}
        text = ", ".join(f"{name} {seconds[name] * 1e6:.1f} us ({over[name]:.2f})" for name in over)
        print(f"{shape}: {text}")
        samples = {name: [round(s * 1e6, 2) for s in x.samples] for name, x in measured.items()}
        rows.append({"shape": shape, "microseconds": samples})
    document = {
        "command": " ".join(["python", *sys.argv]),
        "fingerprint": fingerprint(DEVICE).to_json(),
        "problems": rows,
    }
    arguments.output.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
