"""What Nsight Compute looks at: one call of a case, after it has warmed up.

Run by `profile` as `ncu … python -m flashmoe.ratchet.measuring.profiled CASE`; only what is between
the profiler's start and stop is profiled.
"""

from __future__ import annotations

import sys

import torch

from flashmoe.ratchet.measuring.suite import parse
from flashmoe.ratchet.measuring.workload import Workload


def main() -> int:
    workload = Workload(parse(sys.argv[1]), torch.device("cuda"), seed=0)
    for _ in range(3):
        workload.ours()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    workload.ours()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
    return 0


if __name__ == "__main__":
    sys.exit(main())
