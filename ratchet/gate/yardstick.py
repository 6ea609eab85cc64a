"""SDPA is the yardstick: it did not change, so what its own time does is the environment's doing.

A change of the speedup may be the yardstick's rather than the kernel's:

* On a GPU both sides follow the clocks alike, and a ratio cancels them. What does not cancel is
  SDPA's time moving differently from SDPA's times in the other cases. Where that is significant and
  larger than half the fail threshold, it is taken out of the change; what is then left has to
  exceed the threshold to be the kernel's.
* On a CPU two programs feel a busy neighbour unlike each other: on a virtual machine with 2 cores
  SDPA took 7.3 ms for tens of seconds, then 8.6 ms, and an unchanged kernel 6.2 and 6.4 ms. Such
  rounds do not count (`stats.calm_times`), and what of it shows from process to process is taken
  out of the change (`stats.change_at_equal_sdpa`). What is left is the kernel's only if it is at
  least _BEYOND times as large as the movement of SDPA's time: that case's, where significant, or
  the median over all cases, whichever is larger. (Of 12 `bench` runs of an unchanged kernel on
  that machine over 9 hours, 282 comparisons between runs within half an hour showed no FAIL, and
  1,376 between runs further apart 6, in 4 of 110 gates: minutes apart a machine is more like
  itself.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.measure.stats import Interval
from flashmoe.ratchet.gate.integrity import COMPARED
from flashmoe.ratchet.gate.stats import Change
from flashmoe.ratchet.gate.thresholds import Thresholds
from flashmoe.ratchet.results.values import Results

_BEYOND = 0.75


@dataclass(frozen=True, slots=True)
class Moved:
    """`drift`: how far SDPA's times of all cases moved in the median, as a logarithm. `explained`:
    whether the yardstick's movement may account for the change of the speedup in this case."""

    drift: float
    explained: bool


def moves(
    sdpa: Sequence[Change], speed: Sequence[Change], thresholds: Sequence[Thresholds], cpu: bool
) -> list[Moved]:
    """For each case, from the changes of SDPA's time and of the speedup."""
    times = [math.log(change.ratio.value) for change in sdpa]
    drift = float(np.median(times or [0.0]))
    explained = _on_cpu if cpu else _on_gpu
    return [
        Moved(drift, explained(y, drift if len(times) > 2 else 0.0, s, d, t))
        for y, s, d, t in zip(times, sdpa, speed, thresholds, strict=True)
    ]


def _on_gpu(time: float, drift: float, sdpa: Change, speed: Change, limits: Thresholds) -> bool:
    alone, change = time - drift, math.log(speed.ratio.value)
    low, high = math.log(sdpa.ratio.low) - drift, math.log(sdpa.ratio.high) - drift
    if low <= 0 <= high or abs(alone) <= limits.log_fail / 2:
        return False
    # A slower SDPA makes a larger speedup.
    left = change - alone
    return -limits.log_fail < left < limits.log_improve


def _on_cpu(time: float, drift: float, sdpa: Change, speed: Change, limits: Thresholds) -> bool:
    movement = abs(drift)
    if sdpa.ratio.excludes(1.0):
        movement = max(movement, abs(time))
    return abs(math.log(speed.ratio.value)) < _BEYOND * movement


def notes(
    current: Results,
    baseline: Results,
    moved: Sequence[tuple[str, Interval]],
    thresholds: Thresholds,
) -> list[str]:
    """What moved besides the kernel: SDPA's own time (`moved`, by case), the measured limits, the
    rest of the fingerprint, other programs. None of it decides anything."""
    lines = []
    for which, run in (("now", current), ("in the baseline", baseline)):
        if busy := [case for case in run.cases if case.disturbed > 0]:
            most = max(case.disturbed for case in busy)
            what = "other programs disturbed" if run.fingerprint.threads else "throttling hit"
            lines.append(
                f"{what} {len(busy)} of {len(run.cases)} cases {which} (up to {most:.0%} of the "
                "rounds): intervals are wider than they need be"
            )
    beyond = max(-thresholds.fail, thresholds.improve) / 100
    for name, sdpa in moved:
        if sdpa.excludes(1.0) and abs(sdpa.value - 1) > beyond:
            low, value, high = (100 * (x - 1) for x in (sdpa.low, sdpa.value, sdpa.high))
            lines.append(
                f"SDPA's time in {name} changed by {value:+.1f} % [{low:+.1f}, {high:+.1f}]"
            )
    for dtype in sorted(set(current.limits) & set(baseline.limits)):
        new, old = current.limits[dtype], baseline.limits[dtype]
        for what, ratio in (
            ("matmul rate", new.matmul_flops / old.matmul_flops),
            ("copy rate", new.copy_bytes / old.copy_bytes),
        ):
            if abs(ratio - 1) > beyond:
                lines.append(f"measured {what} ({dtype}) changed by {100 * (ratio - 1):+.1f} %")
    others = tuple(
        name for name in current.fingerprint.to_json() if name not in (*COMPARED, "kernels")
    )
    return lines + current.fingerprint.differences(baseline.fingerprint.to_json(), others)
