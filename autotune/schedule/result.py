"""What tuning one problem came to, and the eyes that watch it happen."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.search.trials import Search, Trial
from flashmoe.autotune.verdict.decide import AGAIN, Samples
from flashmoe.measure.fingerprint import Fingerprint
from flashmoe.measure.stats import Interval, ratio_by_process
from flashmoe.planning.database import DEFAULT, Entry
from flashmoe.spec.problem import Problem

# Statuses of a result, in words for the report.
STATUSES = {
    "tuned": "a faster choice was found",
    "kept": "searched; nothing beat what was in place",
    "confirmed": "stored before; measured again, and it still holds",
    "unmeasured": "nothing could be measured",
}


@dataclass(frozen=True, slots=True)
class Result:
    """One problem's outcome. `samples` are the final's, and `seconds` is the winner's median.
    `tile_with_lse` names the best tile where the winner has none; `store` says whether the database
    shall have the result. Speed-ups are None where the other could not run; `weight` says how often
    the problem runs. `verified` names what passed the check of odd sizes, `search_seconds` is what
    the search has taken, earlier runs included, and `group` as in database.Entry. `starved`: there
    was too little time to decide. An `unmeasured` result has a `reason` and nothing else."""

    problem: Problem
    status: str
    reason: str
    default: Candidate | None = None
    best: Candidate | None = None
    seconds: Interval | None = None
    speedup_default: Interval | None = None
    speedup_sdpa: Interval | None = None
    noise: float = 0.0
    tile_with_lse: str = ""
    samples: Samples = field(default_factory=dict)
    search: Search | None = None
    store: bool = False
    elapsed: float = 0.0
    runner_up: str = ""
    storage: str = ""
    weight: float = 1.0
    verified: Collection[str] = ()
    search_seconds: float = 0.0
    group: tuple[tuple[Problem, float], ...] = ()
    starved: bool = False

    def after(self, first: Result) -> Result:
        """As the outcome of both turns, where `first` was an earlier one of the same run."""
        search = self.search
        if search is not None and first.search is not None:
            search = dataclasses.replace(
                search,
                tried=first.search.tried + search.tried,
                seconds=first.search.seconds + search.seconds,
            )
        return dataclasses.replace(self, search=search, elapsed=first.elapsed + self.elapsed)

    def rejected(self) -> list[Trial]:
        """The tiles that computed wrong numbers or failed."""
        return [t for t in (self.search.trials if self.search else ()) if t.status != "ok"]

    def entry(self, fingerprint: Fingerprint, command: str) -> Entry:
        """As the database stores it. Raises ValueError for an unmeasured result."""
        if self.best is None:
            raise ValueError(f"result must be measured, got {self.status} ({self.reason})")
        kept = self.best == self.default
        return Entry(
            self.problem,
            DEFAULT if kept else self.best.backend,
            "" if kept else str(self.best.tile or ""),
            str(self.default),
            {name: tuple(chain(*processes)) for name, processes in self.samples.items()},
            _triple(self.speedup_default),
            _triple(self.speedup_sdpa),
            fingerprint.to_json(),
            command,
            self.tile_with_lse,
            self.runner_up,
            _triple(self.seconds),
            self.over_default(),
            self.search.study if self.search else "",
            self.storage,
            tuple(sorted(self.verified)),
            self._searched(),
            self.group,
            fingerprint.kernels,
        )

    def _searched(self) -> dict[str, Any]:
        if self.search is None:
            return {}
        return {
            "tried": len(self.search.trials),
            "of": self.search.space,
            "seconds": round(self.search_seconds, 1),
            "ended": self.search.ended,
        }

    def over_default(self) -> dict[str, float]:
        """The time over the default's of every tile that was timed, and of the final's rivals."""
        found = {
            str(trial.tile): trial.ratio.value
            for trial in (self.search.trials if self.search else ())
            if trial.ratio is not None
        }
        default = self.samples.get(str(self.default))
        if default is not None:
            found |= {
                name: ratio_by_process(samples, default).value
                for name, samples in self.samples.items()
                if name != AGAIN
            }
        return {name: round(ratio, 4) for name, ratio in sorted(found.items())}


def _triple(interval: Interval | None) -> tuple[float, float, float] | None:
    return None if interval is None else (interval.value, interval.low, interval.high)


class Watch:
    """Sees the tuning happen. This one looks away; progress.py shows it."""

    # The trials of the present problem, as of the last look.
    seen: Sequence[Trial] = ()

    def begin(self, seconds: float) -> None:
        """The run begins, and may take so long."""

    def problem(self, problem: Problem, number: int, total: int) -> None:
        """A problem begins."""

    def stage(self, text: str) -> None:
        """What happens next in it."""

    def trials(self, trials: Sequence[Trial], total: int) -> None:
        """The trials of its search so far, and how many there may be."""

    def result(self, result: Result) -> None:
        """It is done."""
