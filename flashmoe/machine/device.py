"""What hardware this is: the Arch that a tile must fit."""

from __future__ import annotations

import functools
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Arch:
    """What a tile must fit, and how fast that is. `capability` is the CUDA compute capability,
    (0, 0) for a CPU; `smem_per_block` is the opt-in shared memory of one thread block in bytes;
    `clock` in kHz and `bandwidth` of memory in bytes a second are peaks, 0 where unknown; `amx`:
    whether a CPU multiplies matrices of bfloat16 in an instruction."""

    kind: str
    name: str
    capability: tuple[int, int] = (0, 0)
    sm_count: int = 0
    smem_per_block: int = 0
    clock: int = 0
    bandwidth: float = 0.0
    amx: bool = False


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
        has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        return Arch("cpu", cpu_name(), amx=has_amx())
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


def named(text: str) -> torch.device:
    """The device that --device names, which is here. Raises ValueError for any other."""
    try:
        chosen = torch.device(text)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {text!r}")
    if chosen.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ValueError(f"--device must be cpu, for torch finds no CUDA device, got {text!r}")
    if chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if chosen.index >= count:
        raise ValueError(f"--device must be cuda:0 to cuda:{count - 1}, got {text!r}")
    return chosen


_BETWEEN_WORDS = re.compile(r"[^a-z0-9]+")


def slug(name: str) -> str:
    """A device name as part of a file name: `NVIDIA H200` -> `nvidia-h200`."""
    return _BETWEEN_WORDS.sub("-", name.lower()).strip("-")
