"""The search of one problem's tiles: an Optuna study, asked and told, with racing inside.

The study is one problem's; its trials' values are times relative to the anchor's, the default's,
so that a value means the same whenever it was taken.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import optuna
from optuna.samplers import BruteForceSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from flashmoe.autotune.bench import Bench
from flashmoe.autotune.race import Race
from flashmoe.autotune.space import Candidate, Space
from flashmoe.stats import Interval
from flashmoe.tiles import Tile
from flashmoe.timing import Measurement

# Candidates timed together; between batches the sampler learns.
BATCH = 6
# The first look at a candidate lasts about this long, within these limits in rounds.
_FIRST_SECONDS = 0.15
_FIRST_ROUNDS = (3, 15)
# How many candidates get a second look, and how many of them the final.
CONTENDERS = 8
FINALISTS = 3
# Of the search's time, the share that is left to the second look.
_SECOND_SHARE = 0.3
# Repeated suggestions in a row after which an unexplored tile is enqueued instead.
_MAX_REPEATS = 20


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one tile: status as in flashmoe.timing, its time over the anchor's when
    ok, the reason when not."""

    tile: Tile
    status: str
    ratio: Interval | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Search:
    """The trials in the order of their first look, the contenders fastest first, which sampler
    walked a space of how many tiles, and what a sample costs on the clock."""

    trials: tuple[Trial, ...]
    contenders: tuple[Candidate, ...]
    sampler: str
    space: int
    sample_seconds: float = 0.0


Watch = Callable[[Sequence[Trial], int], None]


class _Exhaustive(BruteForceSampler):
    """BruteForceSampler for ask and tell: the original stops the study after the last trial, which
    only study.optimize allows."""

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        pass


def search(
    space: Space,
    bench: Bench,
    anchor: Candidate,
    first: Sequence[Tile],
    *,
    seconds: float,
    trials: int | None = None,
    seed: int = 0,
    watch: Watch = lambda trials, total: None,
) -> Search:
    """Find the contenders among the tiles of `space` within `seconds` and `trials` tiles.

    The tiles `first` are tried before the sampler's. All tiles are tried where that fits, by
    BruteForceSampler; otherwise TPESampler(seed) chooses. `watch` sees the trials so far and how
    many there may be. `anchor` is known to be right; AnchorFailed when it cannot be timed.
    """
    walk = _Walk(space, bench, anchor, seconds)
    walk.try_tiles(list(dict.fromkeys(first))[:trials])
    affordable = walk.affordable()
    limit = len(space) if trials is None else min(trials, len(space))
    exhaustive = affordable >= limit == len(space)
    study = _new_study(exhaustive, seed)
    for tile in walk.known:
        study.enqueue_trial(space.params(tile))
    suggestions = _suggestions(study, space, walk.known, random.Random(seed))
    watch(list(walk.known.values()), limit)
    while len(walk.known) < limit and not walk.late():
        asked: dict[Tile, optuna.Trial] = {}
        while len(asked) < min(BATCH, limit - len(walk.known)):
            tile, trial = next(suggestions)
            if tile in walk.known or tile in asked:
                _tell(study, trial, walk.known.get(tile))
            else:
                asked[tile] = trial
        walk.try_tiles(list(asked))
        for tile, trial in asked.items():
            _tell(study, trial, walk.known.get(tile))
        watch(list(walk.known.values()), limit)
    contenders = walk.second_look()
    sampler = "BruteForceSampler" if exhaustive else "TPESampler"
    trials_made = tuple(walk.known.values())
    return Search(trials_made, tuple(contenders), sampler, len(space), walk.sample_seconds)


