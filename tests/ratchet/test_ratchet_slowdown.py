"""Kernels that take several passes, measured for real: the gate fails and names their cases."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flashmoe.ratchet.gate.decide import EXIT_REGRESSION, FAIL, decide
from flashmoe.ratchet.gate.thresholds import DEFAULTS
from flashmoe.ratchet.measuring.processes import Source
from flashmoe.ratchet.measuring.run import Settings, bench
from flashmoe.ratchet.measuring.suite import parse
from flashmoe.ratchet.report.markdown import markdown

SLOWED = ("fwd-b4-h4k2-s1x1024-d64-float32-paged", "bwd-b1-h4-s256-d64-float32-causal")
NAMES = ("fwd-b1-h4-s256-d64-float32", *SLOWED, "fwd-b4-h2-s128-d64-float32-causal-packed")


def source(name: str, passes: int) -> Source:
    script = str(Path(__file__).with_name("ratchet_passes_worker.py"))
    command = (sys.executable, script, str(passes))
    return Source(name, command, environment={"OMP_NUM_THREADS": "1"})


# Processes differ more than their rounds do: on a busy machine nine tell three passes from one, and
# five tell six.
@pytest.mark.parametrize(
    ("passes", "processes"), [(6, 5), pytest.param(3, 9, marks=pytest.mark.long)]
)
def test_a_slower_backward_and_a_slower_decode_fail_and_are_named(
    passes: int, processes: int
) -> None:
    base, head = bench(
        [parse(name) for name in NAMES],
        Settings("cpu", 5, 1, 2, processes, processes, precision=1, budget=1e9, seed=0, suite=""),
        "command",
        lambda line: None,
        sources=(source("base", 1), source("head", passes)),
    )
    decision = decide(head, base, DEFAULTS["cpu"])
    assert decision.exit_code == EXIT_REGRESSION
    assert sorted(v.name for v in decision.named(FAIL)) == sorted(SLOWED)
    report = markdown(decision, head, base, "")
    failed = report[: report.index("<details>")]
    for kind, name in zip(("decode, paged", "backward"), SLOWED, strict=True):
        assert failed.index(f"| **{kind}** |") < failed.index(f"| `{name}` | 🔴 FAIL |")
