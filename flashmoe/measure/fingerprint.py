"""What every stored figure depends on besides the code that was timed."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flashmoe._extension import kernel_hash as kernel_hash
from flashmoe.machine import nvml
from flashmoe.machine.device import arch


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


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
