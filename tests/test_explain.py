"""`python -m flashmoe explain`: what is compared, and why the choice fell."""

from __future__ import annotations

import pytest
import torch
from test_main import run

from flashmoe import _extension
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import Arch
from flashmoe.planning import database, explain, plan
from flashmoe.spec.mask import CAUSAL
from flashmoe.spec.problem import Problem
from flashmoe.tiles import PLAIN

H200 = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
DEVICE = torch.device("cuda", 0)
PROBLEM = Problem(8, 16, 16, 2048, 2048, 128, "bfloat16", mask=CAUSAL)
needs_sm90 = pytest.mark.skipif(
    ("sm90", 128, PLAIN) not in _extension.load().instances, reason="this build has no CUDA kernels"
)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(plan, "arch", lambda device: H200)
    monkeypatch.setattr(explain, "arch", lambda device: H200)
    monkeypatch.setattr(plan.database, "shipped_path", lambda name: tmp_path / "nothing.json")
    for name in ("cuda", "triton"):
        monkeypatch.setattr(BACKENDS[name], "unavailable", lambda device: "")
    plan.reload_databases()
    yield
    plan.reload_databases()


def times(lines, column):
    """Microseconds of the listed candidates by name, of those that have any."""
    listed = [line[1:].split() for line in lines if " us " in line or line.startswith("*  ")]
    rows = [[word for word in words if word != "us"] for words in listed]
    return {row[3]: float(row[column]) for row in rows if row[column] != "-"}


@needs_sm90
def test_the_least_predicted_time_is_chosen(hopper):
    lines = explain.lines(PROBLEM, DEVICE)
    predicted = times(lines, 0)
    assert len(predicted) > 5
    best = str(plan.make_plan(PROBLEM, DEVICE).tile)
    assert predicted[best] <= 1.01 * min(predicted.values())
    (chosen,) = (line for line in lines if line.startswith("*  "))
    assert best in chosen
    assert lines[-1].startswith("* is predicted to take the least time")
    assert any(line.startswith("  not cpu: ") for line in lines)


@needs_sm90
def test_what_was_measured_stands_beside_it(hopper):
    tile = _extension.load().instances["sm90", 128, PLAIN][-1]
    samples = {str(tile): (2e-4, 3e-4, 4e-4), "sdpa": (5e-4,)}
    entry = database.Entry(
        PROBLEM, "cuda", str(tile), "", samples=samples, judged=_extension.kernel_hash("cuda")
    )
    database.update(database.user_path(H200.name), {PROBLEM.bucket: entry})
    plan.reload_databases()
    lines = explain.lines(PROBLEM, DEVICE)
    assert times(lines, 1) == {str(tile): 300.0, "sdpa": 500.0}
    (chosen,) = (line for line in lines if line.startswith("*  "))
    assert str(tile) in chosen
    assert lines[-1] == "* was the fastest measured, says the user database"


def test_the_command():
    sizes = ("--batch", "1", "--heads", "4", "--kv-heads", "2", "--seqlen", "33", "--head-dim")
    result = run("explain", *sizes, "64", "--dtype", "float32", "--causal", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "fwd b1 h4/2 s33 d64 float32 causal on " in result.stdout
    assert "* is the first backend that runs it" in result.stdout
    result = run("explain", *sizes, "60", "--device", "cpu")
    assert result.returncode == 2
    assert "--head-dim: must be a multiple of 8" in result.stderr
