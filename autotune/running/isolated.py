"""The Bench whose candidates run in another process: what they break there, they break alone."""

from __future__ import annotations

import collections
import math
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from flashmoe.autotune.running.candidate import (
    SDPA,
    Candidate,
    default_candidate,
    runs,
    searched_backends,
)
from flashmoe.autotune.running.compilers import Compilers
from flashmoe.autotune.running.process import START_PATIENCE, Child, ChildFailed, Steps
from flashmoe.autotune.running.runner import DeviceRunner, GroupRunner
from flashmoe.autotune.schedule.suite import Group
from flashmoe.autotune.search.typical import Typical
from flashmoe.autotune.verdict.final import PROCESSES
from flashmoe.backends import BACKENDS
from flashmoe.backends.base import Precompiles
from flashmoe.measure.timing import Measurement
from flashmoe.spec.problem import Problem

# Each imports torch, and takes memory; more than so many are never all at work.
_MOST_COMPILERS = 32


class Session:
    """In the child: a Runner of the problem that was opened last, telling each step. open() comes
    first."""

    def __init__(self, steps: Steps, device: torch.device, runs: bool = True) -> None:
        self._steps = steps
        self._device = device
        # Who only compiles may do without: NVRTC needs no GPU, and a context takes memory, too.
        if device.type == "cuda" and runs:
            torch.zeros(1, device=device)  # makes the context, which takes a second

    def open(self, group: Group, seed: int, order: int, *, reference: bool) -> float:
        """Seconds that the reference took."""
        runners = [self._make(problem, seed, order) for problem in group.problems]
        self._runner: DeviceRunner | GroupRunner = runners[0]
        if len(runners) > 1:
            self._runner = GroupRunner(runners, group.weights)
        start = time.perf_counter()
        if reference:
            self._runner.reference()
        return time.perf_counter() - start

    def prepare(self, candidate: Candidate) -> Measurement:
        return self._runner.prepare(candidate)

    def verify(self, candidate: Candidate) -> Measurement:
        return self._runner.verify(candidate)

    def measure(
        self, candidates: Mapping[str, Candidate], **options: Any
    ) -> dict[str, Measurement]:
        numbers = {name: number for number, name in enumerate(candidates)}
        self._steps(0)
        return self._runner.measure(
            candidates, before_sample=lambda name: self._steps(numbers[name]), **options
        )

    def precompile(self, problem: Problem, candidate: Candidate) -> None:
        backend = BACKENDS[candidate.backend]
        if isinstance(backend, Precompiles) and candidate.tile is not None:
            backend.precompile(candidate.tile, problem, self._device)

    def _make(self, problem: Problem, seed: int, order: int) -> DeviceRunner:
        return DeviceRunner(problem, self._device, seed, order)


