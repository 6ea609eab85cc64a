"""One problem's Optuna study: asked, told, and found again after whatever happened.

A trial is a tile. Its value is its time over the anchor's, the default's, from the same rounds, so
that values of several processes, GPUs of one model, and days compare. The study is the only state:
what is told is there for the same command later and for every worker that shares the storage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from flashmoe.autotune.identity import is_dead, worker_name
from flashmoe.autotune.sampler import TileSampler
from flashmoe.autotune.space import Space
from flashmoe.tiles import Tile

# A study's attribute: set once its winner was decided and stored.
_FINISHED = "finished"
# A trial's status beside those of flashmoe.timing: it was given up without a result.
LOST, DUPLICATE, UNTRIED = "lost", "duplicate", "not tried"
_NO_RESULT = (LOST, DUPLICATE, UNTRIED)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial found: `status` and `reason` as in flashmoe.timing, seconds of the tile and of
    the anchor, paired by round; `pruned` when it was clearly behind. `value` is the ratio of their
    medians (None without samples), `prepare_seconds` what compiling and checking took."""

    tile: Tile
    status: str
    reason: str = ""
    samples: tuple[float, ...] = ()
    anchor: tuple[float, ...] = ()
    value: float | None = None
    pruned: bool = False
    prepare_seconds: float = 0.0


