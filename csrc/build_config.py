"""The one list of sources, tiles and flags. setup.py imports it; CMakeLists.txt runs it."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

CSRC = Path(__file__).resolve().parent

# Torch-free; csrc/torch_ops.cpp alone binds them.
CPU_SOURCES = (
    "forward/cpu/dispatch.cpp",
    "forward/cpu/generic.cpp",
    "forward/cpu/avx2.cpp",
    "forward/cpu/avx512.cpp",
    "backward/cpu/dispatch.cpp",
)
# Host code of the CUDA kernels; needs the toolkit's headers, not nvcc.
CUDA_SOURCES = (
    "forward/cuda.cpp",
    "forward/sm90/counters.cpp",
    "forward/sm90/host.cpp",
    "common/sm90_launch.cpp",
    "backward/cuda.cpp",
    "backward/sm90/host.cpp",
    "decode/cuda.cpp",
)
CXX_FLAGS = ("-std=c++20", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden")
NVCC_FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden")
# Ampere (also Ada, same instructions) and Hopper; the first one as PTX too, for newer GPUs.
DEFAULT_CUDA_ARCHS = ("80", "90")
MIN_NVCC = (12, 8)


def _table(name: str) -> ModuleType:
    """A module of flashmoe/tiles, which is read where flashmoe is not installed."""
    path = CSRC.parent / "flashmoe" / "tiles" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"flashmoe_tiles_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


_fields, _variant = _table("fields"), _table("variant")
# What follows head_dim in csrc/instances/KERNEL.txt.
INSTANCE_FIELDS = {k: _fields.columns(k) for k in ("sm80", "sm90", "sm90_bwd", "decode")}
# What else nvcc compiles for a kernel.
LAUNCH_SOURCES = {
    "sm90": ("common/schedule.cu", "common/mask_tiles.cu"),
    "decode": ("decode/append.cu",),
}
# nvcc needs a second for each file besides its kernels.
INSTANCES_A_FILE = 3
# General kernels take three times as long to compile: other head dimensions run in the next one's.
GENERAL_HEAD_DIMS = (64, 128, 256)
# What tiles compiled at run time include, besides the generated wgmma.cuh.
RUNTIME_SOURCES = ("forward/sm90/kernel.cuh", "backward/sm90/kernel.cuh")


class Instance(NamedTuple):
    """One compiled tile of one kernel; `shape` are the values of INSTANCE_FIELDS[kernel],
    `variant` the fields of Variant that it is compiled with. `is_general`: it decides at run
    time what flashmoe/tiles/variant.py says."""

    kernel: str
    head_dim: int
    shape: tuple[int, ...]
    variant: tuple[str, ...] = ()
    is_general: bool = False

    @property
    def table(self) -> str:
        """The one in the registry that it stands in."""
        return {"sm90_bwd": "backward", "decode": "decode"}.get(self.kernel, "forward")

    @property
    def symbol(self) -> str:
        name = {"backward": "bwd_sm90", "decode": "decode"}.get(self.table, f"fwd_{self.kernel}")
        general = ("general",) if self.is_general else ()
        return "_".join(map(str, (name, self.head_dim, *self.shape, *self.variant, *general)))

    @property
    def variants(self) -> list[tuple[str, ...]]:
        """The variants that it is for: of a general one all that need it."""
        if not self.is_general:
            return [self.variant]
        runtime = self.computes
        return [
            chosen
            for n in range(1, len(runtime) + 1)
            for chosen in itertools.combinations(runtime, n)
        ]

    @property
    def computes(self) -> tuple[str, ...]:
        """The features that it has."""
        runtime: tuple[str, ...] = _variant.RUNTIME.get(self.kernel, ())
        return runtime if self.is_general else self.variant

    @property
    def flags(self) -> tuple[str, ...]:
        """The fields of csrc/common/variant.h among `computes`."""
        return tuple(name for name in self.computes if not _head_dim_v(name))

    @property
    def head_dim_v(self) -> int:
        """The head_dim of V, where it has its own; 0 where it has not."""
        return sum(map(_head_dim_v, self.variant))

    def to_json(self) -> dict[str, int | str]:
        fields = dict(zip(INSTANCE_FIELDS[self.kernel], self.shape, strict=True))
        return {"kernel": self.kernel, "head_dim": self.head_dim, **fields}


class Generated(NamedTuple):
    """What generate() wrote: the registry in C++, and for each kernel its instances for nvcc."""

    registry: Path
    instances: dict[str, list[Path]]


def _head_dim_v(word: str) -> int:
    """128 of `v128`; 0 of other words."""
    return int(word[1:]) if word[:1] == "v" and word[1:].isdigit() else 0


def instances() -> list[Instance]:
    """The tiles listed in csrc/instances, defaults first. Raises ValueError naming a bad line."""
    found = []
    for kernel, names in INSTANCE_FIELDS.items():
        variants = _variant.COMPILED[kernel]
        path = CSRC / "instances" / f"{kernel}.txt"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            columns, variant = words[: 1 + len(names)], tuple(words[1 + len(names) :])
            known = [name for name in variants if name in variant]
            if kernel in _variant.OWN_HEAD_DIM_V and variant and _head_dim_v(variant[-1]):
                known.append(variant[-1])
            if len(columns) != 1 + len(names) or not all(column.isdigit() for column in columns):
                raise ValueError(
                    f"{path.name}:{number}: expected integers for head_dim, {', '.join(names)}, "
                    f"got {line!r}"
                )
            if variant != tuple(known):
                allowed = ", ".join(variants) or "nothing"
                raise ValueError(
                    f"{path.name}:{number}: expected {allowed} behind the columns, got {line!r}"
                )
            head_dim, *shape = map(int, columns)
            found.append(Instance(kernel, head_dim, tuple(shape), variant))
    return found


def gencode(kernel: str, archs: tuple[str, ...]) -> list[str]:
    """nvcc's -gencode flags for a kernel when `archs` are asked for; empty: it is not built.

    sm80 and decode: machine code for each and PTX for GPUs to come, all from the oldest one's PTX,
    which takes the longest and is made once. sm90: wgmma and setmaxnreg exist on sm_90a alone.
    """
    capabilities = sorted({int(arch.rstrip("af")) for arch in archs})
    if kernel.startswith("sm90"):
        return ["-gencode=arch=compute_90a,code=sm_90a"] if 90 in capabilities else []
    codes = [f"sm_{c}" for c in capabilities] + [f"compute_{c}" for c in capabilities[:1]]
    return [f"-gencode=arch=compute_{capabilities[0]},code={code}" for code in codes]


def source_hashes() -> dict[str, str]:
    """For each kind of device, SHA-256 (16 digits) over the sources that its kernels depend on;
    which tiles are compiled in changes none of them."""
    rooms = {
        name: sorted((CSRC / name).rglob("*"))
        for name in ("common", "forward", "backward", "decode")
    }
    cpu = [path for path in rooms["forward"] if path.parent.name == "cpu"]
    cuda = [path for path in rooms["forward"] if path not in cpu]
    cuda += [*rooms["backward"], *rooms["decode"], *sorted((CSRC / "ptx").iterdir())]
    hashes = {}
    for kind, sources in (("cpu", cpu), ("cuda", cuda)):
        digest = hashlib.sha256()
        for path in [*rooms["common"], CSRC / "torch_ops.cpp", *sources]:
            if path.is_file() and path.suffix != ".pyc":
                digest.update(path.name.encode() + path.read_bytes())
        hashes[kind] = digest.hexdigest()[:16]
    return hashes


def generate(directory: Path, archs: tuple[str, ...], cuda_version: str) -> Generated:
    """Write wgmma.cuh, the instance sources and the registry into `directory`.

    Without archs the registry is empty. Files whose text is unchanged are left alone, so that
    nothing is rebuilt for nothing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "wgmma.cuh", _wgmma_source())
    listed = [i for i in instances() if gencode(i.kernel, archs)]
    first = {(i.kernel, i.head_dim): i for i in reversed(listed)}
    listed += sorted(
        i._replace(is_general=True)
        for i in first.values()
        if i.kernel in _variant.RUNTIME and i.head_dim in GENERAL_HEAD_DIMS
    )
    sources: dict[str, list[Path]] = {}
    # Last those that take the least time, for no job to be left alone at the end.
    for kernel in sorted({i.kernel for i in listed}, reverse=True):
        texts = [_INSTANCE_SOURCES[kernel](i) for i in listed if i.kernel == kernel]
        paths = sources[kernel] = []
        for begin in range(0, len(texts), INSTANCES_A_FILE):
            paths.append(directory / f"{kernel}_{begin}.cu")
            _write(paths[-1], "\n".join(texts[begin : begin + INSTANCES_A_FILE]))
        paths += [CSRC / source for source in LAUNCH_SOURCES.get(kernel, ())]
    registry = directory / "registry.cpp"
    _write(registry, _registry_source(listed, archs, cuda_version))
    return Generated(registry, sources)


