"""Loads the compiled extension and tells what was built into it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from flashmoe.tiles import Tile

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """What setup.py compiled: CUDA architectures (empty without CUDA), for each (kernel, head_dim)
    the tiles that are compiled in, and for each kind of device a hash of the kernels' sources."""

    cuda_archs: tuple[str, ...]
    cuda_version: str
    instances: dict[tuple[str, int], tuple[Tile, ...]]
    source_hashes: dict[str, str]


@functools.cache
def load() -> BuildInfo:
    """Load the extension (once) and return its build information.

    Raises ImportError, saying what to do, when the package was not built.
    """
    found = sorted(_PACKAGE.glob("_C*.so")) + sorted(_PACKAGE.glob("_C*.pyd"))
    if not found:
        raise ImportError(
            f"flashmoe's extension is not in {_PACKAGE}. Run from a repository that was not "
            "installed with `pip install -e .`? Install it, or run from another folder."
        )
    torch.ops.load_library(str(found[0]))  # type: ignore[no-untyped-call]
    library = ctypes.CDLL(str(found[0]))
    library.flashmoe_build_info.restype = ctypes.c_char_p
    info = json.loads(library.flashmoe_build_info().decode())
    instances: dict[tuple[str, int], list[Tile]] = {}
    for kernel, head_dim, *shape in info["instances"]:
        instances.setdefault((kernel, head_dim), []).append(Tile(kernel, *shape))
    return BuildInfo(
        tuple(info["cuda_archs"]),
        info["cuda_version"],
        {key: tuple(tiles) for key, tiles in instances.items()},
        info["source_hashes"],
    )


@functools.cache
def kernel_hash(kind: str) -> str:
    """SHA-256 (16 digits) over the sources of the kernels for a kind of device, cpu or cuda: those
    compiled in, and for cuda Triton's too."""
    compiled = load().source_hashes[kind]
    if kind == "cpu":
        return compiled
    digest = hashlib.sha256(compiled.encode())
    for path in sorted((_PACKAGE / "backends").glob("triton_*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
