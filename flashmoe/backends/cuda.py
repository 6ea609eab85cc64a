"""CUDA kernels: those in the binary (csrc/instances), and Hopper tiles compiled on this machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from flashmoe import _extension
from flashmoe.backends import jit
from flashmoe.backends.base import Backend, Features, Run, RunBackward, lacking
from flashmoe.backends.padding import run_backward_padded, run_padded
from flashmoe.machine.device import Arch
from flashmoe.machine.environment import variable
from flashmoe.prediction import costs
from flashmoe.spec.call import Call, Saved
from flashmoe.spec.mask import causal_if
from flashmoe.spec.problem import TERMS, Problem
from flashmoe.tiles import PLAIN, Tile, Variant, axes, grid, sm90_bwd_head_dim, sm90_head_dim
from flashmoe.tiles.variant import COMPILED

_fwd = _extension.kernel_op("fwd_cuda")
_fwd_dense = _extension.kernel_op("fwd_cuda_dense")
_fwd_packed = _extension.kernel_op("fwd_cuda_packed")
_bwd = _extension.kernel_op("bwd_cuda")
_bwd_dense = _extension.kernel_op("bwd_cuda_dense")


def _features(kernel: str) -> frozenset[str]:
    return frozenset({"window", "packed", "head_dim_v", *(set(COMPILED[kernel]) & set(TERMS))})


# Of Hopper's kernels, the head dimension of an instance.
_SM90_HEAD_DIMS = {"sm90": sm90_head_dim, "sm90_bwd": sm90_bwd_head_dim}


class CudaBackend(Backend):
    name = "cuda"
    # To a backward sinks are a part of softmax_lse.
    features: ClassVar[Features] = {
        "fwd": _features("sm90"),
        "bwd": _features("sm90_bwd") | {"sink"},
    }

    def unavailable(self, device: torch.device) -> str:
        if device.type != "cuda":
            return f"needs a CUDA device, got {device.type}"
        if not _extension.load().cuda_archs:
            return "this build has no CUDA kernels (nvcc 12.8 or newer was not found)"
        major, minor = torch.cuda.get_device_capability(device)
        return "" if major >= 8 else f"needs compute capability 8.0, got {major}.{minor}"

    def unsupported(self, problem: Problem, arch: Arch) -> str:
        if missing := lacking(self, problem):
            return missing
        if problem.direction == "bwd" and arch.capability[0] != 9:
            return "has a backward kernel for compute capability 9.x only"
        if "mask" in problem.terms and problem.seqlen_kv == 0:
            return "has no mask of no keys"
        if "head_dim_v" in problem.features and problem.layout == "dense" and not problem.seqlen_kv:
            return "has no head_dim_v of no keys"
        if not _compiled_in(problem, arch) and not _compiles(problem, arch):
            kind = " ".join((problem.dtype, *Variant.of(problem).names))
            return f"no tile is compiled in for {kind}, head_dim {problem.head_dim}"
        return ""

    def default_tile(self, problem: Problem, arch: Arch) -> Tile | None:
        """The compiled-in one that is predicted to be fastest; where nothing is predicted, the
        first one listed in csrc/instances for the head dimension that fits this GPU. Where Hopper's
        kernel is compiled in without the problem's terms, window, lengths or head_dim_v alone: what
        is the default without them, to be compiled when it is first used."""
        compiled = _compiled_in(problem, arch)
        if not _has_sm90(compiled) and _compiles(problem, arch):
            for simpler in _simpler(problem):
                found = [
                    tile
                    for tile in _compiled_in(simpler, arch)
                    if tile.kernel in _SM90_HEAD_DIMS and not tile.violations(arch, problem)
                ]
                if found:
                    compiled, problem = found, simpler
                    break
        times = {tile: self.predicted(tile, problem, arch) for tile in compiled}
        known = {tile: time for tile, time in times.items() if time is not None}
        return min(known, key=known.__getitem__) if known else compiled[0]

    def predicted(self, tile: Tile | None, problem: Problem, arch: Arch) -> float | None:
        if tile is None or problem.direction != "fwd":
            return None
        needed, variant = _kernel_of(tile.kernel, problem)
        head_dim = instance_head_dim(tile.kernel, needed, variant)
        if head_dim is None or (head_dim, tile, variant) not in _extension.load().handles:
            head_dim = sm90_head_dim(needed)
        if variant.head_dim_v:
            # A step takes as long as one of the kernel whose matmuls are together as large.
            head_dim = (head_dim + variant.head_dim_v) // 2
        return costs.tile_microseconds(tile, head_dim, problem, arch)

    def tiles(self, problem: Problem, arch: Arch) -> list[Tile]:
        """On Hopper every legal tile of its kernels where they can be compiled; otherwise those
        that are compiled in."""
        if not _compiles(problem, arch):
            return _compiled_in(problem, arch)
        reasons = _sm90_reasons(*_sm90_kind(problem), arch)
        return [tile for tile, reason in reasons.items() if not reason]

    def reasons(self, problem: Problem, arch: Arch) -> Mapping[Tile, str]:
        tiles = self.tiles(problem, arch)
        if tiles == _compiled_in(problem, arch):
            return dict.fromkeys(tiles, "")
        return _sm90_reasons(*_sm90_kind(problem), arch)

    def compiled_in(self, problem: Problem, arch: Arch) -> list[Tile]:
        return _compiled_in(problem, arch)

    def untuned_tiles(self, problem: Problem, arch: Arch) -> list[Tile | None]:
        compiled = _compiled_in(problem, arch)
        if _has_sm90(compiled) or not _compiles(problem, arch):
            return [*compiled]
        return [self.default_tile(problem, arch)]  # to be compiled

    def ready(self, tile: Tile | None, problem: Problem, arch: Arch) -> bool:
        """FLASHMOE_COMPILE=1 asks to wait for the compiler."""
        waits = variable("FLASHMOE_COMPILE") == "1"
        return waits or tile is None or self.is_compiled(tile, problem)

    def is_compiled(self, tile: Tile, problem: Problem) -> bool:
        needed = _kernel_of(tile.kernel, problem)
        if _compiled_handle(tile, *needed) is not None:
            return True
        return tile.kernel in _SM90_HEAD_DIMS and jit.is_cached(
            _target(tile, *needed, problem.dtype)
        )

    def precompile(self, tile: Tile, problem: Problem, device: torch.device) -> None:
        needed = _kernel_of(tile.kernel, problem)
        if _compiled_handle(tile, *needed) is None:
            jit.precompile(_target(tile, *needed, problem.dtype))

    def rejects(self, tile: Tile | None, problem: Problem, arch: Arch) -> str:
        if tile is None:
            return "it needs a tile"
        if broken := tile.violations(arch, problem):
            return "; ".join(broken)
        if self.is_compiled(tile, problem):
            return ""
        if tile.kernel in _SM90_HEAD_DIMS:
            why = jit.unavailable()
            return f"not compiled in, and cannot be compiled here: {why}" if why else ""
        compiled = ", ".join(map(str, _compiled_in(problem, arch)))
        return f"not compiled in; compiled are {compiled}"

    def repeats(self, tile: Tile | None, problem: Problem) -> bool:
        if tile is None:
            return False
        variant = _backward_variant(tile, problem, deterministic=True)
        compiled = _compiled_handle(tile, problem.padded_dim, variant) is not None
        return compiled or not jit.unavailable()

    def handle(self, problem: Problem, tile: Tile | None, deterministic: bool = False) -> int:
        assert tile is not None, "the cuda backend needs a tile"
        if problem.direction == "bwd":
            variant = _backward_variant(tile, problem, deterministic)
            return _handle(tile, problem.padded_dim, variant, problem.dtype)
        return _handle(tile, *_kernel_of(tile.kernel, problem), problem.dtype)

    def bind(self, problem: Problem, tile: Tile | None) -> Run:
        handle = self.handle(problem, tile)
        assert tile is not None, "handle has one"
        _, variant = _kernel_of(tile.kernel, problem)
        left, right, has_terms = problem.mask.left, problem.mask.right, bool(problem.terms)

        def run(call: Call) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = _fwd_dense(*call[:4], left, right, handle)
            return result

        def run_with_terms(call: Call) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = _fwd(*call[:4], left, right, handle, *call.terms)
            return result

        def run_packed(call: Call) -> tuple[Tensor, Tensor]:
            q, k, v, scale, terms, s = call
            ends_q, ends_k, used, _, _, _, longest_q, longest_k = s
            result: tuple[Tensor, Tensor]
            if has_terms or used is not None:
                result = _fwd(q, k, v, scale, left, right, handle, *terms, *s)
            else:
                result = _fwd_packed(
                    q, k, v, scale, left, right, handle, ends_q, ends_k, longest_q, longest_k
                )
            return result

        chosen = run_with_terms if has_terms else run
        if problem.layout == "packed":
            chosen = run_packed
        is_padded = problem.head_dim_v is not None and not variant.head_dim_v
        return run_padded(chosen) if is_padded else chosen

    def bind_backward(
        self, problem: Problem, tile: Tile | None, deterministic: bool = False
    ) -> RunBackward:
        """dK and dV are the same bits every time. Unless deterministic, dQ is added to by atomics,
        in any order."""
        handle = self.handle(problem, tile, deterministic)
        left, right, has_terms = problem.mask.left, problem.mask.right, bool(problem.terms)
        packed = problem.layout == "packed"

        def run(call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v, softmax_scale = call[:4]
            dout, out, lse, dlse = saved
            arguments = (dout, q, k, v, out, lse, dlse, softmax_scale, left, right, handle)
            result: tuple[Tensor, Tensor, Tensor]
            if not (has_terms or packed):
                result = _bwd_dense(*arguments)
                return result
            # Sinks are a part of softmax_lse.
            t = call.terms
            options: tuple[object, ...] = (
                *(t.softcap, t.alibi_slopes, t.dropout_p, t.rng_state, t.attn_mask),
            )
            if packed:
                s = call.sequences
                lengths = (s.cu_seqlens_q, s.cu_seqlens_k, s.seqused_k)
                options = (*options, *lengths, s.max_seqlen_q, s.max_seqlen_k)
            result = _bwd(*arguments, *options)
            return result

        return run if problem.head_dim_v is None else run_backward_padded(run)


def instance_head_dim(kernel: str, head_dim: int, variant: Variant) -> int | None:
    """The smallest head dimension that `kernel` is compiled in for and that holds `head_dim`."""
    return _instance_head_dim(_extension.load(), kernel, head_dim, variant)


@functools.lru_cache(maxsize=1024)
def _instance_head_dim(
    info: _extension.BuildInfo, kernel: str, head_dim: int, variant: Variant
) -> int | None:
    instances = info.backward_instances if kernel == "sm90_bwd" else info.instances
    held = [d for name, d, v in instances if (name, v) == (kernel, variant) and d >= head_dim]
    return min(held, default=None)


def _kernel_of(
    kernel: str, problem: Problem, variant: Variant | None = None
) -> tuple[int, Variant]:
    """The head_dim and the variant, the problem's or another, that `kernel` runs a problem with.
    V has a head_dim of its own in Hopper's forward, where that is compiled in or can be: otherwise
    the problem is padded."""
    variant = variant or Variant.of(problem)
    if kernel == "sm90" and (
        not variant.head_dim_v
        or instance_head_dim(kernel, problem.head_dim, variant) is not None
        or not jit.unavailable()
    ):
        return problem.head_dim, variant
    return problem.padded_dim, replace(variant, head_dim_v=0)


def _has_sm90(tiles: list[Tile]) -> bool:
    return any(tile.kernel in _SM90_HEAD_DIMS for tile in tiles)


def _simpler(problem: Problem) -> Iterator[Problem]:
    """The problem without terms, then without a window, too, then of dense sequences, and last of
    one head_dim."""
    yield (problem := replace(problem, terms=()))
    if problem.mask.is_local:
        yield (problem := replace(problem, mask=causal_if(problem.mask.right >= 0)))
    yield (problem := replace(problem, layout="dense", lengths=()))
    yield _padded(problem)


def _padded(problem: Problem) -> Problem:
    return replace(problem, head_dim=problem.padded_dim, head_dim_v=None)


def _compiles(problem: Problem, arch: Arch) -> bool:
    """Whether tiles of Hopper's kernel can be compiled here, of any variant."""
    return _has_sm90(_compiled_in(_padded(problem), arch, PLAIN)) and not jit.unavailable()


