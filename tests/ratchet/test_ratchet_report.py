"""The report and the list of profile targets."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import ratchet_synthetic as synthetic

from flashmoe.ratchet.gate.decide import Decision, decide
from flashmoe.ratchet.gate.thresholds import DEFAULTS
from flashmoe.ratchet.report import markdown as report
from flashmoe.ratchet.results.values import PlanUsed, Results, Series, slowed

SLOW, FAST, SAME = synthetic.NAMES


def decided(current: Results) -> tuple[Decision, str]:
    current, baseline = replace(current, run="f" * 32), synthetic.results()
    decision = decide(current, baseline, DEFAULTS["cuda"])
    return decision, report.markdown(decision, current, baseline, "took 40 s")


def mixed() -> Results:
    return slowed(slowed(synthetic.results(), SLOW, 1.1), FAST, 0.8)


def test_regressions_come_first() -> None:
    _, text = decided(mixed())
    lines = text.splitlines()
    assert lines[0] == (
        "### 🔴 flashmoe ratchet failed: a kernel got slower or broke (1 FAIL, 1 IMPROVED, 1 PASS)"
    )
    rows = [line for line in lines if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [SLOW, FAST, SAME]
    assert rows[0].startswith(f"| `{SLOW}` | 🔴 FAIL | 1.200 [1.198, 1.202] | 1.091 [1.089, 1.092]")
    kinds = [line.strip("| *") for line in lines if line.startswith("| **")]
    assert kinds == ["forward", "training"]
    assert "**-10.0 %** | [-10.0, -10.0]" in rows[0]
    assert text.count("<details>") == text.count("</details>") == 2
    assert text.index(SLOW) < text.index("<details>") < text.index(SAME)


def test_a_pass_hides_its_details() -> None:
    _, text = decided(synthetic.results())
    assert text.startswith("### ✅ flashmoe ratchet passed (3 PASS)\n")
    assert "<summary>3 cases without a significant change</summary>" in text
    assert "| torch | 2.13.0 | 2.13.0 |" in text
    assert "FAIL: a slowdown is proven, and one of 3 % is not excluded." in text
    assert "took 40 s" in text
    assert text.index("<details>") < text.index("| `")


def test_what_cannot_be_compared_is_said_first() -> None:
    run = synthetic.results()
    other = replace(synthetic.FINGERPRINT, torch="2.14.0")
    _, text = decided(replace(run, cases=run.cases[1:], fingerprint=other))
    assert text.startswith("### 🟠 flashmoe ratchet not comparable with the baseline")
    assert "- fingerprint: torch: '2.14.0' here, '2.13.0' there" in text
    assert f"- {SLOW}: missing from the current run" in text


def test_a_plan_that_changed_is_told() -> None:
    run = synthetic.results()
    case = replace(run.cases[0], plans=(PlanUsed("fwd", "triton", "", "user database"),))
    _, text = decided(replace(run, cases=(case, *run.cases[1:])))
    assert f"- `{SLOW}`: sm80:128x64-stages2-warps4 before, triton now" in text


def test_text_from_outside_stays_text() -> None:
    run = synthetic.results()
    reason = "<script>|`x`|\n[a](b) " + "long " * 500
    broken = replace(run.cases[0], ours=Series("failed", (), reason))
    _, text = decided(replace(run, cases=(broken, *run.cases[1:])))
    assert "\\<script\\>\\|\\`x\\`\\| \\[a\\](b) long" in text
    assert len(text) < 5000


def test_it_always_fits_into_a_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_CHARACTERS", 6000)
    names = [f"fwd-b{b}-h8-s512-d64-float32" for b in range(1, 161)]
    case = synthetic.case(names[0])
    many = replace(
        synthetic.results(),
        cases=tuple(replace(case, case=synthetic.parse(name)) for name in names),
    )
    slow = slowed(many, names[70], 1.5)
    text = report.markdown(decide(slow, many, DEFAULTS["cuda"]), slow, many, "")
    assert 3000 < len(text) < 6000
    assert f"`{names[70]}` | 🔴 FAIL" in text
    assert "more cases do not fit here" in text
    one = replace(many, cases=many.cases[:1])
    text = report.markdown(decide(one, many, DEFAULTS["cuda"]), one, many, "")
    assert len(text) < 6000
    assert re.search(r"\n- and \d+ more\n", text)


def test_profile_targets() -> None:
    decision, _ = decided(mixed())
    assert report.profile_targets(decision) == (SLOW, FAST)
    assert report.profile_targets(decided(synthetic.results())[0]) == ()
    run = synthetic.results()
    broken = replace(run.cases[0], ours=Series("failed", (), "boom"))
    decision, _ = decided(replace(run, cases=(broken, *run.cases[1:])))
    assert report.profile_targets(decision) == ()
