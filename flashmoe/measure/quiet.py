"""Timing on a CPU that is not ours alone: rounds in which others took the cores are taken again.

What decides is how long our threads were runnable but had no core (the scheduler's run delay, zero
on a quiet machine), never the times themselves: choosing samples by their value would make up a
result. Elsewhere than on Linux, and on CUDA, where device time is measured, every round counts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from flashmoe.measure.timing import Measurement, measure

# A round is disturbed when its run delay exceeds this many seconds and this share of its wall time.
# Waking our own threads takes about 0.1 ms of a round; one competing process on two cores costs
# more than the round itself (the delay sums over our threads).
_WAKING = 2e-4
_DISTURBED = 0.01
# Attempts for each round that is wanted.
_ATTEMPTS = 2


def run_delay() -> float | None:
    """Seconds that threads of this process have waited for a core so far; None if unknown."""
    total, found = 0, False
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread may just have ended
            total += int(path.read_text(encoding="utf-8").split()[1])
            found = True
    return total * 1e-9 if found else None


def measure_quietly(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int,
    seed: int,
    delay: Callable[[], float | None] = run_delay,
    max_seconds: float | None = None,
    after_round: Callable[[], None] | None = None,
    before_sample: Callable[[str], None] | None = None,
) -> tuple[dict[str, Measurement], float]:
    """`timing.measure`, and the share of its rounds that were disturbed: 0 unless fewer than
    `rounds` of twice as many attempts (or of those that `max_seconds` allow) were quiet, in which
    case the least disturbed make up for the rest. Rounds are kept or replaced whole, so samples
    stay paired. A candidate that fails keeps no samples. `after_round` is called on CUDA only,
    where the rounds that are taken are those that are kept."""
    if device.type != "cpu" or delay() is None:
        measured = measure(
            candidates,
            device,
            rounds=rounds,
            warmup=warmup,
            seed=seed,
            max_seconds=max_seconds,
            after_round=after_round,
            before_sample=before_sample,
        )
        return measured, 0.0
    end = None if max_seconds is None else time.perf_counter() + max_seconds
    if warmup:
        measure(
            candidates,
            device,
            rounds=1,
            warmup=warmup - 1,
            seed=seed,
            before_sample=before_sample,
        )
    failed: dict[str, Measurement] = {}
    taken: list[tuple[float, dict[str, Measurement]]] = []
    for number in range(_ATTEMPTS * rounds):
        alive = {name: call for name, call in candidates.items() if name not in failed}
        before, start = delay() or 0.0, time.perf_counter()
        measured = measure(
            alive,
            device,
            rounds=1,
            warmup=0,
            seed=seed + number,
            before_sample=before_sample,
        )
        waited = max((delay() or 0.0) - before - _WAKING, 0.0)
        failed |= {name: m for name, m in measured.items() if m.status != "ok"}
        if len(failed) == len(candidates):
            return failed, 0.0
        taken.append((waited / (time.perf_counter() - start), measured))
        if sum(share <= _DISTURBED for share, _ in taken) == rounds:
            break
        if end is not None and time.perf_counter() >= end:
            break
    quietest = sorted(range(len(taken)), key=lambda i: taken[i][0])[:rounds]
    kept = [taken[i] for i in sorted(quietest)]
    joined = {
        name: Measurement("ok", tuple(x for _, m in kept for x in m[name].samples))
        for name in candidates
        if name not in failed
    }
    return joined | failed, sum(share > _DISTURBED for share, _ in kept) / len(kept)
