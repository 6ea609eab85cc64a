"""One problem's Optuna study as one worker sees it: asked, told, and looked at.

A trial is a tile. Its value is its time over the anchor's, the default's, from the same rounds, so
that values of several processes, GPUs of one model, and days compare. The study is the only state:
what is told is there for the same command later and for every worker that shares the storage.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from flashmoe.autotune.search.identity import is_dead, worker_name
from flashmoe.autotune.search.sampler import TileSampler
from flashmoe.autotune.search.space import Space
from flashmoe.autotune.search.storage import FINISHED, failure
from flashmoe.tiles import Tile

# Before the name of a tile, a study's attribute: it was told as right, and is not.
_REJECTED = "rejected "
# A trial's status beside those of flashmoe.measure.timing: it was given up without a result.
LOST, DUPLICATE, UNTRIED = "lost", "duplicate", "not tried"
# A process that is alive names itself as the owner of its trial within this time.
_NAMELESS_SECONDS = 30.0
# How often a worker looks whether another has decided: about what a look takes.
_DECISION_SECONDS = 0.02
_NO_RESULT = (LOST, DUPLICATE, UNTRIED)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial found: `status` and `reason` as in flashmoe.measure.timing, seconds of the tile
    and of the anchor, paired by round; `pruned` when it was clearly behind. `value` is the ratio
    of their medians (None without samples), `prepare_seconds` what compiling and checking took."""

    tile: Tile
    status: str
    reason: str = ""
    samples: tuple[float, ...] = ()
    anchor: tuple[float, ...] = ()
    value: float | None = None
    pruned: bool = False
    prepare_seconds: float = 0.0


