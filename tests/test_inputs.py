"""Inputs for any Problem, and the check of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.measure.check import Checker
from flashmoe.measure.inputs import Inputs, make_inputs, ragged
from flashmoe.measure.reference import sequences_reference
from flashmoe.spec.call import Saved
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import LAYOUTS, TERMS, Problem
from flashmoe.spec.sequence import sequences_of

CPU = torch.device("cpu")
PROBLEM = Problem(2, 4, 2, 65, 97, 24, "float32")
LENGTHS = ((9, 30, 2), (1, 97, 1), (65, 65, 3))


def results_of(inputs: Inputs) -> dict[str, Tensor | None]:
    """What the CPU's backends compute: out and softmax_lse, or dq, dk and dv."""
    problem, call = inputs.problem, inputs.call
    forward = replace(problem, direction="fwd")
    cpu = BACKENDS["cpu"]
    out, lse = cpu.bind(forward, cpu.default_tile(forward, arch(CPU)))(call)
    if inputs.dout is None:
        return {"out": out, "softmax_lse": lse}
    assert lse is not None
    run = BACKENDS["blocked"].bind_backward(problem, None)
    gradients = run(call, Saved(inputs.dout, out, lse))
    return dict(zip(("dq", "dk", "dv"), gradients, strict=True))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    direction = draw(st.sampled_from(("fwd", "bwd")))
    layouts = ("dense", "packed") if direction == "bwd" else LAYOUTS
    layout = draw(st.sampled_from(layouts))
    terms = draw(st.sets(st.sampled_from(TERMS)))
    if layout != "dense":
        terms -= {"mask"}
    group, heads_kv = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2)))
    problem = Problem(
        draw(st.integers(1, 3)),
        group * heads_kv,
        heads_kv,
        draw(st.integers(1, 70)),
        draw(st.integers(1, 150)),
        draw(st.sampled_from((8, 24, 64))),
        draw(st.sampled_from(("float32", "bfloat16"))),
        mask=draw(st.sampled_from((FULL, CAUSAL, Mask(20, 3), Mask(5, 0)))),
        direction=direction,
        terms=tuple(terms),
        layout=layout,
    )
    return ragged(problem) if draw(st.booleans()) else problem


@given(problem=problems(), seed=st.integers(0, 99), guard=st.sampled_from((0, 5)))
@settings(max_examples=60, deadline=None)
def test_right_results_of_any_problem_pass(problem: Problem, seed: int, guard: int) -> None:
    inputs = make_inputs(problem, CPU, seed, guard)
    assert Problem.of_call(inputs.call, problem.mask).layout == problem.layout
    assert Checker(inputs, seed).check(results_of(inputs)).reason == ""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_are_the_sequences_that_inputs_have(layout: str) -> None:
    lengths = LENGTHS if layout.startswith("packed") else ((65, 0, 1), (65, 97, 1), (65, 65, 4))
    if layout == "dense":
        lengths = ()
    problem = replace(PROBLEM, batch=6, layout=layout, lengths=lengths)
    call = make_inputs(problem, CPU).call
    found = sorted((s.seqlen_q, s.seqlen_kv) for s in sequences_of(call))
    assert found == sorted((q, k) for q, k, count in problem.histogram for _ in range(count))
    of_call = replace(Problem.of_call(call), lengths=problem.lengths)
    if layout.endswith("paged"):  # whose last page may be larger than what is asked of it
        of_call = replace(of_call, seqlen_kv=problem.seqlen_kv)
    assert of_call == problem


def test_a_backward_has_gradients_of_its_reference() -> None:
    terms = tuple(term for term in TERMS if term != "mask")
    problem = replace(PROBLEM, direction="bwd", mask=Mask(40, 5), terms=terms, layout="packed")
    problem = replace(problem, batch=6, lengths=LENGTHS)
    inputs = make_inputs(problem, CPU)
    leaves = [x.double().requires_grad_() for x in inputs.call[:3]]
    out, _ = sequences_reference(
        inputs.call._replace(q=leaves[0], k=leaves[1], v=leaves[2]), problem.mask
    )
    assert inputs.dout is not None
    exact = torch.autograd.grad(out, leaves, inputs.dout.double())
    for name, gradient in zip(("dq", "dk", "dv"), exact, strict=True):
        for piece, part in Checker(inputs).expected[name].exact:
            torch.testing.assert_close(piece.of(name, gradient), part)


