"""The processes that compile what is tried next, beside the one that times."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.running.process import START_PATIENCE, Child, ChildFailed
from flashmoe.autotune.search.typical import Typical
from flashmoe.spec.problem import Problem

# How often to look at them while waiting.
_TURN_SECONDS = 0.01
_Job = tuple[Problem, Candidate]


class Compilers:
    """Children that compile ahead, beside the one that times. What fails here is nobody's fault
    yet: the candidate is compiled again where it is checked, and blamed there. One that takes
    longer than `patience` seconds is to blame, for it would hang there, too."""

    def __init__(self, start: Callable[[], Child], count: int, patience: float = 60.0) -> None:
        self._start = start
        self._patience = patience
        self.count = count
        self._took = Typical()
        self._waiting: collections.deque[_Job] = collections.deque()
        # What each child is at, and since when: None for one that has yet to start.
        self._children: dict[Child, tuple[_Job | None, float | None]] = {}
        self._late: dict[_Job, str] = {}

    @property
    def seconds(self) -> float | None:
        """What compiling one takes; None: none is done yet."""
        return self._took.seconds if self._took else None

    def warm_up(self) -> None:
        """Start the children: that takes seconds."""
        while len(self._children) < self.count:
            self._children[self._start()] = (None, None)

    def submit(self, problem: Problem, candidate: Candidate) -> None:
        job = (problem, candidate)
        if not self._is_open(job):
            self._waiting.append(job)
        self._turn()

    def late(self, problem: Problem, candidate: Candidate) -> str:
        """Why a candidate's compilation was given up; empty when it was not."""
        return self._late.get((problem, candidate), "")

    def wait_for(self, problem: Problem, candidate: Candidate, until: float) -> bool:
        """Until it is compiled or given up, if it was submitted, but not past `until`
        (time.perf_counter). Whether that was enough."""
        job = (problem, candidate)
        while True:
            self._turn()
            if not self._is_open(job):
                return True
            left = until - time.perf_counter()
            if left <= 0:
                return False
            time.sleep(min(left, _TURN_SECONDS))

    def cancel(self) -> None:
        """Forget what no child has begun."""
        self._waiting.clear()

    def close(self) -> None:
        self.cancel()
        for child in self._children:
            child.close()
        self._children.clear()

    def _is_open(self, job: _Job) -> bool:
        return job in self._waiting or any(job == busy for busy, _ in self._children.values())

    def _turn(self) -> None:
        """Take what children have answered, and give them what waits."""
        for child, (job, since) in list(self._children.items()):
            if job is not None:
                self._look_after(child, job, since)
        idle = [child for child, (job, _) in self._children.items() if job is None]
        while self._waiting and (idle or len(self._children) < self.count):
            child = idle.pop() if idle else self._start()
            job = self._waiting.popleft()
            child.send("precompile", *job)
            self._children[child] = (job, time.perf_counter() if child.up else None)

    def _look_after(self, child: Child, job: _Job, since: float | None) -> None:
        now = time.perf_counter()
        try:
            if since is None:
                if not child.answers_within(0.0):
                    return
                child.wait_until_up(START_PATIENCE)
                self._children[child] = (job, since := now)
            if child.answers_within(0.0):
                self._receive(child)
                self._took.add(now - since)
                self._children[child] = (None, None)
            elif now - since > self._patience:
                self._late[job] = f"compiling took longer than {self._patience:.0f} s"
                child.close()
                del self._children[child]
        except ChildFailed:
            del self._children[child]

    def _receive(self, child: Child) -> None:
        try:
            child.receive(self._patience)
        except ChildFailed:
            raise
        except Exception:  # noqa: BLE001 - told where the candidate is checked
            pass
