"""False alarms and missed slowdowns of whole gates, from processes made up and recorded.

Recorded processes are the files in data/: `python -m flashmoe.ratchet bench --processes 36 --output
tests/ratchet/data/DEVICE.json`. Two sides are drawn from them without a process in common.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ratchet_synthetic as synthetic
from ratchet_resampling import rates

from flashmoe.ratchet.commands.bench import LEAST
from flashmoe.ratchet.gate.thresholds import DEFAULTS
from flashmoe.ratchet.results.files import load
from flashmoe.ratchet.results.values import Results, Series

pytestmark = pytest.mark.long
NAMES = tuple(f"fwd-b{b}-h8-s512-d64-float32" for b in range(1, 13))
DATA = sorted((Path(__file__).parent / "data").glob("*.json"))
GATES = 1000


def noisy(spread: str, processes: int = 400) -> Results:
    """12 cases whose processes differ as `spread` says, rounds by 0.5 %. A third of the cases are
    quieter and a third noisier than the rest."""
    rng = np.random.default_rng(11)
    base = synthetic.results(NAMES, processes=1)
    cases = []
    for i, case in enumerate(base.cases):
        scale = (0.5, 1.0, 1.5)[i % 3]
        if spread == "normal":
            level = 0.003 * rng.standard_normal(processes)
        elif spread == "two kinds":  # as of placements that a process keeps
            level = 0.008 * (rng.random(processes) < 0.3) + 0.001 * rng.standard_normal(processes)
        else:  # now and then one is hit as a whole
            level = 0.002 * rng.standard_normal(processes)
            level -= 0.05 * (rng.random(processes) < 0.05)
        seconds = 1e-3 * np.exp(scale * level)[:, None]
        ours = seconds * np.exp(0.005 * rng.standard_normal((processes, 5)))
        sdpa = 1e-3 * np.exp(0.005 * rng.standard_normal((processes, 5)))
        both = (Series("ok", tuple(tuple(map(float, p)) for p in x)) for x in (ours, sdpa))
        cases.append(replace(case, **dict(zip(("ours", "sdpa"), both, strict=True))))
    return replace(base, cases=tuple(cases))


@pytest.mark.parametrize("spread", ["normal", "two kinds", "outliers"])
def test_synthetic_noise(spread: str) -> None:
    recorded, processes = noisy(spread), 10
    same = rates(recorded, DEFAULTS["cuda"], processes, GATES // 3)
    assert same.alarmed <= 0.01
    assert same.inconclusive <= (0.2 if spread == "outliers" else 0.02)
    assert rates(recorded, DEFAULTS["cuda"], processes, GATES // 3, 1.03).caught >= 0.95
    certain = 0.98 if spread == "outliers" else 0.998
    assert rates(recorded, DEFAULTS["cuda"], processes, GATES // 3, 1.05).caught >= certain


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_recorded_processes(path: Path) -> None:
    recorded = load(path)
    assert len(recorded.cases) >= 12
    thresholds, processes = DEFAULTS[recorded.kind], LEAST[recorded.kind]
    assert rates(recorded, thresholds, processes, GATES).alarmed <= 0.01
    slower = 1 - thresholds.fail / 100
    assert rates(recorded, thresholds, processes, GATES, slower).caught >= 0.95
    more = 1 + (slower - 1) * 5 / 3
    assert rates(recorded, thresholds, processes, GATES, more).caught >= 0.999
