"""Other implementations of attention, found at run time, each as one call on a case's inputs."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe.ratchet.measuring.suite import Case
from flashmoe.ratchet.measuring.workload import torch_sdpa
from flashmoe.ratchet.sota import libraries
from flashmoe.ratchet.sota.libraries import Attend, Make
from flashmoe.spec.call import Call


@dataclass(frozen=True, slots=True)
class Provider:
    """`package`: the distribution whose version is told, and `module` the one that has to import.
    `make` gives its call for a case; `features` are those of Problem.features that it knows.
    `heads_first`: (batch, heads, seqlen, head_dim), as SDPA has it, and not flash-attn's layout.
    """

    name: str
    package: str
    module: str
    make: Make
    features: str = ""
    heads_first: bool = False

    def version(self) -> str:
        """Empty when it is not installed, or does not import here."""
        try:
            importlib.import_module(self.module)
            return importlib.metadata.version(self.package)
        except (ImportError, OSError, RuntimeError, importlib.metadata.PackageNotFoundError):
            return ""

    def call(self, case: Case, call: Call) -> Attend:
        """Raises NotImplementedError for what is not installed, or not known of the case."""
        if not self.version():
            raise NotImplementedError("not installed")
        if unknown := sorted(case.problem.features - {*self.features.split()}):
            raise NotImplementedError(f"has no {', '.join(unknown)}")
        return self.make(case, call)


# Of SDPA's math backend, which holds some four copies of the scores in float32.
_MOST_SCORES = 1 << 31


def _sdpa(backend: SDPBackend) -> Make:
    def make(case: Case, call: Call) -> Attend:
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


def _flex(case: Case, call: Call) -> Attend:
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


PROVIDERS = (
    Provider("sdpa-cudnn", "torch", "torch", _sdpa(SDPBackend.CUDNN_ATTENTION), heads_first=True),
    Provider("sdpa-flash", "torch", "torch", _sdpa(SDPBackend.FLASH_ATTENTION), heads_first=True),
    Provider(
        "sdpa-efficient", "torch", "torch", _sdpa(SDPBackend.EFFICIENT_ATTENTION), heads_first=True
    ),
    Provider("sdpa-math", "torch", "torch", _sdpa(SDPBackend.MATH), heads_first=True),
    Provider("flex", "torch", "torch.nn.attention.flex_attention", _flex, "window", True),
    Provider(
        "flash-attn-2",
        "flash-attn",
        "flash_attn",
        libraries.flash_attn("flash_attn", cache="block_table"),
        "packed cache paged window softcap alibi",
    ),
    Provider(
        "flash-attn-3",
        "flash-attn-3",
        "flash_attn_interface",
        libraries.flash_attn("flash_attn_interface"),
        "packed cache paged window softcap",
    ),
    Provider(
        "flash-attn-4",
        "flash-attn-4",
        "flash_attn.cute",
        libraries.flash_attn("flash_attn.cute", unbounded=None, cache=""),
        "packed cache paged window softcap sink",
    ),
    Provider(
        "xformers", "xformers", "xformers.ops", libraries.xformers, "packed cache paged window"
    ),
    Provider(
        "flashinfer",
        "flashinfer-python",
        "flashinfer",
        libraries.flashinfer,
        "packed cache paged window softcap",
    ),
    Provider(
        "cudnn", "nvidia-cudnn-frontend", "cudnn", libraries.cudnn, "packed cache window sink"
    ),
)


def found() -> Mapping[str, str]:
    """Versions by provider; empty for what is not here."""
    return {provider.name: provider.version() for provider in PROVIDERS}
