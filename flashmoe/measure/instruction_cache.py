"""Evicts what a GPU's instruction caches hold, so that no timed kernel finds its own code there.

A kernel that runs right after itself saves the fetches of its code, which are 1 to 13 % of a call
of 10 to 20 us on an H200, and not the same share for every tile (docs/tuning.md). Flushing L2 does
not change that. The kernel here is longer than those caches and runs on every multiprocessor. It is
PTX, which the driver compiles for the GPU that it finds, and keeps.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

# Of 16 bytes each: more than the 128 KiB of Volta's largest instruction cache (arXiv:1804.06826),
# and enough on an H200.
INSTRUCTIONS = 10 << 10
# Chains that do not wait for each other; warps enough for each of an SM's four partitions; blocks
# enough that none is left out.
_CHAINS, _WARPS, _BLOCKS_PER_SM = 8, 4, 2
# Instructions between branches: compilers take long over long lines.
_STRETCH = 256
# The kernel's argument; here, for the driver reads it at every launch.
_NOWHERE = ctypes.c_uint64(0)


@functools.cache
def ptx() -> str:
    """The kernel `evict(u64 nowhere)`: one straight line of multiplications and additions. With
    some values of `nowhere` it would end early and write what it has; with 0 it does not, which no
    compiler knows, so none leaves anything out."""
    chains = [f"%r{i}" for i in range(_CHAINS)]
    body = []
    for number in range(INSTRUCTIONS):
        chain = chains[number % _CHAINS]
        body.append(f"  mad.lo.u32 {chain}, {chain}, %x, {number};")
        if number % _STRETCH == _STRETCH - 1:
            body += [f"  setp.eq.u64 %end, %p, {number};", "  @%end bra write;"]
    lines = [
        ".version 7.0",
        ".target sm_75",
        ".address_size 64",
        ".visible .entry evict(.param .u64 nowhere) {",
        f"  .reg .b32 %r<{_CHAINS}>, %x;",
        "  .reg .b64 %p;",
        "  .reg .pred %end;",
        "  ld.param.u64 %p, [nowhere];",
        "  mov.u32 %x, %tid.x;",
        *(f"  add.u32 {chain}, %x, {number};" for number, chain in enumerate(chains)),
        *body,
        "  ret;",
        "write:",
        *(f"  xor.b32 %r0, %r0, {chain};" for chain in chains[1:]),
        "  st.global.u32 [%p], %r0;",
        "  ret;",
        "}",
    ]
    return "\n".join(lines) + "\n"


@functools.cache
def evictor(device: torch.device) -> Callable[[], None]:
    """What evicts the instruction caches of `device`, a CUDA device with an index, on its current
    stream. RuntimeError when the driver does not take the kernel."""
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # there is a context now
        _check(driver, driver.cuModuleLoadData(ctypes.byref(module), ptx().encode()))
    _check(driver, driver.cuModuleGetFunction(ctypes.byref(kernel), module, b"evict"))
    blocks = _BLOCKS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(_NOWHERE))

    def evict() -> None:
        with torch.cuda.device(device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            _check(
                driver,
                driver.cuLaunchKernel(
                    kernel, blocks, 1, 1, 32 * _WARPS, 1, 1, 0, stream, arguments, None
                ),
            )

    return evict


def _check(driver: Any, status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        said = (text.value or b"unknown error").decode()
        raise RuntimeError(f"the kernel that evicts instruction caches failed: {said} ({status})")
