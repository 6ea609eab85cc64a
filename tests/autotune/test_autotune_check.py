from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flashmoe.autotune.running.check import Forward, Inputs, ragged_inputs, timed_inputs
from flashmoe.measure.reference import attention_reference
from flashmoe.spec.mask import CAUSAL
from flashmoe.spec.problem import Problem

CPU = torch.device("cpu")
PROBLEM = Problem(2, 4, 2, 65, 97, 24, "float32")
MASKED = Problem(1, 2, 2, 97, 65, 16, "float32", mask=CAUSAL)


def right(problem: Problem) -> Forward:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention_reference(q, k, v, mask=problem.mask)
        return out.to(q.dtype).contiguous(), lse.float()

    return forward


@pytest.mark.parametrize("problem", [PROBLEM, MASKED], ids=["grouped", "rows that see nothing"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_right_answer_passes(problem: Problem, dtype: str) -> None:
    import dataclasses

    problem = dataclasses.replace(problem, dtype=dtype)
    assert timed_inputs(problem, CPU, seed=1).error(right(problem)) == ""
    assert ragged_inputs(problem, CPU, seed=1).error(right(problem)) == ""


def wrong(inputs: Inputs, change: str) -> str:
    correct = right(inputs.problem)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out, lse = correct(q, k, v)
        assert lse is not None
        if change == "unwritten row":
            out[-1, -1] = torch.empty_like(q)[-1, -1]
            out[-1, -1] = 0.0
        elif change == "slightly off":
            out[0, 3, -1, 5] += 1e-5
        elif change == "heads swapped":
            out = out.flip(2)
        elif change == "nan":
            out[0, 40, 1, 7] = math.nan
        elif change == "lse":
            lse[-1, 0, 5] += 1e-3
        elif change == "transposed":
            out = out.transpose(1, 2)
        elif change == "other dtype":
            out = out.double()
        return out, lse

    return inputs.error(forward)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("unwritten row", "out is off by"),
        ("slightly off", "out is off by"),
        ("heads swapped", "out is off by"),
        ("nan", "not finite"),
        ("lse", "softmax_lse is off by"),
        ("transposed", "out must be"),
        ("other dtype", "out must be"),
    ],
)
def test_a_wrong_answer_is_told(change: str, told: str) -> None:
    assert told in wrong(timed_inputs(PROBLEM, CPU, seed=1), change)


def test_rows_that_see_nothing_must_be_zero() -> None:
    inputs = timed_inputs(MASKED, CPU, seed=1)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        out, lse = right(MASKED)(q, k, v)
        assert lse is not None
        return out, lse.nan_to_num(neginf=0.0)

    assert "infinite in other places" in inputs.error(forward)


def test_reading_behind_a_sequence_is_told() -> None:
    inputs = ragged_inputs(PROBLEM, CPU, seed=1)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        longer = (v.shape[0], v.shape[1] + 1, *v.shape[2:])
        k, v = (x.as_strided(longer, x.stride()) for x in (k, v))
        return right(inputs.problem)(q, k, v)

    assert "not finite" in inputs.error(forward)


def test_ragged_lengths_are_odd() -> None:
    for problem in (PROBLEM, Problem(8, 8, 2, 4096, 4096, 64, "float32", mask=CAUSAL)):
        small = ragged_inputs(problem, CPU, seed=1).problem
        assert small.seqlen_q % 2 == 1
        assert small.seqlen_kv % 2 == 1
        assert small.seqlen_q < 512
        assert small.heads_q // small.heads_kv == problem.heads_q // problem.heads_kv


def test_large_problems_are_compared_in_part_from_both_ends() -> None:
    inputs = timed_inputs(Problem(3, 3, 3, 6001, 1501, 8, "float32"), CPU, seed=1)
    rows = {(part.rows.start, part.rows.stop) for part in inputs.expected}
    assert min(rows)[0] == 0
    assert max(rows)[1] == 6001
    assert sum(stop - start for start, stop in rows) < 3000
    pairs = {(part.batch, part.heads.start) for part in inputs.expected}
    assert {(0, 0), (2, 2)} <= pairs


def test_causal_parts_agree_with_the_whole() -> None:
    problem = Problem(1, 1, 1, 3001, 2500, 8, "float32", mask=CAUSAL)
    inputs = timed_inputs(problem, CPU, seed=1)
    assert len(inputs.expected) == 3
    out, lse = attention_reference(inputs.q, inputs.k, inputs.v, mask=CAUSAL)
    for part in inputs.expected:
        torch.testing.assert_close(part.out, out[0, part.rows, part.heads])
        torch.testing.assert_close(part.lse, lse[0, part.heads, part.rows])


def test_what_forward_raises_is_raised() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        raise RuntimeError("no such tile")

    with pytest.raises(RuntimeError, match="no such tile"):
        timed_inputs(PROBLEM, CPU, seed=1).error(forward)
