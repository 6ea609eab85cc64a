"""Dropout: its mask, on every backend that has it here, and through what users call."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_calls import backends_for, cumulative, int32, packed_call
from support import DEVICE
from torch.utils.checkpoint import checkpoint

import flashmoe
from flashmoe import flash_attn_func, flash_attn_varlen_func
from flashmoe.backends import BACKENDS
from flashmoe.frontend.attend import new_rng_state
from flashmoe.measure.reference import attention_reference, sequences_reference
from flashmoe.spec.call import Call, Saved, Terms
from flashmoe.spec.dropout import dropout_limit, dropout_scale, kept_weights, philox
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import Problem

DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.float16


def state(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def qkv(batch=2, seqlen_q=40, seqlen_kv=56, heads=(4, 2), head_dim=32, **more):
    more = {"device": DEVICE, "dtype": DTYPE, **more}
    q = torch.randn(batch, seqlen_q, heads[0], head_dim, **more)
    return q, *(torch.randn(batch, seqlen_kv, heads[1], head_dim, **more) for _ in "kv")


def test_philox_gives_the_known_answers():
    """Of Random123's kat_vectors, for 7 rounds; C++ has them in tests/cpp/test_fwd_cpu.cpp."""
    ones, pi = [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, expected in (
        ([0] * 4, [0, 0], [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (ones, ones[:2], [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (pi, [0xA4093822, 0x299F31D0], [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]),
    ):
        found = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert [int(x) for x in found] == expected


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_mean_and_variance_of_the_mask(dropout_p):
    """Weights are kept independently of one another: of all, of rows, of columns and of
    neighbours in every direction, heads and batches among them."""
    kept = kept_weights(state(3, 5), dropout_p, 4, 8, (0, 512), (0, 512)).double()
    share = (dropout_limit(dropout_p) + 1) / 65536
    assert share == pytest.approx(1 - dropout_p, abs=2**-17)
    variance = share * (1 - share)
    assert abs(kept.mean() - share) < 4.5 * math.sqrt(variance / kept.numel())
    assert (
        abs(kept.var() - variance)
        < 4.5 * math.sqrt(variance * (1 - 4 * variance) / kept.numel()) + 1e-6
    )
    # Sums of 512 are as spread as independent ones: of 16384 sums, their variance within 5 %.
    for dim in (-1, -2):
        sums = kept.sum(dim)
        assert (sums.var() / (512 * variance)).item() == pytest.approx(1, abs=0.05)
        assert (sums - 512 * share).abs().max() < 6.5 * math.sqrt(512 * variance)
    off = kept - share
    for shift in ((0, 1), (0, 8), (0, 16), (1, 0), (8, 0), (16, 0), (8, 8)):
        pairs = (off * off.roll(shift, (2, 3))).mean() / variance
        assert abs(pairs) < 4.5 / math.sqrt(kept.numel())
    for dim in (0, 1):
        pairs = (off * off.roll(1, dim)).mean() / variance
        assert abs(pairs) < 4.5 / math.sqrt(kept.numel())


def test_the_scale_keeps_the_mean():
    for dropout_p in (1e-9, 0.1, 1 / 3, 0.9999, 1 - 1e-9):
        share = (dropout_limit(dropout_p) + 1) / 65536
        assert 0 < share <= 1
        assert share * dropout_scale(dropout_p) == 1


@settings(deadline=None, max_examples=30)
@given(
    rows=st.tuples(st.integers(0, 100), st.integers(0, 60)),
    columns=st.tuples(st.integers(0, 100), st.integers(0, 60)),
)
def test_a_part_of_the_mask_is_that_part(rows, columns):
    whole = kept_weights(state(-7, 11), 0.4, 2, 3, (0, 160), (0, 160))
    sides = [(begin, begin + count) for begin, count in (rows, columns)]
    part = kept_weights(state(-7, 11), 0.4, 2, 3, *sides)
    assert torch.equal(part, whole[:, :, slice(*sides[0]), slice(*sides[1])])


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("offset", [0, 2**32 - 1, -1])
def test_states_and_batches_differ(seed, offset):
    """An offset is one batch: also where its lower half overflows."""
    whole = kept_weights(state(seed, offset), 0.5, 3, 2, (0, 64), (0, 64))
    for batch in range(3):
        alone = kept_weights(state(seed, offset + batch), 0.5, 1, 2, (0, 64), (0, 64))
        assert torch.equal(alone[0], whole[batch])
    kinds = [
        *whole.flatten(0, 1),
        kept_weights(state(seed + 1, offset), 0.5, 1, 1, (0, 64), (0, 64))[0, 0],
    ]
    for i, a in enumerate(kinds):
        for b in kinds[:i]:
            assert 0.45 < (a == b).double().mean() < 0.55


@settings(deadline=None, max_examples=15)
@given(
    mask=st.sampled_from([FULL, CAUSAL, Mask(20, 3)]),
    lengths=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    dropout_p=st.sampled_from([0.05, 0.5, 0.95]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_every_backend_drops_the_same_weights(mask, lengths, dropout_p, seed):
    """With values that are one-hot, out is the weights themselves."""
    heads, length = 2, lengths[1]
    q, k = torch.randn(2, lengths[0], heads, 96), torch.randn(2, length, 1, 96)
    v = torch.eye(96)[None, :length, None].expand(2, -1, -1, -1)
    q, k, v = (x.to(DEVICE, DTYPE) for x in (q, k, v))
    call = Call(q, k, v, 0.1, Terms(dropout_p=dropout_p, rng_state=state(seed, 9)))
    problem = Problem.of_call(call, mask)
    sides = (0, lengths[0]), (0, length)
    kept = kept_weights(call.terms.rng_state, dropout_p, 2, heads, *sides)
    visible = ~mask.hides(
        torch.arange(lengths[0], device=DEVICE)[:, None], torch.arange(length, device=DEVICE),
        *lengths,
    )  # fmt: skip
    expected, _ = attention_reference(*call[:4], mask, **call.terms._asdict())
    found = [BACKENDS[name].bind(problem, tile)(call)[0] for name, tile in backends_for(problem)]
    assert found
    for out in found:
        weights = out.transpose(1, 2)[..., :length]
        assert torch.equal(weights != 0, kept & visible)
        torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=1e-5)


def test_directional_derivatives():
    """Of sums of out in float64 by differences of the reference, whose mask is a constant."""
    q, k, v = qkv()
    options = {"dropout_p": 0.3, "rng_state": state(1, 2)}
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, causal=True, **options)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, dout)
    step = 1e-4
    for i, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient).double()
        values = []
        for sign in (1, -1):
            moved = [x.double() for x in (q, k, v)]
            moved[i] = moved[i] + sign * step * direction
            values.append((attention_reference(*moved, mask=CAUSAL, **options)[0] * dout).sum())
        expected = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=5e-3, atol=5e-3)


def test_torchs_generator_decides():
    """The same after manual_seed; another for every call; the mean over many calls is that without
    dropout."""
    q, k, v = qkv(1, 24, 24)

    def calls() -> list[torch.Tensor]:
        torch.manual_seed(5)
        return [flash_attn_func(q, k, v, 0.25) for _ in range(3)]

    first, second = calls(), calls()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    many = torch.stack([flash_attn_func(q, k, v, 0.25) for _ in range(400)]).double()
    plain = flash_attn_func(q, k, v).double()
    spread = many.std(0) / math.sqrt(len(many))
    assert ((many.mean(0) - plain).abs() < 5.5 * spread + 1e-3).all()


def test_softmax_lse_has_no_dropout():
    q, k, v = qkv()
    plain = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    dropping = flash_attn_func(q, k, v, 0.5, causal=True, return_attn_probs=True)
    torch.testing.assert_close(dropping[1], plain[1])
    assert not torch.equal(dropping[0], plain[0])


def test_gradients_use_the_forwards_mask_though_the_generator_moved():
    leaves = [x.requires_grad_() for x in qkv()]
    given = state(8, -8)
    out = flash_attn_func(*leaves, 0.5, causal=True, rng_state=given)
    torch.rand(100, device=DEVICE)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, dout)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected, _ = attention_reference(*exact, mask=CAUSAL, dropout_p=0.5, rng_state=given)
    for x, y in zip(found, torch.autograd.grad(expected, exact, dout.double()), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=5e-3, atol=5e-3)


def test_a_checkpoint_drops_the_same_again():
    leaves = [x.requires_grad_() for x in qkv()]
    results = []
    for again in (False, True):
        torch.manual_seed(3)
        if again:
            out = checkpoint(lambda *x: flash_attn_func(*x, 0.4), *leaves, use_reentrant=False)
        else:
            out = flash_attn_func(*leaves, 0.4)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiled(requires_grad):
    """Without graph breaks; the forward's mask is the backward's, which a sum of squares of what is
    kept tells: d/dv of sum(w v)^2 is 2 w^T w v."""
    q, k, v = qkv(1, 32, 32, requires_grad=requires_grad)

    def function(q, k, v):
        return flash_attn_func(q * 1.0, k, v, 0.5, causal=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outs = [compiled(q, k, v) for _ in range(2)]
    assert not torch.equal(*outs)
    assert outs[0].requires_grad == requires_grad
    if requires_grad:
        # out is linear in v: its derivative along v is out itself.
        (dv,) = torch.autograd.grad((outs[0].detach() * outs[0]).sum(), v)
        torch.testing.assert_close(
            (dv * v).sum().double(), outs[0].double().square().sum(), rtol=1e-3, atol=1e-3
        )


def test_inductor_draws_new_states():
    q, k, v = qkv(1, 16, 16)
    compiled = torch.compile(lambda q, k, v: flash_attn_func(q, k, v, 0.5), fullgraph=True)
    torch.manual_seed(0)
    outs = [compiled(q, k, v) for _ in range(2)]
    assert not torch.equal(*outs)
    torch.manual_seed(0)
    assert torch.equal(compiled(q, k, v), outs[0])


@pytest.mark.parametrize("grad", [False, True])
def test_packed_batches(grad):
    """Each sequence as a batch of its own with the offset that many further, and nothing between
    them is read."""
    lengths_q, lengths_k = [7, 0, 33, 20], [9, 5, 40, 0]
    q = torch.randn(64, 4, 32, device=DEVICE, dtype=DTYPE)
    k, v = (torch.randn(57, 2, 32, device=DEVICE, dtype=DTYPE) for _ in "kv")
    for x, used in ((q, 60), (k, 54), (v, 54)):
        x[used:] = torch.nan
    given = state(4, 2**32 - 2)
    call = packed_call(q, k, v, lengths_q, lengths_k, Terms(dropout_p=0.3, rng_state=given))
    expected, expected_lse = sequences_reference(call, CAUSAL)
    leaves = [x.clone().requires_grad_(grad) for x in (q, k, v)]
    out, lse, weights = flash_attn_varlen_func(
        *(*leaves, cumulative(lengths_q), cumulative(lengths_k), 33, 40, 0.3),
        causal=True,
        return_attn_probs=True,
        rng_state=given,
    )
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-3, atol=2e-3)
    assert weights.shape == (4, 4, 33, 40)
    kept = kept_weights(given, 0.3, 4, 4, (0, 33), (0, 40))
    seen = weights[2] != 0
    assert torch.equal((weights[2] > 0)[seen], kept[2][seen])
    assert seen.any()
    if grad:
        dout = torch.randn_like(out)
        found = torch.autograd.grad(out, leaves, dout)
        exact = [x.double().nan_to_num().requires_grad_() for x in (q, k, v)]
        right, _ = sequences_reference(call._replace(q=exact[0], k=exact[1], v=exact[2]), CAUSAL)
        for x, y in zip(found, torch.autograd.grad(right, exact, dout.double()), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=5e-3, atol=5e-3)


def test_what_is_dropped_is_not_what_is_hidden():
    """NaN behind lengths, and in keys that no query sees, reaches nothing."""
    q, k, v = qkv(1, 20, 400)
    k[:, :256] = v[:, :256] = torch.nan  # of whole tiles, which GPUs do not read
    mask = Mask(10, 0)
    call = Call(q, k, v, 0.2, Terms(dropout_p=0.5, rng_state=state(1, 1)))
    for name, tile in backends_for(Problem.of_call(call, mask)):
        out, lse = BACKENDS[name].bind(Problem.of_call(call, mask), tile)(call)
        assert out.isfinite().all()
        backward = Problem.of_call(call, mask, "bwd")
        for other, its_tile in backends_for(backward):
            saved = Saved(torch.ones_like(out), out, lse)
            for x in BACKENDS[other].bind_backward(backward, its_tile)(call, saved):
                assert x.isfinite().all()


def test_sdpa_drops_by_our_kernels():
    q, k, v = (x.transpose(1, 2) for x in qkv(1, 24, 24, (2, 2)))
    torch.manual_seed(7)
    given = new_rng_state(q.device)
    torch.manual_seed(7)
    out = flashmoe.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    expected, _ = attention_reference(
        *(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.5, rng_state=given
    )
    torch.testing.assert_close(out.transpose(1, 2).double(), expected, rtol=2e-3, atol=2e-3)


def test_signs_of_the_returned_weights():
    """As flash-attn's tests read them: what is negative was dropped."""
    q, k, v = qkv(2, 17, 33)
    out, _, weights = flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)
    assert (weights.shape, weights.dtype) == ((2, 4, 17, 33), q.dtype)
    kept = weights.double().clamp(min=0)
    weights = weights.double().abs()
    values = v.double().transpose(1, 2).repeat_interleave(2, 1)
    by_hand = kept / weights.sum(-1, keepdim=True) @ values * dropout_scale(0.4)
    torch.testing.assert_close(out.double(), by_hand.transpose(1, 2), rtol=2e-3, atol=2e-3)
    assert abs((kept[weights != 0] != 0).double().mean().item() - 0.6) < 0.05


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 2, math.nan, math.inf])
def test_probabilities_that_are_none(dropout_p):
    for options in ({}, {"rng_state": state(1, 2)}):
        with pytest.raises(ValueError, match="dropout_p must be from 0 to less than 1, got"):
            flash_attn_func(*qkv(), dropout_p, **options)


