"""Tiles of the Hopper kernel compiled on the user's machine, and the cache that keeps them.

The compiler is NVRTC through cuda.core, or nvcc with FLASHMOE_COMPILER=nvcc. Neither needs a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path
from typing import NamedTuple, Protocol

from flashmoe import _extension
from flashmoe._extension import KERNEL_SOURCES
from flashmoe.cache import cache_dir, set_aside
from flashmoe.tiles import Tile

_ARCH = "sm_90a"
NVRTC_OPTIONS = {"arch": _ARCH, "std": "c++20", "device_as_default_execution_space": True}
NVCC_OPTIONS = (f"-arch={_ARCH}", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin")
_CXX_TYPE = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
# NVRTC has no <math.h>.
_SOURCE = """\
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#include "attention/fwd_sm90.cuh"
constexpr flashmoe::Sm90Tile TILE{{{fields}}};
template struct flashmoe::LegalSm90Tile<TILE>;
extern "C" __global__ void __launch_bounds__(TILE.num_threads(), TILE.ctas_per_sm) attention(
    const __grid_constant__ flashmoe::Sm90Params params) {{
  flashmoe::sm90::attention_forward<{type}, TILE>(params);
}}
"""
_DIGEST_BYTES = 32
_compiler_lock = threading.Lock()


class Target(NamedTuple):
    """One kernel to compile; head_dim is a multiple of 16."""

    tile: Tile
    head_dim: int
    dtype: str


class CompilerUnavailable(RuntimeError):
    """There is no compiler; the message says what to install."""


class CompilationFailed(RuntimeError):
    """A compiler refused a tile; the message ends with what it said."""


class DamagedKernel(UserWarning):
    """A cached kernel is not what was written; the message names it and where it was moved."""


def unavailable() -> str:
    """Why nothing can be compiled here, in one line that says what to do; empty when it can."""
    try:
        _chosen_compiler()
    except CompilerUnavailable as error:
        return str(error)
    return ""


def compiler() -> str:
    """The name and version of what compiles. Raises CompilerUnavailable."""
    return _chosen_compiler().identity


def is_cached(target: Target) -> bool:
    """Whether the cache holds the kernel, from any compiler."""
    return any(_cached_paths(target))


def cubin(target: Target) -> bytes:
    """The kernel's machine code: from the cache, or else compiled now.

    Raises CompilerUnavailable and CompilationFailed.
    """
    for path in _cached_paths(target):
        code = _read(path)
        if code is not None:
            return code
    return _compile(target)


def precompile(target: Target) -> None:
    """Compile the kernel into the cache unless the present compiler has done so before. Any number
    of threads and processes may.

    Raises CompilerUnavailable and CompilationFailed.
    """
    if _read(_path(target, _chosen_compiler())) is None:
        _compile(target)


def source(target: Target) -> str:
    """The translation unit; its headers are in KERNEL_SOURCES."""
    values = (
        target.head_dim,
        *(getattr(target.tile, name) for name in _extension.load().fields["sm90"]),
    )
    fields = ", ".join(str(value).lower() for value in values)
    return _SOURCE.format(fields=fields, type=_CXX_TYPE[target.dtype])


class _Compiler(Protocol):
    # Part of a file name: which compiler, and its version.
    identity: str

    def compile(self, text: str) -> bytes:
        """The machine code of a translation unit. Raises CompilationFailed."""
        ...


class _Nvrtc:
    """The compiler as a library, with CUDA's headers from a wheel, conda or a toolkit."""

    def __init__(self) -> None:
        if importlib.util.find_spec("cuda") is None or not importlib.util.find_spec("cuda.core"):
            raise CompilerUnavailable(
                "cuda.core is not installed (pip install 'flashmoe[tune]'); or set "
                "FLASHMOE_COMPILER=nvcc where the CUDA toolkit is installed"
            )
        try:
            from cuda.bindings import nvrtc
            from cuda.core import Program, ProgramOptions
            from cuda.pathfinder import find_nvidia_header_directory

            error, major, minor = nvrtc.nvrtcVersion()
            headers = find_nvidia_header_directory("cudart")
        except (ImportError, RuntimeError) as missing:
            raise CompilerUnavailable(
                f"NVRTC does not load ({missing}); pip install 'flashmoe[tune]'"
            ) from None
        if error or headers is None:
            raise CompilerUnavailable(
                "CUDA's headers were not found (pip install 'flashmoe[tune]', or set CUDA_HOME)"
            )
        self.identity = f"nvrtc-{major}.{minor}"
        self._program, self._options = Program, ProgramOptions
        self._headers = headers

    def compile(self, text: str) -> bytes:
        options = self._options(
            name="attention", include_path=[str(KERNEL_SOURCES), self._headers], **NVRTC_OPTIONS
        )
        try:
            code = self._program(text, "c++", options).compile("cubin").code
        except Exception as error:  # its classes are not public
            raise CompilationFailed(f"{self.identity}: {error}") from error
        assert isinstance(code, bytes)
        return code