class Processes:
    """The children of one tuning run on one device, which shares the cores with other `workers`.
    On a GPU those of the next final start ahead, for device time does not notice."""

    def __init__(
        self,
        device: torch.device,
        session: str = "flashmoe.autotune.running.isolated:Session",
        workers: int = 1,
    ) -> None:
        self.device = device
        self._session = session
        # Each with when it was started.
        self._spares: collections.deque[tuple[Child, float]] = collections.deque()
        self._used: Child | None = None
        # What starting one takes that has to be waited for, and opening a problem in a fresh one,
        # with the first calls there.
        self._starting, self.opening = Typical(), Typical()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # One core belongs to the process that times.
        count = min(max((cores or 1) // workers - 1, 1), _MOST_COMPILERS)
        # The processes that time, or start to, need their cores when they need them.
        start = partial(Child, session, (device, False), nice=10)
        self.compilers = Compilers(start, count)

    def warm_up(self) -> None:
        """Start on a GPU what a search will want at once, while something else is done."""
        if self.device.type == "cuda":
            self._start_spares()
            self.compilers.warm_up()

    def get_ready(self, groups: Sequence[Group], backend: str | None, patience: float) -> None:
        """Find out which tiles are legal, which is remembered, and what a fresh process takes: this
        lasts seconds, and would be the first problem's, whose final would not know. A step that
        takes longer than `patience` seconds is a hang."""
        for group in groups:
            searched_backends(group.main, self.device, backend)
        if self.device.type == "cuda" and groups:
            self._rehearse(min(groups, key=lambda group: group.cost), patience)

    def _rehearse(self, group: Group, patience: float) -> None:
        """Do in a fresh process what a final begins with. What fails here is told where the
        problem is tuned, or comes out right in another process."""
        try:
            child = self.take(fresh=True)
        except Exception:  # noqa: BLE001
            return
        try:
            field = {"default": default_candidate(group.main, self.device)}
            if all(runs(SDPA, problem, self.device) for problem in group.problems):
                field["sdpa"] = SDPA
            # In a final everything is compiled.
            child.request("precompile", group.main, field["default"], patience=patience)
            start = time.perf_counter()
            child.request("open", group, 0, 0, reference=False, patience=patience)
            child.request("measure", field, rounds=1, warmup=0, patience=patience)
        except BaseException as error:
            child.close()
            if isinstance(error, Exception):
                return
            raise
        self.opening.add(time.perf_counter() - start)
        self.give_back(child)

    @property
    def wait_seconds(self) -> float:
        """How long a fresh one would have to be waited for now, as far as one can tell."""
        if not self._spares:
            return 0.0
        child, since = self._spares[0]
        if child.up or child.answers_within(0.0):
            return 0.0
        elapsed = time.perf_counter() - since
        # As long again where it takes longer than any did.
        usual = self._starting.seconds
        return usual - elapsed if elapsed < usual else elapsed

    def take(self, *, fresh: bool) -> Child:
        """A process that is up and belongs to the caller: one that was given back, or a `fresh`
        one, which has run nothing yet."""
        if self._used is not None and not fresh:
            used, self._used = self._used, None
            return used
        child, since = self._spares.popleft() if self._spares else (self._start(), None)
        try:
            if since is not None and not child.answers_within(0.0):
                child.answers_within(START_PATIENCE)
                self._starting.add(time.perf_counter() - since)
            child.wait_until_up(START_PATIENCE)
        except BaseException as error:
            child.close()
            # Whoever asks next may have better luck.
            if isinstance(error, Exception) and self.device.type == "cuda":
                self._start_spares()
            raise
        if self.device.type == "cuda":
            self._start_spares()
        return child

    def give_back(self, child: Child) -> None:
        """A process that its holder is done with: starting another takes seconds."""
        if self._used is not None:
            self._used.close()
        self._used = child

    def close(self) -> None:
        self.compilers.close()
        if self._used is not None:
            self._used.close()
        for child, _ in self._spares:
            child.close()
        self._used = None
        self._spares.clear()

    def _start(self) -> Child:
        return Child(self._session, (self.device,))

    def _start_spares(self) -> None:
        while len(self._spares) < PROCESSES:
            self._spares.append((self._start(), time.perf_counter()))


class IsolatedBench:
    """A Bench on a device. A step that takes longer than `patience` seconds is a hang."""

    def __init__(self, group: Group, processes: Processes, seed: int, patience: float) -> None:
        self._group = group
        self._processes = processes
        self._seed = seed
        self._patience = patience
        self.process = 0
        self._child: Child | None = None
        self._prepared: dict[Candidate, Measurement] = {}
        # A CPU that compiles is no CPU to time on.
        self.compiles_ahead = processes.device.type == "cuda"
        self.compilers = processes.compilers.count
        once = self._open(reference=True, fresh=False)
        if not processes.opening:
            processes.opening.add(once)  # before there has been a fresh one, the first tells

    def precompile(self, candidates: Sequence[Candidate]) -> None:
        if not self.compiles_ahead:
            return
        for candidate in candidates:
            backend, tile = BACKENDS[candidate.backend], candidate.tile
            # What is compiled does not queue for a compiler, which takes seconds to start.
            if (
                isinstance(backend, Precompiles)
                and tile is not None
                and not backend.is_compiled(tile, self._group.main)
            ):
                self._processes.compilers.submit(self._group.main, candidate)

    @property
    def compile_seconds(self) -> float | None:
        return self._processes.compilers.seconds

    def compiled(self, candidate: Candidate, until: float) -> bool:
        return candidate in self._prepared or self._processes.compilers.wait_for(
            self._group.main, candidate, until
        )

    def prepare(self, candidate: Candidate) -> Measurement:
        if candidate not in self._prepared:
            self.compiled(candidate, math.inf)
            if late := self._processes.compilers.late(self._group.main, candidate):
                self._prepared[candidate] = Measurement("timeout", (0.0,), late)
            else:
                self._prepared[candidate] = self._checked("prepare", candidate)
        return self._prepared[candidate]

    def verify(self, candidate: Candidate) -> Measurement:
        return self._checked("verify", candidate)

    def measure(
        self,
        candidates: Mapping[str, Candidate],
        *,
        max_seconds: float | None = None,
        **rounds: int,
    ) -> dict[str, Measurement]:
        """Whoever ends the process is out, and the others are measured anew."""
        alive = dict(candidates)
        broken: dict[str, Measurement] = {}
        end = None if max_seconds is None else self.now() + max_seconds
        while alive:
            left = None if end is None else max(end - self.now(), 0.0)
            try:
                measured: dict[str, Measurement] = self._ask(
                    "measure", alive, max_seconds=left, **rounds
                )
            except ChildFailed as failure:
                name = list(alive)[failure.step]
                broken[name] = Measurement(failure.status, (), str(failure))
                self._prepared[alive.pop(name)] = Measurement(failure.status, (0.0,), str(failure))
            else:
                return {name: {**measured, **broken}[name] for name in candidates}
        return broken

    @property
    def fresh_seconds(self) -> float:
        return self._processes.wait_seconds + self._processes.opening.seconds

    def refresh(self, candidates: Mapping[str, Candidate]) -> None:
        self._end()
        took = self._open(reference=False, fresh=True)
        start = self.now()
        self.measure(candidates, rounds=1, warmup=0)
        self._processes.opening.add(took + self.now() - start)

    def now(self) -> float:
        return time.perf_counter()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        self._processes.compilers.cancel()
        if self._child is not None:
            self._processes.give_back(self._child)
            self._child = None

    def _end(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _checked(self, method: str, candidate: Candidate) -> Measurement:
        start = self.now()
        try:
            result: Measurement = self._ask(method, candidate)
        except ChildFailed as failure:
            return Measurement(failure.status, (self.now() - start,), str(failure))
        return result

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        if self._child is None:
            self._open(reference=False, fresh=True)
        assert self._child is not None
        try:
            return self._child.request(method, *arguments, patience=self._patience, **options)
        except ChildFailed:
            self._child = None
            raise

    def _open(self, *, reference: bool, fresh: bool) -> float:
        """Seconds that it took, but for the reference and for waiting for what starts ahead."""
        start = self.now()
        self._child = self._processes.take(fresh=fresh)
        if self._processes.device.type == "cuda":
            start = self.now()  # the next one is started ahead
        self.process += 1
        try:
            once: float = self._child.request(
                "open",
                self._group,
                self._seed,
                # Far enough apart that no two processes repeat an order of timing.
                self.process * 1_000_003,
                reference=reference,
                patience=START_PATIENCE,
            )
        except BaseException:
            self._end()
            raise
        return self.now() - start - once
