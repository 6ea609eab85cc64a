"""A kernel that misbehaves for some tiles, in the process where candidates run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.running.isolated import Session
from flashmoe.autotune.running.runner import DeviceRunner, _Data
from flashmoe.measure.timing import DeviceLost
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

WRONG = Tile("cpu", 64, 64)
CRASHES = Tile("cpu", 64, 128)
HANGS = Tile("cpu", 128, 64)
LOSES = Tile("cpu", 128, 256)
# Behaves when it is checked, and crashes when it is timed.
CRASHES_LATER = Tile("cpu", 256, 64)


class FaultyRunner(DeviceRunner):
    def _call(self, data: _Data, candidate: Candidate) -> Callable[[], tuple[Tensor | None, ...]]:
        right, tile = super()._call(data, candidate), candidate.tile

        def call() -> tuple[Tensor | None, ...]:
            out, lse = right()
            assert out is not None
            if tile == WRONG:
                return out + 1e-2, lse
            if tile == CRASHES or (tile == CRASHES_LATER and self._looks > self._order):
                os.kill(os.getpid(), signal.SIGSEGV)
            if tile == HANGS:
                threading.Event().wait()
            if tile == LOSES:
                raise DeviceLost(str(candidate), "RuntimeError: an illegal memory access")
            return out, lse

        return call


class FaultySession(Session):
    def precompile(self, problem: Problem, candidate: Candidate) -> None:
        if candidate.tile == HANGS:
            threading.Event().wait()
        super().precompile(problem, candidate)

    def _make(self, problem: Problem, seed: int, order: int) -> DeviceRunner:
        torch.set_num_threads(1)
        return FaultyRunner(problem, self._device, seed, order)


class Refusing:
    """A target that cannot be made."""

    def __init__(self, *_: object) -> None:
        raise ValueError("not here")


class Niceness:
    """Tells how nice its process is."""

    def __init__(self, *_: object) -> None:
        pass

    def value(self) -> int:
        return os.nice(0)
