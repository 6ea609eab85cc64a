"""Whether two result files are about the same thing. Each reason has words of its own, and none of
them ever passes."""

from __future__ import annotations

import difflib

from flashmoe.measure.timing import HOW
from flashmoe.ratchet.results.values import CaseResult, Results

# Fields of a fingerprint that must agree. `kernels` is what is being tested; memory, SM count and
# power limit follow from the device or show in SDPA's time as well.
COMPARED = ("device", "capability", "torch", "cuda", "driver", "triton", "threads")
# How runs were timed that do not tell: before code was evicted.
FORMERLY = {**HOW, "cuda": "device time, L2 flushed"}
# Share of a case's rounds in which the GPU slowed itself down (heat, or power from outside).
MOST_THROTTLED = 0.2
# From which likeness of names a missing and an extra case are taken for one that was renamed.
_RENAMED = 0.8


def how_timed(run: Results) -> str:
    return str(run.settings.get("timing", FORMERLY[run.kind]))


def of_runs(current: Results, baseline: Results) -> list[str]:
    """What makes the runs as wholes incomparable."""
    same = []
    if current.run == baseline.run:
        same = [f"both are the same run ({current.run[:12]}): nothing can differ from itself"]
    differences = current.fingerprint.differences(baseline.fingerprint.to_json(), COMPARED)
    here, there = (how_timed(run) for run in (current, baseline))
    if here != there:
        differences = [*differences, f"timing: {here!r} here, {there!r} there"]
    return same + [f"fingerprint: {difference}" for difference in differences]


def of_cases(current: Results, baseline: Results) -> dict[str, str]:
    """Reasons by the names of cases that cannot be compared."""
    old, new = baseline.by_name(), current.by_name()
    missing = [name for name in old if name not in new]
    extra = [name for name in new if name not in old]
    reasons = {}
    for names, others, reason, renamed in (
        (missing, extra, "missing from the current run", "renamed to"),
        (extra, missing, "not in the baseline", "renamed from"),
    ):
        for name in names:
            like = difflib.get_close_matches(name, others, 1, _RENAMED)
            reasons[name] = f"{reason}; {renamed} {like[0]}?" if like else reason
    for name in new:
        if name in old and (reason := _of_pair(new[name], old[name], current.run)):
            reasons[name] = reason
    return reasons


def _of_pair(new: CaseResult, old: CaseResult, run: str) -> str:
    if old.origin is not None and old.origin.run == run:
        return "the baseline has this case from the same run: nothing can differ from itself"
    if new.ours.status == "ok" and new.sdpa.status != "ok":
        return f"SDPA did not run: {new.reason}"
    if not old.ok:
        return f"the baseline has no figures ({old.reason})"
    if new.ok and new.sdpa_backend != old.sdpa_backend:
        return (
            f"SDPA ran by its {new.sdpa_backend or 'unknown'} backend, in the baseline by "
            f"{old.sdpa_backend or 'unknown'}: the yardstick is another one"
        )
    for which, case in (("now", new), ("in the baseline", old)):
        if case.throttled > MOST_THROTTLED:
            return (
                f"the GPU was throttled in {case.throttled:.0%} of the rounds {which} "
                f"({case.throttle_reasons}); at most {MOST_THROTTLED:.0%} can be judged"
            )
    return ""