def copy_runtime_sources(generated: Path, target: Path) -> None:
    """Copy the headers that tiles compiled at run time include into the folder `target`."""
    shutil.rmtree(target, ignore_errors=True)
    seeds = [CSRC / source for source in RUNTIME_SOURCES]
    found: set[Path] = set()
    while seeds:
        path = seeds.pop().resolve()
        if path in found:
            continue
        found.add(path)
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith('#include "') and (header := line.split('"')[1]) != "wgmma.cuh":
                seeds.append(CSRC / header)
    for path in found:
        copy = target / path.relative_to(CSRC)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    shutil.copyfile(generated / "wgmma.cuh", target / "wgmma.cuh")


def _wgmma_source() -> str:
    sys.path.insert(0, str(CSRC / "ptx"))
    try:
        import generate_wgmma
    finally:
        sys.path.pop(0)
    return generate_wgmma.source()


_ARGUMENTS = "const AttentionParams& params, DType dtype, int device, cudaStream_t stream"
_DECODE_ARGUMENTS = _ARGUMENTS.replace("AttentionParams", "decoding::DecodeParams")


# In the order of DType.
_SM90_DTYPES = ("__half", "__nv_bfloat16")
# What runs one after the other, and its launch bounds: threads, thread blocks of an SM at once.
_SM90_BWD_FUNCTIONS = {
    "prepare": "sm90_backward::EDGE_THREADS, 4",
    "attention_backward": "{tile}.num_threads(), 1",
    "finish": "sm90_backward::EDGE_THREADS, 4",
}


