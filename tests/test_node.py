"""Training under torch's own autograd node (frontend/node.py): CUDA kernels where NODE_ON_GPUS says
so, and the CPU's here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flashmoe import Problem, _extension, flash_attn_func, flash_attn_varlen_func
from flashmoe.api import forget_plans
from flashmoe.backends import BACKENDS
from flashmoe.frontend import node
from flashmoe.frontend.gradients import Training

BLOCK_M, HANDLE = 64, 5


@pytest.fixture
def under_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Call it for calls that are under the node, with this handle for the backward: -1 runs
    frontend/ops.py's."""
    assert node.has_node()
    init = Training.__init__

    def start(backward: int = -1) -> None:
        def init_planned(self: Training, *arguments: Any) -> None:
            init(self, *arguments)
            left, right, backend, deterministic = self.arguments
            self.plan_number = _extension.training_plan(
                left, right, BLOCK_M, backward, deterministic, backend
            )

        monkeypatch.setattr(Training, "__init__", init_planned)
        forget_plans()

    yield start
    forget_plans()


@pytest.fixture
def kernel() -> Iterator[list[tuple[Any, ...]]]:
    """A backward kernel for CPUs whose gradients are 1, 2 and 3, and the arguments that it got."""
    calls: list[tuple[Any, ...]] = []

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        calls.append(arguments)
        return tuple(torch.full_like(x, i) for i, x in enumerate(arguments[1:4], 1))

    library = torch.library.Library("flashmoe", "FRAGMENT")
    library.impl("bwd_cuda_dense", backward, "CPU")
    yield calls
    library._destroy()


def leaves(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    q, kv = shapes[0], shapes[-1]
    return tuple(torch.randn(s, requires_grad=True) for s in (q, kv, kv))


def is_under_node(out: Tensor) -> bool:
    return type(out.grad_fn).__name__ == "ScaledDotProductFusedAttentionOverrideableBackward0"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"causal": True},
        {"window_size": (3, 1)},
        {"softmax_scale": 0.7, "causal": True},
        {"deterministic": True},
    ],
)
def test_gradients_are_those_without_the_node(
    arguments: dict[str, Any], under_node: Callable[..., None]
) -> None:
    inputs = leaves((2, 7, 4, 16), (2, 9, 2, 16))
    results = []
    for number in range(2):
        if number:
            under_node()
        out = flash_attn_func(*inputs, **arguments)
        dout = torch.cos(torch.arange(out.numel()).float()).reshape(out.shape)
        results.append((out, *torch.autograd.grad(out, inputs, dout)))
        assert is_under_node(out) == bool(number)
    for with_node, without in zip(*results, strict=True):
        torch.testing.assert_close(with_node, without)


