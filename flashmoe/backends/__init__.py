"""The backends by name, in the order in which the heuristic prefers them."""

from __future__ import annotations

from flashmoe.backends.base import Backend
from flashmoe.backends.blocked import BlockedBackend
from flashmoe.backends.cpu import CpuBackend
from flashmoe.backends.cuda import CudaBackend
from flashmoe.backends.decode import DecodeBackend
from flashmoe.backends.sdpa import SdpaBackend
from flashmoe.backends.triton import TritonBackend

_cuda = CudaBackend()
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        *(_cuda, DecodeBackend(_cuda), TritonBackend()),
        *(CpuBackend(), BlockedBackend(), SdpaBackend()),
    )
}

__all__ = ["BACKENDS", "Backend"]