class _Walk:
    """The tiles tried so far, and the time they took."""

    def __init__(self, space: Space, bench: Bench, anchor: Candidate, seconds: float) -> None:
        self._space = space
        self._bench = bench
        self._race = Race(bench, anchor)
        self._seconds = seconds
        self._deadline = bench.now() + seconds
        self.known: dict[Tile, Trial] = {}
        self._prepare_seconds: dict[str, float] = {}
        self._race.look([anchor], rounds=3, max_seconds=self.left())
        low, high = _FIRST_ROUNDS
        seconds = max(self._race.sample_seconds, 1e-9)
        self.rounds = min(max(round(_FIRST_SECONDS / seconds), low), high)

    def left(self) -> float:
        return self._deadline - self._bench.now()

    def late(self) -> bool:
        """Whether what is left belongs to the second look."""
        return self.left() <= _SECOND_SHARE * self._seconds

    @property
    def sample_seconds(self) -> float:
        return self._race.sample_seconds

    def affordable(self) -> int:
        """How many tiles of the space the time for the first look allows, going by those tried."""
        kernels = [tile.kernel for tile in self._space.tiles]
        prepare = sum(self._prepare_seconds.get(kernel, 0.0) for kernel in kernels) / len(kernels)
        look = self._race.cost(BATCH, self.rounds) / BATCH
        left = max(self.left() - _SECOND_SHARE * self._seconds, 0.0)
        return len(self.known) + int(left / (prepare + look))

    def try_tiles(self, tiles: Sequence[Tile]) -> None:
        """Check and time new tiles; those that time does not allow stay unknown."""
        ready: list[Candidate] = []
        for tile in tiles:
            # What is ready must still be timed: leave the time for two rounds of it.
            if self.late() or self.left() < self._race.cost(len(ready) + 1, 2):
                break
            candidate = Candidate.of_tile(tile)
            prepared = self._bench.prepare(candidate)
            self._prepare_seconds[tile.kernel] = prepared.samples[0]
            if prepared.status == "ok":
                ready.append(candidate)
            else:
                self.known[tile] = Trial(tile, prepared.status, reason=prepared.reason)
        if ready and self.left() > 0:
            self._look(ready, self.rounds)

    def second_look(self) -> list[Candidate]:
        """Halve the field, doubling the rounds, until it is small or time is up."""
        contenders = self._race.contenders(CONTENDERS)
        rounds = self.rounds
        while len(contenders) > FINALISTS and self.left() > self._race.cost(len(contenders), 2):
            rounds *= 2
            self._look(contenders, rounds)
            contenders = self._race.contenders(max(FINALISTS, len(contenders) // 2))
        # All that survived, so that a finalist that turns out wrong has a successor.
        return self._race.contenders(CONTENDERS)

    def _look(self, candidates: Sequence[Candidate], rounds: int) -> None:
        for candidate, measurement in self._race.look(candidates, rounds, self.left()).items():
            self._record(candidate, measurement)

    def _record(self, candidate: Candidate, measurement: Measurement) -> None:
        tile = candidate.tile
        if tile is None:
            return
        ok = measurement.status == "ok"
        ratio = self._race.ratio(candidate) if ok else None
        self.known[tile] = Trial(tile, measurement.status, ratio, measurement.reason)


def _new_study(exhaustive: bool, seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        # BruteForceSampler has been called experimental since Optuna 3.1.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = _Exhaustive(seed=seed) if exhaustive else TPESampler(seed=seed)
    return optuna.create_study(direction="minimize", sampler=sampler)


def _suggestions(
    study: optuna.Study, space: Space, known: dict[Tile, Trial], rng: random.Random
) -> Iterator[tuple[Tile, optuna.Trial]]:
    """Asks forever; a sampler that repeats itself is handed an unexplored tile."""
    asked: set[Tile] = set()
    repeats = 0
    while True:
        if repeats >= _MAX_REPEATS:
            unexplored = [t for t in space.tiles if t not in known and t not in asked]
            study.enqueue_trial(space.params(rng.choice(unexplored or space.tiles)))
        trial = study.ask()
        tile = space.suggest(trial)
        trial.set_user_attr("tile", str(tile))
        repeats = repeats + 1 if tile in known or tile in asked else 0
        asked.add(tile)
        yield tile, trial


def _tell(study: optuna.Study, trial: optuna.Trial, outcome: Trial | None) -> None:
    """A tile without a time is a failed trial, with the reason; `None` was not tried at all."""
    if outcome is not None and outcome.ratio is not None:
        study.tell(trial, outcome.ratio.value)
        return
    trial.set_user_attr("status", outcome.status if outcome else "not tried")
    trial.set_user_attr("reason", outcome.reason if outcome else "")
    study.tell(trial, state=TrialState.FAIL)
