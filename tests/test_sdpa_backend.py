"""The sdpa backend: torch's own function, given only what its kernels can read and launch."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import DEVICE, LAYOUTS, assert_matches_reference, guarded
from torch.nn.attention import SDPBackend

import flashmoe
from flashmoe import Problem, flash_attn_func
from flashmoe.backends import BACKENDS, sdpa
from flashmoe.machine.device import Arch
from flashmoe.planning.plan import heuristic
from flashmoe.spec.call import Call

H200 = Arch("cuda", "NVIDIA H200", (9, 0), 132, 232448)
CPU = Arch("cpu", "a cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def seen(monkeypatch):
    """What reaches torch's function; it runs all the same."""
    calls = []

    def record(q, k, v, **options):
        calls.append(((q, k, v), options))
        return F.scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(sdpa, "torch_sdpa", record)
    return calls


class TestInTorchsPlace:
    """Users write torch.nn.functional.scaled_dot_product_attention = flashmoe's."""

    @pytest.fixture(autouse=True)
    def theirs(self, monkeypatch):
        theirs = F.scaled_dot_product_attention
        function = flashmoe.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", function)
        return theirs

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_a_mask_or_none(self, theirs, masked, compiled):
        q, k, v = (torch.randn(2, 4, 9, 32, device=DEVICE) for _ in "qkv")
        mask = torch.rand(9, 9, device=DEVICE) > 0.3 if masked else None

        def f(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, mask)

        out = (torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f)(q, k, v)
        torch.testing.assert_close(out, theirs(q, k, v, mask), rtol=1e-4, atol=1e-5)

    def test_dropout_of_everything_goes_to_torch(self, theirs):
        q, k, v = (torch.randn(2, 4, 9, 32, device=DEVICE) for _ in "qkv")
        dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=1.0)
        torch.testing.assert_close(dropped, theirs(q, k, v, dropout_p=1.0))

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_the_backend_runs_torchs(self, theirs, requires_grad):
        q, k, v = (torch.randn(1, 7, 2, 16, device=DEVICE) for _ in "qkv")
        out = flash_attn_func(q.requires_grad_(requires_grad), k, v, backend="sdpa")
        expected = theirs(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        torch.testing.assert_close(out, expected)


def by_math(q, k, v):
    """Of heads that lie first, torch's math kernel leaves them first."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return flash_attn_func(q, k, v, causal=True, backend="sdpa")


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("heads_kv", [4, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_contiguous(layout, heads_kv, requires_grad):
    q = guarded((2, 9, 4, 32), torch.float32, layout).requires_grad_(requires_grad)
    k, v = (guarded((2, 9, heads_kv, 32), torch.float32, layout) for _ in "kv")
    out = by_math(q, k, v)
    assert out.view(2, 9, 4 * 32).stride() == (9 * 4 * 32, 4 * 32, 1)
    assert_matches_reference(out, None, q, k, v, causal=True)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiled_outputs_are_contiguous(requires_grad):
    q, k, v = (torch.randn(2, 9, 4, 32, device=DEVICE) for _ in "qkv")
    compiled = torch.compile(by_math, fullgraph=True, backend="aot_eager", dynamic=False)
    assert compiled(q.requires_grad_(requires_grad), k, v).view(2, 9, 4 * 32).is_contiguous()


@pytest.mark.parametrize("seqlen", [1, 64])
def test_scaled_dot_product_attention_has_one_layout_on_every_plan(monkeypatch, seqlen):
    q = torch.randn(2, 4, seqlen, 32, device=DEVICE)
    k, v = (torch.randn(2, 4, 64, 32, device=DEVICE) for _ in "kv")
    for backend in ("sdpa", "cpu" if DEVICE.type == "cpu" else "triton"):
        monkeypatch.setenv("FLASHMOE_BACKEND", backend)
        flashmoe.api.forget_plans()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = flashmoe.scaled_dot_product_attention(q, k, v)
        assert out.transpose(1, 2).is_contiguous()
    monkeypatch.undo()
    flashmoe.api.forget_plans()


@pytest.mark.parametrize(
    ("changes", "arch", "reason"),
    [
        ({}, H200, ""),
        ({"batch": 65535}, H200, ""),
        ({"batch": 65536}, H200, "cannot launch more than 65535"),
        ({"heads_q": 70000, "heads_kv": 70000}, H200, "cannot launch more than 65535"),
        ({"heads_q": 70000}, H200, "cannot launch more than 65535"),
        ({"heads_q": 70000, "heads_kv": 70000}, CPU, ""),
    ],
)
def test_only_what_its_grids_hold_is_planned(changes, arch, reason):
    problem = replace(Problem(1, 2, 1, 1, 359, 64, "float32"), **changes)
    assert reason in BACKENDS["sdpa"].unsupported(problem, arch)
    assert bool(reason) == bool(BACKENDS["sdpa"].unsupported(problem, arch))


def test_more_heads_than_its_grids_hold_go_to_triton(monkeypatch):
    monkeypatch.setattr(flashmoe.planning.plan, "arch", lambda _: H200)
    for name in ("cuda", "triton"):
        monkeypatch.setattr(BACKENDS[name], "unavailable", lambda _: "")
    device = torch.device("cuda")
    few, many = (Problem(1, heads, heads, 16, 16, 64, "float32") for heads in (8, 70000))
    assert [heuristic(p, device).backend for p in (few, many)] == ["sdpa", "triton"]


# (2, 9, 4, 32) of which torch's CUDA kernels cannot read a row at its address.
UNREADABLE = {
    "address": lambda x: x[3 : 2304 + 3].view(2, 9, 4, 32),
    "batch": lambda x: x[: 2 * 1153].view(2, 1153)[:, :-1].unflatten(1, (9, 4, 32)),
    "row": lambda x: x[: 18 * 129].view(2, 9, 129)[:, :, :-1].unflatten(2, (4, 32)),
    "head": lambda x: x[: 72 * 33].view(2, 9, 4, 33)[..., :-1],
    "last": lambda x: x[:2304].view(2, 9, 32, 4).transpose(2, 3),
}


@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_cuda_kernels_cannot_read_is_copied(what, dtype):
    x = UNREADABLE[what](torch.randn(3000).to(dtype))
    copy = sdpa.readable(x)
    assert copy is not x
    assert copy.is_contiguous()
    assert copy.data_ptr() % 16 == 0
    assert torch.equal(copy, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_cuda_kernels_can_read_is_not_copied(dtype):
    x = torch.randn(2, 9, 12, 32).to(dtype)
    for view in (x, x[:, 4:], x[:, :, 4:8], x.transpose(1, 2), x[:, :1].expand(-1, 9, -1, -1)):
        assert sdpa.readable(view) is view


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_call_made_for_aligned_tensors_copies_unaligned_ones(monkeypatch, seen, requires_grad):
    monkeypatch.setattr(sdpa, "_on_cpu", sdpa._on_cuda)
    aligned = [torch.randn(1, 9, 2, 32) for _ in "qkv"]
    unaligned = [torch.empty(x.numel() + 3)[3:].view(x.shape).copy_(x) for x in aligned]
    first, second = (
        flash_attn_func(q.requires_grad_(requires_grad), k, v, backend="sdpa")
        for q, k, v in (aligned, unaligned)
    )
    assert torch.equal(first, second)
    assert all(x.data_ptr() % 16 == 0 for tensors, _ in seen for x in tensors)
    assert len(seen) == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_unaligned_tensors_are_differentiated(monkeypatch, compiled):
    monkeypatch.setattr(sdpa, "_on_cpu", sdpa._on_cuda)
    q, k, v = (guarded((2, 9, n, 40), torch.float32, "unaligned") for n in (4, 2, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    f = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager", dynamic=False)
    out = (f if compiled else flash_attn_func)(q, k, v, causal=True, backend="sdpa")
    expected = flash_attn_func(q, k, v, causal=True)
    dout = torch.randn_like(out)
    actual, wanted = (torch.autograd.grad(x, leaves, dout) for x in (out, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_kv", [1, 3])
@pytest.mark.parametrize("seqlen_q", [0, 1, 7, 19])
@pytest.mark.parametrize("batch", [0, 2])
def test_float32_groups_reach_no_kernel_that_takes_them(seen, batch, seqlen_q, heads_kv, causal):
    """On a GPU only SDPA's math kernel does, whose memory is quadratic in seqlen."""
    seqlen_kv = seqlen_q if causal else 19
    q = guarded((batch, seqlen_q, 6, 40), torch.float32, "packed").requires_grad_()
    k, v = (
        guarded((batch, seqlen_kv, heads_kv, 40), torch.float32, "packed").requires_grad_()
        for _ in "kv"
    )
    out = sdpa._on_cuda(Call(q, k, v, 40**-0.5), causal)
    ((tensors, options),) = seen
    assert not options["enable_gqa"]
    if not causal:  # K and V are not copied for each of a group's queries
        assert tensors[1].numel() == k.numel()
    expected = flash_attn_func(q, k, v, causal=causal)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    dout = torch.randn_like(out)
    actual, wanted = (torch.autograd.grad(x, (q, k, v), dout) for x in (out, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_decoding_with_float32_groups_copies_nothing(seen):
    q, k, v = (torch.randn(2, n, h, 40) for n, h in ((1, 6), (19, 3), (19, 3)))
    sdpa._on_cuda(Call(q, k, v, 0.2), False)
    (((rows, keys, values), _),) = seen
    assert [x.data_ptr() for x in (rows, keys, values)] == [x.data_ptr() for x in (q, k, v)]


@pytest.mark.parametrize(("major", "groups"), [(7, False), (8, True)])
def test_groups_of_16_bits_go_to_flash_where_it_runs(monkeypatch, seen, major, groups):
    class Properties:
        pass

    Properties.major = major
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    q, k, v = (torch.randn(1, 9, n, 32).half() for n in (4, 2, 2))
    out = sdpa._on_cuda(Call(q, k, v, 0.3), True)
    assert seen[0][1]["enable_gqa"] == groups
    assert_matches_reference(out, None, q, k, v, 0.3, True)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="its CUDA kernels know no such mode")
def test_float32_is_not_rounded_where_torch_rounds_matmuls(seen):
    q, k, v = (torch.randn(1, 9, 2, 32) for _ in "qkv")
    torch.set_float32_matmul_precision("medium")
    try:
        out = flash_attn_func(q, k, v, backend="sdpa")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [x.dtype for x in seen[0][0]] == [torch.float64] * 3
    assert_matches_reference(out, None, q, k, v)


@pytest.mark.parametrize("faster", [False, True])
def test_flash_runs_where_it_is_predicted_to_be_faster(monkeypatch, faster):
    """As the plan counts on: `predicted` gives the time of the faster of the two."""
    chosen, asked = [], []
    monkeypatch.setattr(sdpa, "_flash_is_faster", lambda *problem: asked.append(problem) or faster)
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda kernel: chosen.append(kernel))
    gpu = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.bfloat16, shape=(1, 9, 2, 32))
    sdpa._choice(gpu, gpu, True)
    assert asked == [("cuda:0", torch.bfloat16, gpu.shape, gpu.shape, True)]
    assert chosen == [SDPBackend.FLASH_ATTENTION] * faster


def test_the_choice_is_around_the_call(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def choice(q, k, causal):
        entered.append(causal)
        yield

    monkeypatch.setattr(sdpa, "_choice", choice)
    flash_attn_func(*(torch.randn(1, 9, 2, 32) for _ in "qkv"), causal=True, backend="sdpa")
    assert entered == [True]
