"""Decides, from two result files, whether a kernel got slower. Pure: no files, no clock, no device.

What is compared is the speedup over SDPA, never a time: both files carry SDPA's samples interleaved
with ours, so a machine that runs at another clock today cancels out.

The rule, for each case:

* Each process gives one figure: the median over its rounds of log(SDPA's time / ours), paired by
  round. The process is the unit that varies most (allocation, code placement, neighbours), so it is
  the unit of the statistics; many rounds of one process prove nothing about the next.
* The change is the difference of the means of these figures, current minus baseline, with the 20 %
  smallest and largest trimmed (now and then a process is hit by something else as a whole), and
  Yuen's t-test: a 95 % interval and one-sided p-values. Both files need MIN_PROCESSES processes.
* The p-values of all cases are adjusted by Holm's method, so the chance of any false FAIL in a
  whole gate, whatever the number of cases, is below ALPHA.
* FAIL: the speedup fell by more than the fail threshold (point estimate, default 3 %) and the
  adjusted p-value of "did not fall" is below ALPHA. A case that gave wrong results or did not run
  fails, too.
* IMPROVED: it rose by more than the improve threshold (default 5 %), with the adjusted p-value of
  "did not rise" below ALPHA.
* YARDSTICK: FAIL's or IMPROVED's rule holds, but the change is less than _BEYOND_YARDSTICK times
  the movement of SDPA's own time: that case's, where significant (ALPHA), or the median over all
  cases. SDPA did not change, so the environment did (clocks, a neighbour on the same cores), and a
  ratio cancels that only as far as both sides feel it alike. Passes with a note and moves no
  baseline; where it is the verdict of every case, nothing was judged, and that is no pass.
* INCONCLUSIVE: neither, and either the point estimate is beyond the fail threshold without being
  significant, or the 95 % interval reaches further down than the threshold below the estimate: a
  slowdown of the threshold's size could hide in it. Passes, and says how many processes would do.
* PASS: everything else.

Exit code of the whole: 4 when the two files are not about the same thing (a case missing, extra or
without SDPA's figures, a fingerprint that differs in COMPARED), else 1 for any FAIL, else 4 if
every case is YARDSTICK, else 0.

To see it work, slow one case down and gate the result; it must exit 1:

    python -c "
    from pathlib import Path
    from flashmoe.ratchet.results import load, save, slowed
    run = load(Path('results/current.json'))
    save(slowed(run, run.cases[0].name, 1.10), Path('results/slower.json'))"
    python -m flashmoe.ratchet gate results/slower.json --baseline results/baseline.json
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.ratchet import stats
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.results import CaseResult, Results
from flashmoe.stats import Interval

ALPHA = 0.05
# How much larger than SDPA's own movement a fall of the speedup must be to be the kernel's, as a
# ratio of logarithms. Seen on a virtual machine with 2 cores: where SDPA became 8 % slower between
# two runs, an unchanged kernel became 22 % slower.
_BEYOND_YARDSTICK = 2.0
MIN_PROCESSES = 3
# Fields of a fingerprint that must agree. `kernels` is what is being tested; memory, SM count and
# power limit follow from the device or show in SDPA's time as well.
COMPARED = ("device", "capability", "torch", "cuda", "driver", "triton", "threads")

PASS, FAIL, IMPROVED = "PASS", "FAIL", "IMPROVED"
YARDSTICK, INCONCLUSIVE = "YARDSTICK", "INCONCLUSIVE"
EXIT_PASS, EXIT_REGRESSION, EXIT_BAD_INPUT, EXIT_INTEGRITY = 0, 1, 2, 4


@dataclass(frozen=True, slots=True)
class Thresholds:
    """In percent of the speedup over SDPA; `fail` negative, `improve` positive."""

    fail: float = -3.0
    improve: float = 5.0

    def __post_init__(self) -> None:
        if not -100 < self.fail < 0:
            raise UserError(f"threshold-fail must be between -100 and 0, got {self.fail}")
        if not 0 < self.improve < math.inf:
            raise UserError(f"threshold-improve must be positive, got {self.improve}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one case. Ratios are current / baseline: `change` of the speedup over SDPA,
    `ours` and `sdpa` of the times; None where there is nothing to compare. p-values adjusted."""

    name: str
    verdict: str
    reason: str = ""
    current: CaseResult | None = None
    baseline: CaseResult | None = None
    change: Interval | None = None
    ours: Interval | None = None
    sdpa: Interval | None = None
    p_slower: float = 1.0
    p_faster: float = 1.0

    @property
    def percent(self) -> float | None:
        return None if self.change is None else percent(self.change.value)


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of a gate. `integrity` says why the files cannot be compared; `environment` what
    moved that is not the kernel."""

    exit_code: int
    verdicts: tuple[Verdict, ...]
    integrity: tuple[str, ...]
    environment: tuple[str, ...]
    thresholds: Thresholds

    def named(self, *verdicts: str) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.verdict in verdicts)

    @property
    def summary(self) -> str:
        """One line: the outcome and how many cases have which verdict."""
        order = (FAIL, YARDSTICK, IMPROVED, INCONCLUSIVE, PASS)
        counts = [f"{len(self.named(v))} {v}" for v in order if self.named(v)]
        outcome = {
            EXIT_PASS: "passed",
            EXIT_REGRESSION: "failed: a kernel got slower or broke",
            EXIT_INTEGRITY: "not comparable with the baseline",
        }[self.exit_code]
        return f"{outcome} ({', '.join(counts) or 'no case compared'})"


def percent(ratio: float) -> float:
    return 100.0 * (ratio - 1.0)


def decide(current: Results, baseline: Results, thresholds: Thresholds) -> Decision:
    """The rule above. Raises UserError when a file's samples cannot support any decision."""
    old, new = baseline.by_name(), current.by_name()
    integrity = [
        f"fingerprint: {difference}"
        for difference in current.fingerprint.differences(baseline.fingerprint.to_json(), COMPARED)
    ]
    integrity += [f"case missing from the current run: {name}" for name in old if name not in new]
    integrity += [f"case not in the baseline: {name}" for name in new if name not in old]
    integrity += [
        f"SDPA did not run in {case.name}: {case.reason}"
        for case in current.cases
        if case.sdpa.status != "ok" and case.ours.status == "ok"
    ]
    verdicts = _verdicts([(new[name], old[name]) for name in new if name in old], thresholds)
    if integrity:
        code = EXIT_INTEGRITY
    elif any(v.verdict == FAIL for v in verdicts):
        code = EXIT_REGRESSION
    elif all(v.verdict == YARDSTICK for v in verdicts):
        code = EXIT_INTEGRITY
    else:
        code = EXIT_PASS
    environment = _environment(current, baseline, verdicts, thresholds)
    return Decision(code, tuple(verdicts), tuple(integrity), tuple(environment), thresholds)


