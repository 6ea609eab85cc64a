"""The search of one problem's tiles: which are tried, in which order, with how many samples.

Trials are asked and told through a Record, so they outlive this process and are shared with others;
values are times relative to the anchor's, the default's.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

import optuna

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.running.runner import Bench
from flashmoe.autotune.search.race import Race
from flashmoe.autotune.search.record import Outcome, Record
from flashmoe.autotune.search.space import Space
from flashmoe.autotune.search.trials import BUDGET_REACHED, TRIALS_REACHED, Search, Trial
from flashmoe.autotune.search.typical import Typical
from flashmoe.measure.timing import Measurement
from flashmoe.tiles import Tile

# Candidates timed together; between batches the sampler learns.
BATCH = 6
# Batches that are asked for, to be compiled, by the time one is timed; more where that would leave
# compilers idle.
_AHEAD = 3
# The first look at a candidate lasts about this long, within these limits in rounds.
_FIRST_SECONDS = 0.15
_FIRST_ROUNDS = (3, 15)
# How many candidates get a second look, and how many of them the final.
CONTENDERS = 8
FINALISTS = 3
# Of the search's time, the share that is left to the second look.
_SECOND_SHARE = 0.3
# A sampled search ends after so many tiles without a gain of at least this much: a share of the
# space, within these limits.
_STALE_SHARE, _STALE_TILES, _STALE_GAIN = 0.25, (12, 60), 0.003
# How often to look whether other workers are done, and for how long at most, in seconds.
_POLL_SECONDS, _POLL_SHARE = 0.2, 0.25
# How often to look whether something is compiled, when nothing is.
_COMPILER_SECONDS = 0.02
# How often to look for trials whose process has died.
_DEAD_SECONDS = 2.0


def estimate(tiles: int, prepare_seconds: float, sample_seconds: float) -> float:
    """Seconds that trying so many tiles takes, one after the other."""
    rounds = _first_rounds(sample_seconds)
    look = sample_seconds * (rounds + 1) * (BATCH + 1) / BATCH
    return tiles * (prepare_seconds + look) / (1 - _SECOND_SHARE)


def _first_rounds(sample_seconds: float) -> int:
    low, high = _FIRST_ROUNDS
    return min(max(round(_FIRST_SECONDS / max(sample_seconds, 1e-9)), low), high)


@dataclass(eq=False)
class Walk:
    """One worker's search for the contenders among the tiles of `space`, within `seconds` and
    `trials` tiles, those that `record` holds already among them.

    The tiles `first` are tried before the sampler's. `sampler` is one of SAMPLERS; without one, all
    tiles are tried where that fits (brute), otherwise the model chooses, starting from `prior` and
    `related`, as Model takes them. `watch` sees the trials so far and how many there may be.
    `anchor` is known to be right; AnchorFailed when it cannot be timed. Without `contend` the
    trials are all that counts, for another worker looks again at the contenders.
    """

    space: Space
    bench: Bench
    anchor: Candidate
    first: Sequence[Tile]
    record: Record
    _: KW_ONLY
    seconds: float
    trials: int | None = None
    sampler: str | None = None
    seed: int = 0
    related: Sequence[Mapping[Tile, float]] = ()
    prior: Mapping[Tile, float] | None = None
    watch: Callable[[Sequence[Trial], int], None] = lambda trials, total: None
    contend: bool = True

    def __post_init__(self) -> None:
        self._began = self._looked_for_dead = self.bench.now()
        self._deadline = self._began + self.seconds
        self._limit = min(len(self.space), len(self.space) if self.trials is None else self.trials)
        self._race = Race(self.bench, self.anchor)
        self._known: dict[Tile, Trial] = {}
        self._tried = 0
        # By kernel, what compiling and checking a tile took.
        self._prepare: collections.defaultdict[str, Typical] = collections.defaultdict(Typical)
        # What this process has prepared: asked again, that costs nothing.
        self._checked = {self.anchor}
        self._pending: list[tuple[Tile, optuna.Trial]] = []
        # Who chooses the tiles now.
        self._chooses = ""
        # Whether the next tile takes longer than there is time.
        self._spent = False
        self._race.look([self.anchor], rounds=3, max_seconds=self._left())
        self._rounds = _first_rounds(self._race.sample.seconds)

    def run(self) -> Search:
        self.record.fail_dead()
        self._recall()
        try:
            ended = self._try_all()
        finally:
            for _, trial in self._pending:
                self.record.tell(trial, None)
        contenders: list[Candidate] = []
        if self.contend:
            self._await_others()
            contenders = self._second_look()
        return Search(
            tuple(self._known.values()),
            tuple(contenders),
            self._chooses,
            len(self.space),
            self._race.sample.seconds,
            ended,
            self.record.name,
            tuple((when, o.value) for when, o in self.record.times() if o.value is not None),
            self.record.importances(),
            self._tried,
            self.bench.now() - self._began,
        )

    def _try_all(self) -> str:
        """Try tiles until there is a reason to stop, and return that."""
        while True:
            self._recall()
            self.watch(list(self._known.values()), self._limit)
            if len(self._known) >= self._limit:
                return "all tiles tried" if self._limit == len(self.space) else TRIALS_REACHED
            if self._late() or self._spent:
                return BUDGET_REACHED
            wanted = self.sampler or ("brute" if self._all_fit() else "model")
            if wanted != self._chooses:
                self._chooses = wanted
                self.record.use(wanted, self.first, self.seed, self.related, self.prior)
            tried_first = all(tile in self._known for tile in self.first)
            if wanted != "brute" and tried_first and self._stale():
                return "no better tile for long"
            if not self._ask():
                return "all tiles tried or in flight"
            batch = self._compiled()
            if not batch:
                return BUDGET_REACHED
            self._pending = [asked for asked in self._pending if asked not in batch]
            self._try(batch)

    def _ask(self) -> bool:
        """Fill the pending trials: a batch, and the next ones where they can be compiled meanwhile.
        Whether there are any."""
        depth = BATCH
        if self.bench.compiles_ahead:
            depth = max(_AHEAD * BATCH, self.bench.compilers + 2 * BATCH)
        if self.bench.now() - self._looked_for_dead >= _DEAD_SECONDS:
            self._fail_dead()
        left = self._limit - len(self._known) - self.record.running()
        if left <= 0 and not self._pending and self._fail_dead():
            left = self._limit - len(self._known) - self.record.running()
        if others := self.record.others():
            # Leave them their share, and keep the last ones small: all shall end together. Not
            # smaller than that takes, for the anchor is timed along with every batch.
            left = -(-2 * left // (3 * (others + 1)))
        for _ in range(min(depth - len(self._pending), left)):
            asked = self.record.ask()
            if asked is None:
                break
            self._pending.append(asked)
            self.bench.precompile([Candidate.of_tile(asked[0])])
        return bool(self._pending)

    def _fail_dead(self) -> int:
        """Give up what dead workers were trying, so that others try it; how many trials."""
        self._looked_for_dead = self.bench.now()
        dead = self.record.fail_dead()
        if dead:
            self._recall()
        return dead

    def _compiled(self) -> list[tuple[Tile, optuna.Trial]]:
        """A batch of the pending trials that are compiled, in their order; the others go on
        compiling meanwhile. Waits for one; empty when there is none in time."""
        until = self._deadline - self._reserve()
        while True:
            now = self.bench.now()
            found = [x for x in self._pending if self.bench.compiled(Candidate.of_tile(x[0]), now)]
            if found or now >= until:
                return found[:BATCH]
            self.bench.wait(min(_COMPILER_SECONDS, until - now))

    def _try(self, batch: Sequence[tuple[Tile, optuna.Trial]]) -> None:
        """Check, time and tell a batch; what time does not allow is told as not tried."""
        found: dict[Tile, Outcome] = {}
        ready: dict[Candidate, float] = {}
        try:
            for tile, _ in batch:
                # What is ready must still be timed: leave the time for two rounds of it.
                if self._late() or self._left() < self._race.cost(len(ready) + 1, 2):
                    self._spent = not (ready or found)
                    break
                candidate = Candidate.of_tile(tile)
                # No slow check goes on at the second look's expense.
                if self._expected(tile) > self._left() - self._reserve():
                    self._spent = True
                    break
                prepared = self.bench.prepare(candidate)
                self._checked.add(candidate)
                took = prepared.samples[0]
                self._prepare[tile.kernel].add(took)
                if prepared.status == "ok":
                    ready[candidate] = took
                else:
                    found[tile] = self._outcome(candidate, prepared, took)
            for outcome in self._look(ready):
                found[outcome.tile] = outcome
        finally:
            for tile, trial in batch:
                self.record.tell(trial, found.get(tile))
                if tile in found:
                    self._learn(found[tile])
                    self._tried += 1

    def _look(self, ready: dict[Candidate, float]) -> list[Outcome]:
        """Time what is ready: a first look, and a second one unless it is clearly behind."""
        if not ready or self._left() <= 0:
            return []
        measured = self._race.look(list(ready), self._rounds, self._left())
        close = [c for c, m in measured.items() if m.status == "ok" and not self._race.behind(c)]
        if close and not self._late():
            measured |= self._race.look(close, self._rounds, self._left())
        return [
            self._outcome(candidate, measurement, ready[candidate])
            for candidate, measurement in measured.items()
        ]

    def _outcome(self, candidate: Candidate, measurement: Measurement, took: float) -> Outcome:
        tile = candidate.tile
        assert tile is not None
        if measurement.status != "ok":
            return Outcome(tile, measurement.status, measurement.reason, prepare_seconds=took)
        samples, anchor = self._race.samples(candidate)
        ratio = self._race.ratios[candidate]
        pruned = self._race.behind(candidate)
        return Outcome(
            tile, "ok", "", samples, anchor, ratio.value, pruned=pruned, prepare_seconds=took
        )

    def _recall(self) -> None:
        """Take over what the study holds: earlier runs' trials, other workers', and our own."""
        for outcome in self.record.outcomes():
            tile = outcome.tile
            if tile in self._known:
                continue
            if outcome.value is not None:
                self._race.recall(Candidate.of_tile(tile), outcome.samples, outcome.anchor)
            self._prepare[tile.kernel].add(outcome.prepare_seconds)
            self._learn(outcome)

    def _learn(self, outcome: Outcome) -> None:
        tile = outcome.tile
        ratio = self._race.ratios[Candidate.of_tile(tile)] if outcome.value is not None else None
        self._known[tile] = Trial(tile, outcome.status, ratio, outcome.reason, outcome.pruned)

    def _await_others(self) -> None:
        """Until other workers have told what they are trying, but not for long."""
        end = self.bench.now() + _POLL_SHARE * max(self._left(), 0.0)
        self._recall()
        while self.record.running() and self.bench.now() < end:
            self.bench.wait(_POLL_SECONDS)
            self.record.fail_dead()
            self._recall()

    def _second_look(self) -> list[Candidate]:
        """Halve the field, doubling the rounds, until it is small or time is up."""
        contenders = self._prepared(self._race.contenders(CONTENDERS))
        rounds = self._rounds
        while len(contenders) > FINALISTS and self._left() > self._race.cost(len(contenders), 2):
            rounds *= 2
            self._race.look(contenders, rounds, self._left())
            best = self._race.contenders(max(FINALISTS, len(contenders) // 2))
            contenders = [candidate for candidate in best if candidate in contenders]
        # More than can win, so that a finalist that turns out wrong has a successor.
        return self._prepared(self._race.ranked()[:CONTENDERS])

    def _reserve(self) -> float:
        """Seconds that are left to the second look: what one at the contenders of now takes, and
        no more than its share."""
        field = len(self._race.contenders(CONTENDERS))
        seconds, rounds = 0.0, self._rounds
        while field > FINALISTS:
            rounds *= 2
            seconds += self._race.cost(field, rounds)
            field = max(FINALISTS, field // 2)
        return min(seconds, _SECOND_SHARE * self.seconds)

    def _prepared(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that this process has checked or, if another did, finds right as well while there
        is time."""
        unknown = [c for c in candidates if c not in self._checked]
        self.bench.precompile(unknown)
        found = []
        for candidate in candidates:
            expected = self._expected(candidate.tile)
            if candidate in unknown and (
                expected > self._left() or not self.bench.compiled(candidate, self._deadline)
            ):
                continue
            self._checked.add(candidate)
            if self.bench.prepare(candidate).status == "ok":
                found.append(candidate)
        return found

    def _expected(self, tile: Tile | None) -> float:
        """What compiling and checking a tile may take. One that was slow tells nothing: the first
        of a kernel always is."""
        known = self._prepare[tile.kernel] if tile else Typical()
        return known.seconds if len(known) > 1 else 0.0

    def _left(self) -> float:
        return self._deadline - self.bench.now()

    def _late(self) -> bool:
        """Whether what is left belongs to the second look."""
        return self._left() <= self._reserve()

    def _all_fit(self) -> bool:
        """Whether the time allows a first look at every tile, going by those tried."""
        if self._limit < len(self.space):
            return False
        rest = [tile for tile in self.space.tiles if tile not in self._known]
        prepare = sum(map(self._expected, rest))
        look = self._race.cost(BATCH, self._rounds) / BATCH * len(rest)
        left = self._left() - _SECOND_SHARE * self.seconds
        if not self.bench.compiles_ahead:
            return prepare + look <= left
        compiled = self.bench.compile_seconds
        if compiled is None:
            return False  # nobody knows yet
        return max(prepare + look, compiled * len(rest) / self.bench.compilers) <= left

    def _stale(self) -> bool:
        """Whether the last many tiles brought no gain."""
        low, high = _STALE_TILES
        patience = min(max(round(_STALE_SHARE * len(self.space)), low), high)
        values = [t.ratio.value if t.ratio else float("inf") for t in self._known.values()]
        if len(values) <= patience:
            return False
        before = min(values[:-patience])
        return min(values[-patience:]) > before * (1 - _STALE_GAIN)
