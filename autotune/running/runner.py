"""Runs candidates for the search: checks them, times them, tells the time of day."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.backends import BACKENDS
from flashmoe.measure import timing
from flashmoe.measure.check import Checker
from flashmoe.measure.inputs import GUARD_ROWS, make_inputs, ragged
from flashmoe.measure.quiet import measure_quietly
from flashmoe.measure.timing import Measurement
from flashmoe.planning.plan import heuristic
from flashmoe.spec.call import Saved
from flashmoe.spec.problem import Problem


class Bench(Protocol):
    """What the search needs to know about one problem on one device. Survives every candidate:
    one that crashes is `failed`, one that hangs is a `timeout`."""

    # Whether precompile is worth calling ahead of time.
    compiles_ahead: bool
    # How many candidates are compiled at the same time.
    compilers: int
    # The number of the process that runs candidates now; a fresh one has another.
    process: int

    @property
    def fresh_seconds(self) -> float:
        """What refresh would cost now."""

    @property
    def compile_seconds(self) -> float | None:
        """What compiling one candidate takes; None: nobody knows yet."""

    def precompile(self, candidates: Sequence[Candidate]) -> None:
        """Begin to compile, beside whatever is timed."""

    def compiled(self, candidate: Candidate, until: float) -> bool:
        """Wait until what precompile began is there, but not past `until` on the clock; whether it
        is. What was never begun need not be waited for."""

    def prepare(self, candidate: Candidate) -> Measurement:
        """Compile and check `candidate`, on the tensors that will be timed: `ok`, or `wrong` or
        `failed` with the reason. The one sample is how long that took when it was first asked."""

    def verify(self, candidate: Candidate) -> Measurement:
        """The check for finalists: odd sizes and guarded memory; statuses as in prepare."""

    def measure(
        self,
        candidates: Mapping[str, Candidate],
        *,
        rounds: int,
        warmup: int,
        max_seconds: float | None = None,
    ) -> dict[str, Measurement]:
        """Interleaved samples by name, as flashmoe.measure.quiet.measure_quietly takes them."""

    def refresh(self, candidates: Mapping[str, Candidate]) -> None:
        """Run what follows in a fresh process, in which `candidates` ran once: what first calls
        take (modules, cuDNN's plans) is part of its start."""

    def now(self) -> float:
        """Seconds on a clock that only goes forward."""

    def wait(self, seconds: float) -> None:
        """Do nothing for so long."""

    def close(self) -> None:
        """End what runs for this bench."""


# out and softmax_lse (None where a backend does not return it), or dq, dk and dv.
_Results = Callable[[], tuple[Tensor | None, ...]]


class _Data:
    """Inputs of one problem, what runs on them, and what results are compared with."""

    def __init__(self, problem: Problem, device: torch.device, seed: int, guard: int = 0) -> None:
        self._problem = problem
        self._device = device
        self._inputs = make_inputs(problem, device, seed, guard)
        self._checker = Checker(self._inputs, seed)

    @functools.cached_property
    def saved(self) -> Saved | None:
        """What a backward gets beside its call, by the forward that runs untuned."""
        if self._inputs.dout is None:
            return None
        forward = replace(self._problem, direction="fwd")
        plan = heuristic(forward, self._device, need_lse=True)
        out, lse = BACKENDS[plan.backend].bind(forward, plan.tile)(self._inputs.call)
        assert lse is not None, "need_lse chose a backend that does not return softmax_lse"
        return Saved(self._inputs.dout, out, lse)

    @functools.cached_property
    def expected(self) -> Checker:
        """What judges results, once it has judged what a backward is given."""
        assert self._checker.expected
        if self.saved is not None:
            _, out, lse, _ = self.saved
            if reason := self._checker.check({"out": out, "softmax_lse": lse}).reason:
                raise RuntimeError(f"the forward that runs untuned is wrong: {reason}")
        return self._checker

    def bound(self, candidate: Candidate) -> _Results:
        backend, tile, call = BACKENDS[candidate.backend], candidate.tile, self._inputs.call
        if self.saved is None:
            return functools.partial(backend.bind(self._problem, tile), call)
        return functools.partial(backend.bind_backward(self._problem, tile), call, self.saved)

    def error(self, call: _Results) -> str:
        """What is wrong with its results, empty when nothing is. Raises what it raises."""
        expected = self.expected
        names = ("out", "softmax_lse") if self.saved is None else ("dq", "dk", "dv")
        # The allocator hands freed memory out again: without this, rows that a kernel forgets to
        # write could hold the right results of the previous candidate instead of NaN.
        for x in self._inputs.call[:3]:
            torch.full_like(x, float("nan"))
        return expected.check(dict(zip(names, call(), strict=True))).reason


class DeviceRunner:
    """Checks and times the candidates of one problem on one device, as a Bench does, in the process
    that runs them: may raise timing.DeviceLost. `order` varies the order of timing and nothing
    else."""

    def __init__(self, problem: Problem, device: torch.device, seed: int, order: int = 0) -> None:
        self._problem = problem
        self._device = device
        self._seed = seed
        self._timed = _Data(problem, device, seed)
        self._order = self._looks = order
        self._prepared: dict[Candidate, Measurement] = {}

    @functools.cached_property
    def _ragged(self) -> _Data:
        return _Data(ragged(self._problem), self._device, self._seed + 1, GUARD_ROWS)

    def reference(self) -> None:
        """Compute what results are compared with. Raises when that does not fit."""
        assert self._timed.expected

    def prepare(self, candidate: Candidate) -> Measurement:
        if candidate not in self._prepared:
            self._prepared[candidate] = self._checked(candidate, "_timed")
        return self._prepared[candidate]

    def verify(self, candidate: Candidate) -> Measurement:
        return self._checked(candidate, "_ragged")

    def measure(
        self, candidates: Mapping[str, Candidate], **options: Any
    ) -> dict[str, Measurement]:
        """`options` as flashmoe.measure.quiet.measure_quietly has them."""
        self._looks += 1
        calls = {name: self._call(self._timed, candidate) for name, candidate in candidates.items()}
        seed = self._seed + self._looks
        return measure_quietly(calls, self._device, seed=seed, **options)[0]

    def _call(self, data: _Data, candidate: Candidate) -> _Results:
        """What runs a candidate, bound by its first call: where that fails, the candidate does."""
        bound = functools.cache(data.bound)
        return lambda: bound(candidate)()

    def _checked(self, candidate: Candidate, name: str) -> Measurement:
        start = time.perf_counter()
        try:
            data: _Data = getattr(self, name)
            reason = data.error(self._call(data, candidate))
            status = "wrong" if reason else "ok"
        except timing.DeviceLost:
            raise
        except Exception as error:
            status, reason = "failed", f"{type(error).__name__}: {error}"
            if not timing.usable(self._device):
                raise timing.DeviceLost(str(candidate), reason) from error
        return Measurement(status, (time.perf_counter() - start,), reason)


class GroupRunner:
    """Several problems that will share a tile, as one: a sample is the weighted sum of theirs, each
    timed in the same round, so a tile is behind when it is behind for them all together."""

    def __init__(self, runners: Sequence[DeviceRunner], weights: Sequence[float]) -> None:
        self._runners = runners
        self._weights = weights

    def reference(self) -> None:
        for runner in self._runners:
            runner.reference()

    def measure(
        self,
        candidates: Mapping[str, Candidate],
        *,
        rounds: int,
        warmup: int,
        max_seconds: float | None = None,
        **options: Any,
    ) -> dict[str, Measurement]:
        deadline = None if max_seconds is None else time.perf_counter() + max_seconds
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        failed: dict[str, Measurement] = {}
        for number in range(rounds):
            sums = dict.fromkeys(candidates, 0.0)
            for runner, weight in zip(self._runners, self._weights, strict=True):
                alive = {name: c for name, c in candidates.items() if name not in failed}
                wanted = {"rounds": 1, "warmup": 0 if number else warmup}
                for name, measured in runner.measure(alive, **wanted, **options).items():
                    if measured.status == "ok":
                        sums[name] += weight * measured.samples[0]
                    else:
                        failed[name] = measured
            for name, total in sums.items():
                samples[name].append(total)
            if deadline is not None and time.perf_counter() >= deadline:
                break
        return {
            name: failed.get(name) or Measurement("ok", tuple(samples[name])) for name in candidates
        }

    def _all(self, method: str, candidate: Candidate) -> Measurement:
        seconds = 0.0
        for runner in self._runners:
            found: Measurement = getattr(runner, method)(candidate)
            seconds += sum(found.samples)
            if found.status != "ok":
                return Measurement(found.status, (seconds,), found.reason)
        return Measurement("ok", (seconds,))

    prepare = functools.partialmethod(_all, "prepare")
    verify = functools.partialmethod(_all, "verify")
