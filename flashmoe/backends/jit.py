"""Tiles of the Hopper kernels compiled on the user's machine, and the cache that keeps them.

The compiler is NVRTC through cuda.core, or nvcc with FLASHMOE_COMPILER=nvcc. Neither needs a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path
from typing import NamedTuple, Protocol

from flashmoe._extension import KERNEL_SOURCES
from flashmoe.machine.cache import (
    NoCacheFolder,
    cache_dir,
    make_folder,
    not_ours,
    read_ours,
    set_aside,
)
from flashmoe.machine.environment import variable
from flashmoe.tiles import PLAIN, Tile, Variant, columns, fields, variant

_ARCH = "sm_90a"
NVRTC_OPTIONS = {"arch": _ARCH, "std": "c++20", "device_as_default_execution_space": True}
NVCC_OPTIONS = (f"-arch={_ARCH}", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin")
_CXX_TYPE = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
# NVRTC has no <math.h>.
_PREFIX = """\
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
"""
_SOURCES = {
    "sm90": """\
#include "forward/sm90/kernel.cuh"
constexpr flashmoe::Sm90Tile TILE{fields};
constexpr flashmoe::Variant VARIANT{variant};
template struct flashmoe::LegalSm90Tile<TILE>;
extern "C" __global__ void __launch_bounds__(TILE.num_threads(), TILE.ctas_per_sm) attention(
    const __grid_constant__ flashmoe::Sm90Params params) {{
  flashmoe::sm90::attention_forward<{type}, TILE, VARIANT>(params);
}}
""",
    "sm90_bwd": """\
