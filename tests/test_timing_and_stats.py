"""The timing engine keeps samples paired and survives failures; intervals behave as intervals."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.measure import timing
from flashmoe.measure.instruction_cache import INSTRUCTIONS, ptx
from flashmoe.measure.stats import (
    Interval,
    median_by_process,
    median_interval,
    paired_ratio,
    ratio_by_process,
)
from flashmoe.measure.timing import Limits, Measurement, measure, measure_limits

CPU = torch.device("cpu")


def test_every_candidate_runs_every_round_in_shuffled_order():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abcd"}
    result = measure(calls, CPU, rounds=20, warmup=2)
    rounds = [tuple(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert len(rounds) == 22
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len(set(rounds)) > 5
    assert all(m.status == "ok" and len(m.samples) == 20 for m in result.values())


def test_a_failing_candidate_does_not_stop_the_others():
    count = 0

    def fails_later():
        nonlocal count
        count += 1
        if count > 4:
            raise RuntimeError("out of luck")

    result = measure({"good": lambda: None, "bad": fails_later}, CPU, rounds=9, warmup=1)
    assert result["bad"].status == "failed"
    assert result["bad"].reason == "RuntimeError: out of luck"
    assert len(result["bad"].samples) == 3
    assert len(result["good"].samples) == 9


def test_time_limit_ends_between_rounds():
    result = measure({"a": lambda: None, "b": lambda: None}, CPU, rounds=10**6, max_seconds=0.0)
    assert len(result["a"].samples) == len(result["b"].samples) == 1


def test_measure_errors():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        measure({}, CPU, rounds=0)
    with pytest.raises(ValueError, match="warmup must be at least 0, got -1"):
        measure({}, CPU, rounds=1, warmup=-1)
    with pytest.raises(ValueError, match=r"status must be one of .*, got 'fine'"):
        Measurement("fine")


def test_limits():
    limits = Limits(matmul_flops=100.0, copy_bytes=10.0)
    assert limits.floor(flops=200.0, nbytes=10.0) == 2.0
    assert limits.floor(flops=100.0, nbytes=50.0) == 5.0
    measured = measure_limits(CPU, torch.float32, rounds=2)
    assert measured.matmul_flops > 0
    assert measured.copy_bytes > 0


def test_limits_of_a_cpu_are_those_of_float32(monkeypatch):
    """Most have no 16-bit matrix units."""
    dtypes = []

    def matmul_once(candidates, *_, **__):
        dtypes.append(candidates["matmul"]().dtype)
        return dict.fromkeys(candidates, Measurement("ok", (1.0,)))

    monkeypatch.setattr(timing, "measure", matmul_once)
    measure_limits(CPU, torch.bfloat16, rounds=1)
    assert dtypes == [torch.float32]


times = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=40)


@given(times)
def test_median_lies_in_its_interval(samples):
    interval = median_interval(samples, resamples=200)
    assert min(samples) <= interval.low <= interval.high <= max(samples)
    assert interval == median_interval(samples, resamples=200)


@given(times, st.floats(0.1, 10))
def test_ratio_of_scaled_samples_is_the_scale_exactly(samples, factor):
    ratio = paired_ratio([x * factor for x in samples], samples, resamples=200)
    assert ratio.value == pytest.approx(factor)
    assert ratio.low == pytest.approx(factor)
    assert ratio.high == pytest.approx(factor)


def test_ratio_interval_covers_the_truth():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        noise = 1 + 0.05 * torch.rand(2, 40, generator=generator, dtype=torch.float64)
        ratio = paired_ratio((1.2 * noise[0]).tolist(), noise[1].tolist(), resamples=400)
        covered += not ratio.excludes(1.2)
    assert covered >= 180


def test_ratio_errors():
    with pytest.raises(ValueError, match="paired by round, got 2 and 1"):
        paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="numerator must be a non-empty"):
        paired_ratio([], [1.0])
    with pytest.raises(ValueError, match="denominator must be finite and positive"):
        paired_ratio([1.0], [0.0])


def _width(interval: Interval) -> float:
    return math.log(interval.high / interval.low)


def by_process(
    rng: np.random.Generator, effect: float, processes: int, rounds: int = 50
) -> np.ndarray:
    """Seconds around 1e-3 by process and round: rounds differ by 0.5 %, processes by `effect`."""
    levels = 1e-3 * np.exp(effect * rng.standard_normal((processes, 1)))
    return levels * np.exp(0.005 * rng.standard_normal((processes, rounds)))


@given(st.lists(times, min_size=1, max_size=4), st.floats(0.1, 10))
def test_ratio_by_process_of_scaled_samples_is_the_scale(samples, scale):
    ratio = ratio_by_process([[x * scale for x in process] for process in samples], samples)
    assert ratio.value == pytest.approx(scale)
    assert ratio.low < ratio.value < ratio.high


@pytest.mark.parametrize("effect", [0.0, 0.001, 0.002])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_interval_by_process_covers_what_processes_differ_by(effect, processes):
    """With effects of 0.2 % an interval over pooled rounds covers it in 23 to 30 cases of 100."""
    rng = np.random.default_rng(processes)
    covered = sum(
        not ratio_by_process(
            1.02 * by_process(rng, effect, processes, 400), by_process(rng, effect, processes, 400)
        ).excludes(1.02)
        for _ in range(200)
    )
    assert covered >= 186


def test_processes_tell_more_than_rounds():
    rng = np.random.default_rng(0)
    few, many, four = (
        _width(ratio_by_process(*(by_process(rng, 0.0, *shape) for _ in range(2))))
        for shape in ((1, 100), (1, 10000), (4, 25))
    )
    assert four < many < few < 1.3 * many


def test_processes_that_disagree_are_no_proof():
    rng = np.random.default_rng(0)
    one = by_process(rng, 0.0, 1)[0]
    assert ratio_by_process([1.02 * one] * 2, [one] * 2).low > 1.01
    assert ratio_by_process([1.04 * one, one], [one] * 2).low < 1


def test_what_a_clock_cannot_tell_is_no_difference():
    """A tenth of a microsecond is what processes differ by in short calls."""
    rng = np.random.default_rng(0)
    wide, narrow = (
        _width(ratio_by_process(1.02 * x, x))
        for x in (scale * by_process(rng, 0.0, 3) for scale in (1e-2, 1.0))
    )
    assert wide > 3 * narrow


def test_median_by_process_is_that_of_the_medians():
    found = median_by_process([[1.0, 2.0, 9.0], [7.0, 8.0, 9.0]])
    assert found.value == pytest.approx(4.0)
    assert found.low < 2.0
    assert found.high > 8.0
    huge = median_by_process([[1e-9], [1e9]])
    assert 0 < huge.low < 1 < huge.high < math.inf


def test_by_process_errors():
    with pytest.raises(ValueError, match="paired by round, got 2 and 1"):
        ratio_by_process([[1.0], [1.0, 2.0]], [[1.0], [1.0]])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratio_by_process([[1.0], [1.0]], [[1.0]])
    with pytest.raises(ValueError, match="samples must be of at least 1 process, got none"):
        median_by_process([])


def ptxas() -> str:
    """CUDA's, else the one that Triton brings."""
    if found := shutil.which("ptxas"):
        return found
    triton = importlib.util.find_spec("triton")
    assert triton is not None
    assert triton.origin is not None
    return str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "ptxas")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings a ptxas on Linux")
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_89", "sm_90", "sm_100"])
def test_the_kernel_that_evicts_code_is_as_long_as_it_says(tmp_path: Path, arch: str) -> None:
    """A compiler that saw through it would leave it short."""
    source, code = tmp_path / "evict.ptx", tmp_path / "evict.cubin"
    source.write_text(ptx())
    told = subprocess.run(
        [ptxas(), f"-arch={arch}", "-v", source, "-o", code],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert len(code.read_bytes()) > 16 * INSTRUCTIONS > 128 << 10
    assert not re.search(r"[1-9]\d* bytes (stack|spill)", told)
