"""Workers of one study, in this process and in forked ones, with simulated kernels."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback

from autotune_simulated import DEFAULT, GRID, SimulatedBench, bowl

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.search.record import Record
from flashmoe.autotune.search.search import Walk
from flashmoe.autotune.search.space import Space
from flashmoe.autotune.search.storage import open_storage, open_study
from flashmoe.autotune.search.trials import Search
from flashmoe.tiles import Tile

BEST = Tile("cpu", 192, 256)
SPACE = Space(GRID)
# Enough for three workers to share.
WIDE = Space([*GRID, *(Tile("cpu", 1024 + t.block_m, t.block_n) for t in GRID)])


class SlowBench(SimulatedBench):
    """Takes real time: `cost` seconds for every candidate in a look."""

    def __init__(self, cost: float, seed: int = 0) -> None:
        super().__init__(bowl(BEST, step=0.05), seed=seed)
        self.cost = cost

    def measure(self, candidates, **options):  # type: ignore[no-untyped-def]
        time.sleep(self.cost * len(candidates))
        return super().measure(candidates, **options)

    def now(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


class Turns:
    """One simulated clock a worker. A worker goes on when no other is behind it, so that what each
    finds in the study, and when all are done, depends on simulated time alone."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("fork")
        self._changed = context.Condition()
        self.clocks = context.Array("d", count, lock=False)
        self._done = context.Array("b", count, lock=False)

    def advance(self, worker: int, clock: float) -> None:
        with self._changed:
            self.clocks[worker] = clock
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._next() == worker, timeout=120)

    def finish(self, worker: int) -> None:
        with self._changed:
            self._done[worker] = True
            self._changed.notify_all()

    def _next(self) -> int:
        """The worker that is furthest behind, of equals the first."""
        return min(
            (number for number, done in enumerate(self._done) if not done),
            key=lambda number: self.clocks[number],
        )


class TurnBench(SimulatedBench):
    """Takes simulated time only, turn by turn with the other workers."""

    def __init__(self, turns: Turns, worker: int, seed: int) -> None:
        super().__init__(bowl(BEST, step=0.05), seed=seed, prepare_seconds=0.01)
        self._turns = turns
        self._worker = worker
        turns.advance(worker, 0.0)

    def prepare(self, candidate):  # type: ignore[no-untyped-def]
        measured = super().prepare(candidate)
        self._turns.advance(self._worker, self.clock)
        return measured

    def measure(self, candidates, **options):  # type: ignore[no-untyped-def]
        measured = super().measure(candidates, **options)
        self._turns.advance(self._worker, self.clock)
        return measured

    def wait(self, seconds: float) -> None:
        super().wait(seconds)
        self._turns.advance(self._worker, self.clock)


def run(
    where: str,
    bench: SimulatedBench,
    seed: int = 0,
    trials: int | None = None,
    contend: bool = True,
    space: Space = SPACE,
) -> Search:
    study = open_study(open_storage(where), "study", {})
    return Walk(
        space,
        bench,
        Candidate.of_tile(DEFAULT),
        [DEFAULT],
        Record(study, space),
        seconds=60,
        trials=trials,
        sampler="brute",
        seed=seed,
        contend=contend,
    ).run()


def in_process(
    where: str,
    cost: float,
    seed: int,
    space: Space = SPACE,
    turns: Turns | None = None,
    worker: int = 0,
) -> int:
    """Search in a forked process, which has all modules already, as that one of `turns`; returns
    its PID."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            bench = TurnBench(turns, worker, seed) if turns else SlowBench(cost, seed)
            run(where, bench, seed, contend=False, space=space)
            code = 0
        except Exception:  # noqa: BLE001 - told by the exit code
            traceback.print_exc()
        finally:
            if turns:
                turns.finish(worker)
            os._exit(code)
    return pid


def finished(where: str, space: Space = SPACE) -> list[Tile]:
    study = open_study(open_storage(where), "study", {})
    return [outcome.tile for outcome in Record(study, space).outcomes()]
