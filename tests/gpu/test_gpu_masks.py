"""attn_mask on a real GPU, as models have it: forward and backward against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import flashmoe
from flashmoe import api, flash_attn_func
from flashmoe.backends import BACKENDS, jit
from flashmoe.machine.device import arch
from flashmoe.measure.reference import attention_reference, error_bound
from flashmoe.planning.plan import planned
from flashmoe.spec.call import Call, Saved, Terms
from flashmoe.spec.mask import CAUSAL, FULL, Mask
from flashmoe.spec.problem import Problem

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if torch.cuda.get_device_capability()[0] != 9 or jit.unavailable():
    pytest.skip(f"needs a Hopper GPU and a compiler {jit.unavailable()}", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
CUDA = BACKENDS["cuda"]
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    """Kernels with masks are compiled when they are first used: these tests wait for them."""
    monkeypatch.setenv("FLASHMOE_COMPILE", "1")


def padding(lengths, seqlen_kv):
    return torch.arange(seqlen_kv, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]


def added(seen, dtype, low=None):
    """The boolean mask `seen` as one that is added, with `low` (the dtype's lowest) where it is
    False."""
    low = torch.finfo(dtype).min if low is None else low
    return torch.zeros(seen.shape, dtype=dtype, device=DEVICE).masked_fill(~seen, low)


def bert(_):
    return padding([384, 200, 17, 301], 384)[:, None, None]


def bert_added(dtype):
    return added(bert(dtype), dtype)


def whisper(_):
    return padding([1500, 700], 1500)[:, None, None]


def t5(_):
    """A bias of each head, as float32, under padding."""
    bias = torch.randn(1, 8, 500, 500, device=DEVICE) * 2
    return bias + added(padding([500, 123], 500)[:, None, None], torch.float32)


def swin(dtype):
    """64 windows of 7 x 7: a bias of each head, and regions that do not see one another."""
    regions = torch.randint(3, (64, 1, 49), device=DEVICE)
    seen = regions[..., None] == regions[..., None, :]
    return torch.randn(1, 4, 49, 49, device=DEVICE, dtype=dtype) + added(seen, dtype, -100.0)


def prefix_lm(_):
    seen = torch.ones(1000, 1000, dtype=torch.bool, device=DEVICE).tril()
    seen[:, :300] = True
    return seen


def block_diagonal(_):
    blocks = torch.tensor([0] * 400 + [1] * 700 + [2] * 436, device=DEVICE)
    return blocks[:, None] == blocks


def bias_of_heads(dtype):
    return torch.randn(1, 8, 333, 700, device=DEVICE, dtype=dtype)


def holes(dtype):
    """Random, rows that see nothing among them, and keys that nobody sees."""
    seen = torch.rand(2, 8, 300, 450, device=DEVICE) < 0.3
    seen[:, :, 100:180] = False
    seen[..., 130:290] = False
    return seen


# Builder of the mask: batch, seqlen_q, seqlen_kv, heads_q, heads_kv, head_dim, window.
SHAPES = {
    bert: (4, 384, 384, 12, 12, 64, FULL),
    bert_added: (4, 384, 384, 12, 12, 64, FULL),
    whisper: (2, 448, 1500, 8, 8, 64, FULL),
    t5: (2, 500, 500, 8, 8, 64, FULL),
    swin: (64, 49, 49, 4, 4, 32, FULL),
    prefix_lm: (1, 1000, 1000, 8, 2, 128, FULL),
    block_diagonal: (2, 1536, 1536, 4, 4, 128, CAUSAL),
    bias_of_heads: (2, 333, 700, 8, 2, 96, Mask(200, 30)),
    holes: (2, 300, 450, 8, 4, 256, CAUSAL),
}


def call_of(build, dtype, **terms):
    """With the mask in four dimensions, as kernels want it."""
    batch, seqlen_q, seqlen_kv, heads_q, heads_kv, head_dim, window = SHAPES[build]
    torch.manual_seed(0)
    q = torch.randn(batch, seqlen_q, heads_q, head_dim, device=DEVICE, dtype=dtype)
    k, v = (
        torch.randn(batch, seqlen_kv, heads_kv, head_dim, device=DEVICE, dtype=dtype) for _ in "kv"
    )
    mask = build(dtype)
    mask = mask[(None,) * (4 - mask.dim())]
    return Call(q, k, v, head_dim**-0.5, Terms(attn_mask=mask, **terms)), window


def problem_of(call, window, direction="fwd"):
    return replace(Problem.of_call(call, window), direction=direction)


def computed(call, window, dout, dlse, dtype):
    """out, softmax_lse, dq, dk, dv by definition."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in call[:3]]
    terms = call.terms._asdict()
    out, lse = attention_reference(*leaves, call.softmax_scale, window, dtype, **terms)
    seen = lse > -torch.inf
    loss = (out * dout.to(dtype)).sum() + (lse * dlse).masked_fill(~seen, 0).sum()
    return out, lse, *torch.autograd.grad(loss, leaves)


def assert_close(name, actual, exact, same):
    same_error = (same.double() - exact).abs().max().item()
    error = (actual.double() - exact).abs().max().item()
    bound = error_bound(actual.dtype, same_error, max(1.0, exact.abs().max().item()))
    assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("terms", [{}, {"softcap": 8.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", SHAPES, ids=lambda build: build.__name__)
def test_forward_and_backward(build, dtype, terms, deterministic):
    call, window = call_of(build, dtype, **terms)
    problem = problem_of(call, window)
    forward = planned(problem, DEVICE, "cuda")
    out, lse = forward.run(call)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    backward = replace(problem, direction="bwd")
    tile = CUDA.default_tile(backward, arch(DEVICE))
    run = CUDA.bind_backward(backward, tile, deterministic)
    actual = run(call, Saved(dout, out, lse, dlse))
    exact = computed(call, window, dout, dlse, torch.float64)
    same = computed(call, window, dout, dlse, dtype)
    torch.testing.assert_close(lse.double(), exact[1].detach(), rtol=2e-6, atol=5e-3)
    for name, *values in zip(
        ("out", "dq", "dk", "dv"),
        (out, *actual),
        (exact[0], *exact[2:]),
        (same[0], *same[2:]),
        strict=True,
    ):
        assert_close(name, *values)
    if deterministic:
        again = run(call, Saved(dout, out, lse, dlse))
        assert all(torch.equal(x, y) for x, y in zip(actual, again, strict=True))


@pytest.mark.parametrize("build", [bert, t5, holes], ids=lambda build: build.__name__)
def test_dropout_and_a_mask(build):
    state = torch.tensor([5, 7], device=DEVICE)
    call, window = call_of(build, torch.bfloat16, dropout_p=0.3, rng_state=state)
    problem = problem_of(call, window)
    out, lse = planned(problem, DEVICE, "cuda").run(call)
    dout, dlse = torch.randn_like(out), torch.zeros_like(lse)
    backward = replace(problem, direction="bwd")
    tile = CUDA.default_tile(backward, arch(DEVICE))
    actual = CUDA.bind_backward(backward, tile)(call, Saved(dout, out, lse, None))
    exact = computed(call, window, dout, dlse, torch.float64)
    same = computed(call, window, dout, dlse, torch.bfloat16)
    assert_close("out", out, exact[0], same[0])
    for name, *values in zip(("dq", "dk", "dv"), actual, exact[2:], same[2:], strict=True):
        assert_close(name, *values)


def test_rows_that_see_only_the_lowest_values():
    """Padding on the left under a causal mask, by finfo.min: such rows are means of values, and
    those that count have gradients as if the others were not there."""
    dtype = torch.bfloat16
    q, k, v = (torch.randn(2, 400, 4, 64, device=DEVICE, dtype=dtype) for _ in "qkv")
    keys = torch.arange(400, device=DEVICE) >= torch.tensor([[0], [250]], device=DEVICE)
    seen = keys[:, None, None] & torch.ones(400, 400, dtype=torch.bool, device=DEVICE).tril()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, attn_mask=added(seen, dtype))
    assert out.isfinite().all()
    counts = keys[:, :, None, None]
    dout = torch.randn_like(out) * counts
    actual = torch.autograd.grad(out, leaves, dout)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected, _ = attention_reference(*exact, attn_mask=seen)
    wanted = torch.autograd.grad(expected, exact, dout.double())
    torch.testing.assert_close((out * counts).double(), expected * counts, rtol=2e-2, atol=2e-2)
    for x, y in zip(actual, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=3e-2, atol=3e-2)


def test_the_gradient_of_a_bias():
    call, window = call_of(bias_of_heads, torch.bfloat16)
    bias = call.terms.attn_mask.requires_grad_()
    options = {"window_size": (window.left, window.right)}
    out = flash_attn_func(*call[:3], attn_mask=bias, **options)
    (actual,) = torch.autograd.grad(out.float().sin().sum(), bias)

    def by_definition(dtype):
        leaf = bias.detach().to(dtype).requires_grad_()
        out, _ = attention_reference(*call[:3], None, window, dtype, attn_mask=leaf)
        return torch.autograd.grad(
            out.to(torch.promote_types(dtype, torch.float32)).sin().sum(), leaf
        )[0]

    assert_close("bias", actual, by_definition(torch.float64), by_definition(torch.bfloat16))


def test_graphs_see_what_a_mask_is_now():
    """Tiles are listed on the device, at each replay."""
    leaves = [
        torch.randn(2, 512, 4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in "qkv"
    ]
    mask = padding([512, 100], 512)[:, None, None].clone()
    dout = torch.randn_like(leaves[0])

    def step():
        out = flash_attn_func(*leaves, attn_mask=mask)
        return out, *torch.autograd.grad(out, leaves, dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ([300, 512], [1, 40], [512, 512]):
        mask.copy_(padding(lengths, 512)[:, None, None])
        graph.replay()
        for x, y in zip(captured, step(), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


def test_compiles_without_graph_breaks():
    leaves = [
        torch.randn(2, 256, 4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in "qkv"
    ]
    mask = padding([256, 99], 256)[:, None, None]

    def f(q, k, v):
        return flash_attn_func(q * 1.0, k, v, attn_mask=mask).sin()

    out, expected = torch.compile(f, fullgraph=True)(*leaves), f(*leaves)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    actual, wanted = (torch.autograd.grad(x.sum(), leaves) for x in (out, expected))
    torch.testing.assert_close(actual, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("build", [bert, t5, bias_of_heads], ids=lambda build: build.__name__)
def test_sdpa_under_a_mask(build, monkeypatch):
    monkeypatch.setattr(api, "is_slower_under", lambda *_: True)
    call, _ = call_of(build, torch.bfloat16)
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in call[:3])
    options = {"attn_mask": call.terms.attn_mask, "enable_gqa": True}
    out = flashmoe.scaled_dot_product_attention(q, k, v, **options)
    exact = [x.detach().transpose(1, 2).double().requires_grad_() for x in (q, k, v)]
    expected, _ = attention_reference(*exact, attn_mask=call.terms.attn_mask)
    torch.testing.assert_close(out.transpose(1, 2).double(), expected, rtol=2e-2, atol=2e-2)
    actual = torch.autograd.grad(out.float().sin().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.sin().sum(), exact)
    for x, y in zip(actual, wanted, strict=True):
        torch.testing.assert_close(x.transpose(1, 2).double(), y, rtol=3e-2, atol=3e-2)