class _Nvcc:
    """The toolkit's compiler, by CUDA_HOME or PATH."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME")
        found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
        if found is None:
            raise CompilerUnavailable(
                f"FLASHMOE_COMPILER=nvcc, but nvcc is not in {home + '/bin' if home else 'PATH'}"
            )
        text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"V(\d+\.\d+\.\d+)", text)
        if version is None:
            raise CompilerUnavailable(f"{found} did not tell its version")
        self.identity = f"nvcc-{version[1]}"
        self._nvcc = found

    def compile(self, text: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            unit, output = Path(folder, "attention.cu"), Path(folder, "attention.cubin")
            unit.write_text(text)
            command = [self._nvcc, *NVCC_OPTIONS, f"-I{KERNEL_SOURCES}"]
            command += ["-o", str(output), str(unit)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                # The first error is the cause; others follow from it, at any length.
                raise CompilationFailed(f"{self.identity}: {done.stderr[:2000].strip()}")
            return output.read_bytes()


_COMPILERS: dict[str, type[_Nvrtc] | type[_Nvcc]] = {"nvrtc": _Nvrtc, "nvcc": _Nvcc}


def _chosen_compiler() -> _Compiler:
    # cuda.core does not bear being imported by two threads at once.
    with _compiler_lock:
        return _compiler(os.environ.get("FLASHMOE_COMPILER", "nvrtc"))


@functools.cache
def _compiler(name: str) -> _Compiler:
    if name not in _COMPILERS:
        known = " or ".join(_COMPILERS)
        raise CompilerUnavailable(f"FLASHMOE_COMPILER must be {known}, got {name!r}")
    return _COMPILERS[name]()


def _compile(target: Target) -> bytes:
    chosen = _chosen_compiler()
    code = chosen.compile(source(target))
    path = _path(target, chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: a reader sees all of it or nothing. Behind the code its digest, which
    # readers of ELF files do not mind.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as file:
        try:
            file.write(code + hashlib.sha256(code).digest())
            file.close()
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
    return code


def _read(path: Path) -> bytes | None:
    """The code in a cache file, None if there is none. A damaged file is set aside and named."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    code, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(code).digest() == digest:
        return code
    aside = set_aside(path)
    warnings.warn(
        f"{path} is damaged; it was set aside as {aside.name}", DamagedKernel, stacklevel=2
    )
    return None


def _path(target: Target, chosen: _Compiler) -> Path:
    return _folder() / f"{_stem(target)}-{chosen.identity}.cubin"


def _cached_paths(target: Target) -> list[Path]:
    """The kernel's files from any compiler, the newest first: running one takes no compiler."""
    found = _folder().glob(f"{_stem(target)}-*.cubin")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _folder() -> Path:
    return cache_dir() / "kernels"


def _stem(target: Target) -> str:
    text = f"{source(target)}{NVRTC_OPTIONS}{NVCC_OPTIONS}{_headers_digest()}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _headers_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(KERNEL_SOURCES.rglob("*.*h")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
