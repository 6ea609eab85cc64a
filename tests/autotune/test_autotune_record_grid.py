"""The recording of a grid: what it compiles, what it writes, and that time running out spoils
nothing."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from types import ModuleType

import pytest
from autotune_replay import load
from support import load_benchmark

from flashmoe.backends import BACKENDS, jit
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

SMALL = (Problem(1, 2, 2, 64, 64, 16, "float32"), Problem(1, 2, 2, 96, 96, 16, "float32"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_benchmark("record_grid", monkeypatch)
    monkeypatch.setattr(module, "CPU_PROBLEMS", SMALL)
    monkeypatch.setattr(module, "CPU_AXES", {"block_m": (32, 48), "block_n": (32,)})
    monkeypatch.setattr("flashmoe.backends.cpu.CpuBackend.tiles", lambda *_: [Tile("cpu", 64, 64)])
    return module


def test_what_is_compiled_is_legal_and_shared(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where Hopper's kernels are built and there is a compiler, whatever is here.
    monkeypatch.setattr("flashmoe.backends.jit.unavailable", lambda: "")
    built = [Tile.parse("sm90:128x64-stages2-q1-pingpong")]
    monkeypatch.setattr("flashmoe.backends.cuda._compiled_in", lambda *_: built)
    wanted = script.kernels(script.GPU_PROBLEMS, script.HOPPER)
    whole = 0
    for problem, targets in wanted.items():
        # A quarter of them is what the replayed search may try.
        assert len(set(targets)) == len(targets) >= 60
        found = {target.tile for target in targets}
        assert not any(tile.violations(script.HOPPER, problem) for tile in found)
        if problem.head_dim == 256:
            whole += 1
            considered = BACKENDS["cuda"].reasons(problem, script.HOPPER)
            legal = {tile for tile in considered if not tile.violations(script.HOPPER, problem)}
            assert found == legal
        else:
            for axis, values in script.SM90_AXES.items():
                assert {getattr(tile, axis) for tile in found} <= set(values)
    assert whole >= 6
    everything = {target for targets in wanted.values() for target in targets}
    assert len(everything) < sum(map(len, wanted.values())) / 2


def test_a_whole_run_is_what_the_replay_reads(script: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "grid.json.xz"
    assert script.main(["--output", str(output), "--device", "cpu", "--seconds", "1000"]) == 0
    found = load(output)
    assert [grid.problem for grid in found] == list(SMALL)
    for grid in found:
        tiles = {str(Tile("cpu", m, n)) for m, n in ((64, 64), (32, 32), (48, 32))}
        assert set(grid.samples) == tiles | {"sdpa", str(grid.default)}
        assert all(len(samples) == script.ROUNDS >= 30 for samples in grid.samples.values())


def test_when_time_runs_out_whole_problems_come_first(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = script.record
    monkeypatch.setattr(script, "BATCH", 1)

    def record(problem: Problem, processes: object, deadline: float) -> dict[str, object]:
        # The first problem meets the deadline before its first tile.
        row: dict[str, object] = real(problem, processes, 0.0 if problem == SMALL[0] else deadline)
        return row

    monkeypatch.setattr(script, "record", record)
    output = tmp_path / "grid.json.xz"
    assert script.main(["--output", str(output), "--device", "cpu", "--seconds", "1000"]) == 0
    rows = json.loads(lzma.decompress(output.read_bytes()))["problems"]
    assert [row["complete"] for row in rows] == [True, False]
    assert [grid.problem for grid in load(output)] == [SMALL[1]]
    assert script.main(["--output", str(output), "--device", "cpu", "--seconds", "0"]) == 0
    assert load(output) == []


def test_kernels_are_compiled_without_a_gpu(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        """#!/bin/sh
[ "$1" = --version ] && echo V13.0.88 && exit
while [ "$1" != -o ]; do shift; done
echo code > "$2"
echo x >> "$LOG"
"""
    )
    nvcc.chmod(0o755)
    log = tmp_path / "log"
    for name, value in {
        "CUDA_HOME": nvcc.parents[1],
        "FLASHMOE_COMPILER": "nvcc",
        "FLASHMOE_CACHE_DIR": tmp_path / "cache",
        "LOG": log,
    }.items():
        monkeypatch.setenv(name, str(value))
    jit._compiler.cache_clear()
    few = script.GPU_PROBLEMS[-1:]
    monkeypatch.setattr(script, "GPU_PROBLEMS", few)
    targets = script.kernels(few, script.HOPPER)[few[0]]
    for _ in range(2):  # the second time all are there
        assert script.main(["--compile-only"]) == 0
        assert all(jit.is_cached(target) for target in targets)
        assert log.read_text().count("x") == len(targets)
