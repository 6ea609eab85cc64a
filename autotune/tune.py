"""Tunes problems one after the other: what is stored is confirmed, what is not is searched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from flashmoe.autotune.bench import Bench, DeviceBench
from flashmoe.autotune.decide import AGAIN, MIN_ROUNDS, Decision, decide, speedup
from flashmoe.autotune.race import AnchorFailed
from flashmoe.autotune.result import Result, Watch
from flashmoe.autotune.search import FINALISTS, Search, Trial, search
from flashmoe.autotune.space import (
    SDPA,
    Candidate,
    Space,
    default_candidate,
    runs,
    searched_backends,
)
from flashmoe.backends import BACKENDS
from flashmoe.database import Entry
from flashmoe.device import Fingerprint, arch
from flashmoe.plan import why_not
from flashmoe.problem import Problem
from flashmoe.stats import median_interval
from flashmoe.tiles import Tile
from flashmoe.timing import Measurement

# A stored result holds while these agree; the rest of the fingerprint is for the reader.
FINGERPRINT_FIELDS = ("device", "kernels", "torch", "triton", "cuda", "threads")
# Of a problem's time, the largest share that is left to the final.
_FINAL_SHARE = 0.35
_FINAL_ROUNDS = 300
_FINAL_WARMUP = 2
_CONFIRM_ROUNDS = 100
_CONFIRM_SECONDS = 6.0

MakeBench = Callable[[Problem, torch.device, int], Bench]


@dataclass(frozen=True, slots=True)
class Options:
    """How to tune. `backend` limits the search; `trials` is in tiles a problem, `budget` in
    seconds over all problems; `force` searches what is stored already."""

    backend: str | None = None
    trials: int | None = None
    budget: float = 100.0
    seed: int = 0
    force: bool = False


class Unmeasurable(RuntimeError):
    """A problem whose tuning cannot begin or cannot end; the message says why."""


def tune(
    problems: Sequence[Problem],
    device: torch.device,
    options: Options,
    stored: Mapping[str, Entry],
    fingerprint: Fingerprint,
    watch: Watch,
    now: Callable[[], float],
    make_bench: MakeBench = DeviceBench,
) -> Iterator[Result]:
    """Results as they come, the cheapest problem first: the time it leaves goes to the others.

    `stored` holds the entries that plans use now, by bucket; `now` is the clock of the budget.
    """
    deadline = now() + options.budget
    order = sorted(problems, key=lambda problem: problem.flops)
    for number, problem in enumerate(order):
        watch.problem(problem, number + 1, len(order))
        start = now()
        share = _weight(problem) / sum(map(_weight, order[number:]))
        seconds = (deadline - start) * share
        try:
            entry = stored.get(problem.bucket)
            tuning = _Tuning(problem, device, options, entry, fingerprint, watch, make_bench)
            result = tuning.run(seconds)
        except (AnchorFailed, Unmeasurable, NotImplementedError) as error:
            result = Result(problem, "unmeasured", str(error).strip().split("\n")[0])
        result = dataclasses.replace(result, elapsed=now() - start)
        watch.result(result)
        yield result


def _weight(problem: Problem) -> float:
    """What a problem's tuning costs, in no unit: timing costs in proportion to its flops, checks
    and compilation the same for all; the fourth root lies between."""
    return float(max(problem.flops, 1.0) ** 0.25)


class _Tuning:
    """One problem on one device. `default` runs it untuned; the `anchor` is what all candidates
    are compared with, the default unless that does not work; `stored` is in place if not None."""

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        options: Options,
        entry: Entry | None,
        fingerprint: Fingerprint,
        watch: Watch,
        make_bench: MakeBench,
    ) -> None:
        self._problem = problem
        self._device = device
        self._options = options
        self._watch = watch
        self._sample_seconds = 0.0
        self._unverified: dict[Tile, Measurement] = {}
        self._has_sdpa = not why_not("sdpa", problem, device)
        self._backends = searched_backends(problem, device, options.backend)
        self._default = default_candidate(problem, device)
        watch.stage("computing the reference")
        try:
            self._bench = make_bench(problem, device, options.seed)
        except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors among them
            raise Unmeasurable(f"the inputs and the reference do not fit: {error}") from error
        self._anchor = self._working_anchor()
        self._stored = self._working_stored(entry)
        # Whether the entry was measured with this very software on this very device.
        self._current = (
            entry is not None
            and self._stored is not None
            and not fingerprint.differences(dict(entry.fingerprint), FINGERPRINT_FIELDS)
        )
        self._same_problem = entry is not None and entry.problem == problem

    def run(self, seconds: float) -> Result:
        deadline = self._bench.now() + seconds
        self._require_time(seconds)
        if self._current and self._same_problem and not self._options.force:
            self._watch.stage("confirming what is stored")
            limit = min(self._left(deadline), _CONFIRM_SECONDS)
            decision, samples = self._final([], limit, _CONFIRM_ROUNDS)
            if not decision.changed:
                return self._result("confirmed", decision, samples, None)
        final = self._sample_seconds * (_FINAL_ROUNDS + _FINAL_WARMUP) * (FINALISTS + 4)
        left = self._left(deadline)
        found = self._search(left - min(final, left * _FINAL_SHARE))
        self._sample_seconds = max(self._sample_seconds, found.sample_seconds)
        self._watch.stage("measuring the finalists again")
        decision, samples = self._final(found.contenders, self._left(deadline), _FINAL_ROUNDS)
        return self._result("tuned" if decision.changed else "kept", decision, samples, found)

    def _working_anchor(self) -> Candidate:
        checked = self._checked(self._default)
        if checked.status == "ok":
            return self._default
        if self._has_sdpa:
            return SDPA
        raise AnchorFailed(f"{self._default} is {checked.status}: {checked.reason}")

    def _working_stored(self, entry: Entry | None) -> Candidate | None:
        """What the database has for this bucket, if it can run and is right."""
        if entry is None:
            return None
        try:
            tile = Tile.parse(entry.tile) if entry.tile else None
        except ValueError:
            return None
        stored = Candidate(entry.backend, tile)
        if not runs(stored, self._problem, self._device):
            return None
        return stored if self._checked(stored).status == "ok" else None

    def _checked(self, candidate: Candidate) -> Measurement:
        """Both checks; SDPA needs none, it is what callers would run without this library."""
        if candidate == SDPA:
            return Measurement("ok")
        prepared = self._bench.prepare(candidate)
        return self._bench.verify(candidate) if prepared.status == "ok" else prepared

    def _left(self, deadline: float) -> float:
        return max(deadline - self._bench.now(), 0.0)

    def _require_time(self, seconds: float) -> None:
        """Raise Unmeasurable unless a final of the anchor, twice, with two others fits."""
        start = self._bench.now()
        self._bench.measure({"once": self._anchor}, rounds=1, warmup=0)
        self._sample_seconds = self._bench.now() - start
        needed = 4 * self._final_seconds()
        if needed > seconds:
            raise Unmeasurable(
                f"a comparison takes about {needed:.1f} s, and the budget leaves "
                f"{max(seconds, 0.0):.1f} s for this problem; raise --budget"
            )

    def _final_seconds(self) -> float:
        """What one candidate costs in the shortest final that may change anything."""
        return self._sample_seconds * (MIN_ROUNDS + _FINAL_WARMUP)

    def _search(self, seconds: float) -> Search:
        here = arch(self._device)
        backends = [BACKENDS[name] for name in self._backends]
        defaults = [backend.default_tile(self._problem, here) for backend in backends]
        if self._stored is not None:
            defaults.append(self._stored.tile)
        first = [tile for tile in defaults if tile and tile.backend in self._backends]
        tiles = [tile for backend in backends for tile in backend.tiles(self._problem, here)]
        if not tiles:
            return Search((), (), "", 0)
        self._watch.stage("searching")
        return search(
            Space([*tiles, *first]),
            self._bench,
            self._anchor,
            first,
            seconds=seconds,
            trials=self._options.trials,
            seed=self._options.seed,
            watch=self._watch.trials,
        )

    def _final(
        self, contenders: Sequence[Candidate], seconds: float, rounds: int
    ) -> tuple[Decision, dict[str, tuple[float, ...]]]:
        """Fresh samples of the finalists, the anchor (twice), what is stored, and SDPA."""
        deadline = self._bench.now() + seconds
        rivals = [self._stored] if self._stored is not None else []
        rivals += [SDPA] if self._has_sdpa else []
        # Two of the field are the anchor; fewer finalists if they would leave too few rounds.
        room = int(seconds / self._final_seconds()) - 2 - len(rivals)
        rivals += self._finalists(contenders, min(max(room, 1), FINALISTS))
        field = {AGAIN: self._anchor, str(self._anchor): self._anchor}
        field |= {str(candidate): candidate for candidate in rivals}
        measured = self._bench.measure(
            field, rounds=rounds, warmup=_FINAL_WARMUP, max_seconds=self._left(deadline)
        )
        for name in (str(self._anchor), AGAIN):
            if measured[name].status != "ok":
                raise AnchorFailed(f"{self._anchor} failed: {measured[name].reason}")
        samples = {
            # To the nanosecond: the database need not carry more.
            name: tuple(round(seconds, 9) for seconds in m.samples)
            for name, m in measured.items()
            if m.status == "ok"
        }
        in_place = self._stored or self._anchor
        base = in_place if str(in_place) in samples else self._anchor
        alive = [c for c in (self._anchor, *rivals) if str(c) in samples]
        return decide(samples, base, self._anchor, alive), samples

    def _finalists(self, contenders: Sequence[Candidate], count: int) -> list[Candidate]:
        """The fastest contenders that also pass the check with odd sizes and guarded memory."""
        finalists: list[Candidate] = []
        for candidate in contenders:
            if len(finalists) == count:
                break
            verified = self._bench.verify(candidate)
            if verified.status == "ok":
                finalists.append(candidate)
            elif candidate.tile is not None:
                self._unverified[candidate.tile] = verified
        return finalists

    def _result(
        self,
        status: str,
        decision: Decision,
        samples: dict[str, tuple[float, ...]],
        found: Search | None,
    ) -> Result:
        best = decision.winner
        if found is not None:
            trials = [
                Trial(t.tile, late.status, None, late.reason) if late else t
                for t in found.trials
                for late in [self._unverified.get(t.tile)]
            ]
            found = dataclasses.replace(found, trials=tuple(trials))
        return Result(
            problem=self._problem,
            status=status,
            reason=decision.reason,
            default=self._default,
            best=best,
            seconds=median_interval(samples[str(best)]),
            speedup_default=(
                speedup(samples, best, self._default) if str(self._default) in samples else None
            ),
            speedup_sdpa=speedup(samples, best, SDPA) if str(SDPA) in samples else None,
            noise=decision.noise,
            tile_with_lse=str(decision.tile) if best == SDPA and decision.tile else "",
            samples=samples,
            search=found,
            # Too few rounds decide nothing that is worth keeping.
            # What holds with this software stays as it is; what was found with another is renewed.
            store=status == "tuned"
            or (status == "kept" and not self._current and len(samples[AGAIN]) >= MIN_ROUNDS),
        )