@pytest.mark.parametrize("is_on", [True, False])
def test_the_second_step_is_under_the_node_where_there_are_kernels(
    is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handle(problem: Problem, *_: Any) -> int:
        return BLOCK_M if problem.direction == "fwd" else -1

    monkeypatch.setattr(node, "NODE_ON_GPUS", is_on)
    for name in ("cpu", "blocked"):
        monkeypatch.setattr(BACKENDS[name], "handle", handle, raising=False)
    q, k, v = leaves((1, 5, 2, 8))
    ends = torch.tensor([0, 5], dtype=torch.int32)
    calls = (
        (True, lambda: flash_attn_func(q, k, v, causal=True)),
        (False, lambda: flash_attn_func(q, k, v, return_attn_probs=True)[0]),
        (False, lambda: flash_attn_func(q, k, v, softcap=2.0)),
        (False, lambda: flash_attn_varlen_func(q[0], k[0], v[0], ends, ends, 5, 5)),
    )
    forget_plans()
    try:
        for moves, call in calls:
            steps = []
            for number in range(3):
                out = call()
                steps.append(torch.autograd.grad(out.sin().sum(), (q, k, v)))
                assert is_under_node(out) == (is_on and moves and number > 0)
            for x, y in zip(steps[0], steps[2], strict=True):
                torch.testing.assert_close(x, y)
    finally:
        forget_plans()


def test_the_kernel_gets_the_call(
    under_node: Callable[[int], None], kernel: list[tuple[Any, ...]]
) -> None:
    under_node(HANDLE)
    q, k, v = leaves((1, 5, 2, 8), (1, 6, 2, 8))
    out = flash_attn_func(q, k, v, softmax_scale=0.3, window_size=(4, 2))
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert [float(x.unique()) for x in gradients] == [1, 2, 3]
    (arguments,) = kernel
    for given, expected in zip(arguments, (dout, q, k, v, out), strict=False):
        assert torch.equal(given, expected)
    lse = flash_attn_func(q, k, v, 0, 0.3, window_size=(4, 2), return_attn_probs=True)[1]
    torch.testing.assert_close(arguments[5], lse)
    assert arguments[6:] == (None, 0.3, 4, 2, HANDLE)


def test_torch_may_ask_for_the_same_bits_after_the_forward(
    under_node: Callable[[int], None], kernel: list[tuple[Any, ...]]
) -> None:
    under_node(HANDLE)
    inputs = leaves((1, 5, 2, 8))
    outs = [flash_attn_func(*inputs, deterministic=deterministic) for deterministic in (0, 1)]
    torch.use_deterministic_algorithms(True)
    try:
        assert not is_under_node(flash_attn_func(*inputs))
        (dq,) = torch.autograd.grad(outs[0].sum(), inputs[:1])
        assert not kernel, "this kernel need not repeat its gradients"
        torch.autograd.grad(outs[1].sum(), inputs[:1])
        assert len(kernel) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.equal(dq, torch.ones_like(dq))


def test_double_backward_is_refused(
    under_node: Callable[[int], None], kernel: list[tuple[Any, ...]]
) -> None:
    under_node(HANDLE)
    q, k, v = leaves((1, 5, 2, 8))
    (dq,) = torch.autograd.grad(flash_attn_func(q, k, v).sin().sum(), q, create_graph=True)
    assert not kernel
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        dq.sum().backward()


def test_modes_see_the_backward(
    under_node: Callable[[int], None], kernel: list[tuple[Any, ...]]
) -> None:
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    under_node(HANDLE)
    out = flash_attn_func(*leaves((1, 5, 2, 8)))
    with Seeing():
        out.sum().backward()
    assert torch.ops.flashmoe.bwd_cuda_dense.default in seen
    assert len(kernel) == 1


def test_what_was_changed_in_place_is_an_error(under_node: Callable[[], None]) -> None:
    under_node()
    q, k, v = leaves((1, 5, 2, 8))
    out = flash_attn_func(q, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saved_tensors_go_through_hooks(under_node: Callable[[], None]) -> None:
    under_node()
    q, k, v = leaves((1, 5, 2, 8))
    expected = torch.autograd.grad(flash_attn_func(q, k, v).sin().sum(), (q, k, v))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: packed.append(x) or x.clone(), lambda x: x
    ):
        out = flash_attn_func(q, k, v)
    assert sorted(x.dim() for x in packed) == [3, 4, 4, 4, 4]
    for x, y in zip(torch.autograd.grad(out.sin().sum(), (q, k, v)), expected, strict=True):
        assert torch.equal(x, y)


def test_checkpoint_and_single_gradients(under_node: Callable[[], None]) -> None:
    under_node()
    q, k, v = leaves((1, 5, 2, 8))
    expected = torch.autograd.grad(flash_attn_func(q, k, v).sin().sum(), (q, k, v))
    out = checkpoint(flash_attn_func, q, k, v, use_reentrant=False)
    for x, y in zip(torch.autograd.grad(out.sin().sum(), (q, k, v)), expected, strict=True):
        assert torch.equal(x, y)
    alone = flash_attn_func(q.detach(), k, v.detach())
    assert is_under_node(alone)
    assert torch.equal(torch.autograd.grad(alone.sin().sum(), k)[0], expected[1])


def test_the_op_runs_no_call_of_others() -> None:
    assert node.has_node()
    q = torch.randn(1, 5, 2, 8)
    with pytest.raises(RuntimeError, match="not implemented: torch's overrideable attention"):
        node.attention_under_node(q, q, q, dropout_p=0.5, scale=0.3)


@pytest.mark.parametrize("name", ["attention_under_node", "_backward"])
def test_another_schema_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, name, torch.ops.aten.add.Tensor)
    assert not node.has_node.__wrapped__()


def test_kernels_of_others_are_left_alone() -> None:
    assert node.has_node()
    assert not node.has_node.__wrapped__(), "here the others' are our own"
