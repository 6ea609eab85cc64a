from __future__ import annotations

import ast
import dataclasses
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import flashmoe
from flashmoe.autotune.cli.progress import shown
from flashmoe.autotune.report import texts as report
from flashmoe.autotune.report.html import html
from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.schedule.result import Result
from flashmoe.autotune.search.trials import Search, Trial, best_so_far
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.measure.stats import Interval
from flashmoe.planning import database
from flashmoe.planning.plan import Plan, make_plan
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import TERMS, Problem
from flashmoe.tiles import Tile, instances

CPU = torch.device("cpu")
HERE = fingerprint(CPU)
PROBLEM = Problem(2, 16, 16, 8192, 8192, 120, "bfloat16", mask=CAUSAL)
SM80 = Tile("sm80", 128, 64, 2, 4)
RESULT = Result(
    problem=PROBLEM,
    status="tuned",
    reason="it is faster",
    default=Candidate.of_tile(Tile("sm80", 64, 64, 1, 4)),
    best=Candidate.of_tile(SM80),
    seconds=Interval(1.234e-3, 1.2e-3, 1.3e-3),
    speedup_default=Interval(1.25, 1.2, 1.3),
    speedup_sdpa=Interval(1.1, 1.05, 1.15),
    samples={str(SM80): ((1.2e-3, 1.3e-3),)},
    search=Search(
        (
            Trial(SM80, "ok", Interval(0.8, 0.77, 0.83)),
            Trial(Tile("sm80", 64, 32, 1, 4), "wrong", None, "out is off by 1"),
        ),
        (Candidate.of_tile(SM80),),
        "model",
        9,
        tried=2,
    ),
    store=True,
    elapsed=3.0,
)
UNMEASURED = Result(PROBLEM, "unmeasured", "no time")


def suggestions(result: Result) -> str:
    return report.suggestions_text([result], HERE, Path("/cache/x.json"), "python -m x")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_suggestions_tell_what_was_measured() -> None:
    text = suggestions(RESULT)
    assert "1.25x [1.20, 1.30]" in text
    assert "/cache/x.json" in text
    environment = ["export FLASHMOE_BACKEND=cuda", f"export FLASHMOE_TILE={SM80}"]
    assert blocks(text, "sh")[-1].splitlines() == environment


RUN_HERE = [Candidate.of_tile(Tile("cpu", 96, 256)), Candidate("sdpa")]


@pytest.mark.parametrize("best", RUN_HERE, ids=str)
def test_every_line_of_the_suggestions_does_what_it_says(
    best: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(1, 2, 2, 64, 64, 32, "float32", mask=CAUSAL)
    text = suggestions(dataclasses.replace(RESULT, problem=problem, best=best))
    monkeypatch.setenv("FLASHMOE_BACKEND", "blocked")
    monkeypatch.delenv("FLASHMOE_TILE", raising=False)
    (call,) = blocks(text, "python")
    q = torch.randn(1, 64, 2, 32)
    exec(call, {"flashmoe": flashmoe, "q": q, "k": q, "v": q})
    (statement,) = ast.parse(call).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Call)
    told = {word.arg: ast.literal_eval(word.value) for word in statement.value.keywords}
    assert told.pop("causal") is True
    assert make_plan(problem, CPU, **told) == Plan(best.backend, best.tile, "argument")
    (exports,) = blocks(text, "sh")
    names = "FLASHMOE_BACKEND=$FLASHMOE_BACKEND FLASHMOE_TILE=$FLASHMOE_TILE"
    shell = subprocess.run(
        ["sh", "-euc", f'FLASHMOE_TILE=\n{exports}echo "{names}"'],
        capture_output=True,
        text=True,
        check=True,
        env={},
    )
    for pair in shell.stdout.split():
        monkeypatch.setenv(*pair.split("=", 1))
    assert make_plan(problem, CPU) == Plan(best.backend, best.tile, "environment")


@pytest.mark.parametrize("name", ["sm80:128x128-stages2-warps4", "sm90:128x64-stages2"])
def test_the_line_that_compiles_winners_in_does_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parents[2]
    shutil.copytree(root / "csrc" / "instances", tmp_path / "csrc" / "instances")
    here = dataclasses.replace(HERE, device="Some GPU")
    tile = Tile.parse(name)
    result = dataclasses.replace(RESULT, best=Candidate.of_tile(tile))
    database.update(
        database.user_path(here.device), {PROBLEM.bucket: result.entry(here, "command")}
    )
    text = report.suggestions_text([result], here, Path("/cache/x.json"), "python -m x")
    line = blocks(text, "sh")[0].replace("python", sys.executable, 1)
    subprocess.run(["sh", "-euc", line], check=True, capture_output=True)
    listed = (tmp_path / "csrc" / "instances" / f"{tile.kernel}.txt").read_text(encoding="utf-8")
    assert instances.line_of(PROBLEM, tile) in listed.splitlines()


