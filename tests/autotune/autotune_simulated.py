"""A simulated device for the search: true times with noise and drift, and a clock of its own."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence

import pytest

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.backends import BACKENDS
from flashmoe.measure.timing import Measurement
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile, grid

PROBLEM = Problem(1, 8, 8, 1024, 1024, 64, "float32")
DEFAULT = Tile("cpu", 64, 128)
GRID = grid("cpu", block_m=(32, 64, 96, 128, 192, 256), block_n=(32, 64, 128, 256, 512))


def bowl(best: Tile, step: float = 0.03, floor: float = 1e-3) -> Callable[[Candidate], float]:
    """True seconds that grow by `step` with every halving or doubling away from `best`."""

    def seconds(candidate: Candidate) -> float:
        tile = candidate.tile
        if tile is None:
            return floor * 3
        distance = 0.0
        for axis in ("block_m", "block_n", "num_stages", "num_warps"):
            low, high = sorted((getattr(tile, axis), getattr(best, axis)))
            while low < high:
                low *= 2
                distance += 1
        return floor * (1 + step * distance)

    return seconds


class SimulatedBench:
    """A Bench without a device. `wrong` and `failing` hold names with reasons; `ragged` those that
    only the check of odd sizes finds wrong; `broken_at` fails a candidate while it is timed."""

    def __init__(
        self,
        seconds: Callable[[Candidate], float],
        *,
        noise: float = 0.01,
        seed: int = 0,
        prepare_seconds: float = 0.0,
        wrong: Mapping[str, str] | None = None,
        failing: Mapping[str, str] | None = None,
        ragged: Mapping[str, str] | None = None,
        broken_at: Mapping[str, str] | None = None,
        compiles_ahead: bool = False,
        compile_seconds: float = 0.0,
        verify_seconds: float = 0.0,
        fresh: float = 0.0,
        compilers: int = 1,
        stuck: Collection[str] = (),
    ) -> None:
        self.seconds = seconds
        self.noise = noise
        self.rng = random.Random(seed)
        self.prepare_seconds = prepare_seconds
        self.wrong = dict(wrong or {})
        self.failing = dict(failing or {})
        self.ragged = dict(ragged or {})
        self.broken_at = dict(broken_at or {})
        self.clock = 0.0
        self.prepared: list[str] = []
        self.timed: dict[str, int] = {}
        self.drift = 1.0
        self.fresh_processes = 0
        self.process = 0
        self.submitted: list[str] = []
        self.compiles_ahead = compiles_ahead
        self.compilers = compilers
        # When each tile is compiled, and when each compiler is free again: never, once it got one
        # of `stuck`.
        self.compile_seconds = compile_seconds
        self.compiled_at: dict[str, float] = {}
        self.stuck = stuck
        self._free = [0.0] * compilers
        self.verify_seconds = verify_seconds
        self.fresh_seconds = fresh

    def precompile(self, candidates: Sequence[Candidate]) -> None:
        for name in map(str, candidates):
            self.submitted.append(name)
            if name in self.compiled_at:
                continue
            compiler = self._free.index(min(self._free))
            takes = math.inf if name in self.stuck else self.compile_seconds
            self._free[compiler] = max(self.clock, self._free[compiler]) + takes
            self.compiled_at[name] = self._free[compiler]

    def compiled(self, candidate: Candidate, until: float) -> bool:
        there = self.compiled_at.get(str(candidate), self.clock)
        self.clock = max(self.clock, min(there, until))
        return there <= until

    def refresh(self, candidates: Mapping[str, Candidate]) -> None:
        self.fresh_processes += 1
        self.process += 1
        self.clock += self.fresh_seconds
        self.measure(candidates, rounds=1, warmup=0)

    def wait(self, seconds: float) -> None:
        self.clock += seconds

    def close(self) -> None:
        pass

    def prepare(self, candidate: Candidate) -> Measurement:
        name = str(candidate)
        if name not in self.prepared:
            self.compiled(candidate, math.inf)
            self.prepared.append(name)
            self.clock += self.prepare_seconds
        cost = (self.prepare_seconds,)
        if name in self.wrong:
            return Measurement("wrong", cost, self.wrong[name])
        if name in self.failing:
            return Measurement("failed", cost, self.failing[name])
        return Measurement("ok", cost)

    def verify(self, candidate: Candidate) -> Measurement:
        self.clock += self.verify_seconds
        name = str(candidate)
        if name in self.ragged:
            return Measurement("wrong", (0.0,), self.ragged[name])
        return Measurement("ok", (0.0,))

    def measure(
        self,
        candidates: Mapping[str, Candidate],
        *,
        rounds: int,
        warmup: int,
        max_seconds: float | None = None,
    ) -> dict[str, Measurement]:
        deadline = None if max_seconds is None else self.clock + max_seconds
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        for number in range(-warmup, rounds):
            # Drift that all candidates of a round share, as clocks and neighbours cause.
            self.drift *= 1 + self.rng.gauss(0, self.noise)
            self.drift = min(max(self.drift, 0.8), 1.2)
            for name, candidate in candidates.items():
                if str(candidate) in self.broken_at:
                    continue
                true = self.seconds(candidate) * self.drift
                # Noise only ever adds time.
                taken = true * (1 + abs(self.rng.gauss(0, self.noise)))
                self.clock += taken
                self.timed[str(candidate)] = self.timed.get(str(candidate), 0) + 1
                if number >= 0:
                    samples[name].append(taken)
            if deadline is not None and number >= 0 and self.clock >= deadline:
                break
        return {
            name: Measurement("failed", (), self.broken_at[str(candidate)])
            if str(candidate) in self.broken_at
            else Measurement("ok", tuple(samples[name]))
            for name, candidate in candidates.items()
        }

    def now(self) -> float:
        return self.clock


def simulate_kernel(monkeypatch: pytest.MonkeyPatch, tiles: Sequence[Tile]) -> None:
    """The CPU kernel has these tiles and DEFAULT, which simulated times are made for."""
    backend = type(BACKENDS["cpu"])
    monkeypatch.setattr(backend, "tiles", lambda *_: list(tiles))
    monkeypatch.setattr(backend, "default_tile", lambda *_: DEFAULT)
    monkeypatch.setattr(
        "flashmoe.autotune.schedule.problem.default_candidate",
        lambda *_: Candidate.of_tile(DEFAULT),
    )
