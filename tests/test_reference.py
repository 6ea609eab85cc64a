"""The judge itself: right where its own scores are larger than their digits."""

from __future__ import annotations

import pytest
import torch

from flashmoe.measure.reference import attention_reference
from flashmoe.spec.mask import CAUSAL, causal_if


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softmax_scale", [1e-30, 1.0, 1e20, 2.3e38])
def test_equal_keys_are_averaged_whatever_the_scale(softmax_scale, causal):
    q = k = torch.full((1, 7, 1, 8), 3.0)
    v = torch.randn(1, 7, 1, 8)
    out, _ = attention_reference(q, k, v, softmax_scale, causal_if(causal))
    count = torch.arange(1, 8).view(1, 7, 1, 1)
    expected = v.double().cumsum(1) / count if causal else v.double().mean(1, keepdim=True)
    torch.testing.assert_close(out, expected.expand_as(out))


def test_rows_that_see_nothing_are_zero_and_so_are_their_gradients():
    q, k, v = (torch.randn(2, n, 2, 8, requires_grad=True) for n in (6, 4, 4))
    out, lse = attention_reference(q, k, v, mask=CAUSAL)
    assert not out[:, :2].any()
    assert (lse[..., :2] == -torch.inf).all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert not gradients[0][:, :2].any()
    assert all(x.isfinite().all() for x in gradients)


def test_gradients_of_lse_are_those_of_the_softmax_however_large_scores_are():
    q, k, v = (torch.randn(1, n, 1, 8, requires_grad=True) for n in (2, 3, 3))
    lowest = torch.full((2, 3), torch.finfo(torch.float32).min)
    _, lse = attention_reference(q, k, v, attn_mask=lowest)
    (dq,) = torch.autograd.grad(lse.sum(), q)
    expected = k.detach().mean(1, keepdim=True) * 8**-0.5
    torch.testing.assert_close(dq, expected.expand_as(q))
