"""Other implementations of attention, found at run time, each as one call on a case's inputs."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe.ratchet.measuring.suite import Case
from flashmoe.ratchet.measuring.workload import torch_sdpa

# q, k, v in a provider's own layout to out, in that layout.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Provider:
    """`package`: the distribution whose version is told, and `module` the one that has to import.
    `heads_first`: (batch, heads, seqlen, head_dim), as SDPA has it, and not flash-attn's layout.
    `make(case)` gives the call; what a case asks for and it cannot do raises NotImplementedError.
    """

    name: str
    package: str
    module: str
    heads_first: bool
    make: Callable[[Case], Attend]

    def version(self) -> str:
        """Empty when it is not installed, or does not import here."""
        try:
            importlib.import_module(self.module)
            return importlib.metadata.version(self.package)
        except (ImportError, OSError, RuntimeError, importlib.metadata.PackageNotFoundError):
            return ""


# Of SDPA's math backend, which holds some four copies of the scores in float32.
_MOST_SCORES = 1 << 31


def _sdpa(backend: SDPBackend) -> Callable[[Case], Attend]:
    def make(case: Case) -> Attend:
        p = case.problem
        scores = p.batch * p.heads_q * p.seqlen_q * p.seqlen_kv
        if backend == SDPBackend.MATH and scores > _MOST_SCORES:
            raise NotImplementedError(f"each copy of its scores takes {4 * scores / 2**30:.0f} GiB")
        grouped = p.heads_q != p.heads_kv

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return torch_sdpa(q, k, v, is_causal=p.mask.is_causal, enable_gqa=grouped)

        return attend

    return make


def _flex(case: Case) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    p = case.problem
    # Compiled for each shape: general over shapes it is slower. After a few shapes of one function
    # torch gives up and runs it uncompiled, unless it forgets those before.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal mask
        if not p.mask.is_full and mask is None:
            mask = create_block_mask(
                lambda b, h, i, j: ~p.mask.hides(i, j, p.seqlen_q, p.seqlen_kv),
                *(None, None, p.seqlen_q, p.seqlen_kv),
                device=q.device.type,
            )
        out = compiled(q, k, v, block_mask=mask, enable_gqa=p.heads_q != p.heads_kv)
        assert isinstance(out, Tensor)
        return out

    return attend


def _of_module(module: str, function: str) -> Callable[[Case], Attend]:
    """flash-attn's function of that name, whatever its generation."""

    def make(case: Case) -> Attend:
        call = getattr(importlib.import_module(module), function)
        window = case.problem.mask.left, case.problem.mask.right

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = call(q, k, v, window_size=window)
            found: Tensor = out[0] if isinstance(out, tuple) else out
            return found

        return attend

    return make


def _xformers(case: Case) -> Attend:
    ops: Any = importlib.import_module("xformers.ops")
    p = case.problem
    if p.heads_q != p.heads_kv:
        raise NotImplementedError("grouped heads need five dimensions")
    if p.mask.is_local:
        raise NotImplementedError("its windows are biases of packed sequences")
    bias = ops.LowerTriangularMask() if p.mask.is_causal else None
    return lambda q, k, v: ops.memory_efficient_attention(q, k, v, attn_bias=bias)


def _flashinfer(case: Case) -> Attend:
    flashinfer: Any = importlib.import_module("flashinfer")
    p = case.problem
    if case.backward:
        raise NotImplementedError("has no backward")
    if p.batch != 1:
        raise NotImplementedError("one sequence a call; batches are for paged caches")
    if p.mask.is_local:
        raise NotImplementedError("its window has a left limit only, and is not timed here")
    if p.seqlen_q == 1:
        return lambda q, k, v: flashinfer.single_decode_with_kv_cache(q[0, 0], k[0], v[0])[
            None, None
        ]
    return lambda q, k, v: flashinfer.single_prefill_with_kv_cache(
        q[0], k[0], v[0], causal=p.mask.is_causal
    )[None]


PROVIDERS = (
    Provider("sdpa-cudnn", "torch", "torch", True, _sdpa(SDPBackend.CUDNN_ATTENTION)),
    Provider("sdpa-flash", "torch", "torch", True, _sdpa(SDPBackend.FLASH_ATTENTION)),
    Provider("sdpa-efficient", "torch", "torch", True, _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    Provider("sdpa-math", "torch", "torch", True, _sdpa(SDPBackend.MATH)),
    Provider("flex", "torch", "torch.nn.attention.flex_attention", True, _flex),
    Provider(
        "flash-attn-2",
        "flash-attn",
        "flash_attn",
        False,
        _of_module("flash_attn", "flash_attn_func"),
    ),
    Provider(
        "flash-attn-3",
        "flash-attn-3",
        "flash_attn_interface",
        False,
        _of_module("flash_attn_interface", "flash_attn_func"),
    ),
    Provider(
        "flash-attn-4",
        "flash-attn-4",
        "flash_attn.cute",
        False,
        _of_module("flash_attn.cute", "flash_attn_func"),
    ),
    Provider("xformers", "xformers", "xformers.ops", False, _xformers),
    Provider("flashinfer", "flashinfer-python", "flashinfer", False, _flashinfer),
)


def found() -> Mapping[str, str]:
    """Versions by provider; empty for what is not here."""
    return {provider.name: provider.version() for provider in PROVIDERS}
