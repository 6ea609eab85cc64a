"""A call made slower by a known share: what `selftest` injects to see whether the gate notices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from flashmoe.measure.timing import measure

_CYCLES = 1_000_000


def delayed(
    call: Callable[[], object], device: torch.device, percent: float
) -> Callable[[], object]:
    """`call` with a delay behind it, on the device where it runs, that takes `percent` of its time
    (its own median, measured here); `call` itself where that is 0."""
    if percent == 0:
        return call
    timed = {"call": call}
    if device.type == "cuda":
        timed["sleep"] = lambda: torch.cuda._sleep(_CYCLES)  # type: ignore[no-untyped-call]
    measured = measure(timed, device, rounds=15, warmup=3)
    seconds = {name: statistics.median(m.samples) for name, m in measured.items()}
    wanted = seconds["call"] * percent / 100

    def on_gpu() -> None:
        cycles = max(1, round(wanted / seconds["sleep"] * _CYCLES))
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]

    def on_cpu() -> None:
        end = time.perf_counter() + wanted
        while time.perf_counter() < end:
            pass

    delay = on_gpu if device.type == "cuda" else on_cpu

    def slower() -> object:
        result = call()
        delay()
        return result

    return slower
