"""Every committed baseline can be compared with what is measured today."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import ratchet_synthetic as synthetic

from flashmoe.measure.timing import HOW
from flashmoe.ratchet.ci import runner
from flashmoe.ratchet.gate.decide import decide
from flashmoe.ratchet.gate.thresholds import DEFAULTS
from flashmoe.ratchet.measuring.suite import SUITES
from flashmoe.ratchet.results.files import load
from flashmoe.ratchet.results.values import Results

ROOT = Path(__file__).resolve().parents[2]
BASELINES = [p for p in sorted((ROOT / "baselines").glob("*.json")) if p.name != "static.json"]


def pins() -> dict[str, str]:
    """Versions that the GPU runner installs."""
    lines = (ROOT / runner.REQUIREMENTS).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def measured_today(baseline: Results) -> Results:
    """As if `bench` ran now, on the baseline's machine: today's suite, timed as it is timed today,
    with the runner's versions, each case as fast as in the baseline."""
    versions = pins()
    # torch tells +cuNNN, by which the index's default build is no version of its own.
    told = {name: getattr(baseline.fingerprint, name) for name in ("torch", "triton")}
    moved = {name: v for name, v in versions.items() if told.get(name, v).partition("+")[0] != v}
    known, names = baseline.by_name(), SUITES["quick"][baseline.kind]
    return replace(
        baseline,
        run="today",
        settings={**baseline.settings, "timing": HOW[baseline.kind]},
        fingerprint=replace(baseline.fingerprint, kernels="today", **moved),
        cases=tuple(known.get(name) or synthetic.case(name) for name in names),
    )


def problems(baseline: Results) -> tuple[str, ...]:
    """What a gate against it would say for its exit code 4."""
    return decide(measured_today(baseline), baseline, DEFAULTS[baseline.kind]).problems


def test_there_is_one() -> None:
    assert BASELINES


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_gate_against_it_decides(path: Path) -> None:
    assert problems(load(path)) == ()


def test_what_would_end_every_gate_is_seen() -> None:
    """Whatever of the baseline is not as it is today."""
    names = SUITES["quick"]["cuda"]
    made_up = synthetic.results(names)
    versions = {name: pins()[name] for name in ("torch", "triton")}
    today = replace(
        made_up,
        settings={**made_up.settings, "timing": HOW["cuda"]},
        fingerprint=replace(made_up.fingerprint, **versions),
    )
    assert problems(today) == ()
    plus = replace(today.fingerprint, torch=f"{versions['torch']}+cu130")
    assert problems(replace(today, fingerprint=plus)) == ()
    for wrong, told in (
        (replace(today, settings=made_up.settings), "timing: "),
        (replace(today, settings={"timing": "by hand"}), "timing: "),
        (replace(today, fingerprint=replace(plus, torch="2.9.0+cu130")), "torch: "),
        (replace(today, fingerprint=replace(plus, triton="3.5.0")), "triton: "),
        (replace(today, cases=today.cases[1:]), f"{names[0]}: not in the baseline"),
        (replace(today, cases=(*today.cases, synthetic.case("fwd-b1-h1-s16-d16-float16"))), "miss"),
    ):
        (problem,) = problems(wrong)
        assert told in problem
