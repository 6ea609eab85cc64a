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
* On a CPU a neighbour slows SDPA and us unlike each other. There the rounds count in which SDPA
  found the machine undisturbed (`stats.calm_times`), and the figure is the speedup at equal time
  of SDPA (`stats.change_at_equal_sdpa`): what of it follows SDPA's time from one process of a
  file to another is taken out, and how uncertain that is adds to the error.
* The p-values of all cases are adjusted by Holm's method, so the chance of any false FAIL in a
  whole gate, whatever the number of cases, is below ALPHA.
* PASS: the interval excludes a slowdown of the fail threshold (`thresholds.DEFAULTS`).
* FAIL: it does not, and a slowdown is proven: the adjusted p-value of "did not get slower" is below
  ALPHA, and the change is larger than what same against same shows (`stats.effect_floor` of the
  baseline's processes). A kernel slower by exactly the threshold so fails in about 95 of 100 gates
  (docs/ratchet.md), where asking for an estimate beyond the threshold would let every other one
  pass. A case that gave wrong results or did not run fails, too.
* INCONCLUSIVE: it does not, and none is proven; says how many processes would do.
* IMPROVED: the estimate is faster by more than the improve threshold, and proven so in the same
  way.
* INTEGRITY: there is nothing to compare. The case is missing or extra, both sides are from the same
  run, SDPA ran by another of its backends or not at all, or the GPU was throttled for more than
  MOST_THROTTLED of the rounds.

A case that the baseline's build does not support is skipped, and named as such: there is nothing
yet that could get slower.

SDPA did not change, so what its own time does is the environment's doing. See `yardstick`; a
verdict that it may explain becomes INCONCLUSIVE, and a note says what moved.

Exit code of the whole: 4 when the files are not about the same thing (any INTEGRITY, a fingerprint
that differs in COMPARED, a run compared with itself, or an environment that changed under every
case), else 1 for any FAIL,
else 3 for any INCONCLUSIVE, else 0.

To see it work, slow one case down and gate the result; it must exit 1:

    python -c "
    from pathlib import Path
    from flashmoe.ratchet.results.files import load, save
    from flashmoe.ratchet.results.values import slowed
    run = load(Path('results/current.json'))
    save(slowed(run, run.cases[0].name, 1.10), Path('results/slower.json'))"
    python -m flashmoe.ratchet gate results/slower.json --baseline results/baseline.json
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flashmoe.measure.stats import Interval, factor
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate import integrity, stats, yardstick
from flashmoe.ratchet.gate.thresholds import Thresholds, percent
from flashmoe.ratchet.gate.yardstick import Moved
from flashmoe.ratchet.results.values import CaseResult, Results

ALPHA = 0.005
MIN_PROCESSES = 3

PASS, FAIL, IMPROVED = "PASS", "FAIL", "IMPROVED"
INCONCLUSIVE, INTEGRITY = "INCONCLUSIVE", "INTEGRITY"
EXIT_PASS, EXIT_REGRESSION, EXIT_BAD_INPUT, EXIT_INCONCLUSIVE, EXIT_INTEGRITY = 0, 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one case. Ratios are current / baseline: `change` of the speedup over SDPA,
    `ours` and `sdpa` of the times; None where there is nothing to compare. p-values adjusted.
    `detectable` is the smallest slowdown that this gate would have seen 19 times of 20, as a
    factor. `environment`: the verdict is INCONCLUSIVE for what the environment did."""

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
    detectable: float | None = None
    environment: bool = False

    @property
    def percent(self) -> float | None:
        return None if self.change is None else percent(self.change.value)

    @property
    def kind(self) -> str:
        """Of the case."""
        measured = self.current or self.baseline
        return measured.case.kind if measured else ""


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of a gate. `integrity` says why the files as wholes cannot be compared;
    `environment` what moved that is not the kernel; `skipped` which cases the baseline's build does
    not support, and why."""

    exit_code: int
    verdicts: tuple[Verdict, ...]
    integrity: tuple[str, ...]
    environment: tuple[str, ...]
    thresholds: Thresholds
    skipped: tuple[str, ...] = ()

    def named(self, *verdicts: str) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.verdict in verdicts)

    @property
    def problems(self) -> tuple[str, ...]:
        """All that cannot be compared, of the files and of single cases."""
        cases = tuple(f"{v.name}: {v.reason}" for v in self.named(INTEGRITY))
        return self.integrity + cases

    @property
    def summary(self) -> str:
        """One line: the outcome and how many cases have which verdict."""
        order = (FAIL, INTEGRITY, IMPROVED, INCONCLUSIVE, PASS)
        counts = [f"{len(self.named(v))} {v}" for v in order if self.named(v)]
        outcome = {
            EXIT_PASS: "passed",
            EXIT_REGRESSION: "failed: a kernel got slower or broke",
            EXIT_INCONCLUSIVE: "cannot tell: too noisy, or the environment changed",
            EXIT_INTEGRITY: "not comparable with the baseline",
        }[self.exit_code]
        return f"{outcome} ({', '.join(counts) or 'no case compared'})"


