"""Direct launches of Triton's kernels: what they are given, and when Triton's dispatch is asked."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from flashmoe.backends import triton_bwd, triton_fwd, triton_launch
from flashmoe.backends.triton_fwd import MaskKind
from flashmoe.backends.triton_launch import Launch, Repeated, another, are_aligned, is_known
from flashmoe.spec.mask import CAUSAL, FULL, Mask


class Kernel:
    """Stands for a @triton.jit function: notes its launches, and those of what it compiled."""

    def __init__(self, interpreted: bool = False) -> None:
        self.ordinary: list[Any] = []
        self.direct: list[Any] = []
        self.compiled = None
        if not interpreted:
            self.compiled = SimpleNamespace(
                run=lambda *x: self.direct.append(x), function=7, packed_metadata=(1, 2)
            )

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.ordinary.append((grid, arguments, constants))
            return self.compiled

        return launch


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda d: 100 + d)
    monkeypatch.setattr(triton_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton_launch, "_IS_KNOWN", True)


def repeated(kernel: Kernel) -> Repeated:
    return Repeated(Launch(kernel, 5, (2, 0.5), {"BLOCK": 64, "EVEN": True}, {"num_warps": 4}))


@pytest.mark.usefixtures("device")
def test_all_launches_but_the_first_are_direct() -> None:
    kernel, tensors = Kernel(), [object(), object()]
    launch = repeated(kernel)
    for _ in range(3):
        launch(True, *tensors)
    constants = {"BLOCK": 64, "EVEN": True, "num_warps": 4}
    assert kernel.ordinary == [((5,), (*tensors, 2, 0.5), constants)]
    expected = (5, 1, 1, 103, 7, (1, 2), None, None, None, *tensors, 2, 0.5, 64, True)
    assert kernel.direct == [expected] * 2


@pytest.mark.usefixtures("device")
def test_tensors_that_are_not_aligned_are_dispatched() -> None:
    kernel = Kernel()
    launch = repeated(kernel)
    for aligned in (False, False, True, False, True):
        launch(aligned, object())
    assert (len(kernel.ordinary), len(kernel.direct)) == (4, 1)


@pytest.mark.usefixtures("device")
def test_what_is_not_known_is_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted, other = Kernel(interpreted=True), Kernel()
    del other.compiled.packed_metadata  # type: ignore[attr-defined]
    monkeypatch.setattr(triton_launch, "_IS_KNOWN", False)
    for kernel in (interpreted, other, Kernel()):
        launch = repeated(kernel)
        for _ in range(3):
            launch(True, object())
        assert (len(kernel.ordinary), len(kernel.direct)) == (3, 0)
        monkeypatch.setattr(triton_launch, "_IS_KNOWN", kernel is interpreted)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("hook", [lambda *_: None, SimpleNamespace(calls=[print])])
def test_who_is_told_of_launches_still_is(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=SimpleNamespace(calls=[]))
    monkeypatch.setattr(triton_launch.triton.knobs, "runtime", runtime)
    kernel = Kernel()
    launch = repeated(kernel)
    launch(True, object())
    launch(True, object())
    runtime.launch_exit_hook = hook
    launch(True, object())
    assert (len(kernel.ordinary), len(kernel.direct)) == (2, 1)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.3.1", False), ("3.4.0", True), ("3.6.0+git12", True), ("3.9.0", True), ("3.10.0", False)],
)
def test_releases_whose_launchers_are_known(version: str, expected: bool) -> None:
    assert is_known(version) == expected


@pytest.mark.parametrize("mask", [FULL, CAUSAL, Mask(9, 3)], ids=str)
@pytest.mark.parametrize("use_tma", [False, True])
@pytest.mark.parametrize("attn_mask", [None, torch.bool, torch.float32], ids=str)
def test_arguments_are_in_the_order_of_the_signatures(
    mask: Mask, use_tma: bool, attn_mask: torch.dtype | None
) -> None:
    strides = (12288, 256, 64, 1)
    kind = {
        **dict.fromkeys(("q_shape", "kv_shape"), torch.Size((2, 48, 4, 64))),
        **dict.fromkeys(("q_strides", "k_strides", "v_strides"), strides),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "softmax_scale": 0.125,
        "softcap": 0.0,
        "slopes": None,
        "dropout_p": 0.0,
        "attn_mask": None if attn_mask is None else MaskKind(attn_mask, (0, 0, 48, 1)),
        "mask": mask,
        "tile": (32, 64, 2, 4),
        "use_tma": use_tma,
    }
    forward = triton_fwd._planned(triton_fwd._Kind(has_sinks=False, head_dim_v=32, **kind))
    backward = triton_bwd._planned(triton_bwd._Kind(dout_strides=strides, has_dlse=True, **kind))
    launches = [forward.launch, backward.prepare, backward.dkdv, backward.dq]
    bounds = [x for x in (forward.bounds, backward.seen_by, backward.seen) if x is not None]
    assert len(bounds) == (0 if attn_mask is None else 3)
    for repeated_launch in (*launches, *(x.launch for x in bounds)):
        launch = repeated_launch.launch
        names = list(inspect.signature(launch.kernel.fn).parameters)
        tensors = [name for name in names if name.endswith("_ptr")]
        assert names[: len(tensors)] == tensors
        assert list(launch.constants) == names[len(tensors) + len(launch.numbers) :]


def test_alignment_is_that_of_the_least_aligned() -> None:
    x = torch.zeros(64, dtype=torch.bfloat16)
    assert are_aligned(x, None, x[8:])
    assert not are_aligned(x, x[4:])


def test_another_descriptor_differs_in_its_tensor_alone() -> None:
    x, y = torch.zeros(2, 16, 1, 64), torch.ones(2, 16, 1, 64)
    first = triton_fwd.tma_descriptor(x, 16, 64)
    second = another(first, y)
    assert (first.base is x, second.base is y) == (True, True)
    assert vars(first) | {"base": y} == vars(second)
    assert first.strides == [1024, 64, 4, 1]  # the one of a single head may be anything