def _sm80_source(instance: Instance) -> str:
    tile = f"Sm80Tile<{', '.join(map(str, (instance.head_dim, *instance.shape)))}>"
    general = str(instance.is_general).lower()
    functions = [(instance.symbol, "true")]
    if instance.is_general:  # any rows that are not 16-byte aligned are its own
        functions.append((f"{instance.symbol}_unaligned", "false"))
    lines = ['#include "forward/sm80/launch.cuh"', "", "namespace flashmoe {", ""]
    for symbol, aligned in functions:
        launch = f"sm80::launch_dtype<{tile}, {aligned}, {general}>"
        lines += [
            f"cudaError_t {symbol}({_ARGUMENTS}) {{",
            f"  return {launch}(params, dtype, device, stream);",
            "}",
            "",
        ]
    return "\n".join([*lines, "}  // namespace flashmoe", ""])


def _constants(instance: Instance, tile: str) -> tuple[str, str, list[str]]:
    """The names of an instance's tile, which is a `tile` of C++, and variant; and their lines."""
    names = f"{instance.symbol}_tile", f"{instance.symbol}_variant"
    lines = [
        f"constexpr {tile} {names[0]}{_struct(instance)};",
        f"constexpr Variant {names[1]}{_variant.initializer(instance.flags)};",
        f"static_assert(sizeof(Legal{tile}<{names[0]}>) > 0);",
        "",
    ]
    return *names, lines