def _scaled(x: Tensor) -> Tensor:
    return x * 1.01


def _last_row_of_a_head(x: Tensor) -> Tensor:
    x = x.clone()
    x.flatten(0, -3)[-1, -1] += 1.0
    return x


def _nan(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1)[x.numel() // 2] = float("nan")
    return x


@pytest.mark.parametrize("harm", [_scaled, _last_row_of_a_head, _nan])
@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_what_is_wrong_is_found(layout: str, name: str, harm: Callable[[Tensor], Tensor]) -> None:
    problem = replace(PROBLEM, layout=layout, direction="fwd" if name == "out" else "bwd")
    inputs = make_inputs(problem, CPU)
    results = results_of(inputs)
    right = results[name]
    assert right is not None
    correctness = Checker(inputs).check(results | {name: harm(right)})
    assert correctness.reason.startswith(name)
    assert correctness.error > 1


def test_a_wrong_softmax_lse_is_found() -> None:
    inputs = make_inputs(replace(PROBLEM, seqlen_q=120, mask=CAUSAL), CPU)  # rows that see nothing
    results = results_of(inputs)
    lse = results["softmax_lse"]
    assert lse is not None
    assert "softmax_lse is off" in Checker(inputs).check({"softmax_lse": lse + 0.1}).reason
    infinite = lse.nan_to_num(neginf=0.0)
    assert "infinite in other places" in Checker(inputs).check({"softmax_lse": infinite}).reason


def test_long_rows_are_checked_in_part_and_gradients_in_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flashmoe.measure.inputs._MAX_SCORES", 97 * 2 * 6)
    whole = make_inputs(PROBLEM, CPU)
    rows = sum(len(part) for _, part in Checker(whole).expected["out"].exact)
    assert rows == 4 * 6  # of each pair the first, the middle and the last two
    assert Checker(whole).check(results_of(whole)).reason == ""
    backward = make_inputs(replace(PROBLEM, direction="bwd", mask=CAUSAL, terms=TERMS), CPU)
    assert Checker(backward).check(results_of(backward)).reason == ""
    dq = results_of(backward)["dq"]
    assert dq is not None
    dq[0, 40, 0] += 1.0
    assert "dq is off" in Checker(backward).check({"dq": dq}).reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ((1, 1, 6),)}, "lengths must be empty in layout dense"),
        ({"layout": "packed", "lengths": ((129, 1, 1),)}, "must be at most seqlen_q .128."),
        ({"layout": "packed", "lengths": ((1, 1, 9),)}, "of batch .8. sequences, got 9"),
        ({"layout": "cache", "lengths": ((65, 1, 2),)}, "of batch .6. sequences, got 2"),
        ({"layout": "cache", "lengths": ((64, 1, 6),)}, "must all be seqlen_q"),
        ({"layout": "packed", "lengths": ((1, -1, 1),)}, "lengths must be an integer"),
    ],
)
def test_lengths_that_are_none_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(replace(PROBLEM, batch=6), **changes)


def test_packed_sizes_are_rounded_and_lengths_counted() -> None:
    problem = replace(
        PROBLEM, batch=6, layout="packed", lengths=(*LENGTHS, (9, 30, 0), (65, 65, 1))
    )
    assert (problem.batch, problem.seqlen_q, problem.seqlen_kv) == (8, 128, 128)
    assert problem.lengths == ((1, 97, 1), (9, 30, 2), (65, 65, 4))
    pairs = 97 + 2 * 9 * 30 + 4 * 65 * 65
    assert problem.flops == 4 * 4 * pairs * 24
    assert Problem.from_json(problem.to_json()) == problem
    assert replace(problem, lengths=()).bucket == problem.bucket