class Record:
    """The study of one space of tiles, as one worker sees it."""

    def __init__(self, study: optuna.Study, space: Space) -> None:
        self.study = study
        self._space = space
        self._worker = worker_name()
        self.name = study.study_name
        self._taken: set[Tile] = set()
        # As of the last look at the storage, which is slow where that is a database far away.
        self._seen: list[FrozenTrial] = []
        self._rejected: dict[Tile, tuple[str, str]] = {}
        for key, found in study.user_attrs.items():
            if key.startswith(_REJECTED):
                tile = Tile.parse(key.removeprefix(_REJECTED))
                self._rejected[tile] = (found["status"], found["reason"])

    def fail_dead(self) -> int:
        """Fail the trials that dead processes left running; how many there were."""
        trials = self.study.get_trials(deepcopy=False)
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
            if name:
                gone = name != self._worker and is_dead(name, max(heard[name], started))
            else:
                gone = time.time() - started > _NAMELESS_SECONDS
            if gone:
                dead += self._end(trial.number, trial.user_attrs.get("outcome"))
        return dead

    def _end(self, number: int, told: Mapping[str, Any] | None) -> bool:
        """End a dead process's trial, with what it had `told` of it; whether it was unfinished."""
        if not told:
            return self._give_up(number, LOST, "its process died")
        with contextlib.suppress(RuntimeError, ValueError):
            self._conclude(number, told)
            return True
        return False  # another worker was faster

    def outcomes(self) -> list[Outcome]:
        """What all workers have found so far, in the order of the trials; looks at the storage, and
        running() and others() tell what that look saw."""
        return [found for trial in self._trials() if (found := self._outcome(trial)) is not None]

    def running(self) -> int:
        """Trials in flight, all workers' together."""
        return sum(
            trial.state == TrialState.RUNNING and self._asked(trial) is not None
            for trial in self._seen
        )

    def others(self) -> int:
        """How many other workers have trials in flight."""
        owners = {
            trial.user_attrs.get("worker", {}).get("name")
            for trial in self._seen
            if trial.state == TrialState.RUNNING
        }
        return len(owners - {self._worker, None})

    def times(self) -> list[tuple[float, Outcome]]:
        """Every outcome with the seconds since the study's first trial when it was told."""
        trials = self._trials()
        told = [
            (trial.datetime_complete.timestamp(), outcome)
            for trial in trials
            if trial.datetime_complete and (outcome := self._outcome(trial)) is not None
        ]
        starts = [trial.datetime_start.timestamp() for trial in trials if trial.datetime_start]
        return [(when - min(starts), outcome) for when, outcome in sorted(told, key=lambda x: x[0])]

    def use(
        self,
        sampler: str,
        first: Sequence[Tile],
        seed: int,
        related: Sequence[Mapping[Tile, float]] = (),
        prior: Mapping[Tile, float] | None = None,
    ) -> None:
        """Ask the sampler of that name (one of SAMPLERS) from now on, the tiles `first` before it;
        `related` and `prior` as search.model.Model takes them."""
        self.study.sampler = TileSampler(
            sampler, self._space, first, lambda: self._taken, seed, related, prior
        )

    def ask(self) -> tuple[Tile, optuna.Trial] | None:
        """A tile that no worker has tried or is trying, and its trial; None when there is none."""
        self._taken = set(self._owners(self._seen))
        while True:
            if len(self._taken) >= len(self._space):
                return None
            trial = self.study.ask()
            # At once: should this process die, the next one knows whose trial it was.
            trial.set_user_attr("worker", {"name": self._worker, "asked": time.time()})
            tile = self._space.suggest(trial)
            if self._has(trial, tile):
                return tile, trial
            self._give_up(trial.number, DUPLICATE, "another worker tries it")

    def _has(self, trial: optuna.Trial, tile: Tile) -> bool:
        """Whether the tile that `trial` asked for is this worker's.

        Everyone asks first and looks then, so of two that ask at the same moment at least the later
        one sees the other. The higher number always yields. The lower one waits until the other has
        either yielded too or, having looked before, has taken the tile.
        """
        deadline = time.monotonic() + _NAMELESS_SECONDS
        while True:
            rivals = [
                other
                for other in self._trials()
                if other.number != trial.number
                and _status(other) not in _NO_RESULT
                and self._asked(other) == tile
            ]
            self._taken = set(self._owners(self._seen))
            if any(x.number < trial.number or _is_taken(x) for x in rivals):
                return False
            if not rivals or time.monotonic() > deadline:
                trial.set_user_attr("worker", {**trial.user_attrs["worker"], "has": True})
                return True
            time.sleep(_DECISION_SECONDS)

    def tell(self, trial: optuna.Trial, outcome: Outcome | None) -> None:
        """What came of an asked trial; None: it was not tried after all."""
        if outcome is None:
            self._give_up(trial.number, UNTRIED, "")
            return
        found: dict[str, Any] = {
            "status": outcome.status,
            "reason": outcome.reason,
            "prepare_seconds": round(outcome.prepare_seconds, 4),
        }
        if outcome.value is not None:
            # Rounded to the nanosecond: clocks are no finer, and storages stay small.
            found["samples"] = [round(x, 9) for x in outcome.samples]
            found["anchor"] = [round(x, 9) for x in outcome.anchor]
            found["value"], found["pruned"] = outcome.value, outcome.pruned
        trial.set_user_attr("outcome", found)
        self._conclude(trial.number, found)

    def _conclude(self, number: int, found: Mapping[str, Any]) -> None:
        """The trial's end, as its outcome says, which was told before: a process that dies between
        the two has lost nothing."""
        value = found.get("value")
        if value is None:
            self.study.tell(number, state=TrialState.FAIL)
        elif found["pruned"]:
            storage = self.study._storage
            storage.set_trial_intermediate_value(self._id(number), len(found["samples"]), value)
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, value)

    def importances(self) -> dict[str, float]:
        """How much each parameter matters among the tiles of its kernel, by PED-ANOVA: shares that
        sum to 1 for a kernel; empty for one with too few trials."""
        found: dict[str, float] = {}
        for names in self._space.kernels():
            with contextlib.suppress(ValueError, RuntimeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found |= optuna.importance.get_param_importances(
                    self.study, evaluator=PedAnovaImportanceEvaluator(), params=names
                )
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def reject(self, tile: Tile, status: str, reason: str) -> None:
        """Take back what was told of a tile: a later check found it `wrong` or `failed`."""
        self._rejected[tile] = (status, reason)
        self._note(f"{_REJECTED}{tile}", {"status": status, "reason": reason})

    def finish(self, decision: Mapping[str, Any]) -> None:
        """Note the winner: a search that wants a fresh study then begins another."""
        self._note(FINISHED, {**decision, "at": time.time()})

    def _note(self, key: str, value: Mapping[str, Any]) -> None:
        """A note about what is decided: no reason to lose that."""
        try:
            self.study.set_user_attr(key, value)
        except Exception as error:  # noqa: BLE001 - of whatever database
            warnings.warn(f"{failure(error) or error}: {key!r} was not noted", stacklevel=2)

    def _trials(self) -> list[FrozenTrial]:
        self._seen = self.study.get_trials(deepcopy=False)
        return self._seen

    def _owners(self, trials: Sequence[FrozenTrial]) -> dict[Tile, int]:
        """The first trial of every tile that was tried or is being tried."""
        owners: dict[Tile, int] = {}
        for trial in trials:
            tile = self._asked(trial)
            if tile is not None and _status(trial) not in _NO_RESULT:
                owners.setdefault(tile, trial.number)
        return owners

    def _asked(self, trial: FrozenTrial) -> Tile | None:
        """The tile that a trial has asked for, once it has got that far."""
        return self._space.tile_of(trial.params) if "worker" in trial.user_attrs else None

    def _outcome(self, trial: FrozenTrial) -> Outcome | None:
        status = _status(trial)
        if not trial.state.is_finished() or not status or status in _NO_RESULT:
            return None
        tile = self._space.tile_of(trial.params)
        if tile is None:
            return None  # a tile that is no longer in the space
        if tile in self._rejected:
            found = trial.user_attrs["outcome"]
            seconds = float(found["prepare_seconds"])
            return Outcome(tile, *self._rejected[tile], prepare_seconds=seconds)
        found = trial.user_attrs["outcome"]
        return Outcome(
            tile,
            status,
            found["reason"],
            tuple(found.get("samples", ())),
            tuple(found.get("anchor", ())),
            trial.value,
            trial.state == TrialState.PRUNED,
            float(found["prepare_seconds"]),
        )

    def _give_up(self, number: int, status: str, reason: str) -> bool:
        """Fail a trial without a result; whether it was still unfinished."""
        found = {"status": status, "reason": reason, "prepare_seconds": 0.0}
        try:
            self.study._storage.set_trial_user_attr(self._id(number), "outcome", found)
            self.study.tell(number, state=TrialState.FAIL)
        except (RuntimeError, ValueError):
            return False  # another worker was faster
        return True

    def _id(self, number: int) -> int:
        study = self.study
        return study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)


def _status(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get("outcome", {}).get("status", ""))


def _is_taken(trial: FrozenTrial) -> bool:
    return trial.state.is_finished() or trial.user_attrs["worker"].get("has", False)