def _sm90_source(instance: Instance) -> str:
    tile, variant, constants = _constants(instance, "Sm90Tile")
    lines = ['#include "forward/sm90/kernel.cuh"', "", "namespace flashmoe {", "", *constants]
    # nvcc 13.0 cannot call a kernel that has a template parameter of class type.
    for dtype in _SM90_DTYPES:
        lines += [
            f"__global__ void __launch_bounds__({tile}.num_threads(), {tile}.ctas_per_sm)",
            f"    {instance.symbol}{dtype}(const __grid_constant__ Sm90Params params) {{",
            f"  sm90::attention_forward<{dtype}, {tile}, {variant}>(params);",
            "}",
            "",
        ]
    lines += [
        f"extern const void* const {instance.symbol}[2];",
        f"const void* const {instance.symbol}[2] = {{",
        *(f"    reinterpret_cast<const void*>({instance.symbol}{t})," for t in _SM90_DTYPES),
        "};",
    ]
    return "\n".join([*lines, "", "}  // namespace flashmoe", ""])


def _sm90_bwd_source(instance: Instance) -> str:
    tile, variant, constants = _constants(instance, "Sm90BackwardTile")
    lines = ['#include "backward/sm90/kernel.cuh"', "", "namespace flashmoe {", "", *constants]
    for dtype in _SM90_DTYPES:
        for function, bounds in _SM90_BWD_FUNCTIONS.items():
            lines += [
                f"__global__ void __launch_bounds__({bounds.format(tile=tile)})",
                f"    {instance.symbol}_{function}{dtype}("
                "const __grid_constant__ Sm90BackwardParams params) {",
                f"  sm90_backward::{function}<{dtype}, {tile}, {variant}>(params);",
                "}",
                "",
            ]
    lines += [
        f"extern const void* const {instance.symbol}[2][3];",
        f"const void* const {instance.symbol}[2][3] = {{",
    ]
    for dtype in _SM90_DTYPES:
        addresses = (
            f"reinterpret_cast<const void*>({instance.symbol}_{function}{dtype})"
            for function in _SM90_BWD_FUNCTIONS
        )
        lines.append(f"    {{{', '.join(addresses)}}},")
    return "\n".join([*lines, "};", "", "}  // namespace flashmoe", ""])


def _decode_source(instance: Instance) -> str:
    tile = _decode_tile(instance)
    lines = [
        '#include "decode/launch.cuh"',
        "",
        "namespace flashmoe {",
        "",
        f"cudaError_t {instance.symbol}({_DECODE_ARGUMENTS}) {{",
        f"  return decoding::launch_dtype<{tile}>(params, dtype, device, stream);",
        "}",
    ]
    return "\n".join([*lines, "", "}  // namespace flashmoe", ""])


_INSTANCE_SOURCES = {
    "sm80": _sm80_source,
    "sm90": _sm90_source,
    "sm90_bwd": _sm90_bwd_source,
    "decode": _decode_source,
}


def _decode_tile(instance: Instance) -> str:
    return f"DecodeTile<{', '.join(map(str, (instance.head_dim, *instance.shape)))}>"


def _struct(instance: Instance) -> str:
    """The initializer of its Sm90Tile or Sm90BackwardTile."""
    tile = dict(zip(INSTANCE_FIELDS[instance.kernel], instance.shape, strict=True))
    if instance.head_dim_v:
        tile["head_dim_v"] = instance.head_dim_v
    text: str = _fields.initializer(instance.head_dim, tile)
    return text


