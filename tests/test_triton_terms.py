"""Softcap, ALiBi and sinks in the Triton kernels against float64 mathematics."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmoe.measure.reference import attention_reference

pytest.importorskip("triton")

from flashmoe.backends import BACKENDS
from flashmoe.machine.device import arch
from flashmoe.spec.call import Call, Saved, Terms
from flashmoe.spec.mask import Mask
from flashmoe.spec.problem import Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = BACKENDS["triton"]

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1",
)


def assert_close(actual: Tensor, expected: Tensor, same_dtype: Tensor) -> None:
    error = (actual.double() - expected).abs().max().item()
    same = (same_dtype.double() - expected).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    assert error <= 2 * same + 8 * torch.finfo(actual.dtype).eps * scale


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    group=st.sampled_from((1, 2)),
    mask=st.sampled_from((Mask(), Mask(-1, 0), Mask(20, 3), Mask(9, 0))),
    softcap=st.sampled_from((0.0, 5.0, 30.0)),
    slopes=st.sampled_from(("", "heads", "batch")),
    sink=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    magnitude=st.sampled_from((1.0, 8.0)),
    seed=st.integers(0, 2**20),
)
def test_terms_forward_and_backward(
    lengths, group, mask, softcap, slopes, sink, dtype, magnitude, seed
):
    generator = torch.Generator().manual_seed(seed)
    batch, heads_kv, head_dim = 2, 2, 24
    heads = heads_kv * group

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = (random(batch, lengths[0], heads, head_dim) * magnitude).to(DEVICE, dtype)
    k, v = (random(batch, lengths[1], heads_kv, head_dim).to(DEVICE, dtype) for _ in "kv")
    alibi = {"": None, "heads": random(heads), "batch": random(batch, heads)}[slopes]
    alibi = None if alibi is None else alibi.abs().to(DEVICE)
    sinks = (random(heads) * 3).to(DEVICE) if sink else None
    names = (*("softcap",) * (softcap > 0), *("alibi",) * (alibi is not None), *("sink",) * sink)
    problem = Problem.of(q, k, mask)
    problem = Problem(
        *(getattr(problem, n) for n in ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_kv")),
        *(head_dim, problem.dtype, mask),
        terms=names,
    )
    call = Call(q, k, v, head_dim**-0.5, Terms(softcap, alibi, sinks))
    tile = TRITON.default_tile(problem, arch(DEVICE))
    assert not TRITON.unsupported(problem, arch(DEVICE))
    out, lse = TRITON.bind(problem, tile)(call)

    def judge(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        terms = {"softcap": softcap, "alibi_slopes": alibi, "sinks": sinks}
        out, lse = attention_reference(*leaves, call.softmax_scale, mask, dtype, **terms)
        gradients = torch.autograd.grad((out, lse), leaves, (dout.to(dtype), dlse.to(dtype)))
        return (out.detach(), *gradients, lse.detach())

    dout, dlse = random(*q.shape).to(DEVICE, dtype), random(*lse.shape).to(DEVICE)
    expected, same = judge(torch.float64), judge(dtype)
    seen = expected[-1] != -torch.inf
    dlse = dlse * seen  # of a row without keys and sink the reference's gradient is no number
    expected, same = judge(torch.float64), judge(dtype)
    saved = Saved(dout, out, lse, dlse)
    tile = TRITON.default_tile(problem, arch(DEVICE))
    gradients = TRITON.bind_backward(problem, tile)(call, saved)
    torch.testing.assert_close(lse.double(), expected[-1], rtol=1e-5, atol=1e-4)
    for actual, right, reference in zip((out, *gradients), expected, same, strict=False):
        assert_close(actual, right.nan_to_num(), reference.nan_to_num())