@pytest.mark.parametrize(
    ("changes", "call"),
    [
        ({"mask": FULL}, "flash_attn_func(q, k, v"),
        ({"mask": Mask(128, 0)}, "flash_attn_func(q, k, v, window_size=(128, 0)"),
        ({"terms": ("sink",)}, "flash_attn_func(q, k, v, causal=True, sinks=sinks"),
        (
            {"layout": "packed", "terms": tuple(x for x in TERMS if x != "mask")},
            "flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
            "max_seqlen_k, causal=True, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, "
            "dropout_p=dropout_p",
        ),
        ({"layout": "paged"}, "flash_attn_with_kvcache(q, k_cache, v_cache, ..., causal=True"),
    ],
)
def test_the_call_is_of_the_problems_kind(changes: dict[str, Any], call: str) -> None:
    problem = dataclasses.replace(PROBLEM, **changes)
    (told,) = blocks(suggestions(dataclasses.replace(RESULT, problem=problem)), "python")
    assert told == f'flashmoe.{call}, backend="cuda", tile="{SM80}")\n'


def test_forward_backward_and_decode_are_told_apart() -> None:
    backward = dataclasses.replace(PROBLEM, direction="bwd")
    decode = dataclasses.replace(PROBLEM, seqlen_q=1)
    results = [dataclasses.replace(RESULT, problem=p) for p in (decode, backward, PROBLEM)]
    text = report.suggestions_text(results, HERE, Path("x.json"), "")
    heads = [line for line in text.splitlines() if line.startswith("##")]
    assert heads == [
        *("## Forward", f"### {PROBLEM.label}"),
        *("## Backward", f"### {backward.label}"),
        *("## Decode", f"### {decode.label}"),
    ]
    # No argument names a backward's tile.
    assert len(blocks(text, "python")) == 2
    page = html(results, HERE, {}, command="", database="")
    assert re.findall("<h3>(Forward|Backward|Decode)</h3>", page) == [
        *("Forward", "Backward", "Decode")
    ]
    out = io.StringIO()
    Console(file=out, width=200).print(report.table(results))
    places = [out.getvalue().index(p.label) for p in (PROBLEM, backward, decode)]
    assert places == sorted(places)


def test_unmeasured_problems_suggest_nothing() -> None:
    assert "##" not in suggestions(UNMEASURED)


def test_the_table_shows_every_problem() -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(report.table([RESULT, UNMEASURED]))
    text = out.getvalue()
    for cell in (
        PROBLEM.label,
        "sm80:64x64-stages1-warps4",
        "sm80:128x64-stages2-warps4",
        "1.23 ms",
        "1.25x [1.20, 1.30]",
        "1.10x [1.05, 1.15]",
        "tuned",
        "unmeasured",
    ):
        assert cell in text


def test_the_cost_of_a_candidate_is_told_where_tiles_were_tried() -> None:
    (line,) = report.costs([RESULT, UNMEASURED])
    assert line == (
        f"{PROBLEM.label}: 2 tiles tried of 9 legal ones in 3.0 s, 1.50 s each with compilation, "
        "checks and the final"
    )


def test_rejected_tiles_are_named_with_the_reason() -> None:
    (line,) = report.rejections([RESULT, UNMEASURED])
    assert line == f"{PROBLEM.label}: sm80:64x32-stages1-warps4 is wrong: out is off by 1"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.0, "2 s"), (0.0123456, "12.3 ms"), (4.56e-5, "45.6 µs"), (2e-7, "0.2 µs")],
)
def test_durations_have_three_digits_and_a_unit(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_problem_best_and_outcome(terminal: bool) -> None:
    out = io.StringIO()
    with shown(Console(file=out, force_terminal=terminal, width=250)) as watch:
        watch.problem(PROBLEM, 1, 3)
        watch.stage("searching")
        assert RESULT.search is not None
        watch.trials(RESULT.search.trials, 9)
        watch.result(RESULT)
    text = out.getvalue()
    assert f"[1/3] {PROBLEM.label}" in text
    assert "tuned sm80:128x64-stages2-warps4: it is faster" in text
    if not terminal:
        assert "2/9 tiles, 1 failed, best sm80:128x64-stages2-warps4 0.800 [0.770, 0.830]" in text


def test_suggestions_tell_what_one_step_costs() -> None:
    trials = [
        Trial(SM80, "ok", Interval(0.8, 0.77, 0.83)),
        Trial(Tile("sm80", 64, 64, 2, 4), "ok", Interval(0.84, 0.8, 0.9)),
        Trial(Tile("sm80", 128, 32, 2, 4), "failed", None, "no"),
        Trial(Tile("sm80", 128, 64, 3, 4), "ok", Interval(0.9, 0.8, 1.0)),
        Trial(Tile("sm80", 128, 64, 1, 8), "ok", Interval(0.9, 0.8, 1.0)),
    ]
    importances = {"sm80.block_m": 0.75, "sm80.block_n": 0.25}
    found = dataclasses.replace(RESULT.search, trials=tuple(trials), importances=importances)
    lines = suggestions(dataclasses.replace(RESULT, search=found)).splitlines()
    assert "| BLOCK_M | sm80:64x64-stages2-warps4 | +5.0% |" in lines
    assert "| BLOCK_N | sm80:128x32-stages2-warps4 | not measured |" in lines
    assert "| NUM_STAGES | sm80:128x64-stages3-warps4 | +12.5% |" in lines
    assert not any("warps8" in line for line in lines)
    assert "Importance (PED-ANOVA): sm80.block_m 75%, sm80.block_n 25%." in lines


def test_best_so_far_needs_a_timed_trial() -> None:
    assert best_so_far([Trial(SM80, "failed", None, "no")]) == ""