def _compiled_in(problem: Problem, arch: Arch, variant: Variant | None = None) -> list[Tile]:
    """The legal tiles in the binary, Hopper's first, of the problem's variant or another."""
    info = _extension.load()
    backward = problem.direction == "bwd"
    instances = info.backward_instances if backward else info.instances
    kind = problem.head_dim, problem.head_dim_v, problem.dtype, problem.direction
    found: list[Tile] = []
    for kernel in ("sm90_bwd",) if backward else ("sm90", "sm80"):
        needed, of_kernel = _kernel_of(kernel, problem, variant)
        head_dim = instance_head_dim(kernel, needed, of_kernel)
        if head_dim is not None:
            found += _legal(instances[kernel, head_dim, of_kernel], *kind, arch)
    return found


@functools.lru_cache(maxsize=1024)
def _legal(
    tiles: tuple[Tile, ...],
    head_dim: int,
    head_dim_v: int | None,
    dtype: str,
    direction: str,
    arch: Arch,
) -> tuple[Tile, ...]:
    """Those that can run; of a problem, their rules ask no more than this."""
    sizes = (1, 1, 1, 1, 1, head_dim)
    problem = Problem(*sizes, dtype, direction=direction, head_dim_v=head_dim_v)
    return tuple(tile for tile in tiles if not tile.violations(arch, problem))