def decide(
    current: Results, baseline: Results, thresholds: Thresholds, *, created: bool = False
) -> Decision:
    """The rule above. `created`: the baseline was made from this very run just now, which is no
    mistake then. Raises UserError when a file's samples cannot support any decision, or a pattern
    of `thresholds` names no case."""
    absent = {c.name: c.ours.reason for c in baseline.cases if c.ours.status == "unsupported"}
    current, baseline = (
        replace(run, cases=tuple(case for case in run.cases if case.name not in absent))
        for run in (current, baseline)
    )
    old, new = baseline.by_name(), current.by_name()
    thresholds.check({**old, **new})
    wrong = [] if created else integrity.of_runs(current, baseline)
    reasons = integrity.of_cases(current, baseline)
    comparable = [(new[n], old[n]) for n in new if n in old and n not in reasons]
    decided = {v.name: v for v in _verdicts(comparable, thresholds, current.kind == "cpu")}
    verdicts = [
        decided.get(name) or Verdict(name, INTEGRITY, reasons[name], new.get(name), old.get(name))
        for name in [*new, *(name for name in old if name not in new)]
    ]
    if verdicts and all(v.environment for v in verdicts):
        wrong.append("the environment changed under every case: nothing was judged")
    if wrong or any(v.verdict == INTEGRITY for v in verdicts):
        code = EXIT_INTEGRITY
    elif any(v.verdict == FAIL for v in verdicts):
        code = EXIT_REGRESSION
    elif any(v.verdict == INCONCLUSIVE for v in verdicts):
        code = EXIT_INCONCLUSIVE
    else:
        code = EXIT_PASS
    moved = [(v.name, v.sdpa) for v in verdicts if v.sdpa]
    environment = yardstick.notes(current, baseline, moved, thresholds)
    skipped = tuple(f"{name}: {why}" for name, why in absent.items())
    return Decision(code, tuple(verdicts), tuple(wrong), tuple(environment), thresholds, skipped)


@dataclass(frozen=True, slots=True)
class _Compared:
    current: CaseResult
    baseline: CaseResult
    change: stats.Change
    ours: stats.Change
    sdpa: stats.Change
    floor: float
    processes: int  # of the side that has fewer

    @property
    def name(self) -> str:
        return self.current.name


