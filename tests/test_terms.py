"""softcap, ALiBi and sinks, alone and together, on every backend that has them here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_calls import (
    backends_for,
    check_backward,
    check_forward,
    dense_calls,
    masks,
    saved,
)
from support import DEVICE

from flashmoe.backends import BACKENDS
from flashmoe.measure.reference import attention_reference
from flashmoe.spec.call import Call, Saved, Terms
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import Problem


def random_call(terms: Terms, seqlen_q: int = 40, seqlen_kv: int = 56) -> Call:
    q = torch.randn(2, seqlen_q, 4, 32, device=DEVICE)
    k, v = (torch.randn(2, seqlen_kv, 2, 32, device=DEVICE) for _ in "kv")
    return Call(q, k, v, 32**-0.5, terms)


def forwards(call: Call, mask: Mask = FULL) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The results of all backends; there is at least one."""
    problem = Problem.of_call(call, mask)
    results = [BACKENDS[name].bind(problem, tile)(call) for name, tile in backends_for(problem)]
    assert results, f"no backend computes {problem.label}"
    return results


# float32 on a CPU; the kernels of a GPU that have terms have 16-bit ones.
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="needs float32 terms")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_problems(data):
    check_forward(data.draw(dense_calls()), data.draw(masks()))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_gradients_of_random_problems(data):
    call, mask = data.draw(dense_calls()), data.draw(masks())
    check_backward(call, data.draw(saved(call, mask)), mask)


@on_cpu
@pytest.mark.parametrize("softcap", [0.25, 1.0, 30.0])
def test_softcap_of_any_score(softcap):
    """softmax_lse of one key is its score, which is a product of two floats here."""
    score = torch.cat((torch.logspace(-30, 6, 400), torch.linspace(-2, 2, 401) * softcap))
    q = torch.zeros(1, len(score), 1, 8)
    q[0, :, 0, 3] = score
    k = torch.zeros(1, 1, 1, 8)
    k[..., 3] = 1
    expected = softcap * torch.tanh(score.double() / softcap)
    for _, lse in forwards(Call(q, k, k, 1.0, Terms(softcap))):
        torch.testing.assert_close(lse[0, 0].double(), expected, rtol=2**-21, atol=1e-38)


@on_cpu
@pytest.mark.parametrize("mask", [FULL, CAUSAL, Mask(3, 2)], ids=str)
def test_rows_that_see_nothing_have_their_sink_as_lse(mask):
    call = random_call(
        Terms(sinks=torch.tensor([1.0, -2.0, 0.5, 30.0])), 9, 0 if mask == FULL else 4
    )
    hidden = 9 if mask == FULL else 5 - max(mask.right, 0)
    for out, lse in forwards(call, mask):
        assert not out[:, :hidden].any()
        assert torch.equal(lse[:, :, :hidden], call.terms.sinks[:, None].expand(2, 4, hidden))


@on_cpu
def test_sinks_of_any_size():
    call = random_call(Terms())
    plain, plain_lse = attention_reference(*call[:4])
    for size in (-torch.inf, -1e4):
        for out, lse in forwards(call._replace(terms=Terms(sinks=torch.full((4,), size)))):
            torch.testing.assert_close(out.double(), plain, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(lse.double(), plain_lse, rtol=1e-6, atol=1e-6)
    for out, lse in forwards(call._replace(terms=Terms(sinks=torch.full((4,), 1e4)))):
        assert not out.any()
        assert (lse == 1e4).all()


@on_cpu
def test_the_largest_values_with_a_sink():
    """Their sum is more than a float32 holds before it is divided."""
    call = random_call(Terms(sinks=torch.tensor([0.0, 3.0, 5.0, -5.0])))
    call = call._replace(v=torch.full_like(call.v, 3e38))
    expected, _ = attention_reference(*call[:4], sinks=call.terms.sinks)
    for out, _ in forwards(call):
        torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=0)


@on_cpu
@pytest.mark.parametrize("softmax_scale", [1e-20, 1e30])
def test_alibi_beside_the_smallest_and_largest_scores(softmax_scale):
    """Whichever of the two the other drowns, the result is a number, and the right one."""
    call = random_call(Terms(alibi_slopes=torch.tensor([1.0, 0.5, 0.25, 1e-3])))
    call = call._replace(softmax_scale=softmax_scale)
    expected, lse = attention_reference(*call[:4], alibi_slopes=call.terms.alibi_slopes)
    for out, _ in forwards(call):
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    dout = torch.randn_like(call.q)
    of_forward = Saved(dout, expected.float(), lse.float())
    problem = Problem.of_call(call, FULL, "bwd")
    for name, tile in backends_for(problem):
        _, _, dv = BACKENDS[name].bind_backward(problem, tile)(call, of_forward)
        v = call.v.double().requires_grad_()
        out, _ = attention_reference(
            call.q, call.k, v, softmax_scale, alibi_slopes=call.terms.alibi_slopes
        )
        (wanted,) = torch.autograd.grad(out, v, dout.double())
        torch.testing.assert_close(dv.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [-1.0, torch.inf, torch.nan])
def test_the_op_refuses_a_softcap_that_is_none(softcap):
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises((RuntimeError, ValueError), match="softcap must be"):
        torch.ops.flashmoe.fwd_cpu(q, q, q, 0.25, -1, -1, 64, 64, softcap)
