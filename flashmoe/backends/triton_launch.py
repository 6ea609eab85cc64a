"""Launches of Triton kernels without Triton's dispatch, which takes longer than a small kernel: the
first of each kind is an ordinary one, and tells what the others launch directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

# The releases whose compiled kernels take these arguments: grid, stream, function, packed metadata,
# launch metadata, two hooks, then the kernel's own arguments and its constants.
_KNOWN = (3, 4), (3, 9)


def is_known(version: str) -> bool:
    major, minor = version.split(".")[:2]
    return _KNOWN[0] <= (int(major), int(minor)) <= _KNOWN[1]


_IS_KNOWN = is_known(triton.__version__)


def _is_hooked() -> bool:
    """Whether a launch hook is set, as a profiler does. Only Triton's own dispatch has the metadata
    that hooks are given."""
    runtime = triton.knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


class Launch(NamedTuple):
    """What a launch of a @triton.jit kernel is given besides tensors, which are its first
    arguments: then come the numbers, then the constants, in the order of its signature. `options`
    are the compiler's."""

    kernel: Any
    grid: int
    numbers: tuple[int | float, ...]
    constants: dict[str, Any]
    options: dict[str, Any]

    def ordinary(self, *tensors: Any) -> Any:
        """By Triton's dispatch. Returns the compiled kernel; None where it is interpreted."""
        launch = self.kernel[(self.grid,)]
        return launch(*tensors, *self.numbers, **self.constants, **self.options)

    def warm_up(self, *tensors: Any) -> None:
        """Compile only."""
        launch = self.kernel.warmup
        launch(*tensors, *self.numbers, **self.constants, **self.options, grid=(self.grid,))

    def direct(self, compiled: Any) -> Callable[..., None] | None:
        """A launch of what an ordinary one returned; None where that is not what is known."""
        run, function = getattr(compiled, "run", None), getattr(compiled, "function", None)
        metadata = getattr(compiled, "packed_metadata", None)
        if not (_IS_KNOWN and callable(run) and function is not None and metadata is not None):
            return None
        grid, behind = self.grid, (*self.numbers, *self.constants.values())

        def launch(*tensors: Any) -> None:
            device = driver.active
            stream = device.get_current_stream(device.get_current_device())
            run(grid, 1, 1, stream, function, metadata, None, None, None, *tensors, *behind)

        return launch


class Repeated:
    """A Launch for tensors that differ in their addresses alone, on one device."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._direct: Callable[..., None] | None = None

    def __call__(self, are_aligned: bool, *tensors: Any) -> None:
        """Triton compiles apart what is not aligned to 16 bytes: such tensors are dispatched."""
        if self._direct is not None and are_aligned and not _is_hooked():
            self._direct(*tensors)
            return
        compiled = self.launch.ordinary(*tensors)
        if are_aligned:
            self._direct = self.launch.direct(compiled)


def are_aligned(*tensors: Tensor | None) -> bool:
    """To 16 bytes."""
    bits = 0
    for x in tensors:
        if x is not None:
            bits |= x.data_ptr()
    return bits % 16 == 0


def another(descriptor: TensorDescriptor, base: Tensor) -> TensorDescriptor:
    """One of another tensor of the same shape and strides, without checking it again."""
    copy: TensorDescriptor = object.__new__(TensorDescriptor)
    copy.__dict__.update(descriptor.__dict__, base=base)
    return copy
