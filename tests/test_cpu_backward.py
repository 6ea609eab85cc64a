"""The CPU's backward kernel: each instruction set, its tiles, parts of a head and number of
threads. tests/test_terms.py and others draw random calls for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_calls import assert_backward_matches, dense_call, packed_call
from support import DEVICE
from torch import Tensor

from flashmoe.backends import BACKENDS
from flashmoe.measure.reference import sequences_reference
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

if DEVICE.type != "cpu":
    pytest.skip("of the CPU", allow_module_level=True)


def gradients(
    call: Call, saved: Saved, mask: Mask = FULL, block_m: int = 64, block_n: int = 64
) -> tuple[Tensor, ...]:
    problem = Problem.of_call(call, mask, "bwd")
    run = BACKENDS["cpu"].bind_backward(problem, Tile("cpu", block_m, block_n))
    return run(call, saved)


def saved_of(call: Call, mask: Mask = FULL) -> Saved:
    out, lse = sequences_reference(call, mask)
    dlse = torch.randn(lse.shape).masked_fill_(lse == -torch.inf, 0.0)
    return Saved(torch.randn(out.shape).to(call.q.dtype), out.to(call.q.dtype), lse.float(), dlse)


def random_call(
    seqlen_q: int, seqlen_kv: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype
) -> Call:
    """With NaN behind each row."""
    shapes = ((seqlen_q, heads[0], dims[0]), (seqlen_kv, heads[1], dims[0]))
    found = []
    for rows, count, dim in (*shapes, (seqlen_kv, heads[1], dims[1])):
        buffer = torch.full((2, rows, count, dim + 8), torch.nan, dtype=dtype)
        found.append(buffer[..., :dim].copy_(torch.randn(2, rows, count, dim)))
    return dense_call(*found)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tiles_of_any_size(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    seqlen_q, seqlen_kv = (draw(st.integers(1, 150)) for _ in "qk")
    dims = draw(st.sampled_from([(8, 8), (40, 40), (64, 64), (24, 72), (200, 136)]))
    heads = draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    call = random_call(seqlen_q, seqlen_kv, heads, dims, dtype)
    mask = draw(st.sampled_from([FULL, CAUSAL, Mask(20, 3)]))
    saved = saved_of(call, mask)
    tile = draw(st.sampled_from([1, 7, 64, 200])), draw(st.sampled_from([1, 9, 64, 300]))
    assert_backward_matches(gradients(call, saved, mask, *tile), call, saved, mask)


def test_threads_that_share_a_head_and_threads_that_do_not() -> None:
    call = random_call(300, 260, (2, 1), (32, 32), torch.float32)
    saved = saved_of(call, CAUSAL)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            found = [gradients(call, saved, CAUSAL) for _ in range(3)]
            assert_backward_matches(found[0], call, saved, CAUSAL)
            for again in found[1:]:
                assert all(torch.equal(x, y) for x, y in zip(again, found[0], strict=True))
    finally:
        torch.set_num_threads(threads)


def test_what_is_in_no_sequence_gets_zeros() -> None:
    q, k, v = (torch.randn(20, 2, 16) for _ in "qkv")
    call = packed_call(q, k, v, [5, 0, 7], [4, 6, 0])
    saved = saved_of(call)
    for x in (saved.dout, saved.out):
        x[12:] = torch.nan
    dq, dk, dv = gradients(call, saved)
    assert not dq[5:].any(), "the second sequence has no queries, the third no keys"
    assert not dk[4:].any()
    assert not dv[4:].any()
    assert dq[:5].isfinite().all()


def test_one_key_has_all_the_weight_whatever_its_score() -> None:
    """dQ and dK are exactly 0: neither softmax_lse nor out, which are rounded, decides."""
    for dtype in (torch.float32, torch.bfloat16):
        call = random_call(30, 1, (2, 2), (64, 64), dtype)
        call = call._replace(q=call.q * 30)
        saved = saved_of(call)._replace(dlse=None)
        dq, dk, dv = gradients(call, saved)
        assert not dq.any()
        assert not dk.any()
        expected = saved.dout.double().sum(1, keepdim=True)
        torch.testing.assert_close(dv.double(), expected, atol=1e-5, rtol=2.0**-7)


SCRIPT = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_cpu_backward import gradients, random_call, saved_of
from random_calls import assert_backward_matches, random_terms
from flashmoe.spec.mask import CAUSAL, FULL, Mask
for mask in (FULL, CAUSAL, Mask(30, 2)):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for dims in ((8, 8), (64, 64), (104, 40)):
            torch.manual_seed(0)
            call = random_call(70, 90, (4, 2), dims, dtype)
            for names in ((), ("softcap", "alibi", "sink"), ("dropout",)):
                given = call._replace(terms=random_terms(names, 4, 2))
                saved = saved_of(given, mask)
                assert_backward_matches(gradients(given, saved, mask), given, saved, mask)
"""


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    environment = os.environ | {"FLASHMOE_CPU_ISA": isa}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    if "FLASHMOE_CPU_ISA must be one of" in done.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stderr
