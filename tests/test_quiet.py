"""Rounds that other programs disturbed are taken again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import count

import pytest
import torch

from flashmoe.measure import quiet
from flashmoe.measure.timing import Measurement

CPU = torch.device("cpu")


def clock(*waits: float) -> Callable[[], float]:
    """A run delay that grows by each of `waits` in a round, and by nothing afterwards. It is read
    once up front, then before and after each round."""

    def readings() -> Iterator[float]:
        total = 0.0
        yield total
        for wait in waits:
            yield total
            total += wait
            yield total
        for _ in count():
            yield total

    return readings().__next__


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces the timing engine: round number n measures n + 1 seconds."""
    seen: list[int] = []

    def measure(candidates: object, device: object, **_: int) -> dict[str, Measurement]:
        seen.append(len(seen))
        return {"ours": Measurement("ok", (float(len(seen)),))}

    monkeypatch.setattr(quiet, "measure", measure)
    return seen


def taken(delay: Callable[[], float | None], wanted: int = 3) -> tuple[tuple[float, ...], float]:
    measured, disturbed = quiet.measure_quietly(
        {"ours": lambda: None}, CPU, rounds=wanted, warmup=0, seed=0, delay=delay
    )
    return measured["ours"].samples, disturbed


def test_a_quiet_machine_takes_each_round_once(rounds: list[int]) -> None:
    assert taken(clock()) == ((1.0, 2.0, 3.0), 0.0)


def test_disturbed_rounds_are_replaced(rounds: list[int]) -> None:
    assert taken(clock(0, 9, 0, 9)) == ((1.0, 3.0, 5.0), 0.0)


def test_a_busy_machine_ends_with_the_least_disturbed(rounds: list[int]) -> None:
    samples, disturbed = taken(clock(900, 5, 0, 700, 1e-4, 800))
    assert samples == (2.0, 3.0, 5.0)
    assert disturbed == pytest.approx(1 / 3)
    assert len(rounds) == 6


def test_where_the_delay_is_unknown_every_round_counts(rounds: list[int]) -> None:
    assert taken(lambda: None) == ((1.0,), 0.0)
    assert len(rounds) == 1


def test_a_failure_is_passed_on() -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    measured, _ = quiet.measure_quietly(
        {"ours": fail, "sdpa": lambda: None}, CPU, rounds=2, warmup=1, seed=0
    )
    assert measured["ours"].status == "failed"
    assert "boom" in measured["ours"].reason
    # The others go on.
    assert (measured["sdpa"].status, len(measured["sdpa"].samples)) == ("ok", 2)


def test_time_that_is_up_ends_the_attempts(rounds: list[int]) -> None:
    measured, disturbed = quiet.measure_quietly(
        {"ours": lambda: None},
        CPU,
        rounds=9,
        warmup=0,
        seed=0,
        delay=clock(900),
        max_seconds=0.0,
    )
    assert measured["ours"].samples == (1.0,)
    assert disturbed == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="the scheduler tells its delays on Linux")
def test_run_delay_grows() -> None:
    first = quiet.run_delay()
    if first is None:
        pytest.skip("this kernel keeps no schedstat")
    assert 0 <= first <= (quiet.run_delay() or 0)