@dataclass(frozen=True, slots=True)
class _Compared:
    current: CaseResult
    baseline: CaseResult
    change: stats.Change
    ours: stats.Change
    sdpa: stats.Change


def _verdicts(
    pairs: Sequence[tuple[CaseResult, CaseResult]], thresholds: Thresholds
) -> list[Verdict]:
    for which, case in (x for new, old in pairs for x in (("baseline", old), ("current", new))):
        if which == "baseline" and not case.ok:
            raise UserError(f"baseline case {case.name} has no figures ({case.reason})")
        if case.ok and (found := len(case.ours.samples)) < MIN_PROCESSES:
            raise UserError(
                f"{which} case {case.name} comes from {found} process(es); a decision needs "
                f"{MIN_PROCESSES}: run bench with --processes {MIN_PROCESSES} or more"
            )
    compared = [_compare(new, old) for new, old in pairs if new.ok]
    slower = stats.holm([c.change.p_below for c in compared])
    faster = stats.holm([c.change.p_above for c in compared])
    drift = abs(float(np.median([math.log(c.sdpa.ratio.value) for c in compared] or [0.0])))
    decided = {
        c.current.name: _decide_case(c, p_slower, p_faster, drift, thresholds)
        for c, p_slower, p_faster in zip(compared, slower, faster, strict=True)
    }
    return [decided.get(new.name) or _without_figures(new, old) for new, old in pairs]


def _compare(current: CaseResult, baseline: CaseResult) -> _Compared:
    def speedups(case: CaseResult) -> stats.Array:
        return stats.log_speedups(case.ours.samples, case.sdpa.samples)

    def times(samples: stats.Samples) -> stats.Array:
        return np.asarray(np.log(stats.medians(samples)))

    return _Compared(
        current,
        baseline,
        stats.change(speedups(current), speedups(baseline)),
        stats.change(times(current.ours.samples), times(baseline.ours.samples)),
        stats.change(times(current.sdpa.samples), times(baseline.sdpa.samples)),
    )


