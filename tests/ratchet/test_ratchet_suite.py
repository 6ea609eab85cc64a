"""Case names and suites."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.measuring.suite import SUITES, Case, parse, select
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import DTYPE_BYTES, Problem

sizes = st.integers(1, 5000)


@given(sizes, sizes, sizes, sizes, sizes, st.integers(1, 32), st.booleans(), st.data())
def test_a_name_says_all(
    batch: int, kv: int, group: int, sq: int, skv: int, d: int, backward: bool, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from(list(DTYPE_BYTES)))
    limits = st.integers(-1, 20)
    mask = data.draw(st.one_of(st.sampled_from([FULL, CAUSAL]), st.builds(Mask, limits, limits)))
    problem = Problem(
        batch,
        kv * group,
        kv,
        sq,
        skv,
        8 * d,
        dtype,
        mask,
    )
    case = Case(problem, backward)
    assert parse(case.name) == case


def test_suites_hold_distinct_canonical_cases() -> None:
    for suite in SUITES.values():
        for names in suite.values():
            assert len(names) >= 12
            assert len(set(names)) == len(names)
            assert [parse(name).name for name in names] == list(names)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_reference_configuration_is_in_the_quick_suite(dtype: str) -> None:
    wanted = Problem(32, 8, 8, 512, 512, 64, dtype)
    assert Case(wanted) in select("quick", "cuda")
    assert Case(Problem(2, 8, 8, 512, 512, 64, "float32")) in select("quick", "cpu")


def test_backward_is_in_the_full_suites_only() -> None:
    for device in ("cpu", "cuda"):
        assert not any(case.backward for case in select("quick", device))
        assert any(case.backward for case in select("full", device))


def test_work_of_forward_and_backward() -> None:
    forward, both = parse("fwd-b1-h2-s64-d32-float32"), parse("fwdbwd-b1-h2-s64-d32-float32")
    assert forward.flops == 4 * 2 * 64 * 64 * 32
    assert both.flops == 3.5 * forward.flops
    assert both.bytes > 2 * forward.bytes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fwd-b1-h2-s64-d32", "case must look like"),
        ("bwd-b1-h2-s64-d32-float32", "case must look like"),
        ("fwd-b1-h2-s64-d32-float64", "case must look like"),
        ("fwd-b1-h2-s64-d30-float32", "head_dim must be a multiple of 8"),
        ("fwd-b1-h3k2-s64-d32-float32", "heads_q must be a multiple of heads_kv"),
        ("fwd-b1-h2-s64-d32-float32-window-1-x", "mask must be full, causal or window-LEFT-RIGHT"),
        ("fwd-b0-h2-s64-d32-float32", "must be at least 1"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(name)


def test_the_yardstick_is_what_sdpa_computes_too() -> None:
    for name in ("fwd-b1-h2-s64-d32-float32-causal", "fwd-b1-h2-s64x8-d32-float32"):
        assert parse(name).yardstick == parse(name).problem
    # Rows see 33 keys in the mean, and at most 17.
    for name, keys in (("s64x65-d32-float32-causal", 33), ("s64-d32-float32-window-16-0", 14)):
        case = parse(f"fwd-b1-h2-{name}")
        yardstick = case.yardstick
        assert (yardstick.mask, yardstick.seqlen_q, yardstick.seqlen_kv) == (FULL, 64, keys)


def test_select_patterns_and_names() -> None:
    causal = select("quick", "cpu", ["*-causal"])
    assert causal
    assert all(case.problem.mask.is_causal for case in causal)
    name = "fwd-b1-h2-s64-d32-float32"
    assert [case.name for case in select("quick", "cpu", [name, name])] == [name]
    with pytest.raises(UserError, match="no case matches 'nothing\\*'"):
        select("quick", "cpu", ["nothing*"])
