"""The one list of sources, tiles and flags. setup.py imports it; CMakeLists.txt runs it."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent

# Torch-free; csrc/torch_ops.cpp alone binds them.
CPU_SOURCES = (
    "attention/fwd_cpu.cpp",
    "attention/fwd_cpu_generic.cpp",
    "attention/fwd_cpu_avx2.cpp",
    "attention/fwd_cpu_avx512.cpp",
)
CXX_FLAGS = ("-std=c++20", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden")
NVCC_FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden")
# Ampere (also Ada, same instructions) and Hopper; the last one as PTX too, for newer GPUs.
DEFAULT_CUDA_ARCHS = ("80", "90")
MIN_NVCC = (12, 8)


class Instance(NamedTuple):
    """One compiled tile of one kernel."""

    kernel: str
    head_dim: int
    block_m: int
    block_n: int
    num_stages: int
    num_warps: int

    @property
    def symbol(self) -> str:
        return "fwd_{}_d{}_{}x{}_stages{}_warps{}".format(*self)


def instances() -> list[Instance]:
    """The tiles listed in csrc/instances, defaults first. Raises ValueError naming a bad line."""
    found = []
    for path in sorted((CSRC / "instances").glob("*.txt")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            fields = line.partition("#")[0].split()
            if not fields:
                continue
            if len(fields) != 5 or not all(field.isdigit() for field in fields):
                raise ValueError(f"{path.name}:{number}: expected five integers, got {line!r}")
            found.append(Instance(path.stem, *map(int, fields)))
    return found


def gencode(archs: tuple[str, ...]) -> list[str]:
    """nvcc's -gencode flags: machine code for each, and PTX of the last for GPUs to come."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def source_hashes() -> dict[str, str]:
    """For each kind of device, SHA-256 (16 digits) over the sources that its kernels depend on."""
    shared = [CSRC / "attention" / "params.h", CSRC / "torch_ops.cpp"]
    cpu = sorted((CSRC / "attention").glob("fwd_cpu*"))
    cuda = [
        *sorted(set((CSRC / "attention").iterdir()) - set(cpu)),
        *sorted((CSRC / "ptx").glob("*.cuh")),
        *sorted((CSRC / "instances").glob("*.txt")),
    ]
    hashes = {}
    for kind, sources in (("cpu", cpu), ("cuda", cuda)):
        digest = hashlib.sha256()
        for path in [*shared, *sources]:
            digest.update(path.name.encode() + path.read_bytes())
        hashes[kind] = digest.hexdigest()[:16]
    return hashes


def generate(directory: Path, archs: tuple[str, ...], cuda_version: str) -> list[Path]:
    """Write the instance sources and the registry into `directory`; return them.

    Without archs only the registry, empty. Files whose text is unchanged are left alone, so that
    nothing is rebuilt for nothing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    listed = instances() if archs else []
    written = []
    defaults = {(i.kernel, i.head_dim): i for i in reversed(listed)}
    for instance in listed:
        is_default = defaults[instance.kernel, instance.head_dim] == instance
        path = directory / f"{instance.symbol}.cu"
        _write(path, _instance_source(instance, is_default))
        written.append(path)
    registry = directory / "registry.cpp"
    _write(registry, _registry_source(listed, defaults, archs, cuda_version))
    return [*written, registry]


_ARGUMENTS = "const AttentionParams& params, DType dtype, int device, cudaStream_t stream"


def _instance_source(instance: Instance, is_default: bool) -> str:
    kernel, *shape = instance
    tile = f"{kernel.capitalize()}Tile<{', '.join(map(str, shape))}>"
    functions = [(instance.symbol, "true")]
    if is_default:
        functions.append((f"{instance.symbol}_unaligned", "false"))
    lines = [f'#include "attention/fwd_{kernel}_launch.cuh"', "", "namespace flashmoe {", ""]
    for symbol, aligned in functions:
        lines += [
            f"cudaError_t {symbol}({_ARGUMENTS}) {{",
            f"  return {kernel}::launch_dtype<{tile}, {aligned}>(params, dtype, device, stream);",
            "}",
            "",
        ]
    return "\n".join([*lines, "}  // namespace flashmoe", ""])


def _registry_source(
    listed: list[Instance],
    defaults: dict[tuple[str, int], Instance],
    archs: tuple[str, ...],
    cuda_version: str,
) -> str:
    info = json.dumps(
        {
            "cuda_archs": archs,
            "cuda_version": cuda_version,
            "instances": listed,
            "source_hashes": source_hashes(),
        }
    )
    lines = ['#include "instances/registry.h"', "", "namespace flashmoe {", ""]
    if listed:
        for instance in listed:
            lines.append(f"cudaError_t {instance.symbol}({_ARGUMENTS});")
        for instance in defaults.values():
            lines.append(f"cudaError_t {instance.symbol}_unaligned({_ARGUMENTS});")
        lines += ["", "const Instance instances[] = {"]
        for instance in listed:
            _, *shape = instance
            unaligned = f"{defaults[instance.kernel, instance.head_dim].symbol}_unaligned"
            lines.append(f"    {{{', '.join(map(str, shape))}, {instance.symbol}, {unaligned}}},")
        lines += ["};", f"const int num_instances = {len(listed)};"]
    lines += [f'const char build_info[] = R"({info})";', "", "}  // namespace flashmoe", ""]
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def main() -> None:
    """For CMake: generate into a folder and print one list, semicolon-separated."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("what", choices=("cpu-sources", "cxx-flags", "nvcc-flags", "generate"))
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--archs", default="", help="comma-separated, as 80,90")
    parser.add_argument("--cuda-version", default="")
    arguments = parser.parse_args()
    archs = tuple(filter(None, arguments.archs.split(",")))
    if arguments.what == "cpu-sources":
        items = [str(CSRC / source) for source in CPU_SOURCES]
    elif arguments.what == "cxx-flags":
        items = list(CXX_FLAGS)
    elif arguments.what == "nvcc-flags":
        items = [*NVCC_FLAGS, *gencode(archs)]
    else:
        generated = generate(arguments.directory, archs, arguments.cuda_version)
        items = [str(path) for path in generated]
    sys.stdout.write(";".join(items))


if __name__ == "__main__":
    main()
