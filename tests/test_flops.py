"""torch's FLOP counter sees attention, and counts it as it counts its own."""

from __future__ import annotations

import pytest
import torch
from random_calls import cumulative, int32
from support import DEVICE
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import flashmoe
from flashmoe.frontend.ops import attention
from flashmoe.spec.mask import CAUSAL

aten = torch.ops.aten


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


def torchs(op: str, *shapes: tuple[int, ...]) -> int:
    """What torch counts for its own op of these shapes."""
    return flop_registry[getattr(aten, op)](*(torch.empty(s, device="meta") for s in shapes))


def counted(call, *arguments, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*arguments, **options)
    return counter.get_total_flops()


@pytest.mark.parametrize("causal", [False, True])
def test_training_counts_as_torchs_own(causal):
    q, k, v = tensor(2, 9, 4, 16), tensor(2, 13, 4, 16), tensor(2, 13, 4, 16)

    def step() -> None:
        flashmoe.flash_attn_func(q, k, v, causal=causal).sum().backward()

    of_q, of_k = (2, 4, 9, 16), (2, 4, 13, 16)
    forward = torchs("_scaled_dot_product_flash_attention", of_q, of_k, of_k)
    backward = torchs("_scaled_dot_product_flash_attention_backward", of_q, of_q, of_k, of_k)
    assert counted(step) == forward + backward
    with torch.no_grad():
        assert counted(flashmoe.flash_attn_func, q, k, v) == forward


def test_packed_sequences_count_their_own_pairs_only():
    q, k, v = (tensor(12, 4, 16) for _ in "qkv")
    lengths_q, lengths_k = [5, 0, 6], [3, 4, 5]
    cu_seqlens = cumulative(lengths_q), cumulative(lengths_k)

    def step() -> None:
        flashmoe.flash_attn_varlen_func(q, k, v, *cu_seqlens, 6, 5).sum().backward()

    pairs = 5 * 3 + 6 * 5
    assert counted(step) == 2 * pairs * 4 * 16 * (2 + 5)


def test_a_cache_counts_the_keys_in_use():
    q, cache = tensor(2, 3, 4, 16).detach(), tensor(2, 20, 2, 16).detach()
    call = flashmoe.flash_attn_with_kvcache
    assert counted(call, q, cache, cache, cache_seqlens=int32([7, 0])) == 2 * 21 * 4 * 32
    pages, table = cache.reshape(10, 4, 2, 16), int32([[0, 3], [1, 2]])
    found = counted(call, q, pages, pages, cache_seqlens=int32([5, 8]), block_table=table)
    assert found == 2 * 3 * 13 * 4 * 32


def test_a_gradient_of_a_mask_is_counted():
    q, mask = tensor(1, 8, 2, 16), tensor(1, 1, 8, 8)

    def step() -> None:
        flashmoe.flash_attn_func(q, q, q, attn_mask=mask).sum().backward()

    assert counted(step) == 2 * 64 * 2 * 16 * (2 + 5 + 2)


def test_arguments_of_an_op_may_have_names():
    q = tensor(1, 8, 2, 16).detach()
    rest = {"window_left": -1, "window_right": 0, "backend": "", "tile": ""}
    found = counted(attention, q, q, v=q, softmax_scale=0.25, **rest)
    assert found == 2 * 64 * 2 * 32


def test_tensors_without_values_count_the_longest_sequences():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(2, 8, 4, 16, device=DEVICE)
        assert counted(attention, q, q, q, 0.25, *(CAUSAL.left, CAUSAL.right), "", "") == (
            2 * 2 * 64 * 4 * 32
        )
        rows, lengths = q.flatten(0, 1), torch.empty(3, dtype=torch.int32, device=DEVICE)
        call = flashmoe.flash_attn_varlen_func
        assert counted(call, rows, rows, rows, lengths, lengths, 8, 5) == 2 * 2 * 40 * 4 * 32
        pages, table = q.reshape(4, 4, 4, 16), torch.empty(2, 3, dtype=torch.int32, device=DEVICE)
        used = torch.empty(2, dtype=torch.int32, device=DEVICE)
        decode = flashmoe.flash_attn_with_kvcache
        found = counted(decode, q, pages, pages, cache_seqlens=used, block_table=table)
        assert found == 2 * 2 * 8 * 12 * 4 * 32


def test_selective_checkpointing_keeps_attention():
    from functools import partial

    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    q = tensor(1, 8, 2, 16)

    def step(kept: list) -> None:
        contexts = partial(create_selective_checkpoint_contexts, kept)
        checkpoint(
            lambda x: flashmoe.flash_attn_func(x.sin(), x, x),
            q,
            use_reentrant=False,
            context_fn=contexts,
        ).sum().backward()

    forward = 2 * 64 * 2 * 32
    again = counted(step, [torch.ops.aten.sin.default])
    assert counted(step, [attention]) == again - forward
