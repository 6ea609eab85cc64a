"""Watches the GPU while a case is timed."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from flashmoe.machine import nvml


class Watch:
    """`look` after each round; `seen` tells it all as results.Telemetry has it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._readings: list[nvml.Reading] = []

    def look(self) -> None:
        if reading := nvml.read(self._device):
            self._readings.append(reading)

    def throttled_share(self) -> float:
        return sum(r.throttled for r in self._readings) / max(len(self._readings), 1)

    def seen(self) -> dict[str, Any] | None:
        """None where nothing was told."""
        if not self._readings:
            return None
        return {
            "sm_mhz": int(statistics.median(r.sm_mhz for r in self._readings)),
            "memory_mhz": int(statistics.median(r.memory_mhz for r in self._readings)),
            "celsius": max(r.celsius for r in self._readings),
            "watts": round(statistics.fmean(r.watts for r in self._readings), 1),
            "reasons": sorted({reason for r in self._readings for reason in r.reasons}),
            "throttled": [i for i, r in enumerate(self._readings) if r.throttled],
        }
