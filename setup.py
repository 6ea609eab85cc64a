"""Builds one abi3 wheel for torch 2.10 and newer: the CPU kernel always, CUDA kernels with nvcc.

FLASHMOE_CUDA=auto|on|off, FLASHMOE_CUDA_ARCHS="80;90", MAX_JOBS=N.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch.utils.cpp_extension as cpp_extension
from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import build_config  # noqa: E402

# torch 2.10 is the oldest that the wheel serves.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def find_nvcc() -> tuple[Path, str] | str:
    """CUDA's home and version, or why there is none that can be used."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return "nvcc was not found (set CUDA_HOME)"
    text = subprocess.run(
        [nvcc, "--version"], capture_output=True, encoding="utf-8", check=True
    ).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        return f"{nvcc} did not tell its version"
    if (int(match[1]), int(match[2])) < build_config.MIN_NVCC:
        minimum = ".".join(map(str, build_config.MIN_NVCC))
        return f"nvcc {match[1]}.{match[2]} is older than {minimum}"
    # nvcc may be a wrapper script somewhere else; its dry run tells where it really lives.
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, encoding="utf-8"
    )
    here = re.search(r"^#\$ _HERE_=(.+)$", dry.stderr, re.MULTILINE)
    binary = Path(here[1]) if here else Path(nvcc).resolve().parent
    return binary.parent, f"{match[1]}.{match[2]}"


def choose_cuda() -> tuple[Path, str] | None:
    """CUDA's home and version when its kernels are to be built; says so in one line if not."""
    wish = os.environ.get("FLASHMOE_CUDA") or "auto"
    if wish not in ("auto", "on", "off"):
        raise SystemExit(f"FLASHMOE_CUDA must be auto, on or off, got {wish!r}")
    found = "FLASHMOE_CUDA=off" if wish == "off" else find_nvcc()
    if not isinstance(found, str):
        return found
    if wish == "on":
        raise SystemExit(f"FLASHMOE_CUDA=on, but {found}")
    print(f"flashmoe: building without CUDA kernels: {found}", file=sys.stderr)
    return None


def cuda_archs() -> tuple[str, ...]:
    text = os.environ.get("FLASHMOE_CUDA_ARCHS") or ";".join(build_config.DEFAULT_CUDA_ARCHS)
    archs = tuple(arch.replace(".", "") for arch in re.split(r"[;, ]+", text.strip()) if arch)
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise SystemExit(f"FLASHMOE_CUDA_ARCHS must look like '80;90', got {text!r}")
    if any(int(arch.rstrip("af")) < 80 for arch in archs):
        raise SystemExit(f"FLASHMOE_CUDA_ARCHS must be 80 or newer, got {text!r}")
    return archs


def compile_kernels(
    nvcc: Path, archs: tuple[str, ...], sources: dict[str, list[Path]]
) -> list[str]:
    """Object files of the instances, each kernel's for its own architectures. Through ninja, which
    compiles only what changed."""
    directory = ROOT / "build" / "kernels"
    directory.mkdir(parents=True, exist_ok=True)
    lines = [
        f"includes = -I{ROOT / 'csrc'} -I{ROOT / 'build' / 'generated'}",
        "rule nvcc",
        f"  command = {nvcc} -c $flags $includes -Xcompiler=-fPIC -MD -MF $out.d $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects = []
    for kernel, paths in sources.items():
        flags = " ".join([*build_config.NVCC_FLAGS, *build_config.gencode(kernel, archs)])
        for path in paths:
            objects.append(str(directory / f"{path.stem}.o"))
            lines += [f"build {objects[-1]}: nvcc {path}", f"  flags = {flags}"]
    (directory / "build.ninja").write_text("\n".join([*lines, ""]), encoding="utf-8")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    subprocess.run(["ninja", "-C", str(directory), *jobs], check=True)
    return objects


class Build(cpp_extension.BuildExtension.with_options(use_ninja=True)):
    """Kernels by nvcc, the rest as torch does it; then the headers of what is compiled at run time,
    beside the extension that was built with them."""

    def build_extensions(self):
        if cuda:
            self.extensions[0].extra_objects += compile_kernels(
                cuda[0] / "bin" / "nvcc", archs, generated.instances
            )
        super().build_extensions()
        self.copy_runtime_sources()

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        inplace, self.inplace = self.inplace, True
        self.copy_runtime_sources()
        self.inplace = inplace

    def copy_runtime_sources(self):
        package = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        build_config.copy_runtime_sources(ROOT / "build" / "generated", package / "kernels")


def extension():
    sources = ["torch_ops.cpp", *build_config.CPU_SOURCES]
    sources += build_config.CUDA_SOURCES if cuda else ()
    flags = [*build_config.CXX_FLAGS, TORCH_TARGET]
    includes = [str(ROOT / "csrc")]
    options = {}
    if cuda:
        flags.append("-DFLASHMOE_WITH_CUDA")
        includes.append(str(cuda[0] / "include"))
        # The last one is where the toolkit of the package index has them.
        target = "sbsa-linux" if platform.machine() == "aarch64" else "x86_64-linux"
        libraries = [
            cuda[0] / "lib64",
            cuda[0] / "targets" / target / "lib",
            cuda[0] / "lib",
        ]
        options = {
            "libraries": ["cudart_static", "rt", "dl", "pthread"],
            "library_dirs": [str(path) for path in libraries if path.is_dir()],
        }
    return cpp_extension.CppExtension(
        "flashmoe._C",
        [
            *(f"csrc/{source}" for source in sources),
            str(generated.registry.relative_to(ROOT)),
        ],
        include_dirs=includes,
        extra_compile_args={"cxx": flags},
        # Options of GNU's linker.
        extra_link_args=["-Wl,--exclude-libs,ALL", "-s"] if sys.platform == "linux" else [],
        py_limited_api=True,
        **options,
    )


cuda = choose_cuda()
archs = cuda_archs() if cuda else ()
generated = build_config.generate(ROOT / "build" / "generated", archs, cuda[1] if cuda else "")

setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
