"""Runs candidates for the search: checks them, times them, tells the time of day."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from flashmoe import timing
from flashmoe.autotune.check import Inputs, ragged_inputs, timed_inputs
from flashmoe.autotune.space import Candidate
from flashmoe.backends import BACKENDS
from flashmoe.problem import Problem
from flashmoe.timing import Measurement


class Bench(Protocol):
    """What the search needs to know about one problem on one device; tests simulate it."""

    def prepare(self, candidate: Candidate) -> Measurement:
        """Compile and check `candidate`, on the tensors that will be timed: `ok`, or `wrong` or
        `failed` with the reason. The one sample is how long that took when it was first asked."""
        ...

    def verify(self, candidate: Candidate) -> Measurement:
        """The check for finalists: odd sizes and guarded memory; statuses as in prepare."""
        ...

    def measure(
        self,
        candidates: Mapping[str, Candidate],
        *,
        rounds: int,
        warmup: int,
        max_seconds: float | None = None,
    ) -> dict[str, Measurement]:
        """Interleaved samples by name, as flashmoe.timing.measure takes them."""
        ...

    def now(self) -> float:
        """Seconds on a clock that only goes forward."""
        ...


class DeviceBench:
    """The Bench of a real device."""

    def __init__(self, problem: Problem, device: torch.device, seed: int) -> None:
        self._problem = problem
        self._device = device
        self._seed = seed
        self._inputs = timed_inputs(problem, device, seed)
        self._looks = 0
        self._prepared: dict[Candidate, Measurement] = {}

    @functools.cached_property
    def _ragged(self) -> Inputs:
        return ragged_inputs(self._problem, self._device, self._seed + 1)

    def prepare(self, candidate: Candidate) -> Measurement:
        if candidate not in self._prepared:
            self._prepared[candidate] = self._checked(candidate, self._inputs)
        return self._prepared[candidate]

    def verify(self, candidate: Candidate) -> Measurement:
        return self._checked(candidate, self._ragged)

    def measure(
        self,
        candidates: Mapping[str, Candidate],
        *,
        rounds: int,
        warmup: int,
        max_seconds: float | None = None,
    ) -> dict[str, Measurement]:
        self._looks += 1
        x = self._inputs
        calls = {
            name: functools.partial(self._forward, candidate, x.q, x.k, x.v)
            for name, candidate in candidates.items()
        }
        return timing.measure(
            calls,
            self._device,
            rounds=rounds,
            warmup=warmup,
            seed=self._seed + self._looks,
            max_seconds=max_seconds,
        )

    def now(self) -> float:
        return time.perf_counter()

    def _forward(
        self, candidate: Candidate, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        backend = BACKENDS[candidate.backend]
        scale = float(q.shape[-1] ** -0.5)
        return backend.forward(q, k, v, scale, self._problem.causal, candidate.tile)

    def _checked(self, candidate: Candidate, inputs: Inputs) -> Measurement:
        start = self.now()
        try:
            reason = inputs.error(functools.partial(self._forward, candidate))
            status = "wrong" if reason else "ok"
        except Exception as error:  # noqa: BLE001 - a failing candidate is a result, not a crash
            status, reason = "failed", f"{type(error).__name__}: {error}"
        return Measurement(status, (self.now() - start,), reason)
