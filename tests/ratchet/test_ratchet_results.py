"""The result file: what is written is read back, and nothing damaged is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import ratchet_synthetic as synthetic

from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.measuring import programs
from flashmoe.ratchet.results import files, schema
from flashmoe.ratchet.results.values import CaseResult, Origin, Series, Telemetry, slowed


def test_round_trip(tmp_path: Path) -> None:
    written = synthetic.results()
    first = written.cases[0]
    broken = CaseResult(first.case, Series("wrong", (), "out is off by 1"), Series("ok"))
    moved = replace(written.cases[1], origin=Origin("1f", "2026", "python -m x", "c0ffee", "abc"))
    telemetry = Telemetry(1980, 3201, 51, 312.5, ("hw_thermal", "power_cap"), (0, 7))
    hot = replace(written.cases[2], telemetry=(telemetry,), disturbed=0.1)
    written = replace(written, cases=(broken, moved, hot))
    path = tmp_path / "new" / "folder" / "current.json"
    files.save(written, path)
    assert files.load(path) == written
    assert [p.name for p in path.parent.iterdir()] == ["current.json"]


def test_derived_figures() -> None:
    data = schema.to_json(synthetic.results())
    case = data["cases"][0]
    ours = case["ours"]["summary"]
    flops = 4 * 2 * 8 * 512 * 512 * 64
    assert ours["gflops"] == pytest.approx(flops / ours["median"] * 1e-9)
    assert ours["efficiency"] == pytest.approx(
        max(flops / 7e14, ours["gbytes"] * ours["median"] * 1e9 / 4e12) / ours["median"]
    )
    assert ours["interval"][0] <= ours["median"] <= ours["interval"][1]
    assert case["speedup"][0] == pytest.approx(1.2, rel=1e-3)
    for key in ("mean", "standard_deviation"):
        assert ours[key] > 0


def test_derived_figures_are_not_believed() -> None:
    """Editing a summary changes nothing: what is decided is decided from the samples."""
    data = json.loads(json.dumps(schema.to_json(synthetic.results())))
    data["cases"][0]["speedup"] = [9.9, 9.8, 10.0]
    assert schema.from_json(data) == synthetic.results()


def test_samples_stay_one_line_per_process(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.save(synthetic.results(), path)
    assert len(path.read_text().splitlines()) < 300


def test_slowed() -> None:
    name = synthetic.NAMES[1]
    slow = slowed(synthetic.results(), name, 1.1)
    for before, after in zip(synthetic.results().cases, slow.cases, strict=True):
        factor = after.ours.samples[2][3] / before.ours.samples[2][3]
        assert factor == pytest.approx(1.1 if before.name == name else 1.0)
        assert before.sdpa == after.sdpa
    with pytest.raises(UserError, match="no case 'x'"):
        slowed(synthetic.results(), "x", 1.1)


def _set(*where: Any, value: Any) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        for key in where[:-1]:
            data = data[key]
        data[where[-1]] = value

    return edit


TOLD = asdict(Telemetry(1980, 3201, 51, 312.5, ("power_cap",), (0,)))
SAMPLES = ("cases", 0, "ours", "samples")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("schema", value=1), "schema must be 2, got 1"),
        (_set("cases", value=[]), "cases is empty: nothing was measured"),
        (_set("cases", value={}), "cases must be list, got dict"),
        (_set("cases", 0, value=7), r"cases\[0\]: expected an object with 'name', got int"),
        (_set("cases", 0, "name", value="x"), r"cases\[0\]: case must look like"),
        (_set("cases", 0, "name", value=synthetic.NAMES[1]), "problem is not the one"),
        (_set("cases", 0, "problem", "batch", value=3), "problem is not the one"),
        (_set("cases", 0, "ours", "status", value="fine"), "ours.status must be one of ok"),
        (_set(*SAMPLES, value=[]), "ours and sdpa need as many rounds"),
        (_set(*SAMPLES, 0, value=[]), "ours and sdpa need as many rounds"),
        (_set(*SAMPLES, 0, value=1.0), r"ours.samples\[0\] must be a list"),
        (_set(*SAMPLES, 1, 2, value=float("nan")), r"ours.samples\[1\]\[2\] must be finite"),
        (_set(*SAMPLES, 1, 2, value=float("inf")), "got inf"),
        (_set(*SAMPLES, 1, 2, value=0.0), "got 0.0"),
        (_set(*SAMPLES, 1, 2, value=-1e-3), "got -0.001"),
        (_set(*SAMPLES, 1, 2, value=10**400), r"got 10000000000000000000… \(401 digits\)"),
        (_set(*SAMPLES, 1, 2, value=1e-200), "1e-09 to 1e\\+06, got 1e-200"),
        (_set(*SAMPLES, 1, 2, value=1e200), r"got 1e\+200"),
        (_set(*SAMPLES, 1, 2, value=None), "got None"),
        (_set(*SAMPLES, 1, 2, value=True), "got True"),
        (_set("fingerprint", "threads", value="2"), "threads must be int, got str"),
        (_set("fingerprint", value=None), "fingerprint must be dict, got NoneType"),
        (_set("limits", "float32", "copy_bytes", value=0), "copy_bytes must be finite and positi"),
        (_set("limits", "float32", "copy_bytes", value=10**400), "copy_bytes must be finite"),
        (_set("duration", value=10**400), "duration must be finite, got 1000"),
        (_set("cases", 0, "disturbed", value=float("nan")), "disturbed must be finite, got nan"),
        (_set("fingerprint", "power_limit", value=10**400), "power_limit must be finite"),
        (_set("cases", 0, "telemetry", value=[{**TOLD, "watts": 10**400}]), "watts must be fin"),
        (_set("cases", 0, "telemetry", value=[{**TOLD, "reasons": [{}]}]), r"reasons\[0\] must be"),
        (
            _set("cases", 0, "telemetry", value=[{**TOLD, "throttled": ["0"]}]),
            "throttled.* must be",
        ),
        (lambda data: data["fingerprint"].pop("torch"), "torch is missing"),
        (lambda data: data["cases"].append(data["cases"][0]), "a case name occurs twice"),
    ],
)
def test_damage_is_named_and_left_alone(
    tmp_path: Path, edit: Callable[[Any], None], message: str
) -> None:
    data = json.loads(json.dumps(schema.to_json(synthetic.results())))
    edit(data)
    path = tmp_path / "current.json"
    path.write_text(json.dumps(data))
    before = path.read_bytes()
    with pytest.raises(UserError, match=message) as caught:
        files.load(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cut", [0, 1, 1000, -2])
def test_truncated_files_say_so(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "current.json"
    files.save(synthetic.results(), path)
    path.write_text(path.read_text()[:cut])
    told = "the file is empty" if cut == 0 else "no whole JSON document"
    with pytest.raises(UserError, match=rf"current\.json is damaged: {told}"):
        files.load(path)


def test_a_problem_may_gain_fields_later() -> None:
    data = json.loads(json.dumps(schema.to_json(synthetic.results())))
    del data["cases"][0]["problem"]["causal"]
    assert schema.from_json(data) == synthetic.results()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\x00", '{"schema": 1}', "[" * 9999])
def test_not_a_result_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "current.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"current\.json is damaged"):
        files.load(path)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*missing.json: No such file"):
        files.load(tmp_path / "missing.json")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        files.load(binary)


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        files.save(synthetic.results(), tmp_path / "file" / "x.json")


def test_the_commit_is_told_where_there_is_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLASHMOE_COMMIT", raising=False)
    assert programs.commit(tmp_path) == ""
    monkeypatch.setenv("FLASHMOE_COMMIT", "a" * 40)
    assert programs.commit(tmp_path) == "a" * 40
