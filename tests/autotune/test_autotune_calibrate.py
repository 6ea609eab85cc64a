"""`--calibrate`: simulated timings give back the constants that made them, and plans use them."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from statistics import median
from typing import Any

import pytest
import torch

from flashmoe import _extension
from flashmoe.autotune import calibration
from flashmoe.autotune.calibration import Pair, calibrated
from flashmoe.autotune.cli.dispatch import main
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import Arch
from flashmoe.planning import plan
from flashmoe.prediction import costs, kernels
from flashmoe.prediction.predict import Costs, Work, microseconds
from flashmoe.spec.mask import causal_if
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

HERE = Arch("cuda", "An unknown GPU", (9, 0), 100, 232448, 1_600_000, 2.4e12)
TILES = ("sm90:128x128-stages2-q2-pingpong-qreg-fma0-ctas1", "sm80:128x64-stages2-warps4")
NAMES = tuple(f"{tile}@128" for tile in TILES)


def work_of(name: str, problem: Problem) -> Work:
    work = kernels.tile_work(Tile.parse(name.partition("@")[0]), problem, HERE.sm_count)
    assert work is not None
    return work


def simulated(truth: dict[str, Costs], rng: random.Random) -> dict[str, list[Pair]]:
    """What a calibration would measure, with a noise of 1 %."""
    found: dict[str, list[Pair]] = {name: [] for name in truth}
    for problem in calibration.problems(128, HERE.sm_count):
        for name, known in truth.items():
            work = work_of(name, problem)
            found[name].append((work, microseconds(work, known) * math.exp(rng.gauss(0, 0.01))))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_known_constants_are_recovered(seed: int) -> None:
    rng = random.Random(seed)
    believed = costs.shipped(HERE)
    truth = {}
    for name in NAMES:
        known = believed.named(name)
        assert known is not None
        factors = [math.exp(rng.uniform(-0.5, 0.5)) for _ in range(4)]
        truth[name] = known._replace(
            launch=known.launch * factors[0],
            block=known.block * factors[1],
            masked_block=known.masked_block * factors[1],
            step=known.step * factors[2],
            bytes_per_us=known.bytes_per_us * math.exp(rng.uniform(-0.2, 0.2)),
        )
    table = calibrated(believed, simulated(truth, rng))
    for name in NAMES:
        found = table.costs[name]
        assert found.launch == pytest.approx(truth[name].launch, rel=0.1)
        assert found.step == pytest.approx(truth[name].step, rel=0.05)
        # On problems that were not measured, and well nearer than what was believed before.
        errors: dict[Costs, list[float]] = {found: [], believed.named(name) or found: []}
        for _ in range(60):
            sizes = [2 ** rng.uniform(*x) for x in ((0, 9), (5, 12), (5, 12))]
            batch, seqlen_q, seqlen_kv = map(round, sizes)
            causal = causal_if(rng.random() < 0.5)
            problem = Problem(batch, 4, 4, seqlen_q, seqlen_kv, 128, "bfloat16", mask=causal)
            work = work_of(name, problem)
            exact = microseconds(work, truth[name])
            for known, errors_of in errors.items():
                errors_of.append(abs(math.log(microseconds(work, known) / exact)))
        assert median(errors[found]) < 0.02
        assert max(errors[found]) < 0.12
        assert median(errors[found]) < 0.3 * max(map(median, errors.values()))


def test_tiles_that_nobody_measured_follow_those_that_were() -> None:
    """All that was measured takes twice as long a step as was believed."""
    believed = costs.shipped(HERE)
    names = [name for name in believed.costs if name.startswith("sm90:") and name.endswith("@128")]
    truth = {}
    for name in names:
        known = believed.named(name)
        assert known is not None
        truth[name] = known._replace(step=2 * known.step)
    table = calibrated(believed, simulated(truth, random.Random(0)))
    unknown = Tile.parse("sm90:64x80-stages3-q1-fma4-ctas1")
    before, after = (x.of_tile(unknown, 128) for x in (believed, table))
    assert before is not None
    assert after is not None
    assert after.step == pytest.approx(2 * before.step, rel=0.1)


@pytest.fixture
def forgotten() -> Any:
    yield
    costs.forget()


@pytest.mark.usefixtures("forgotten")
def test_what_is_stored_comes_before_what_is_shipped(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path))
    for other in (HERE, dataclasses.replace(HERE, capability=(8, 6))):
        plan.reload_databases()
        before = costs.table(other)
        assert (before is None) == (other.capability[0] != 9)
        path = costs.user_path(other.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        table = calibrated(costs.shipped(HERE), {})
        mine = dataclasses.replace(table, costs={NAMES[0]: Costs(*[1.0] * 9)})
        stored = mine.to_json() | {"kernels": _extension.kernel_hash("cuda")}
        path.write_text(json.dumps(stored), encoding="utf-8")
        assert costs.table(other) == before  # until it is read anew
        plan.reload_databases()
        found = costs.table(other)
        assert found is not None
        assert found.costs == mine.costs
        path.write_text(json.dumps({**stored, "kernels": "others"}), encoding="utf-8")
        plan.reload_databases()
        assert costs.table(other) == before
        path.write_text("{", encoding="utf-8")
        plan.reload_databases()
        with pytest.warns(UserWarning, match="is damaged .* set aside as"):
            assert costs.table(other) == before
        assert not path.exists()


def test_what_is_measured_runs(monkeypatch: Any) -> None:
    """On the CPU, whose clock stands in for a GPU's: SDPA's kernels, by their own descriptions."""
    for name in ("cuda", "triton"):
        monkeypatch.setattr(BACKENDS[name], "unavailable", lambda device: "not here")
    monkeypatch.setattr(calibration, "HEAD_DIMS", (64,))
    monkeypatch.setattr(calibration, "_SIZES", ((0.01, 128, 128), (0.01, 32, 64)))
    told: list[str] = []
    pairs = calibration.measured(torch.device("cpu"), HERE, 60.0, told.append)
    assert set(pairs) == {"sdpa@64", "sdpa-split@64"} or set(pairs) == {"sdpa@64", "sdpa-flash@64"}
    assert all(us > 0 for found in pairs.values() for _, us in found)
    assert len(told) == 4
    assert calibration.measured(torch.device("cpu"), HERE, 0.0, told.append) == {}


def test_a_cpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--calibrate", "--device", "cpu"]) == 2
    assert "--calibrate must be used with a CUDA device" in capsys.readouterr().err
