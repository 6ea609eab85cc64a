from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flashmoe.autotune import report
from flashmoe.autotune.candidate import Candidate
from flashmoe.autotune.progress import shown
from flashmoe.autotune.result import Result
from flashmoe.autotune.trials import Search, Trial, best_so_far
from flashmoe.device import fingerprint
from flashmoe.problem import Problem
from flashmoe.stats import Interval
from flashmoe.tiles import Tile

HERE = fingerprint(torch.device("cpu"))
PROBLEM = Problem(2, 16, 16, 8192, 8192, 120, "bfloat16", causal=True)
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
    samples={str(SM80): (1.2e-3, 1.3e-3)},
    search=Search(
        (
            Trial(SM80, "ok", Interval(0.8, 0.77, 0.83)),
            Trial(Tile("sm80", 64, 32, 1, 4), "wrong", None, "out is off by 1"),
        ),
        (Candidate.of_tile(SM80),),
        "TPESampler",
        9,
        tried=2,
    ),
    store=True,
    elapsed=3.0,
)
UNMEASURED = Result(PROBLEM, "unmeasured", "no time")


def suggestions(result: Result) -> str:
    return report.suggestions_text([result], HERE, Path("/cache/x.json"), "python -m x")


def test_suggestions_hold_lines_to_copy() -> None:
    lines = suggestions(RESULT).splitlines()
    assert "export FLASHMOE_BACKEND=cuda" in lines
    assert "export FLASHMOE_TILE=sm80:128x64-stages2-warps4" in lines
    assert (
        'flash_attn_func(q, k, v, causal=True, backend="cuda", tile="sm80:128x64-stages2-warps4")'
        in lines
    )
    nvcc = "nvcc -DHEAD_DIM=128 -DBLOCK_M=128 -DBLOCK_N=64 -DNUM_STAGES=2 -DNUM_WARPS=4"
    assert nvcc in lines
    # As csrc/instances/sm80.txt writes it: the head dimension that holds 120.
    assert "128 128 64 2 4" in lines
    assert "1.25x [1.20, 1.30]" in suggestions(RESULT)
    assert "/cache/x.json" in suggestions(RESULT)


def test_a_tile_of_run_time_needs_no_build() -> None:
    tile = Tile("cpu", 96, 256)
    full = dataclasses.replace(PROBLEM, causal=False)
    text = suggestions(dataclasses.replace(RESULT, problem=full, best=Candidate.of_tile(tile)))
    assert 'flash_attn_func(q, k, v, backend="cpu", tile="cpu:96x256-stages1-warps1")' in text
    assert "nvcc -D" not in text


def test_a_backend_without_tiles_names_none() -> None:
    text = suggestions(dataclasses.replace(RESULT, best=Candidate("sdpa")))
    assert "export FLASHMOE_BACKEND=sdpa" in text
    assert "FLASHMOE_TILE" not in text
    assert 'backend="sdpa")' in text


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