def _verdicts(
    pairs: Sequence[tuple[CaseResult, CaseResult]], thresholds: Thresholds, cpu: bool
) -> list[Verdict]:
    for which, case in (x for new, old in pairs for x in (("baseline", old), ("current", new))):
        if case.ok and (found := len(case.ours.samples)) < MIN_PROCESSES:
            raise UserError(
                f"{which} case {case.name} comes from {found} process(es); a decision needs "
                f"{MIN_PROCESSES}: run bench with --processes {MIN_PROCESSES} or more"
            )
    compared = [_compare(new, old, cpu) for new, old in pairs if new.ok]
    slower = stats.holm([c.change.p_below for c in compared])
    faster = stats.holm([c.change.p_above for c in compared])
    moves = yardstick.moves(
        [c.sdpa for c in compared],
        [c.change for c in compared],
        [thresholds.of(c.name) for c in compared],
        cpu,
    )
    decided = {
        c.name: _decide_case(c, p, q, len(compared), moved, thresholds.of(c.name))
        for c, p, q, moved in zip(compared, slower, faster, moves, strict=True)
    }
    return [
        decided.get(new.name) or Verdict(new.name, FAIL, new.reason, new, old) for new, old in pairs
    ]


def _compare(current: CaseResult, baseline: CaseResult, cpu: bool) -> _Compared:
    sides = [(case.ours.samples, case.sdpa.samples) for case in (current, baseline)]
    new, old = (stats.log_times(*samples) for samples in sides)
    if cpu:
        calm = stats.calm_times(*sides)
        # Otherwise no state of the machine is in both files, and the error says so.
        if all(len(sdpa) >= MIN_PROCESSES for sdpa, _ in calm):
            new, old = calm
        slope = stats.slope(new, old)
        change = stats.change_at_equal_sdpa(new, old, slope)
        speedups = stats.at_equal_sdpa(old, slope)
    else:
        _, speedups = both = [stats.log_speedups(*samples) for samples in sides]
        change = stats.change(*both)
    processes = min(len(new[0]), len(old[0]))
    return _Compared(
        current,
        baseline,
        change,
        ours=stats.change(new[1], old[1]),
        sdpa=stats.change(new[0], old[0]),
        floor=stats.effect_floor(speedups, processes),
        processes=processes,
    )


def _decide_case(
    c: _Compared,
    p_slower: float,
    p_faster: float,
    family: int,
    moved: Moved,
    thresholds: Thresholds,
) -> Verdict:
    ratio = c.change.ratio
    size = abs(math.log(ratio.value))
    proven = size > c.floor
    reason, environment = "", False
    if math.log(ratio.low) > -thresholds.log_fail:
        faster = p_faster < ALPHA and proven and math.log(ratio.value) > thresholds.log_improve
        verdict = IMPROVED if faster else PASS
    elif p_slower < ALPHA and proven:
        verdict = FAIL
    else:
        verdict = INCONCLUSIVE
        needed = stats.processes_needed(c.processes, c.change, thresholds.log_fail, ALPHA / family)
        reason = (
            f"a slowdown of {-thresholds.fail:g} % is neither proven nor excluded: about "
            f"{needed} processes in both runs would do (now {c.processes})"
        )
        if p_slower < ALPHA:
            reason = (
                f"slower, but same against same differs by up to {100 * c.floor:.1f} % in the "
                f"baseline: about {needed} processes in both runs would do (now {c.processes})"
            )
    unsure = verdict == INCONCLUSIVE and c.change.shared > c.change.error / 2
    if unsure or (verdict in (FAIL, IMPROVED) and moved.explained):
        verdict, environment = INCONCLUSIVE, True
        reason = (
            f"the environment changed, not the kernel: SDPA's own time by "
            f"{100 * (c.sdpa.ratio.value - 1):+.1f} % here and by "
            f"{100 * math.expm1(moved.drift):+.1f} % over all cases, ours by "
            f"{100 * (c.ours.ratio.value - 1):+.1f} %"
        )
    return Verdict(
        c.name,
        verdict,
        reason,
        c.current,
        c.baseline,
        ratio,
        c.ours.ratio,
        c.sdpa.ratio,
        p_slower,
        p_faster,
        factor(stats.detectable(c.change, ALPHA / family)),
        environment,
    )