def test_wrong_states_are_named():
    q, k, v = qkv()
    with pytest.raises(TypeError, match="dropout_p must be a number, got str"):
        flash_attn_func(q, k, v, "0.5")
    with pytest.raises(ValueError, match="rng_state must be None without dropout_p"):
        flash_attn_func(q, k, v, rng_state=state(1, 2))
    with pytest.raises(TypeError, match=r"rng_state must be \(2,\) int64, got torch.int32"):
        flash_attn_func(q, k, v, 0.5, rng_state=int32([1, 2]))
    with pytest.raises(TypeError, match=r"rng_state must be .* of shape \(3,\)"):
        flash_attn_func(q, k, v, 0.5, rng_state=state(1, 2, 3))
    with pytest.raises(TypeError, match=r"rng_state must be a torch\.Tensor or None, got int"):
        flash_attn_func(q, k, v, 0.5, rng_state=3)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the op of the cpu")
def test_the_op_refuses_half_of_it():
    q, k, v = qkv()
    op = torch.ops.flashmoe.fwd_cpu
    with pytest.raises(RuntimeError, match="rng_state must be there with dropout_p"):
        op(q, k, v, 0.2, -1, -1, 8, 8, dropout_p=0.5)
    with pytest.raises(RuntimeError, match="rng_state must be there with dropout_p"):
        op(q, k, v, 0.2, -1, -1, 8, 8, rng_state=state(1, 2))
    with pytest.raises(RuntimeError, match="dropout_p must be from 0 to less than 1"):
        op(q, k, v, 0.2, -1, -1, 8, 8, dropout_p=1.5, rng_state=state(1, 2))


def test_no_dropout_draws_nothing():
    q, k, v = qkv()
    torch.manual_seed(1)
    before = torch.rand(1, device=DEVICE)
    torch.manual_seed(1)
    flash_attn_func(q, k, v, 0.0)
    flashmoe.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
    assert torch.equal(torch.rand(1, device=DEVICE), before)