def open_study(
    storage: BaseStorage, name: str, facts: Mapping[str, Any], *, fresh: bool
) -> optuna.Study:
    """The study `name`, made if need be with `facts` as its attributes.

    `fresh` wants no finished one: then the next generation `name#2`, `name#3`... is used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    generation = 1
    while True:
        full = name if generation == 1 else f"{name}#{generation}"
        study = optuna.create_study(
            storage=storage,
            study_name=full,
            sampler=RandomSampler(),
            direction="minimize",
            load_if_exists=True,
        )
        if not (_FINISHED in study.user_attrs and (fresh or _exists(storage, name, generation))):
            break
        generation += 1
    known = study.user_attrs
    for key, value in facts.items():
        if key not in known:
            study.set_user_attr(key, value)
    return study


def _exists(storage: BaseStorage, name: str, generation: int) -> bool:
    """Whether there is a generation after this one."""
    try:
        storage.get_study_id_from_name(f"{name}#{generation + 1}")
    except KeyError:
        return False
    return True


class Record:
    """The study of one space of tiles, as one worker sees it."""

    def __init__(self, study: optuna.Study, space: Space) -> None:
        self._study = study
        self._space = space
        self._worker = worker_name()
        self.name = study.study_name
        self._taken: set[Tile] = set()

    def fail_dead(self) -> int:
        """Fail the trials that dead processes left running; how many there were."""
        trials = self._study.get_trials(deepcopy=False)
        heard: dict[str, float] = {}
        for trial in trials:
            owner = trial.user_attrs.get("worker", {})
            name = owner.get("name", "")
            heard[name] = max(heard.get(name, 0.0), float(owner.get("asked", 0.0)))
        dead = 0
        for trial in trials:
            if trial.state != TrialState.RUNNING:
                continue
            name = trial.user_attrs.get("worker", {}).get("name", "")
            started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
            if name != self._worker and is_dead(name, max(heard.get(name, 0.0), started)):
                dead += self._give_up(trial.number, LOST, "its process died")
        return dead

    def outcomes(self) -> list[Outcome]:
        """What all workers have found so far, in the order of the trials."""
        return [found for trial in self._trials() if (found := self._outcome(trial)) is not None]

    def running(self) -> int:
        """Trials in flight, all workers' together."""
        return sum(
            trial.state == TrialState.RUNNING and "tile" in trial.user_attrs
            for trial in self._trials()
        )

    def others(self) -> int:
        """How many other workers have trials in flight."""
        owners = {
            trial.user_attrs.get("worker", {}).get("name")
            for trial in self._trials()
            if trial.state == TrialState.RUNNING
        }
        return len(owners - {self._worker, None})

    def times(self) -> list[tuple[float, Outcome]]:
        """Every outcome with the seconds since the study's first trial when it was told."""
        told = [
            (trial.datetime_complete.timestamp(), outcome)
            for trial in self._trials()
            if trial.datetime_complete and (outcome := self._outcome(trial)) is not None
        ]
        starts = [t.datetime_start.timestamp() for t in self._trials() if t.datetime_start]
        return [(when - min(starts), outcome) for when, outcome in sorted(told, key=lambda x: x[0])]

    def use(
        self,
        sampler: str,
        first: Sequence[Tile],
        seed: int,
        related: Sequence[Mapping[Tile, float]] = (),
    ) -> str:
        """Ask the sampler of that name (one of SAMPLERS) from now on, the tiles `first` before it;
        returns the name of its class. `related`: times over the default's in other problems."""
        chosen = TileSampler(sampler, self._space, first, lambda: self._taken, seed, related)
        self._study.sampler = chosen
        return chosen.name

    def ask(self) -> tuple[Tile, optuna.Trial] | None:
        """A tile that no worker has tried or is trying, and its trial; None when there is none."""
        while True:
            self._taken = set(self._owners())
            if self._taken >= set(self._space.tiles):
                return None
            trial = self._study.ask()
            # At once: should this process die, the next one knows whose trial it was.
            trial.set_user_attr("worker", {"name": self._worker, "asked": time.time()})
            tile = self._space.suggest(trial)
            trial.set_user_attr("tile", str(tile))
            # Workers that asked at the same moment see each other now; the first has the tile.
            if self._owners().get(tile, trial.number) >= trial.number:
                return tile, trial
            self._give_up(trial.number, DUPLICATE, "another worker tries it")

    def tell(self, trial: optuna.Trial, outcome: Outcome | None) -> None:
        """What came of an asked trial; None: it was not tried after all."""
        if outcome is None:
            self._give_up(trial.number, UNTRIED, "")
            return
        trial.set_user_attr("status", outcome.status)
        trial.set_user_attr("prepare_seconds", round(outcome.prepare_seconds, 4))
        if outcome.reason:
            trial.set_user_attr("reason", outcome.reason)
        if outcome.samples:
            samples = {"tile": _rounded(outcome.samples), "anchor": _rounded(outcome.anchor)}
            trial.set_user_attr("samples", samples)
        if outcome.value is None:
            self._study.tell(trial, state=TrialState.FAIL)
        elif outcome.pruned:
            trial.report(outcome.value, len(outcome.samples))
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, outcome.value)

    def importances(self) -> dict[str, float]:
        """How much each parameter matters among the tiles of its kernel, by PED-ANOVA: shares that
        sum to 1 for a kernel; empty for one with too few trials."""
        found: dict[str, float] = {}
        for names in self._space.kernels():
            with contextlib.suppress(ValueError, RuntimeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found |= optuna.importance.get_param_importances(
                    self._study, evaluator=PedAnovaImportanceEvaluator(), params=names
                )
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def finish(self, decision: Mapping[str, Any]) -> None:
        """Note the winner: a search that wants a fresh study then begins another."""
        self._study.set_user_attr(_FINISHED, dict(decision))

    @property
    def study(self) -> optuna.Study:
        return self._study

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _owners(self) -> dict[Tile, int]:
        """The first trial of every tile that was tried or is being tried."""
        owners: dict[Tile, int] = {}
        for trial in self._trials():
            tile = self._space.tile_of(trial.params)
            gone = trial.user_attrs.get("status") in _NO_RESULT
            # In a space of one tile there is no parameter to tell that a trial has got that far.
            asked = bool(trial.params) or "tile" in trial.user_attrs
            if tile is not None and asked and not gone:
                owners.setdefault(tile, trial.number)
        return owners

    def _outcome(self, trial: FrozenTrial) -> Outcome | None:
        status = trial.user_attrs.get("status")
        if not trial.state.is_finished() or status is None or status in _NO_RESULT:
            return None
        tile = self._space.tile_of(trial.params)
        if tile is None:
            return None  # a tile that is no longer in the space
        samples = trial.user_attrs.get("samples", {})
        return Outcome(
            tile,
            status,
            trial.user_attrs.get("reason", ""),
            tuple(samples.get("tile", ())),
            tuple(samples.get("anchor", ())),
            trial.value,
            trial.state == TrialState.PRUNED,
            float(trial.user_attrs.get("prepare_seconds", 0.0)),
        )

    def _give_up(self, number: int, status: str, reason: str) -> bool:
        """Fail a trial without a result; whether it was still unfinished."""
        (frozen,) = (trial for trial in self._trials() if trial.number == number)
        storage, trial_id = self._study._storage, frozen._trial_id
        try:
            storage.set_trial_user_attr(trial_id, "status", status)
            storage.set_trial_user_attr(trial_id, "reason", reason)
            self._study.tell(number, state=TrialState.FAIL)
        except (RuntimeError, ValueError):
            return False  # another worker was faster
        return True


def study_name(prefix: str, problem: str, facts: Mapping[str, Any]) -> str:
    """A study's name: prefix, problem, and a digest of what its times depend on."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return f"{prefix}/{problem}/{digest}"


def _rounded(seconds: Sequence[float]) -> list[float]:
    """To the nanosecond: no clock tells more, and storages stay small."""
    return [round(x, 9) for x in seconds]