def _registry_source(listed: list[Instance], archs: tuple[str, ...], cuda_version: str) -> str:
    forward, backward, decode = (
        [instance for instance in listed if instance.table == table]
        for table in ("forward", "backward", "decode")
    )
    info = json.dumps(
        {
            "cuda_archs": archs,
            "cuda_version": cuda_version,
            "fields": INSTANCE_FIELDS,
            "variant": _variant.FLAGS,
            "instances": [_listed(instance) for instance in forward],
            "backward_instances": [_listed(instance) for instance in backward],
            "decode_instances": [_listed(instance) for instance in decode],
            "source_hashes": source_hashes(),
        }
    )
    declarations, entries, backward_entries, decode_entries = [], [], [], []
    general = {i.head_dim: i.symbol for i in forward if i.is_general}
    for instance in forward:
        head_dim, symbol = instance.head_dim, instance.symbol
        variant = _variant.initializer(instance.flags)
        if instance.kernel == "sm80":
            unaligned = general[min(d for d in general if d >= head_dim)] + "_unaligned"
            declarations.append(f"cudaError_t {symbol}({_ARGUMENTS});")
            if instance.is_general:
                declarations.append(f"cudaError_t {unaligned}({_ARGUMENTS});")
            entries.append(f"    {{{head_dim}, {symbol}, {unaligned}, {{}}, {variant}, {{}}}},")
        else:
            declarations.append(f"extern const void* const {symbol}[2];")
            entries.append(
                f"    {{{head_dim}, nullptr, nullptr, {_struct(instance)}, {variant}, "
                f"{{{symbol}[0], {symbol}[1]}}}},"
            )
    for instance in backward:
        symbol = instance.symbol
        declarations.append(f"extern const void* const {symbol}[2][3];")
        addresses = ", ".join(
            f"{{{', '.join(f'{symbol}[{dtype}][{i}]' for i in range(3))}}}" for dtype in range(2)
        )
        variant = _variant.initializer(instance.flags)
        backward_entries.append(f"    {{{_struct(instance)}, {variant}, {{{addresses}}}}},")
    for instance in decode:
        declarations.append(f"cudaError_t {instance.symbol}({_DECODE_ARGUMENTS});")
        decode_entries.append(f"    decode_kernel<{_decode_tile(instance)}>({instance.symbol}),")
    lines = ['#include "instances/registry.h"', "", '#include "decode/tile.h"', ""]
    lines += ["namespace flashmoe {", ""]
    if listed:
        lines += declarations
        for name, kernel, table in (
            ("compiled_kernels", "Kernel", entries),
            ("compiled_backward_kernels", "BackwardKernel", backward_entries),
            ("compiled_decode_kernels", "DecodeKernel", decode_entries),
        ):
            lines += ["", f"const std::vector<{kernel}>& {name}() {{"]
            lines += [f"  static const std::vector<{kernel}> kernels = {{", *table, "  };"]
            lines += ["  return kernels;", "}"]
        lines.append("")
    lines += [f'const char build_info[] = R"({info})";', "", "}  // namespace flashmoe", ""]
    return "\n".join(lines)


def _listed(instance: Instance) -> dict[str, Any]:
    """An instance as flashmoe/_extension.py reads it."""
    return {**instance.to_json(), "variants": instance.variants}


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """For CMake: print one list, semicolon-separated. `instances` prints the sources of a kernel
    that `registry` generated."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    choices = ("cpu-sources", "cuda-sources", "cxx-flags", "nvcc-flags", "registry", "instances")
    parser.add_argument("what", choices=choices)
    parser.add_argument("--kernel", choices=tuple(INSTANCE_FIELDS))
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--archs", default="", help="comma-separated, as 80,90")
    parser.add_argument("--cuda-version", default="")
    arguments = parser.parse_args()
    archs = tuple(filter(None, arguments.archs.split(",")))
    if arguments.what == "cpu-sources":
        items = [str(CSRC / source) for source in CPU_SOURCES]
    elif arguments.what == "cuda-sources":
        items = [str(CSRC / source) for source in CUDA_SOURCES]
    elif arguments.what == "cxx-flags":
        items = list(CXX_FLAGS)
    elif arguments.what == "nvcc-flags":
        items = [*NVCC_FLAGS, *gencode(arguments.kernel, archs)]
    else:
        generated = generate(arguments.directory, archs, arguments.cuda_version)
        items = [str(generated.registry)]
        if arguments.what == "instances":
            items = [str(path) for path in generated.instances.get(arguments.kernel, ())]
    sys.stdout.write(";".join(items))


if __name__ == "__main__":
    main()
