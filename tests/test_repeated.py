"""What was prepared is found again for tensors like those it was for, and for no others."""

import pytest
import torch
from support import DEVICE
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import flashmoe
from flashmoe import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flashmoe.frontend import attend as attend_module
from flashmoe.frontend import repeated
from flashmoe.frontend.attend import forget_calls


@pytest.fixture(autouse=True)
def nothing_remembered():
    forget_calls()
    yield
    forget_calls()


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


def pair():
    return torch.randn(2, 3), torch.zeros(4, dtype=torch.int32)


def remembered(tensors, prepared="prepared"):
    for _ in range(2):
        repeated.remember("kind", tensors, prepared)


def test_torch_has_the_checks():
    assert repeated.HAS_CHECKS


def test_found_from_the_second_time_on():
    repeated.remember("kind", pair(), "prepared")
    assert repeated.found("kind", pair()) is None
    repeated.remember("kind", pair(), "prepared")
    assert repeated.found("kind", pair()) == "prepared"
    assert repeated.found("another", pair()) is None
    repeated.remember("kind", pair(), "something else")
    assert repeated.found("kind", pair()) is None


@pytest.mark.parametrize(
    "other",
    [
        torch.randn(3, 2),
        torch.randn(2, 6)[:, ::2],
        torch.randn(2, 3, dtype=torch.float64),
        torch.randn(2, 3, requires_grad=True),
        torch.nn.Parameter(torch.randn(2, 3), requires_grad=False),
        torch.randn(2, 3, device="meta"),
        torch.randn(2, 3).to_sparse(),
        torch.randn(2, 3).to_sparse_csr(),
        torch.randn(2, 3).to_mkldnn(),
        torch.nested.nested_tensor([torch.randn(3), torch.randn(2)]),
        torch.nested.nested_tensor([torch.randn(3), torch.randn(2)], layout=torch.jagged),
        None,
    ],
)
def test_not_found_for_other_tensors(other):
    remembered(pair())
    assert repeated.found("kind", (other, pair()[1])) is None


def test_not_found_under_other_modes():
    remembered(pair())
    for mode in (
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode,
        Mode,
        forward_ad.dual_level,
    ):
        tensors = pair()
        with mode():
            assert repeated.found("kind", tensors) is None
    tensors, inside = pair(), []

    def look(x):
        inside.append(repeated.found("kind", (x, tensors[1])))
        inside.append(repeated.found("kind", tensors))
        return x.sum()

    torch.func.vmap(look)(torch.randn(1, 2, 3))
    torch.func.grad(look)(tensors[0])
    torch.func.jvp(look, tensors[:1], tensors[:1])
    torch.jit.trace(look, tensors[:1], check_trace=False)
    assert inside == [None] * 8
    assert repeated.found("kind", pair()) == "prepared"


def test_what_has_no_hash_is_not_found():
    assert repeated.found(["kind"], pair()) is None


def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(repeated, "MAX_KINDS", 2)
    for kind in range(5):
        repeated.remember(kind, pair(), "prepared")
    assert len(repeated._lasts) <= 2


def dense_call():
    q, k, v = torch.randn(3, 1, 5, 2, 16, device=DEVICE)
    return lambda **named: flash_attn_func(q, k, v, **named)


def packed_arguments(rows=5):
    ends = torch.tensor([0, 2, rows], dtype=torch.int32, device=DEVICE)
    return *torch.randn(3, rows, 2, 16, device=DEVICE), ends, ends.clone(), rows, rows


def cache_arguments():
    q, k, v = torch.randn(3, 2, 1, 2, 16, device=DEVICE)
    caches = torch.randn(2, 4, 16, 2, 16, device=DEVICE)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([3, 20], dtype=torch.int32, device=DEVICE)
    return (q, *caches), (k, v), {"cache_seqlens": lengths, "block_table": table}


