"""A worker of `bench` whose kernels take as many passes as its argument says in every backward, and
in every forward of few queries: with more than one a genuine slowdown of these, and of nothing else.

Seconds are of the processor and not of the wall, so that a busy machine can tell, too.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from flashmoe.backends import blocked, cpu
from flashmoe.backends.base import Run
from flashmoe.measure import timing
from flashmoe.ratchet.measuring import worker
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

PASSES = int(sys.argv[1])


def repeated(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(*arguments: Any) -> Any:
        for _ in range(PASSES - 1):
            call(*arguments)
        return call(*arguments)

    return run


def bind(self: cpu.CpuBackend, problem: Problem, tile: Tile | None) -> Run:
    run = bound(self, problem, tile)
    return repeated(run) if problem.seqlen_q < 16 else run


bound, cpu.CpuBackend.bind = cpu.CpuBackend.bind, bind
blocked._attention_backward = repeated(blocked._attention_backward)
timing.time = SimpleNamespace(perf_counter=time.process_time)
worker.measure_quietly = lambda *calls, **options: (timing.measure(*calls, **options), 0.0)
worker.measure_limits = lambda *_: timing.Limits(1e12, 1e11)

if __name__ == "__main__":
    sys.exit(worker.main())
