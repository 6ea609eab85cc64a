"""PyTorch's scaled_dot_product_attention: a candidate like any other, and what others must beat."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashmoe.backends import jit
from flashmoe.backends.base import (
    Backend,
    Features,
    Run,
    lacking,
    matmul_dtype,
    reject_without_tiles,
)
from flashmoe.backends.padding import cut, padded_call
from flashmoe.machine.device import Arch, arch
from flashmoe.prediction import costs, kernels
from flashmoe.spec.call import Call
from flashmoe.spec.mask import causal_if
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

# From so many scores on Hopper's kernels are faster than torch's under a boolean mask, up to 3.7
# times; under one that is added they take 1.1 to 3.3 times as long (docs/attention.md).
_MASKED_SCORES = 1 << 26

# Not by torch.nn.functional, whose name users give to our own function.
torch_sdpa = torch._C._nn.scaled_dot_product_attention

# Grids of its CUDA kernels have batch and heads in y and z.
_MAX_GRID_YZ = 65535
# Its CUDA kernels read so many bytes at a time.
_READ_BYTES = 16


def is_slower_under(attn_mask: Tensor, scores: int) -> bool:
    """Whether torch's kernels are slower than ours where attn_mask is given for so many scores."""
    return not attn_mask.is_cuda or (
        attn_mask.dtype == torch.bool
        and scores >= _MASKED_SCORES
        and arch(attn_mask.device).capability[0] == 9
        and not jit.unavailable()
    )


class SdpaBackend(Backend):
    name = "sdpa"
    features: ClassVar[Features] = {"fwd": frozenset({"head_dim_v"})}

    def unavailable(self, device: torch.device) -> str:
        return ""

    def unsupported(self, problem: Problem, arch: Arch) -> str:
        if problem.direction == "bwd":
            return "its backward belongs to its own autograd graph"
        if missing := lacking(self, problem):
            return missing
        if problem.mask.is_causal and problem.seqlen_q != problem.seqlen_kv:
            return "its causal mask is aligned top-left when seqlen_q differs from seqlen_kv"
        if arch.kind == "cuda" and max(problem.batch, problem.heads_q) > _MAX_GRID_YZ:
            return f"its kernels cannot launch more than {_MAX_GRID_YZ} sequences or heads"
        return ""

    def default_tile(self, problem: Problem, arch: Arch) -> Tile | None:
        return None

    def predicted(self, tile: Tile | None, problem: Problem, arch: Arch) -> float | None:
        """Of the faster of its own choice and FlashAttention-2, which `forward` runs."""
        times = costs.sdpa_microseconds(problem, arch)
        return min(times.values(), default=None)

    def tiles(self, problem: Problem, arch: Arch) -> list[Tile]:
        return []

    def rejects(self, tile: Tile | None, problem: Problem, arch: Arch) -> str:
        return reject_without_tiles(self.name, tile)

    def bind(self, problem: Problem, tile: Tile | None) -> Run:
        """Differentiable by torch's own autograd. Does not return softmax_lse."""
        causal = problem.mask.is_causal

        def run(call: Call) -> tuple[Tensor, None]:
            return attend_by_sdpa(call, causal), None

        return run


def attend_by_sdpa(call: Call, causal: bool) -> Tensor:
    """out, contiguous and differentiable. `causal` needs seqlen_q equal to seqlen_kv."""
    if call.q.shape[-1] != call.v.shape[-1]:  # not all of its kernels take two
        return cut(attend_by_sdpa(padded_call(call), causal), call.v.shape[-1])
    if call.q.numel() == 0:  # some of its kernels return no tensor then
        return call.q.contiguous() + (call.k.sum() + call.v.sum())
    attend = _on_cuda if call.q.is_cuda else _on_cpu
    with _choice(call.q, call.k, causal):
        out = attend(call, causal)
    # Its kernels lay out their results each in its own way.
    return out.contiguous()


def _choice(q: Tensor, k: Tensor, causal: bool) -> AbstractContextManager[None]:
    """Has SDPA run FlashAttention-2 where that is predicted to be faster than what it chooses."""
    if (
        q.is_cuda
        and not torch.compiler.is_compiling()
        and _flash_is_faster(q.device, q.dtype, q.shape, k.shape, causal)
    ):
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return nullcontext()


@functools.lru_cache(maxsize=4096)
def _flash_is_faster(
    device: torch.device, dtype: torch.dtype, q: torch.Size, k: torch.Size, causal: bool
) -> bool:
    batch, seqlen_q, heads_q, head_dim = q
    problem = Problem(
        *(batch, heads_q, k[2], seqlen_q, k[1], head_dim),
        dtype=str(dtype).removeprefix("torch."),
        mask=causal_if(causal),
    )
    times = costs.sdpa_microseconds(problem, arch(device))
    return bool(times) and min(times, key=times.__getitem__) != kernels.SDPA


def _attend(call: Call, causal: bool) -> Tensor:
    q, k, v, scale = call[:4]
    return torch_sdpa(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)


def _on_cpu(call: Call, causal: bool) -> Tensor:
    q, k, v, scale = call[:4]
    if (
        q.dtype == torch.float32
        and not torch.compiler.is_compiling()  # which cannot ask how exact matmuls are
        and matmul_dtype(q) != q.dtype
    ):
        return _attend(Call(q.double(), k.double(), v.double(), scale), causal).float()
    return _attend(call, causal)


def _on_cuda(call: Call, causal: bool) -> Tensor:
    """SDPA of what its kernels can read, and by none whose memory is quadratic in seqlen."""
    q, k, v = (readable(x) for x in call[:3])
    batch, seqlen_q, heads_q, head_dim = q.shape
    heads_kv = k.shape[2]
    group = heads_q // heads_kv
    if group == 1 or _flash_runs(q):
        return _attend(Call(q, k, v, call.softmax_scale), causal)
    # The others take no groups, but for the one that materializes the scores.
    if causal:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        return _attend(Call(q, k, v, call.softmax_scale), causal)
    # Without a mask the queries of a group are rows of one head: no copy of K and V, nor of a
    # single query.
    rows = q.reshape(batch, seqlen_q, heads_kv, group, head_dim).transpose(2, 3).flatten(1, 2)
    out = _attend(Call(rows, k, v, call.softmax_scale), causal)
    return out.reshape(batch, seqlen_q, group, heads_kv, head_dim).transpose(2, 3).flatten(2, 3)


def _flash_runs(q: Tensor) -> bool:
    """Whether SDPA's flash kernel runs on q's GPU and in its dtype."""
    return q.dtype != torch.float32 and torch.cuda.get_device_properties(q.device).major >= 8


def readable(x: Tensor) -> Tensor:
    """x, copied unless SDPA's CUDA kernels can read it where it lies: they check neither address
    nor strides, and a fault takes the CUDA context with it."""
    if not torch.compiler.is_compiling() and _is_aligned(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _is_aligned(x: Tensor) -> bool:
    batch, row, head, last = x.stride()
    if last != 1 or (batch | row | head) * x.element_size() % _READ_BYTES:
        return False
    try:
        return x.data_ptr() % _READ_BYTES == 0
    except RuntimeError:  # what is fake or batched has no address
        return False