def packed_call():
    arguments = packed_arguments()
    return lambda **named: flash_attn_varlen_func(*arguments, **named)


def cache_call():
    arguments, _, lengths = cache_arguments()
    return lambda **named: flash_attn_with_kvcache(*arguments, **lengths, **named)


def appending_call():
    arguments, new, lengths = cache_arguments()
    return lambda **named: flash_attn_with_kvcache(*arguments, *new, **lengths, **named)


@pytest.mark.parametrize("make", [dense_call, packed_call, cache_call, appending_call])
def test_later_calls_have_no_key(make, monkeypatch):
    class Forbidden(dict):
        def get(self, key, default=None):
            raise AssertionError("looked up by a key")

    call = make()
    first, *_ = [call(causal=True) for _ in range(3)]
    monkeypatch.setattr(attend_module, "_calls", Forbidden())
    assert torch.equal(call(causal=True), first)
    with pytest.raises(AssertionError, match="by a key"):
        call(causal=False)
    with pytest.raises(AssertionError, match="by a key"), torch.inference_mode():
        call(causal=True)


def test_gradients_are_asked_for_again_after_a_call_without():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 5, 2, 16, device=DEVICE))
    with torch.no_grad():
        for _ in range(3):
            assert not flash_attn_func(q, k, v).requires_grad
    for _ in range(3):
        assert flash_attn_func(q, k, v).requires_grad


def test_recorded_after_it_was_remembered(tmp_path):
    call = packed_call()
    for _ in range(3):
        call()
    with flashmoe.record_problems(tmp_path / "shapes.json"):
        call()
    assert '"packed"' in (tmp_path / "shapes.json").read_text()


@pytest.mark.parametrize(
    ("position", "other", "error"),
    [
        (3, torch.tensor([0, 2, 5]), "cu_seqlens_q must be int32"),
        (4, torch.tensor([0, 5], dtype=torch.int32), r"cu_seqlens_k must be \(batch \+ 1,\)"),
        (1, torch.randn(5, 3, 16), "k's"),
        (2, torch.randn(5, 2, 16, dtype=torch.float64), "v must have q's dtype"),
    ],
)
def test_packed_arguments_are_validated_after_valid_ones(position, other, error):
    arguments = list(packed_arguments())
    for _ in range(3):
        flash_attn_varlen_func(*arguments)
    arguments[position] = other.to(DEVICE)
    with pytest.raises((TypeError, ValueError), match=error):
        flash_attn_varlen_func(*arguments)


@pytest.mark.parametrize(
    ("name", "other", "error"),
    [
        ("k", torch.randn(2, 1, 3, 16), "k must be"),
        ("v", torch.randn(2, 1, 2, 16, dtype=torch.float64), "v must have the cache's dtype"),
        ("cache_seqlens", torch.tensor([3, 20]), "seqused_k must be int32"),
        ("cache_seqlens", 32, "cache_seqlens . seqlen_new must be at most 32"),
        ("block_table", torch.zeros(1, 2, dtype=torch.int32), "block_table must be"),
        ("softmax_scale", -1.0, "softmax_scale must be"),
    ],
)
def test_appends_are_validated_after_valid_ones(name, other, error):
    arguments, (k, v), lengths = cache_arguments()
    named = {"k": k, "v": v, **lengths}
    for _ in range(3):
        flash_attn_with_kvcache(*arguments, **named)
    named[name] = other.to(DEVICE) if isinstance(other, torch.Tensor) else other
    with pytest.raises((TypeError, ValueError), match=error):
        flash_attn_with_kvcache(*arguments, **named)


def test_of_two_shapes_in_turn_each_is_attended_to():
    calls = [packed_arguments(rows) for rows in (5, 7)]
    expected = [flash_attn_varlen_func(*arguments) for arguments in calls]
    for _ in range(4):
        for arguments, out in zip(calls, expected, strict=True):
            assert torch.equal(flash_attn_varlen_func(*arguments), out)