#include "backward/sm90/kernel.cuh"
namespace bwd = flashmoe::sm90_backward;
using Params = flashmoe::Sm90BackwardParams;
constexpr flashmoe::Sm90BackwardTile TILE{fields};
constexpr flashmoe::Variant VARIANT{variant};
template struct flashmoe::LegalSm90BackwardTile<TILE>;
extern "C" __global__ void __launch_bounds__(bwd::EDGE_THREADS, 4) prepare(
    const __grid_constant__ Params params) {{
  bwd::prepare<{type}, TILE, VARIANT>(params);
}}
extern "C" __global__ void __launch_bounds__(TILE.num_threads(), 1) attention_backward(
    const __grid_constant__ Params params) {{
  bwd::attention_backward<{type}, TILE, VARIANT>(params);
}}
extern "C" __global__ void __launch_bounds__(bwd::EDGE_THREADS, 4) finish(
    const __grid_constant__ Params params) {{
  bwd::finish<{type}, TILE, VARIANT>(params);
}}
""",
}
_DIGEST_BYTES = 32
_INSTALL = "pip install cuda-core cuda-bindings nvidia-cuda-nvrtc nvidia-cuda-runtime"
_compiler_lock = threading.Lock()
_log = logging.getLogger(__name__)


class Target(NamedTuple):
    """One kernel to compile, by the head_dim of its instances."""

    tile: Tile
    head_dim: int
    dtype: str
    variant: Variant = PLAIN


class CompilerUnavailable(RuntimeError):
    """There is no compiler; the message says what to install."""


class CompilationFailed(RuntimeError):
    """A compiler refused a tile; the message ends with what it said."""


class DamagedKernel(UserWarning):
    """A cached kernel is not what was written; the message names it and where it was moved."""


class UnusedCache(UserWarning):
    """Kernels are not kept, or kept ones are not loaded; the message says why and what to do."""


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
    """Whether the cache holds the kernel, undamaged, from any compiler."""
    return _cached(target) is not None


def cubin(target: Target) -> bytes:
    """The kernel's machine code: from the cache, or else compiled now.

    Raises CompilerUnavailable and CompilationFailed.
    """
    code = _cached(target)
    if code is None:
        chosen = _chosen_compiler()
        names = " ".join((target.dtype, *target.variant.names))
        told = "compiling %s for head_dim %d, %s: it takes seconds, and is kept"
        _log.warning(told, target.tile, target.head_dim, names)
        code = chosen.compile(source(target))
        try:
            _keep(code, _path(target, chosen))
        except OSError as error:
            text = f"a kernel is compiled again in each process: {error}"
            warnings.warn(text, UnusedCache, stacklevel=2)
    return code


def precompile(target: Target) -> None:
    """Compile the kernel into the cache unless the present compiler has done so before. Any number
    of threads and processes may.

    Raises CompilerUnavailable, CompilationFailed, and OSError where it cannot be kept.
    """
    chosen = _chosen_compiler()
    path = _path(target, chosen)
    _make_ours(path.parent)
    if _read(path) is None:
        _keep(chosen.compile(source(target)), path)


def source(target: Target) -> str:
    """The translation unit; its headers are in KERNEL_SOURCES."""
    tile = target.tile
    values = {name: getattr(tile, name) for name in columns(tile.kernel)}
    if target.variant.head_dim_v:
        values["head_dim_v"] = target.variant.head_dim_v
    return _PREFIX + _SOURCES[tile.kernel].format(
        fields=fields.initializer(target.head_dim, values),
        variant=variant.initializer(target.variant.flags),
        type=_CXX_TYPE[target.dtype],
    )


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
                f"cuda.core is not installed ({_INSTALL}); or set FLASHMOE_COMPILER=nvcc where "
                "the CUDA toolkit is installed"
            )
        try:
            from cuda.bindings import nvrtc
            from cuda.core import Program, ProgramOptions
            from cuda.pathfinder import find_nvidia_header_directory

            error, major, minor = nvrtc.nvrtcVersion()
            headers = find_nvidia_header_directory("cudart")
        except (ImportError, RuntimeError) as missing:
            raise CompilerUnavailable(f"NVRTC does not load ({missing}); {_INSTALL}") from None
        if error or headers is None:
            raise CompilerUnavailable(
                f"CUDA's headers were not found ({_INSTALL}, or set CUDA_HOME)"
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
        home = variable("CUDA_HOME")
        found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
        if found is None:
            raise CompilerUnavailable(
                f"FLASHMOE_COMPILER=nvcc, but nvcc is not in {home + '/bin' if home else 'PATH'}"
            )
        command = [found, "--version"]
        text = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace"
        ).stdout
        version = re.search(r"V(\d+\.\d+\.\d+)", text)
        if version is None:
            raise CompilerUnavailable(f"{found} did not tell its version")
        self.identity = f"nvcc-{version[1]}"
        self._nvcc = found

    def compile(self, text: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            unit, output = Path(folder, "attention.cu"), Path(folder, "attention.cubin")
            unit.write_text(text, encoding="utf-8")
            command = [self._nvcc, *NVCC_OPTIONS, f"-I{KERNEL_SOURCES}"]
            command += ["-o", str(output), str(unit)]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode:
                # The first error is the cause; others follow from it, at any length.
                raise CompilationFailed(f"{self.identity}: {done.stderr[:2000].strip()}")
            return output.read_bytes()


_COMPILERS: dict[str, type[_Nvrtc] | type[_Nvcc]] = {"nvrtc": _Nvrtc, "nvcc": _Nvcc}


def _chosen_compiler() -> _Compiler:
    # cuda.core does not bear being imported by two threads at once.
    with _compiler_lock:
        return _compiler(variable("FLASHMOE_COMPILER", "nvrtc"))


@functools.cache
def _compiler(name: str) -> _Compiler:
    if name not in _COMPILERS:
        known = " or ".join(_COMPILERS)
        raise CompilerUnavailable(f"FLASHMOE_COMPILER must be {known}, got {name!r}")
    return _COMPILERS[name]()


def _cached(target: Target) -> bytes | None:
    """The kernel's code, the newest from any compiler: running one takes none."""
    try:
        found = list(_folder().glob(f"{_stem(target)}-*.cubin"))
    except NoCacheFolder:
        return None
    for path in sorted(found, key=_modified, reverse=True):
        code = _read(path)
        if code is not None:
            return code
    return None


def _read(path: Path) -> bytes | None:
    """The code in a cache file; None without one, and for one that is damaged, which is set aside,
    or that somebody else may have put there."""
    try:
        if why := not_ours(path.parent):
            raise PermissionError(why)
        content = read_ours(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        text = f"kernels in {path.parent} are not loaded: {error}"
        warnings.warn(text, UnusedCache, stacklevel=2)
        return None
    code, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(code).digest() == digest:
        return code
    try:
        fate = f"it was set aside as {set_aside(path).name}"
    except OSError as error:  # another process was faster, or nobody may write there
        fate = f"it is not used, and stays where it is ({error})"
    warnings.warn(f"{path} is damaged; {fate}", DamagedKernel, stacklevel=2)
    return None


def _modified(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:  # set aside meanwhile
        return 0.0


def _make_ours(folder: Path) -> None:
    """Make the folder that kernels are kept in. Raises OSError, which says what to do, where it
    cannot be made or others may write there."""
    try:
        make_folder(folder)
        if why := not_ours(folder):
            raise PermissionError(why)
    except OSError as error:
        text = f"it cannot be kept ({error}); FLASHMOE_CACHE_DIR names another folder"
        raise OSError(text) from error


def _keep(code: bytes, path: Path) -> None:
    """Write a cache file. Raises OSError."""
    _make_ours(path.parent)
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


def _path(target: Target, chosen: _Compiler) -> Path:
    return _folder() / f"{_stem(target)}-{chosen.identity}.cubin"


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
