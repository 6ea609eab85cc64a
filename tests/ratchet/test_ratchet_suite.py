"""Case names and suites."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.measuring.suite import DIRECTIONS, SUITES, Case, parse, select
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import DTYPE_BYTES, LAYOUTS, TERMS, Problem

limits = st.integers(-1, 20)


@given(
    sizes=st.tuples(st.integers(1, 100), *(st.integers(1, 5000) for _ in range(4))),
    head_dim=st.integers(1, 32).map(lambda x: 8 * x),
    dtype=st.sampled_from(list(DTYPE_BYTES)),
    mask=st.one_of(st.sampled_from([FULL, CAUSAL]), st.builds(Mask, limits, limits)),
    mode=st.sampled_from(list(DIRECTIONS)),
    terms=st.sets(st.sampled_from(TERMS)),
    layout=st.sampled_from(LAYOUTS),
)
def test_a_name_says_all(
    sizes: tuple[int, ...],
    head_dim: int,
    dtype: str,
    mask: Mask,
    mode: str,
    terms: set[str],
    layout: str,
) -> None:
    batch, heads, group, seqlen_q, seqlen_kv = sizes
    if mode != "fwd" and layout != "packed":
        layout = "dense"
    if layout != "dense":
        terms = terms - {"mask"}
    lengths = (seqlen_q, seqlen_kv, head_dim)
    problem = Problem(
        *(batch, heads * group, heads, *lengths, dtype, mask),
        terms=tuple(terms),
        layout=layout,
    )
    case = Case(problem, mode)
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


def test_every_suite_has_all_that_the_library_runs() -> None:
    for device in ("cpu", "cuda"):
        quick, full = ({c.kind for c in select(suite, device)} for suite in ("quick", "full"))
        assert len(select("quick", device)) == 16
        assert {
            *("forward", "decode, paged", "forward, packed", "forward, window, sink"),
            *("forward, softcap", "backward", "backward, packed"),
        } <= quick
        assert {"training", "backward, window", "forward, window", "forward, alibi"} <= full
    assert "decode" in {case.kind for case in select("quick", "cuda")}


def test_work_of_forward_and_backward() -> None:
    forward, both = parse("fwd-b1-h2-s64-d32-float32"), parse("fwdbwd-b1-h2-s64-d32-float32")
    assert forward.flops == 4 * 2 * 64 * 64 * 32
    assert both.flops == 3.5 * forward.flops
    assert both.bytes > 2 * forward.bytes
    backward = parse("bwd-b1-h2-s64-d32-float32")
    assert (both.flops, both.bytes) == (
        forward.flops + backward.flops,
        forward.bytes + backward.bytes,
    )


def test_work_of_sequences_is_that_of_each() -> None:
    packed = parse("fwd-b4-h2-s64-d32-float32-packed")
    assert packed.problem.lengths == tuple((n, n, 1) for n in (16, 32, 48, 64))
    assert packed.flops == 4 * 2 * 32 * (16**2 + 32**2 + 48**2 + 64**2)
    paged = parse("fwd-b4-h2-s1x64-d32-float32-paged")
    assert paged.flops == 4 * 2 * 32 * (16 + 32 + 48 + 64)
    assert paged.bytes < parse("fwd-b4-h2-s1x64-d32-float32").bytes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fwd-b1-h2-s64-d32", "case must look like"),
        ("bwd-b1-h2-s64-d32-float32-full", "case must look like"),
        ("fwd-b1-h2-s64-d32-float32-sink-softcap", "case must look like"),
        ("bwd-b1-h2-s64-d32-float32-paged", "layout must be dense or packed in a backward"),
        ("fwd-b3-h2-s60-d32-float32-packed", "batch and seqlen_q must be powers of two"),
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
    softcap = parse("bwd-b1-h2-s64-d32-float32-causal-softcap")
    assert softcap.yardstick == parse("fwd-b1-h2-s64-d32-float32-causal").problem
    # Sequences of 16, 32, 48 and 64: 40 in the mean, of which a row sees (16 ** 2 + ...) / 160.
    packed = parse("fwd-b4-h2-s64-d32-float32-packed").yardstick
    assert (packed.seqlen_q, packed.seqlen_kv, packed.layout) == (40, 48, "dense")
    paged = parse("fwd-b4-h2k1-s1x64-d32-float32-softcap-paged")
    assert paged.yardstick == parse("fwd-b4-h2k1-s1x40-d32-float32").problem


def test_select_patterns_and_names() -> None:
    causal = select("quick", "cpu", ["*-causal"])
    assert causal
    assert all(case.problem.mask.is_causal for case in causal)
    name = "fwd-b1-h2-s64-d32-float32"
    assert [case.name for case in select("quick", "cpu", [name, name])] == [name]
    with pytest.raises(UserError, match="no case matches 'nothing\\*'"):
        select("quick", "cpu", ["nothing*"])
