"""Tunes one problem: what is stored is confirmed, what is not is searched."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flashmoe.autotune.running.candidate import (
    SDPA,
    Candidate,
    default_candidate,
    known_tile,
    legality,
    runs,
    searched_backends,
    space,
)
from flashmoe.autotune.running.runner import Bench
from flashmoe.autotune.schedule.place import FINGERPRINT_FIELDS, Options, Place
from flashmoe.autotune.schedule.result import Result, Watch
from flashmoe.autotune.schedule.suite import Group
from flashmoe.autotune.search.race import AnchorFailed
from flashmoe.autotune.search.record import Record
from flashmoe.autotune.search.search import FINALISTS, Walk
from flashmoe.autotune.search.space import Space
from flashmoe.autotune.search.storage import open_study, study_name
from flashmoe.autotune.search.trials import BUDGET_REACHED, TRIALS_REACHED, Search, Trial
from flashmoe.autotune.search.typical import Typical
from flashmoe.autotune.verdict import final
from flashmoe.autotune.verdict.decide import MIN_ROUNDS, rounds_of, speedup
from flashmoe.autotune.verdict.final import Final
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.measure.stats import Interval, median_by_process
from flashmoe.measure.timing import HOW, Measurement
from flashmoe.planning.database import Entry, nearest
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

# Of a problem's time, the largest share that is left to the final.
_FINAL_SHARE = 0.35
# What a final that comes up late may take beyond it.
_GRACE_SHARE = 0.05
_CONFIRM_ROUNDS = 100
_CONFIRM_SECONDS = 6.0
# How many winners of other buckets, and how many of other devices, are tried first.
_TRANSFERRED = 4
# A search that was cut short goes on where it has so many times the time that it had, or had tried
# fewer than so many tiles.
_MUCH_MORE, _FEW_TILES = 2.0, 12
# How many related problems the search's model learns from.
_RELATED = 4


class Unmeasurable(RuntimeError):
    """A problem whose tuning cannot begin or cannot end; the message says why."""


class Starved(Unmeasurable):
    """One that the budget leaves too little time for."""


@dataclass(eq=False)
class Tuning:
    """One group on one device. `default` runs it untuned; the `anchor` is what all candidates are
    compared with, the default unless that does not work; `stored` is in place if not None."""

    group: Group
    place: Place
    options: Options
    watch: Watch
    found: Mapping[str, Entry]
    bench: Bench
    deadline: float

    def __post_init__(self) -> None:
        self._problem, self._device = self.group.main, self.place.device
        # What there was when it began, and what a sample takes.
        self._seconds = self._sample_seconds = 0.0
        # What a check of odd sizes takes.
        self._verify = Typical()
        self._late: dict[Tile, Measurement] = {}
        self._right: set[Candidate] = set()
        self._began = time.time() if self.options.helping is None else self.options.helping
        self._record: Record | None = None
        self._has_sdpa = self._everywhere(SDPA)
        self._backends = searched_backends(self._problem, self._device, self.options.backend)
        self._default = default_candidate(self._problem, self._device)
        self._anchor = self._working_anchor()
        entry = self.place.stored.get(self._problem.bucket)
        self._stored = self._working_stored(entry)
        self._current = self._stored is not None and self.place.is_current(self._problem.bucket)
        self._same_problem = (
            entry is not None
            and entry.problem == self._problem
            and entry.group == self.group.shares
        )
        self._searched = dict(entry.search) if entry is not None and self._current else {}

    def run(self) -> Result:
        self._seconds = self._left()
        self._require_time()
        fresh = self._began if self.options.force else None
        if self.options.helping is not None:
            self._search(self._left(), fresh)
            return Result(self._problem, "unmeasured", "another process decides")
        holds = self._current and self._same_problem and fresh is None
        goes_on = holds and self._wants_more()
        if holds and not goes_on:
            self.watch.stage("confirming what is stored")
            held = self._confirm()
            if held.decision.changed:
                # One process alone may be at odds with all others.
                held = self._confirm(processes=1)
            if not held.decision.changed:
                return self._result("confirmed", held, None)
            fresh = self._began  # what the study says no longer holds
            self._searched = {}
        wanted = final.seconds_wanted(self._sample_seconds, FINALISTS + 4, self.bench.fresh_seconds)
        wanted += FINALISTS * self._verify.seconds
        left = self._left()
        found = self._search(left - min(wanted, left * _FINAL_SHARE), fresh)
        self._sample_seconds = max(self._sample_seconds, found.sample_seconds)
        self.watch.stage("measuring the finalists again")
        held = self._final(found)
        self._verify_rest(found.contenders)
        result = self._result("tuned" if held.decision.changed else "kept", held, found)
        if goes_on and not result.starved:
            result = replace(result, store=True)  # it knows more than before
        if self._record is not None and not result.starved:
            self._record.finish({"winner": str(result.best), "reason": result.reason})
        return result

    def _wants_more(self) -> bool:
        """Whether the search that the stored result comes from was cut short, and this run can do
        clearly more: it has much more time, or is to try more tiles, or hardly any were tried."""
        searched = self._searched
        tried, ended = int(searched.get("tried", 0)), searched.get("ended")
        if ended == TRIALS_REACHED:
            return self.options.trials is None or self.options.trials > tried
        if ended != BUDGET_REACHED:
            return False
        seconds = self._left() * (1 - _FINAL_SHARE)
        few = tried < min(_FEW_TILES, int(searched["of"]))
        return few or seconds > _MUCH_MORE * float(searched["seconds"])

    def _everywhere(self, candidate: Candidate) -> bool:
        """Whether every problem of the group can run it here."""
        return all(runs(candidate, problem, self._device) for problem in self.group.problems)

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
        tile = known_tile(entry.tile)
        if entry.tile and tile is None:
            return None
        stored = self._default if entry.kept else Candidate(entry.backend, tile)
        works = self._everywhere(stored) and self._checked(stored).status == "ok"
        return stored if works else None

    def _checked(self, candidate: Candidate) -> Measurement:
        """Both checks; SDPA needs none, it is what callers would run without this library."""
        if candidate == SDPA:
            return Measurement("ok")
        prepared = self.bench.prepare(candidate)
        return self._verified(candidate) if prepared.status == "ok" else prepared

    def _verified(self, candidate: Candidate) -> Measurement:
        start = self.bench.now()
        verified = self.bench.verify(candidate)
        self._verify.add(self.bench.now() - start)
        if verified.status == "ok":
            self._right.add(candidate)
        return verified

    def _left(self) -> float:
        return max(self.deadline - self.bench.now(), 0.0)

    def _require_time(self) -> None:
        """Raise Unmeasurable unless a final of the anchor, twice, with two others fits."""
        self._sample_seconds = self._timed_once()
        if self._sample_seconds < self._left() < self._needed():
            # A first call may be slow for once.
            self._sample_seconds = min(self._sample_seconds, self._timed_once())
        if self._needed() > self._left():
            raise Starved(
                f"a comparison takes about {self._needed():.1f} s, and the budget leaves "
                f"{self._left():.1f} s for this problem; raise --budget"
            )

    def _timed_once(self) -> float:
        start = self.bench.now()
        self.bench.measure({"once": self._anchor}, rounds=1, warmup=0)
        return self.bench.now() - start

    def _needed(self) -> float:
        return 4 * final.seconds_needed(self._sample_seconds)

    def _search(self, seconds: float, fresh: float | None) -> Search:
        here = arch(self._device)
        backends = [BACKENDS[name] for name in self._backends]
        defaults = [backend.default_tile(self._problem, here) for backend in backends]
        # A backend's tiles are legal for the main problem; there may be thousands.
        legal = dict.fromkeys(
            tile
            for tile in space(self._problem, self._device, self._backends)
            if len(self.group.problems) == 1 or self._everywhere(Candidate.of_tile(tile))
        )
        # Of this device, then of others, each the nearest buckets first.
        near = nearest({**self.place.stored, **self.found}, self._problem)
        far = nearest({str(n): x for n, x in enumerate(self.place.elsewhere)}, self._problem)
        stored = [self._stored.tile] if self._stored is not None else []
        good = [*defaults, *stored, *winners(near), *winners(far)]
        # What is compiled in costs no compiler, and won somewhere.
        there = [t for b in backends for t in b.compiled_in(self._problem, here)]
        first = [tile for tile in [*good, *there] if tile in legal]
        if not legal:
            return Search((), (), "", 0)
        self.watch.stage(f"searching: {legality(self._problem, self._device, self._backends)}")
        facts = {name: getattr(self.place.fingerprint, name) for name in FINGERPRINT_FIELDS}
        facts["timing"] = HOW[self._device.type]
        label = self._problem.label
        if shares := self.group.shares:
            label += f" and {len(shares) - 1} more"
            facts["group"] = [[problem.to_json(), share] for problem, share in shares]
        elif self._problem.lengths:
            facts["lengths"] = self._problem.lengths
        study = open_study(
            self.place.storage,
            study_name(self.options.study, label, {**facts, "anchor": str(self._anchor)}),
            {**facts, "problem": self._problem.to_json(), "anchor": str(self._anchor)},
            fresh=fresh,
        )
        tiles = Space(legal)
        self._record = Record(study, tiles)
        return Walk(
            tiles,
            self.bench,
            self._anchor,
            first,
            self._record,
            seconds=seconds,
            trials=self.options.trials,
            sampler=self.options.sampler,
            seed=self.options.seed,
            related=[self._deviations(entry) for entry in (near + far)[:_RELATED]],
            prior=self._predicted(self._problem, tiles.tiles),
            watch=self._saw,
            contend=self.options.helping is None,
        ).run()

    def _predicted(self, problem: Problem, tiles: Iterable[Tile]) -> dict[Tile, float]:
        """Logarithms of times over the default's, of the tiles of which one is predicted."""
        here, default = arch(self._device), self._default.tile

        def microseconds(tile: Tile) -> float | None:
            return BACKENDS[tile.backend].predicted(tile, problem, here)

        base = None if default is None else microseconds(default)
        times = {tile: microseconds(tile) for tile in tiles}
        return {tile: math.log(us / base) for tile, us in times.items() if us and base}

    def _deviations(self, entry: Entry) -> dict[Tile, float]:
        """What an entry knows about tiles: their times over the default's, as multiples of those
        that are predicted."""
        ratios = _ratios(entry)
        prior = self._predicted(entry.problem, ratios)
        return {tile: ratio / math.exp(prior.get(tile, 0.0)) for tile, ratio in ratios.items()}

    def _saw(self, trials: Sequence[Trial], total: int) -> None:
        self.watch.seen = trials
        self.watch.trials(trials, total)

    def _confirm(self, processes: int = 0) -> Final:
        rivals = [SDPA] if self._has_sdpa else []
        deadline = self.bench.now() + min(self._left(), _CONFIRM_SECONDS)
        return final.hold(
            self.bench,
            self._anchor,
            self._stored,
            rivals,
            deadline,
            rounds=_CONFIRM_ROUNDS,
            processes=processes,
        )

    def _final(self, found: Search) -> Final:
        """The anchor (twice), what is stored, SDPA, and the best contenders."""
        rivals = [SDPA] if self._has_sdpa else []
        # Two of the field are the anchor; fewer finalists if they would leave too few rounds.
        others = 2 + len(rivals) + (self._stored is not None)
        room = int(self._left() / final.seconds_needed(self._sample_seconds)) - others
        rivals += self._finalists(found, min(max(room, 1), FINALISTS))
        least = final.seconds_needed(self._sample_seconds) * (others + len(rivals))
        processes = final.PROCESSES
        while processes and processes * (self.bench.fresh_seconds + least / 2) > self._left():
            processes -= 1
        return final.hold(
            self.bench,
            self._anchor,
            self._stored,
            rivals,
            self.deadline,
            processes=processes,
            grace=self._grace(others + len(rivals)),
        )

    def _grace(self, candidates: int) -> float:
        """What one process's rounds take, up to a small share of the problem's time: with less, a
        slow start would lose what was searched."""
        rounds = final.ROUNDS / final.PROCESSES + final.WARMUP
        return min(self._sample_seconds * candidates * rounds, _GRACE_SHARE * self._seconds)

    def _finalists(self, found: Search, count: int) -> list[Candidate]:
        """The fastest contenders that also pass the check with odd sizes and guarded memory, up to
        those that are clearly behind the first of them."""
        finalists: list[Candidate] = []
        ratios: dict[Tile | None, Interval] = {t.tile: t.ratio for t in found.trials if t.ratio}
        # What the shortest final of them all takes, which has no use without it.
        least = final.seconds_needed(self._sample_seconds) * (count + 4)
        for candidate in found.contenders:
            if len(finalists) == count:
                break
            mine = ratios.get(candidate.tile)
            first = ratios.get(finalists[0].tile) if finalists else None
            if mine is not None and first is not None and mine.above(first):
                break
            if self._verify.seconds + least > self._left():
                break
            verified = self._verified(candidate)
            if verified.status == "ok":
                finalists.append(candidate)
            else:
                self._reject(candidate, verified)
        return finalists

    def _reject(self, candidate: Candidate, verified: Measurement) -> None:
        """One that only the last check found wrong: the study shall know."""
        if candidate.tile is not None:
            self._late[candidate.tile] = verified
            if self._record is not None:
                self._record.reject(candidate.tile, verified.status, verified.reason)

    def _verify_rest(self, contenders: Sequence[Candidate]) -> None:
        """The last check of the other contenders, while there is time: other buckets' lookups take
        over what has passed it."""
        for candidate in contenders:
            if candidate in self._right or candidate.tile in self._late:
                continue
            if self._verify.seconds > self._left():
                return
            verified = self._verified(candidate)
            if verified.status != "ok":
                self._reject(candidate, verified)

    def _result(self, status: str, held: Final, found: Search | None) -> Result:
        decision, samples = held.decision, held.samples
        best = decision.winner
        # Too few rounds decide nothing that is worth keeping.
        starved = rounds_of(samples) < MIN_ROUNDS
        if found is not None:
            trials = [
                Trial(t.tile, late.status, None, late.reason) if late else t
                for t in found.trials
                for late in [self._late.get(t.tile)]
            ]
            found = replace(found, trials=tuple(trials))
        return Result(
            problem=self._problem,
            status=status,
            reason=decision.reason,
            default=self._default,
            best=best,
            seconds=median_by_process(samples[str(best)]),
            speedup_default=(
                speedup(samples, best, self._default) if str(self._default) in samples else None
            ),
            speedup_sdpa=speedup(samples, best, SDPA) if str(SDPA) in samples else None,
            noise=decision.noise,
            tile_with_lse=str(decision.tile) if best == SDPA and decision.tile else "",
            runner_up=str(decision.runner_up or ""),
            samples=samples,
            search=found,
            # What holds with this software stays as it is; what was found with another is renewed.
            store=status == "tuned" or (status == "kept" and not self._current and not starved),
            storage=self.place.storage_name,
            weight=sum(self.group.weights),
            verified=frozenset(str(candidate) for candidate in self._right),
            search_seconds=float(self._searched.get("seconds", 0.0))
            + (found.seconds if found else 0.0),
            group=self.group.shares,
            starved=starved,
        )


def winners(entries: Sequence[Entry]) -> list[Tile]:
    """The best tiles of the first few of these entries that differ."""
    names = dict.fromkeys(entry.best_tile for entry in entries if entry.best_tile)
    return [*filter(None, map(known_tile, [*names][:_TRANSFERRED]))]


def _ratios(entry: Entry) -> dict[Tile, float]:
    """What an entry knows about tiles: their times over the default's."""
    known = {known_tile(name): ratio for name, ratio in entry.over_default.items()}
    return {tile: ratio for tile, ratio in known.items() if tile is not None}
