"""Softcap, ALiBi and sinks on a real GPU: compiled-in kernels and kernels compiled here."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LAYOUTS, guarded

from flashmoe import Tile, _extension
from flashmoe.backends import BACKENDS, jit
from flashmoe.machine.device import arch
from flashmoe.measure.reference import attention_reference, error_bound
from flashmoe.planning.plan import planned
from flashmoe.spec.call import Call, Saved, Terms
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import TERMS, Problem
from flashmoe.tiles import PLAIN, Variant

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
CUDA = BACKENDS["cuda"]
DTYPES = [torch.float16, torch.bfloat16]
INFO = _extension.load()
# head_dim, tile, variant; what is compiled for several variants with each of them.
FORWARD = [key for key in INFO.handles if set(key[2].names) & set(TERMS)]
BACKWARD = [*INFO.backward_handles]


def terms_of(names, heads_q, batch, softcap=8.0, seed=0):
    """Slopes of each batch and head, from steep to none; one sink beyond all scores, one of no
    weight."""
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.rand(batch, heads_q, generator=generator) ** 4
    sinks = torch.randn(heads_q, generator=generator) * 3
    sinks[0], sinks[-1] = 60.0, -torch.inf
    return Terms(
        softcap if "softcap" in names else 0.0,
        slopes.to(DEVICE) if "alibi" in names else None,
        sinks.to(DEVICE) if "sink" in names else None,
        *((0.3, torch.tensor([seed, -3], device=DEVICE)) if "dropout" in names else ()),
    )


def tensors(batch, seqlen_q, seqlen_kv, heads_q, heads_kv, head_dim, dtype, layouts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = guarded((batch, seqlen_q, heads_q, head_dim), dtype, layouts[0], DEVICE, generator)
    k, v = (
        guarded((batch, seqlen_kv, heads_kv, head_dim), dtype, layout, DEVICE, generator)
        for layout in layouts[1:]
    )
    return q, k, v


def problem_of(call, mask, direction="fwd"):
    return replace(Problem.of(call.q, call.k, mask, direction), terms=call.terms.names)


def assert_matches(out, lse, call, mask):
    """By support.assert_matches_reference's rule. softcap's tanh is off by up to 2^-11 of it: less
    than one rounding of a score to float16."""
    terms = call.terms._asdict()

    def computed(dtype):
        return attention_reference(*call[:4], mask, dtype, **terms)

    expected, expected_lse = computed(torch.float64)
    off = call.terms.softcap * 2**-11
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-5 + off)
    assert not out[expected.abs().sum(-1) == 0].any()
    if out.numel() == 0:
        return
    same_error = (computed(out.dtype)[0].double() - expected).abs().max().item()
    bound = error_bound(out.dtype, same_error, max(1.0, expected.abs().max().item()))
    error = (out.double() - expected).abs().max().item()
    assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"


def check(call, mask, tile):
    out, lse = CUDA.bind(problem_of(call, mask), tile)(call)
    assert_matches(out, lse, call, mask)


def fits(tile, problem):
    return not tile.violations(arch(DEVICE), problem)


MASKS = [FULL, CAUSAL, Mask(63, 0), Mask(300, 40), Mask(-1, 20)]
SEQLENS = [(1100, 1100), (333, 1300), (700, 333), (1, 2000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "tile", "variant"), FORWARD, ids=lambda x: str(x))
def test_compiled_in_kernels(head_dim, tile, variant, dtype):
    for mask, (seqlen_q, seqlen_kv) in itertools.product(MASKS, SEQLENS):
        if mask.reduced(seqlen_q, seqlen_kv).is_local != variant.local:
            continue
        layouts = ["padded", "packed", "packed"]
        q, k, v = tensors(2, seqlen_q, seqlen_kv, 8, 4, head_dim, dtype, layouts)
        call = Call(q, k, v, head_dim**-0.5, terms_of(variant.names, 8, 2))
        if not fits(tile, problem_of(call, mask)):
            pytest.skip("does not fit this GPU")
        check(call, mask, tile)


@pytest.mark.parametrize("names", [*((term,) for term in TERMS), TERMS], ids="-".join)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_planned_kernel_on_random_problems(names, data):
    """Where nothing is compiled in and nothing compiles, a general kernel; also for unaligned rows
    and without keys."""
    dtype = data.draw(st.sampled_from(DTYPES))
    head_dim = data.draw(st.sampled_from([40, 64, 96, 128, 256]))
    group, heads_kv = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.integers(1, 2))
    seqlen_q, seqlen_kv = data.draw(st.integers(1, 600)), data.draw(st.integers(0, 600))
    layouts = [data.draw(st.sampled_from(LAYOUTS)) for _ in "qkv"]
    sizes = (data.draw(st.integers(1, 2)), seqlen_q, seqlen_kv, heads_kv * group, heads_kv)
    q, k, v = tensors(*sizes, head_dim, dtype, layouts, data.draw(st.integers(0, 2**31)))
    softcap = data.draw(st.sampled_from([0.5, 8.0, 50.0]))
    call = Call(q, k, v, head_dim**-0.5, terms_of(names, heads_kv * group, len(q), softcap))
    mask = data.draw(st.sampled_from([FULL, CAUSAL]))
    out, lse = planned(problem_of(call, mask), DEVICE, "cuda").run(call)
    assert_matches(out, lse, call, mask)


@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=str)
def test_alibi_that_grows_by_more_than_a_maximum_may_lag(mask):
    """Tiles are visited from the last key on: a row's own key may be thousands ahead of the first
    ones, and with a negative slope the first key is."""
    for variant in (Variant(alibi=True), Variant(alibi=True, sink=True)):
        q, k, v = tensors(1, 3000, 3000, 4, 4, 64, torch.bfloat16, ["packed"] * 3)
        slopes = torch.tensor([3.0, 0.5, -0.5, -3.0], device=DEVICE)
        terms = terms_of(variant.names, 4, 1)._replace(alibi_slopes=slopes)
        call = Call(q, k, v, 0.125, terms)
        out, lse = planned(problem_of(call, mask), DEVICE, "cuda").run(call)
        assert_matches(out, lse, call, mask)


@pytest.mark.skipif(bool(jit.unavailable()), reason=jit.unavailable())
@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_compiled_here(dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path))
    texts = {
        64: ("64x64-stages3-q1-qreg-ctas2", "256x64-stages4-q2-serial", "192x64-stages3-pingpong"),
        96: ("256x64-stages4-q1-serial", "64x128-stages2-qreg"),
        128: ("128x96-stages2-q2-pingpong-fma4",),
    }
    for head_dim, names in texts.items():
        q, k, v = tensors(2, 700, 900, 8, 2, head_dim, dtype, ["packed"] * 3)
        call = Call(q, k, v, head_dim**-0.5, terms_of(TERMS, 8, 2))
        for text, mask in itertools.product(names, (CAUSAL, Mask(200, 30))):
            check(call, mask, Tile.parse(f"sm90:{text}"))


def test_kernels_refuse_terms_that_they_do_not_have():
    q, k, v = tensors(1, 100, 100, 2, 2, 64, torch.bfloat16, ["packed"] * 3)
    each = torch.zeros(2, device=DEVICE)
    plain = next(handle for key, handle in INFO.handles.items() if key[::2] == (64, PLAIN))
    state = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    options = (
        (30.0, None, None),
        (0.0, each, None),
        (0.0, None, each),
        (0.0, None, None, 0.5, state),
    )
    for terms in options:
        with pytest.raises(RuntimeError, match="invalid argument"):
            torch.ops.flashmoe.fwd_cuda(q, k, v, 0.1, -1, -1, plain, *terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("head_dim", "tile", "variant"), BACKWARD, ids=lambda x: str(x))
def test_gradients(head_dim, tile, variant, sinks, dtype):
    if not (set(variant.names) & set(TERMS) or sinks):
        pytest.skip("has no terms")
    names = (*variant.names, "sink") if sinks else variant.names
    for mask, (seqlen_q, seqlen_kv) in itertools.product(MASKS, [(700, 700), (150, 600)]):
        if mask.reduced(seqlen_q, seqlen_kv).is_local != variant.local:
            continue
        layouts = ["padded", "packed", "packed"]
        q, k, v = tensors(2, seqlen_q, seqlen_kv, 4, 2, head_dim, dtype, layouts)
        call = Call(q, k, v, head_dim**-0.5, terms_of(names, 4, 2))
        problem = problem_of(call, mask, "bwd")
        if not fits(tile, problem):
            pytest.skip("does not fit this GPU")
        out, lse = planned(replace(problem, direction="fwd"), DEVICE, "cuda").run(call)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        actual = CUDA.bind_backward(problem, tile)(call, Saved(dout, out, lse, dlse))
        for name, x, exact, same in zip(
            ("dq", "dk", "dv"),
            actual,
            gradients(call, mask, dout, dlse, torch.float64),
            gradients(call, mask, dout, dlse, dtype),
            strict=True,
        ):
            same_error = (same.double() - exact).abs().max().item()
            error = (x.double() - exact).abs().max().item()
            bound = error_bound(dtype, same_error, max(1.0, exact.abs().max().item()))
            assert error <= bound, f"{name}, {mask}: error {error:.3g} exceeds {bound:.3g}"


def gradients(call, mask, dout, dlse, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in call[:3]]
    out, lse = attention_reference(*leaves, call.softmax_scale, mask, dtype, **call.terms._asdict())
    loss = (out * dout.to(dtype)).sum() + (lse * dlse).sum()
    return torch.autograd.grad(loss, leaves)