def _compiled_handle(tile: Tile, head_dim: int, variant: Variant) -> int | None:
    info = _extension.load()
    handles = info.backward_handles if tile.kernel == "sm90_bwd" else info.handles
    instance = instance_head_dim(tile.kernel, head_dim, variant)
    return None if instance is None else handles.get((instance, tile, variant))


def _backward_variant(tile: Tile, problem: Problem, deterministic: bool) -> Variant:
    """What a backward runs. Where a thread block has all keys, dQ needs no sums, and no order."""
    variant = Variant.of(problem)
    faster = []
    if problem.seqlen_kv <= tile.block_n:
        faster.append(replace(variant, whole=True))
    if not deterministic and _order_pays(tile, problem):
        faster.append(replace(variant, deterministic=True))
    for other in faster:
        if _compiled_handle(tile, problem.padded_dim, other) is not None:
            return other
    return replace(variant, deterministic=deterministic)


def _order_pays(tile: Tile, problem: Problem) -> bool:
    """Whether the deterministic kernel is the faster one: it needs no zeros, and its thread blocks
    do not all add to the same rows. With few of them they would wait (H200, bfloat16:
    docs/dev/hopper-backward.md)."""
    blocks = -(-problem.seqlen_kv // tile.block_n)
    many = problem.batch * problem.heads_kv * blocks >= 1024
    few_a_head = blocks <= (32 if problem.mask.is_causal else 4)
    return many and few_a_head and problem.heads_q == problem.heads_kv


def _target(tile: Tile, head_dim: int, variant: Variant, dtype: str) -> jit.Target:
    return jit.Target(tile, _SM90_HEAD_DIMS[tile.kernel](head_dim), dtype, variant)


@functools.cache
def _handle(tile: Tile, head_dim: int, variant: Variant, dtype: str) -> int:
    """The handle of the kernel that runs a tile: the compiled-in one, or else it is loaded from the
    cache, or else compiled."""
    handle = _compiled_handle(tile, head_dim, variant)
    if handle is not None:
        return handle
    target = _target(tile, head_dim, variant, dtype)
    return _extension.load_kernel(jit.cubin(target), *target)


def _sm90_kind(problem: Problem) -> tuple[str, int, int]:
    """Hopper's kernel for a problem, and the head dimensions that it is compiled for: V's is 0
    where it is the other one."""
    kernel = "sm90_bwd" if problem.direction == "bwd" else "sm90"
    head_dim, variant = _kernel_of(kernel, problem)
    return kernel, _SM90_HEAD_DIMS[kernel](head_dim), variant.head_dim_v


@functools.cache
def _sm90_reasons(kernel: str, head_dim: int, head_dim_v: int, arch: Arch) -> Mapping[Tile, str]:
    """Enumerates.reasons for all problems of these head dimensions: of the forward that takes a
    second."""
    direction = "bwd" if kernel == "sm90_bwd" else "fwd"
    sizes = (1, 1, 1, 1, 1, head_dim)
    problem = Problem(*sizes, "bfloat16", direction=direction, head_dim_v=head_dim_v or None)
    return {tile: "".join(tile.violations(arch, problem)[:1]) for tile in _sm90_grid(kernel)}


@functools.cache
def _sm90_grid(kernel: str) -> tuple[Tile, ...]:
    return tuple(grid(kernel, **axes(kernel)))
