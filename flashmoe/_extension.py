"""Loads the compiled extension and tells what was built into it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashmoe.tiles import FLAGS, Tile, Variant, columns, variant

_PACKAGE = Path(__file__).parent
# The headers that the extension's kernels for Hopper were compiled from.
KERNEL_SOURCES = _PACKAGE / "kernels"
# By kernel, head dimension and variant; and by those of one tile.
Instances = dict[tuple[str, int, Variant], tuple[Tile, ...]]
Handles = dict[tuple[int, Tile, Variant], int]


@dataclass(frozen=True, slots=True, eq=False)
class BuildInfo:
    """What setup.py compiled: CUDA architectures (empty without CUDA), for each CUDA kernel the
    fields of Tile that it is compiled for, for each (kernel, head_dim, variant) the tiles that are
    compiled in and for each of those its handle, the same of the backward kernel and of the decode
    kernel, whose handles are their own, and for each kind of device a hash of the kernels' sources.
    Where a kernel decides at run time what a variant is for, its tiles stand under every one.
    """

    cuda_archs: tuple[str, ...]
    cuda_version: str
    fields: dict[str, tuple[str, ...]]
    instances: Instances
    handles: Handles
    backward_instances: Instances
    backward_handles: Handles
    decode_instances: Instances
    decode_handles: Handles
    source_hashes: dict[str, str]


@functools.cache
def _library() -> ctypes.CDLL:
    found = sorted(_PACKAGE.glob("_C*.so")) + sorted(_PACKAGE.glob("_C*.pyd"))
    if not found:
        raise ImportError(
            f"flashmoe's extension is not in {_PACKAGE}. Run from a repository that was not "
            "installed with `pip install -e .`? Install it, or run from another folder."
        )
    torch.ops.load_library(str(found[0]))  # type: ignore[no-untyped-call]
    library = ctypes.CDLL(str(found[0]))
    library.flashmoe_build_info.restype = ctypes.c_char_p
    library.flashmoe_load_kernel.restype = ctypes.c_longlong
    library.flashmoe_training_plan.restype = ctypes.c_double
    return library


def _tiles(shapes: list[dict[str, Any]]) -> tuple[Instances, Handles]:
    """Tiles and handles of instances as the build lists them."""
    instances: dict[tuple[str, int, Variant], list[Tile]] = {}
    handles: Handles = {}
    for handle, shape in enumerate(shapes):
        head_dim = shape.pop("head_dim")
        variants = [Variant.named(names) for names in shape.pop("variants")]
        # The build's lists hold integers only.
        flags = {name: bool(shape[name]) for name in FLAGS & shape.keys()}
        tile = Tile(**(shape | flags))
        for each in variants:
            instances.setdefault((tile.kernel, head_dim, each), []).append(tile)
            handles[head_dim, tile, each] = handle
    return {key: tuple(tiles) for key, tiles in instances.items()}, handles


@functools.cache
def load() -> BuildInfo:
    """Load the extension (once) and return its build information.

    Raises ImportError, saying what to do, when the package was not built, or from another table of
    fields.
    """
    info = json.loads(_library().flashmoe_build_info().decode())
    compiled = {kernel: tuple(names) for kernel, names in info["fields"].items()}
    expected = {kernel: columns(kernel) for kernel in compiled}
    if compiled != expected or info.get("variant") != list(variant.FLAGS):
        raise ImportError(
            "flashmoe's extension was built for other fields than flashmoe/tiles has: "
            "build it again (`pip install -e .`)"
        )
    forward, handles = _tiles(info["instances"])
    backward, backward_handles = _tiles(info["backward_instances"])
    decode, decode_handles = _tiles(info["decode_instances"])
    return BuildInfo(
        tuple(info["cuda_archs"]),
        info["cuda_version"],
        compiled,
        forward,
        handles,
        backward,
        backward_handles,
        decode,
        decode_handles,
        info["source_hashes"],
    )


def kernel_op(name: str) -> Callable[..., Any]:
    """The op of that name in csrc/torch_ops.cpp, without the frame of Python that calls it."""
    load()
    op: Callable[..., Any] = getattr(torch.ops.flashmoe, name).default._op
    return op


def load_kernel(cubin: bytes, tile: Tile, head_dim: int, dtype: str, chosen: Variant) -> int:
    """The handle of a kernel, sm90 or sm90_bwd, that was compiled for all of these.

    Raises RuntimeError when CUDA cannot load it.
    """
    structs = tile_struct(tile, head_dim, chosen.head_dim_v), variant_struct(chosen)
    given = (x for struct in structs for x in (ctypes.byref(struct), ctypes.sizeof(struct)))
    error = ctypes.create_string_buffer(512)
    is_backward, is_bfloat16 = int(tile.kernel == "sm90_bwd"), int(dtype == "bfloat16")
    size = ctypes.c_size_t(len(error))
    handle: int = _library().flashmoe_load_kernel(
        cubin, *given, is_backward, is_bfloat16, error, size
    )
    if handle < 0:
        raise RuntimeError(f"loading {tile} for head_dim {head_dim}: {error.value.decode()}")
    return handle


def tile_struct(tile: Tile, head_dim: int, head_dim_v: int = 0) -> ctypes.Structure:
    """An Sm90Tile, which ends in head_dim_v, or an Sm90BackwardTile."""
    values = {"head_dim": head_dim} | {name: getattr(tile, name) for name in columns(tile.kernel)}
    if tile.kernel in variant.OWN_HEAD_DIM_V:
        values["head_dim_v"] = head_dim_v
    return _struct(values, FLAGS)


def variant_struct(chosen: Variant) -> ctypes.Structure:
    """A C++ Variant."""
    names = variant.FLAGS
    return _struct({name: getattr(chosen, name) for name in names}, names)


def _struct(values: Mapping[str, int], flags: Collection[str]) -> ctypes.Structure:
    """A C++ struct of bools, which are `flags`, and ints."""

    class Struct(ctypes.Structure):
        _fields_ = tuple((n, ctypes.c_bool if n in flags else ctypes.c_int) for n in values)

    return Struct(*values.values())


def register_node() -> bool:
    """Bring the kernels of torch's overrideable attention; False where this torch lacks what they
    need. Not twice."""
    return bool(_library().flashmoe_register_node())


def training_plan(
    window_left: int,
    window_right: int,
    forward: int,
    backward: int,
    deterministic: bool,
    backend: str,
) -> float:
    """The number of a TrainingPlan (csrc/torch_ops.cpp) of these fields: the same for the same."""
    array = (ctypes.c_longlong * 4)(window_left, window_right, forward, backward)
    number: float = _library().flashmoe_training_plan(array, deterministic, backend.encode())
    return number


@functools.cache
def kernel_hash(kind: str) -> str:
    """SHA-256 (16 digits) over the sources of the kernels for a kind of device, cpu or cuda: those
    compiled in, and for cuda Triton's too."""
    compiled = load().source_hashes[kind]
    if kind == "cpu":
        return compiled
    digest = hashlib.sha256(compiled.encode())
    backends = _PACKAGE / "backends"
    for name in sorted(os.listdir(backends)):  # a first glob takes a millisecond
        if name.startswith("triton_") and name.endswith(".py"):
            digest.update((backends / name).read_bytes())
    return digest.hexdigest()[:16]
