"""What the driver tells, with a driver that only pretends."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashmoe.machine import nvml
from flashmoe.ratchet.measuring.telemetry import Watch

GPU = torch.device("cuda", 0)


class Driver:
    """NVML's functions, for one GPU. `reasons` is what holds clocks down, one a reading."""

    def __init__(self, *reasons: int) -> None:
        self.reasons = list(reasons)
        self.missing: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("NVML_", "nvmlClocks", "NVMLError")):
            return getattr(nvml.pynvml, name)
        answers = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlSystemGetDriverVersion": lambda: "580.1",
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
            "nvmlDeviceGetClockInfo": lambda handle, which: 1980 if which == 1 else 3201,
            "nvmlDeviceGetTemperature": lambda handle, which: 51,
            "nvmlDeviceGetPowerUsage": lambda handle: 312_500,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: self.reasons.pop(0),
        }
        if name in self.missing:

            def refuse(*_: Any) -> None:
                raise nvml.pynvml.NVMLError(nvml.pynvml.NVML_ERROR_NOT_SUPPORTED)

            return refuse
        return answers[name]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    pretended = Driver()
    for name in dir(nvml.pynvml):
        if name.startswith(("nvmlInit", "nvmlSystemGet", "nvmlDeviceGet")):
            monkeypatch.setattr(
                nvml.pynvml, name, lambda *args, name=name: getattr(pretended, name)(*args)
            )
    properties = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    nvml._handle.cache_clear()
    yield pretended
    nvml._handle.cache_clear()


def test_a_reading(driver: Driver) -> None:
    driver.reasons = [4, 4 | 64]
    assert nvml.read(GPU) == nvml.Reading(1980, 3201, 51, 312.5, ("power_cap",))
    hot = nvml.read(GPU)
    assert hot is not None
    assert hot.reasons == ("power_cap", "hw_thermal")
    assert hot.throttled
    assert (nvml.driver(GPU), nvml.power_limit(GPU)) == ("580.1", 700.0)


def test_the_power_cap_is_ordinary_and_heat_is_not(driver: Driver) -> None:
    driver.reasons = [0, 1, 4, 32, 8, 128]
    assert [nvml.read(GPU).throttled for _ in range(6)] == [False] * 3 + [True] * 3  # type: ignore[union-attr]


def test_what_a_gpu_does_not_tell_is_0(driver: Driver) -> None:
    driver.reasons = [0]
    driver.missing = {"nvmlDeviceGetPowerUsage", "nvmlDeviceGetTemperature"}
    assert nvml.read(GPU) == nvml.Reading(1980, 3201, 0, 0.0, ())


def test_without_a_driver_nothing_is_told(driver: Driver) -> None:
    driver.missing = {"nvmlInit"}
    assert nvml.read(GPU) is None
    assert (nvml.driver(GPU), nvml.power_limit(GPU)) == ("", 0.0)
    watch = Watch(GPU)
    watch.look()
    assert watch.seen() is None
    assert watch.throttled_share() == 0


def test_without_the_package_nothing_is_told(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "pynvml", None)
    assert nvml.read(GPU) is None
    assert (nvml.driver(GPU), nvml.power_limit(GPU)) == ("", 0.0)


def test_the_bits_are_nvmls() -> None:
    names = {
        "applications_clocks": "nvmlClocksEventReasonApplicationsClocksSetting",
        "power_cap": "nvmlClocksEventReasonSwPowerCap",
        "hw_slowdown": "nvmlClocksThrottleReasonHwSlowdown",
        "sync_boost": "nvmlClocksEventReasonSyncBoost",
        "sw_thermal": "nvmlClocksEventReasonSwThermalSlowdown",
        "hw_thermal": "nvmlClocksThrottleReasonHwThermalSlowdown",
        "hw_power_brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
    }
    assert {x: getattr(nvml.pynvml, name) for x, name in names.items()} == nvml._REASONS


def test_a_watch_marks_the_rounds_that_were_throttled(driver: Driver) -> None:
    driver.reasons = [4, 64, 0, 32]
    watch = Watch(GPU)
    for _ in range(4):
        watch.look()
    assert watch.throttled_share() == 0.5
    assert watch.seen() == {
        "sm_mhz": 1980,
        "memory_mhz": 3201,
        "celsius": 51,
        "watts": 312.5,
        "reasons": ["hw_thermal", "power_cap", "sw_thermal"],
        "throttled": [1, 3],
    }
