"""What hardware this is: the Arch a tile must fit, and the fingerprint of every stored figure."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flashmoe import nvml
from flashmoe._extension import kernel_hash as kernel_hash
from flashmoe.tiles import Arch


def cpu_name() -> str:
    """The processor's model name as the operating system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


@functools.cache
def arch(device: torch.device) -> Arch:
    """The Arch of a torch device; a CUDA device without an index is the current one when first
    asked for. Raises ValueError for any other kind of device."""
    if device.type == "cpu":
        return Arch("cpu", cpu_name())
    if device.type != "cuda":
        raise ValueError(f"device must be cpu or cuda, got {device}")
    properties = torch.cuda.get_device_properties(device)
    return Arch(
        "cuda",
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        int(properties.shared_memory_per_block_optin),  # type: ignore[attr-defined]
        getattr(properties, "clock_rate", 0),
        _bandwidth(properties),
    )


def _bandwidth(properties: Any) -> float:
    """Of its memory in bytes a second at peak, 0 where this torch does not tell: kHz times bits, at
    both edges of the clock."""
    clock = getattr(properties, "memory_clock_rate", 0)
    return clock * 1e3 * 2 * getattr(properties, "memory_bus_width", 0) / 8


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything a figure depends on besides the code that was timed, which `kernels` hashes.
    Memory in bytes, power limit in watts (0 where unknown)."""

    device: str
    capability: str
    sm_count: int
    memory: int
    power_limit: float
    driver: str
    cuda: str
    torch: str
    triton: str
    threads: int
    kernels: str

    @property
    def kind(self) -> str:
        """The kind of device: cpu or cuda."""
        return "cpu" if self.threads else "cuda"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: dict[str, Any], fields: tuple[str, ...]) -> list[str]:
        """`field: here -> there` for each named field in which a stored fingerprint differs."""
        mine = self.to_json()
        return [
            f"{name}: {mine[name]!r} here, {other.get(name)!r} there"
            for name in fields
            if mine[name] != other.get(name)
        ]


@functools.cache
def fingerprint(device: torch.device) -> Fingerprint:
    """The fingerprint of `device` with the software around it."""
    here = arch(device)
    cuda = here.kind == "cuda"
    return Fingerprint(
        device=here.name,
        capability=f"{here.capability[0]}.{here.capability[1]}" if cuda else platform.machine(),
        sm_count=here.sm_count,
        memory=torch.cuda.get_device_properties(device).total_memory if cuda else 0,
        power_limit=nvml.power_limit(device) if cuda else 0.0,
        driver=nvml.driver(device) if cuda else "",
        cuda=torch.version.cuda or "" if cuda else "",
        torch=torch.__version__,
        triton=_version("triton"),
        threads=0 if cuda else torch.get_num_threads(),
        kernels=kernel_hash(here.kind),
    )


def slug(name: str) -> str:
    """A device name as part of a file name: `NVIDIA H200` -> `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
