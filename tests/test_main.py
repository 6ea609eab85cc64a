"""`python -m flashmoe` as a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys

from flashmoe import Problem, _extension
from flashmoe.machine import device
from flashmoe.measure.fingerprint import kernel_hash
from flashmoe.planning import database


def run(*arguments):
    command = [sys.executable, "-m", "flashmoe", *arguments]
    # conftest.py sets TRITON_INTERPRET for the tests' own process; users do not.
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_says_what_is_available_and_why_the_rest_is_not():
    result = run()
    assert result.returncode == 0
    assert result.stderr == ""
    assert "\ncpu: " in result.stdout
    summary = result.stdout.splitlines()
    assert [line for line in summary if line.startswith("  cpu")] == ["  cpu      yes"]
    assert len(summary) < 30
    assert "  cuda     no: needs a CUDA device, got cpu" in result.stdout
    assert "  triton   no: needs a CUDA device (or TRITON_INTERPRET=1), got cpu" in result.stdout
    assert "tuned (yours): " in result.stdout


def test_lists_every_tile_that_is_compiled_in():
    result = run("tiles")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == len(set(lines))
    info = _extension.load()
    for table in (info.instances, info.backward_instances, info.decode_instances):
        for (kernel, head_dim, variant), tiles in table.items():
            names = f"{kernel} head_dim {head_dim}"
            starts = (names + ":",) if not variant.names else (names + ",",)
            listed = [line for line in lines if line.startswith((*starts, f"{names}, plain"))]
            for tile in tiles:
                assert any(str(tile).partition(":")[2] in line for line in listed)


def test_says_how_many_tuned_problems_are_of_other_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path))
    problems = [Problem(1, 2, 2, seqlen, seqlen, 16, "float32") for seqlen in (8, 16, 32)]
    judged = (kernel_hash("cpu"), "others", "others")
    entries = {
        problem.bucket: database.Entry(problem, "default", "", "sdpa", judged=kernels)
        for problem, kernels in zip(problems, judged, strict=True)
    }
    path = database.user_path(device.cpu_name())
    database.update(path, entries)
    line = f"  tuned (yours): 3 problems (2 of other kernels, which are not used), {path}"
    assert line in run().stdout.splitlines()


def test_bad_usage():
    result = run("--frobnicate")
    assert result.returncode == 2
    assert "--frobnicate" in result.stderr
