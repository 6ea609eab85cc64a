"""What the driver tells about a GPU (NVML): clocks, temperature, power, why it runs slower; nothing
where nvidia-ml-py is not installed, which attention does not need."""

from __future__ import annotations

import contextlib
import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch

pynvml: Any = None
with contextlib.suppress(ImportError):
    pynvml = importlib.import_module("pynvml")

# Reasons for which a GPU slows itself down besides its ordinary power management (which caps clocks
# under every heavy load, and so is part of the machine that is measured).
THROTTLING = ("sw_thermal", "hw_slowdown", "hw_thermal", "hw_power_brake")
# Bits of NVML's clocks event reasons.
_REASONS = {
    "applications_clocks": 0x02,
    "power_cap": 0x04,
    "hw_slowdown": 0x08,
    "sync_boost": 0x10,
    "sw_thermal": 0x20,
    "hw_thermal": 0x40,
    "hw_power_brake": 0x80,
}


@dataclass(frozen=True, slots=True)
class Reading:
    """One moment: clocks in MHz, degrees Celsius, watts, and names of _REASONS. 0 where unknown."""

    sm_mhz: int
    memory_mhz: int
    celsius: int
    watts: float
    reasons: tuple[str, ...]

    @property
    def throttled(self) -> bool:
        return any(reason in THROTTLING for reason in self.reasons)


@functools.cache
def _handle(device: torch.device) -> Any:
    """NVML's handle of a CUDA device; None where the driver tells nothing (no NVML, MIG)."""
    if pynvml is None:
        return None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
    except pynvml.NVMLError:
        return None


def _ask(question: Any, *arguments: Any) -> Any:
    """The answer, or 0 where this GPU has none."""
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return 0


def driver(device: torch.device) -> str:
    """The driver's version; empty where unknown."""
    return str(_ask(pynvml.nvmlSystemGetDriverVersion) or "") if _handle(device) else ""


def power_limit(device: torch.device) -> float:
    """In watts; 0 where unknown."""
    handle = _handle(device)
    return _ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle) / 1e3 if handle else 0.0


def read(device: torch.device) -> Reading | None:
    """Now; None where nothing is told."""
    handle = _handle(device)
    if handle is None:
        return None
    bits = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    return Reading(
        _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        _ask(pynvml.nvmlDeviceGetPowerUsage, handle) / 1e3,
        tuple(name for name, bit in _REASONS.items() if bits & bit),
    )
