"""Files of problems: what a model runs, recorded, and what a tuner takes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import flashmoe
from flashmoe import Problem
from flashmoe.autotune.cli.dispatch import main
from flashmoe.spec import shapes

PROBLEM = Problem(1, 8, 8, 1024, 1024, 64, "float32").to_json()


def text_of(weight: Any = 1, **changes: Any) -> str:
    row = {"weight": weight, "problem": {**PROBLEM, **changes}}
    return json.dumps({"schema": 1, "problems": [row]})


def test_record_problems_counts_what_a_model_runs(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    short, long = torch.randn(1, 8, 2, 16), torch.randn(1, 24, 2, 16)
    flashmoe.flash_attn_func(short, short, short)
    with flashmoe.record_problems(path):
        for _ in range(3):
            flashmoe.flash_attn_func(long, long, long, causal=True)
        flashmoe.flash_attn_func(short, long, long)
        graded = short.clone().requires_grad_()
        flashmoe.flash_attn_func(graded, short, short).sum().backward()
    flashmoe.flash_attn_func(long, long, long)
    found = {problem.label: weight for problem, weight in shapes.read(path)}
    assert found == {
        "fwd b1 h2 s24 d16 float32 causal": 3.0,
        "fwd b1 h2 s8x24 d16 float32": 1.0,
        "fwd b1 h2 s8 d16 float32": 1.0,
    }


@pytest.mark.parametrize(
    ("path", "error"), [("", IsADirectoryError), ("file/shapes.json", NotADirectoryError)]
)
def test_what_cannot_be_written_is_told_before_the_model_runs(
    tmp_path: Path, path: str, error: type[OSError]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((error, FileExistsError)), flashmoe.record_problems(tmp_path / path):
        pytest.fail("it ran")


def test_an_earlier_recording_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "shapes.json"
    with flashmoe.record_problems(path):
        assert not path.exists()
    path.write_text("before", encoding="utf-8")
    with flashmoe.record_problems(path):
        assert path.read_text(encoding="utf-8") == "before"
    assert json.loads(path.read_text(encoding="utf-8"))["problems"] == []


BAD = [
    ("{", "Expecting"),
    ('{"schema": 9}', "schema must be 1, got 9"),
    ('{"schema": 1, "problems": []}', "holds no problems"),
    ('{"schema": 1, "problems": [{"problem": {"batch": 1}}]}', "incomplete"),
    ("[" * 100_000, "recursion"),
    *(
        (text_of(weight), "weight must be a positive number of at most 1e\\+18, got")
        for weight in (float("inf"), float("nan"), -1, 0, True, "2", 10**400)
    ),
    (text_of(batch=True), "batch must be an integer from 0 to .*, got True"),
    (text_of(batch=0), "batch must be at least 1 in a problem to tune, got 0"),
    (text_of(head_dim=64.0), "head_dim must be an integer from 0 to .*, got 64.0"),
    (text_of(causal="yes"), "causal must be true or false, got 'yes'"),
    (text_of(seqlen_q=10**400), "seqlen_q must be an integer from 0 to"),
    (text_of(dtype=[]), "dtype must be one of"),
]


@pytest.mark.parametrize(("text", "part"), BAD, ids=[part for _, part in BAD])
def test_a_bad_file_of_problems_is_refused_and_named(
    tmp_path: Path, text: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(shapes.ShapesError, match=part) as caught:
        shapes.read(path)
    assert str(path) in str(caught.value)
    assert main(["--shapes", os.fspath(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"flashmoe.autotune: error: --shapes: {path} ")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    problem = Problem.from_json(PROBLEM)
    shapes.write(tmp_path / "shapes.json", {problem: 3})
    assert shapes.read(tmp_path / "shapes.json") == [(problem, 3.0)]
    (tmp_path / "largest.json").write_text(text_of(shapes.MAX_WEIGHT), encoding="utf-8")
    assert shapes.read(tmp_path / "largest.json") == [(problem, shapes.MAX_WEIGHT)]