def _without_figures(current: CaseResult, baseline: CaseResult) -> Verdict:
    """A yardstick that does not run is not the kernel's fault; a kernel that does not is."""
    verdict = FAIL if current.ours.status != "ok" else YARDSTICK
    return Verdict(current.name, verdict, current.reason, current, baseline)


def _decide_case(
    c: _Compared, p_slower: float, p_faster: float, drift: float, thresholds: Thresholds
) -> Verdict:
    """`drift`: how far the SDPA times of all cases moved in the median, as a logarithm."""
    ratio = c.change.ratio
    least, most = 1 + thresholds.fail / 100, 1 + thresholds.improve / 100
    reason = ""
    if ratio.value < least and p_slower < ALPHA:
        verdict = FAIL
    elif ratio.value > most and p_faster < ALPHA:
        verdict = IMPROVED
    elif ratio.value < least or ratio.low < ratio.value * least:
        verdict = INCONCLUSIVE
        processes = min(len(c.current.ours.samples), len(c.baseline.ours.samples))
        needed = stats.processes_needed(
            processes, math.log(ratio.high / ratio.low) / 2, -math.log(least)
        )
        reason = (
            f"the interval is too wide for {-thresholds.fail:g} %: about {needed} processes in "
            f"both runs would do (now {processes})"
        )
        if ratio.value < least and ratio.low >= ratio.value * least:
            reason = "slower beyond the threshold, but not significantly over all cases"
    else:
        verdict = PASS
    if verdict in (FAIL, IMPROVED) and _is_environment(c, drift):
        verdict = YARDSTICK
        reason = (
            f"SDPA's own time changed by {percent(c.sdpa.ratio.value):+.1f} % here and by "
            f"about {percent(math.exp(drift)):.1f} % over all cases, ours by "
            f"{percent(c.ours.ratio.value):+.1f} %: the environment changed"
        )
    return Verdict(
        c.current.name,
        verdict,
        reason,
        c.current,
        c.baseline,
        ratio,
        c.ours.ratio,
        c.sdpa.ratio,
        p_slower,
        p_faster,
    )


def _is_environment(c: _Compared, drift: float) -> bool:
    movement = drift
    if 2 * min(c.sdpa.p_below, c.sdpa.p_above) < ALPHA:
        movement = max(drift, abs(math.log(c.sdpa.ratio.value)))
    return abs(math.log(c.change.ratio.value)) < _BEYOND_YARDSTICK * movement


def _environment(
    current: Results, baseline: Results, verdicts: Sequence[Verdict], thresholds: Thresholds
) -> list[str]:
    """What moved besides the kernel: SDPA's own time, the measured limits, the rest of the
    fingerprint. None of it decides anything."""
    notes = []
    for which, run in (("now", current), ("in the baseline", baseline)):
        if busy := [case for case in run.cases if case.disturbed > 0]:
            most = max(case.disturbed for case in busy)
            notes.append(
                f"other programs disturbed {len(busy)} of {len(run.cases)} cases {which} "
                f"(up to {most:.0%} of the rounds): intervals are wider than they need be"
            )
    beyond = max(-thresholds.fail, thresholds.improve) / 100
    for v in verdicts:
        if v.sdpa and v.sdpa.excludes(1.0) and abs(v.sdpa.value - 1) > beyond:
            notes.append(
                f"SDPA's time in {v.name} changed by {percent(v.sdpa.value):+.1f} % "
                f"[{percent(v.sdpa.low):+.1f}, {percent(v.sdpa.high):+.1f}]"
            )
    for dtype in sorted(set(current.limits) & set(baseline.limits)):
        new, old = current.limits[dtype], baseline.limits[dtype]
        for what, ratio in (
            ("matmul rate", new.matmul_flops / old.matmul_flops),
            ("copy rate", new.copy_bytes / old.copy_bytes),
        ):
            if abs(ratio - 1) > beyond:
                notes.append(f"measured {what} ({dtype}) changed by {percent(ratio):+.1f} %")
    others = tuple(
        name for name in current.fingerprint.to_json() if name not in (*COMPARED, "kernels")
    )
    notes += current.fingerprint.differences(baseline.fingerprint.to_json(), others)
    return notes
