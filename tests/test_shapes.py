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
        "bwd b1 h2 s8 d16 float32": 1.0,
    }


def test_a_training_step_and_a_serving_loop_are_recorded_with_their_lengths(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    q, kv = torch.randn(12, 4, 16, requires_grad=True), torch.randn(12, 2, 16)
    cu_seqlens = torch.tensor([0, 3, 9, 12], dtype=torch.int32)
    caches = [torch.zeros(3, 64, 2, 16) for _ in range(2)]
    used = torch.tensor([40, 5, 17], dtype=torch.int32)
    table = torch.zeros(3, 8, dtype=torch.int32)
    with flashmoe.record_problems(path):
        for softcap in (0.0, 2.0):
            out = flashmoe.flash_attn_varlen_func(
                q, kv, kv, cu_seqlens, cu_seqlens, 6, 6, causal=True, softcap=softcap
            )
            out.sum().backward()
        with torch.no_grad():
            for step in range(3):
                one = torch.randn(3, 1, 4, 16)
                flashmoe.flash_attn_with_kvcache(one, *caches, cache_seqlens=used + step)
            paged = [torch.zeros(30, 16, 2, 16) for _ in range(2)]
            flashmoe.flash_attn_varlen_func(
                q, *paged, cu_seqlens, None, 6, 64, seqused_k=used, block_table=table
            )
    read = shapes.read(path)
    found = {(p.direction, p.kind): (p.lengths, weight) for p, weight in read}
    lengths = ((3, 3, 2), (6, 6, 1))
    assert found["fwd", "causal-packed"] == found["bwd", "causal-packed"] == (lengths, 1.0)
    assert found["bwd", "causal-softcap-packed"] == (lengths, 1.0)
    assert found["fwd", "full-packed-paged"] == (((3, 18, 1), (3, 40, 1), (6, 5, 1)), 1.0)
    caches_found = {p.lengths: weight for p, weight in read if p.layout == "cache"}
    # 17, 18 and 19 keys count as 18 and 20, 40 to 42 as 40 and 44.
    assert caches_found == {
        ((1, 5, 1), (1, 18, 1), (1, 40, 1)): 1.0,
        ((1, 6, 1), (1, 18, 1), (1, 44, 1)): 1.0,
        ((1, 7, 1), (1, 20, 1), (1, 44, 1)): 1.0,
    }
    # What is recorded has the bucket that plans look into.
    (cache,) = {p.bucket for p, _ in read if p.layout == "cache"}
    assert cache == flashmoe.Problem(3, 4, 2, 1, 64, 16, "float32", layout="cache").bucket
    shapes.write(tmp_path / "again.json", {problem: int(weight) for problem, weight in read})
    assert sorted(map(str, shapes.read(tmp_path / "again.json"))) == sorted(map(str, read))


def test_a_compiled_backward_is_recorded(tmp_path: Path) -> None:
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    attend = torch.compile(lambda x: flashmoe.flash_attn_func(x, x, x), backend="aot_eager")
    with flashmoe.record_problems(tmp_path / "shapes.json"):
        attend(q).sum().backward()
    directions = [problem.direction for problem, _ in shapes.read(tmp_path / "shapes.json")]
    assert sorted(directions) == ["bwd", "fwd"]


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
