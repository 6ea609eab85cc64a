"""Options that name a problem, the same for every command."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from test_main import run

from flashmoe.spec import options
from flashmoe.spec.mask import CAUSAL, Mask
from flashmoe.spec.problem import TERMS, Problem


def problems(line: str, kind: str = "cpu") -> tuple[Problem, ...]:
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    options.add_options(parser)
    return options.problems_of(options.given_options(parser.parse_args(line.split())), kind)


SIZES: dict[str, Any] = dict(zip(("batch", "heads_q", "heads_kv"), (1, 8, 8), strict=True))
SIZES |= {"head_dim": 64, "dtype": "float32"}


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("", {"seqlen_q": 1024, "seqlen_kv": 1024}),
        ("--seqlen 9 --causal", {"seqlen_q": 9, "seqlen_kv": 9, "mask": CAUSAL}),
        ("--seqlen 9 --no-causal --seqlen-kv 7", {"seqlen_q": 9, "seqlen_kv": 7}),
        (
            "--seqlen 99 --causal --window=5,3 --kv-heads 2 --softcap --alibi --sinks --dropout",
            {
                **{"seqlen_q": 99, "seqlen_kv": 99, "heads_kv": 2, "mask": Mask(5, 0)},
                "terms": tuple(term for term in TERMS if term != "mask"),
            },
        ),
        (
            "--layout packed --batch 3 --seqlen 100",
            {
                **{"batch": 4, "seqlen_q": 128, "seqlen_kv": 128, "layout": "packed"},
                "lengths": ((100, 100, 3),),
            },
        ),
        (
            "--layout packed --lengths 20*2,3x70 --direction bwd",
            {
                **{"batch": 4, "seqlen_q": 32, "seqlen_kv": 128, "layout": "packed"},
                **{"direction": "bwd", "lengths": ((20, 20, 2), (3, 70, 1))},
            },
        ),
        (
            "--layout cache --batch 4 --seqlen 1 --seqlen-kv 64",
            {"batch": 4, "seqlen_q": 1, "seqlen_kv": 64, "layout": "cache"},
        ),
        (
            "--layout paged --lengths 1x30*3,1x9 --seqlen-kv 64",
            {
                **{"batch": 4, "seqlen_q": 1, "seqlen_kv": 64, "layout": "paged"},
                "lengths": ((1, 30, 3), (1, 9, 1)),
            },
        ),
    ],
)
def test_what_options_name(line: str, fields: dict[str, Any]) -> None:
    assert problems(line) == (Problem(**{**SIZES, **fields}),)


def test_both_directions_are_two_problems() -> None:
    forward, backward = problems("--direction both --sinks", "cuda")
    assert (forward.direction, backward.direction) == ("fwd", "bwd")
    assert forward.kind == backward.kind == "full-sink"
    assert forward.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--heads 8 --kv-heads 3", r"--kv-heads must divide --heads \(8\), got 3"),
        ("--layout cache --direction bwd", "--direction must be fwd with --layout cache"),
        ("--layout paged --direction both", "--direction must be fwd with --layout paged"),
        ("--lengths 9", "--layout must be another than dense with --lengths"),
        ("--layout packed --lengths 9 --batch 2", "--lengths says what --batch would"),
        ("--layout packed --lengths 9 --seqlen-kv 2", "--lengths says what --seqlen-kv would"),
        ("--layout cache --lengths 1x9 --seqlen-kv 8", "--lengths must be at most"),
        ("--layout cache --lengths 1x9,2x9", "--lengths of queries must all be seqlen_q"),
    ],
)
def test_options_that_name_no_problem(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problems(line)


@pytest.mark.parametrize("text", ["", "x", "1x", "1*", "9*-1", "1,,2", "-3"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be SEQLEN"):
        options.parse_lengths(text)


def test_the_tuner_and_explain_have_the_same_options() -> None:
    """And explain tells of problems that only a few backends run."""
    line = "--layout packed --lengths 40,9*3 --sinks --window=5,0 --direction both --device cpu"
    told = run("explain", "--heads", "4", *line.split())
    assert told.returncode == 0, told.stderr
    for direction in ("fwd", "bwd"):
        name = f"{direction} b4 h4 s64 d64 float32 window-5-0-sink-packed of 67x67 on "
        assert name in told.stdout
    assert "* is the first backend that runs it" in told.stdout
    refused = run("explain", "--layout", "cache", "--direction", "bwd", "--device", "cpu")
    assert refused.returncode == 2
    assert "--direction must be fwd with --layout cache" in refused.stderr
