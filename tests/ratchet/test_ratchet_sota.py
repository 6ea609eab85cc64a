"""The comparison with other implementations."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from flashmoe.measure.timing import Limits
from flashmoe.ratchet import cli
from flashmoe.ratchet.commands.sota import sentences
from flashmoe.ratchet.measuring.suite import SUITES, parse
from flashmoe.ratchet.sota import comparison as sota
from flashmoe.ratchet.sota import figures, providers
from flashmoe.ratchet.sota.comparison import OURS, Compared, Row, conclusion, with_significance
from flashmoe.ratchet.sota.providers import Provider
from flashmoe.spec.call import Call

ROOT = Path(__file__).resolve().parents[2]
# SDPA and flex need only the case.
NO_CALL = Call(*(torch.empty(0) for _ in range(3)), 1.0)
CASES = ("fwd-b1-h2-s64-d16-float32-causal", "fwdbwd-b1-h4k2-s40-d24-float32")


def test_suites_are_large_enough() -> None:
    assert len(SUITES["sota"]["cuda"]) >= 24
    for names in SUITES["sota"].values():
        assert len(names) >= 12
        cases = [parse(name) for name in names]
        assert {case.kind.partition(",")[0] for case in cases} == {"forward", "training", "decode"}
        kinds = {feature for case in cases for feature in case.problem.features}
        assert kinds >= {"packed", "paged", "window", "sink"}
        assert {case.problem.mask.is_causal for case in cases} == {False, True}


def made_up(**factors: float) -> list[Compared]:
    """Two cases in which providers take `factors` times as long as we do, with 1 % noise."""
    rng = np.random.default_rng(0)

    def samples(factor: float) -> tuple[float, ...]:
        return tuple(1e-3 * factor * np.exp(0.01 * rng.standard_normal(100)))

    return with_significance(
        [
            Compared(
                parse(name),
                (
                    *(Row(p, samples(f)) for p, f in {OURS: 1.0, **factors}.items()),
                    Row("xformers", (), "not installed"),
                ),
                1e-4,
                650.0,
            )
            for name in ("fwd-b2-h8-s512-d64-float32", "fwd-b2-h8-s4096-d64-float32")
        ]
    )


def test_conclusions_need_significance() -> None:
    measured = made_up(flex=1.2, **{"sdpa-flash": 1.0, "sdpa-cudnn": 0.9})
    for compared in measured:
        told = {row.provider: conclusion(row) for row in compared.rows}
        assert told == {
            OURS: "",
            "flex": "faster",
            "sdpa-flash": "same",
            "sdpa-cudnn": "slower",
            "xformers": "",
        }
        ratio = compared.row("flex").ratio
        assert ratio is not None
        assert ratio.value == pytest.approx(1.2, rel=0.01)


def test_what_another_process_may_differ_by_is_no_conclusion() -> None:
    for compared in made_up(flex=1.006, **{"sdpa-flash": 0.994}):
        assert compared.row("flex").p < 0.05
        assert {conclusion(compared.row(name)) for name in ("flex", "sdpa-flash")} == {"same"}


def test_same_against_same_differs_almost_never() -> None:
    found = [
        conclusion(row)
        for _ in range(10)
        for compared in made_up(flex=1.0, **{"sdpa-flash": 1.0})
        for row in compared.rows
        if row.ratio
    ]
    assert set(found) == {"same"}


def test_figures_are_pictures() -> None:
    measured = made_up(flex=1.2, **{"sdpa-flash": 1.0})
    for text, shape, count in (
        (figures.lead(measured), "rect", 2),
        (figures.bars(measured), "rect", 2 * 3 + 3),
        (figures.roofline(measured, Limits(5e13, 2e12)), "circle", 2 * 3),
    ):
        drawn = ElementTree.fromstring(text)
        assert len(drawn.findall(f".//{{http://www.w3.org/2000/svg}}{shape}")) == count
        width, height = float(drawn.get("width", 0)), float(drawn.get("height", 0))
        for element in drawn.iter():
            for key, most in (("cx", width), ("cy", height), ("x", width), ("y", height)):
                if key in element.attrib:
                    assert -1 <= float(element.attrib[key]) <= most


def test_five_sentences_each_of_which_a_row_backs() -> None:
    """A loss is told as a win is."""
    names = ("fwd-b2-h8-s512-d64-float32", "fwdbwd-b2-h8-s512-d64-float32")
    names += ("fwd-b4-h8-s1x2048-d64-float32",)
    measured = []
    for name, times in zip(names, ((1.5, 2.0), (0.8, 0.9), (1.0, 3.0)), strict=True):
        (told, _) = made_up(flex=times[0], **{"sdpa-flash": times[1]})
        measured.append(dataclasses.replace(told, case=parse(name)))
    data = json.loads((ROOT / "docs/performance/nvidia-h200.json").read_text(encoding="utf-8"))
    comparison = dataclasses.replace(sota.from_json(data), measured=with_significance(measured))
    one, forward, training, decode, extremes = sentences(comparison)
    assert "faster than every other implementation found in 1 of 3 cases" in one
    assert "as fast as the fastest in 1, and slower than it in 1." in one
    assert forward.startswith("2. Forward: 1.5")
    assert forward.endswith("which is flex.")
    assert training.startswith("3. Training: 0.80 times as fast as the fastest other")
    assert decode.startswith("4. Decode: 1.00 times")
    assert f"at worst 0.80 times as fast as flex (`{names[1]}`)" in extremes
    assert f"1.50 times as fast as flex (`{names[0]}`)" in extremes
    alone = [dataclasses.replace(c, rows=c.rows[:1]) for c in measured]
    comparison = dataclasses.replace(comparison, measured=alone)
    assert sentences(comparison) == ["Nothing could be compared."]
    ElementTree.fromstring(figures.lead(alone))


def test_a_wrong_implementation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(case: object, call: object) -> providers.Attend:
        return lambda q, k, v: q * 2

    wrong = Provider("flex", "torch", "torch", make, heads_first=True)
    absent = Provider("xformers", "no-such-package", "no_such_module", make)
    monkeypatch.setattr(sota, "PROVIDERS", (wrong, absent))
    limits = {"float32": Limits(1e11, 1e10)}
    (compared,) = sota.compare(
        [parse(CASES[0])], torch.device("cpu"), limits, 10, lambda name: None
    )
    assert compared.row("flex").samples == ()
    assert "out differs from ours" in compared.row("flex").reason
    assert compared.row("xformers").reason == "not installed"
    assert len(compared.row(OURS).samples) == 10


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = tuple(p for p in providers.PROVIDERS if p.name in ("sdpa-flash", "sdpa-math"))
    monkeypatch.setattr(sota, "PROVIDERS", some)
    monkeypatch.setattr("flashmoe.measure.timing.measure_limits", lambda *_: Limits(1e11, 1e10))
    document = tmp_path / "docs" / "performance.md"
    command = ["sota", "--device", "cpu", "--case", *CASES, "--rounds", "10"]
    # A provider in the list that was not measured is no row.
    monkeypatch.setattr(providers, "PROVIDERS", some)
    assert cli.main([*command, "--output", str(document)]) == 0
    text = document.read_text()
    assert "python -m flashmoe.ratchet sota --device cpu --case" in text
    assert f"| `{CASES[0]}` |" in text
    assert "| sdpa-flash | 2." in text
    data = json.loads(next((tmp_path / "docs" / "performance").glob("*.json")).read_text())
    assert [case["name"] for case in data["cases"]] == list(CASES)
    assert len(data["cases"][0]["providers"]["sdpa-math"]["samples"]) == 10
    for link in text.split("](")[1:]:
        assert (document.parent / link.partition(")")[0]).exists()
    assert cli.main(["sota", "--rounds", "9"]) == 2


def test_the_committed_document_is_what_its_data_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = ROOT / "docs"
    document = tmp_path / "performance.md"
    monkeypatch.setattr("flashmoe.ratchet.commands.sota.compare", lambda *_: pytest.fail("it runs"))
    plane = "performance/nvidia-h200-plane.svg"  # of another command
    (tmp_path / plane).parent.mkdir()
    shutil.copy(committed / plane, tmp_path / plane)
    for data in (committed / "performance").glob("*.json"):
        assert cli.main(["sota", "--from", str(data), "--output", str(document)]) == 0
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")}
    assert len(written) >= 4
    for path in written:
        assert (tmp_path / path).read_bytes() == (committed / path).read_bytes(), path


def test_kinds_are_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads((ROOT / "docs/performance/nvidia-h200.json").read_text(encoding="utf-8"))
    cases = {case["name"]: case for case in data["cases"]}
    for name, case in cases.items():
        case["providers"]["flex"]["ratio"] = [0.5] * 3 if name.startswith("fwdbwd") else [2.0] * 3
    (tmp_path / "data.json").write_text(json.dumps(data), encoding="utf-8")
    again = ["sota", "--from", str(tmp_path / "data.json"), "--output", str(tmp_path / "x.md")]
    assert cli.main(again) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| flex ")]
    training = sum(name.startswith("fwdbwd") for name in cases)
    decode = sum("-s1x" in name for name in cases)
    assert [[*line.split(" | ")[2:4], line.split(" | ")[-1]] for line in lines] == [
        ["forward", str(len(cases) - training - decode), "2.00 |"],
        ["training", str(training), "0.50 |"],
        ["decode", str(decode), "2.00 |"],
    ]


@pytest.mark.parametrize("text", ["", "{}", '{"limits": 1}', "[]"])
def test_a_damaged_file_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    again = ["sota", "--from", str(path), "--output", str(tmp_path / "x.md")]
    assert cli.main(again) == 2
    assert f"{path} is damaged: " in capsys.readouterr().err
    path.unlink()
    assert cli.main(again) == 2
    assert f"cannot read {path}: " in capsys.readouterr().err


def test_flex_is_compiled_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many shapes of one function torch would run it uncompiled, and slower than it is.
    (Of compiling, only what decides that: the rest takes half a minute.)"""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    (flex,) = (provider for provider in providers.PROVIDERS if provider.name == "flex")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for seqlen in (64, 96):
            case = parse(f"fwd-b1-h1-s{seqlen}-d16-float32")
            q = torch.randn(1, 1, seqlen, 16)
            assert flex.make(case, NO_CALL)(q, q, q).shape == q.shape


def test_sdpa_math_is_left_out_where_scores_fill_the_memory() -> None:
    (math,) = (provider for provider in providers.PROVIDERS if provider.name == "sdpa-math")
    with pytest.raises(NotImplementedError, match="16 GiB"):
        math.make(parse("fwd-b1-h16-s16384-d128-bfloat16"), NO_CALL)
    math.make(parse("fwd-b4-h16-s4096-d128-bfloat16"), NO_CALL)
