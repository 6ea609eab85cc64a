"""A worker of `bench` whose kernels take as many passes as its argument says in every backward, and
in every forward of few queries: with more than one a genuine slowdown of these and nothing else.

On a CPU seconds are of the processor and not of the wall, so that a busy machine can tell, too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from flashmoe.backends import BACKENDS
from flashmoe.measure import timing
from flashmoe.ratchet.measuring import worker
from flashmoe.spec.problem import Problem

Bind = Callable[..., Callable[..., Any]]
PASSES = int(sys.argv[1])


def repeated(bind: Bind) -> Bind:
    def slower(problem: Problem, *more: Any, **options: Any) -> Callable[..., Any]:
        run = bind(problem, *more, **options)
        if problem.direction == "fwd" and problem.seqlen_q >= 16:
            return run
        return lambda *arguments: [run(*arguments) for _ in range(PASSES)][-1]

    return slower


for backend in BACKENDS.values():
    for name in ("bind", "bind_backward"):
        setattr(backend, name, repeated(getattr(backend, name)))
timing.time = SimpleNamespace(perf_counter=time.process_time)
worker.measure_quietly = lambda *calls, **options: (timing.measure(*calls, **options), 0.0)
timing.measure_limits = lambda *_: timing.Limits(1e12, 1e11)

if __name__ == "__main__":
    sys.exit(worker.main())
