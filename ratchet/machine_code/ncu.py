"""Nsight Compute: how it is called, and what its answers mean."""

from __future__ import annotations

import csv
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flashmoe.ratchet.measuring.processes import Source
from flashmoe.ratchet.measuring.programs import captured

# What is reported, and ncu's name for it. Summed over the kernels of a call where `total`, else the
# mean weighted by their time.
STALLS = (
    "long_scoreboard",
    "short_scoreboard",
    "math_pipe_throttle",
    "mio_throttle",
    "barrier",
    "wait",
    "not_selected",
    "gmma",
)
METRICS: Mapping[str, str] = {
    "time (us)": "gpu__time_duration.sum",
    "tensor pipes (%)": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "MUFU pipe (%)": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "FMA pipes (%)": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "memory (%)": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory (MB)": "dram__bytes.sum",
    "L2 (MB)": "lts__t_bytes.sum",
    "occupancy (%)": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "shared memory (KB)": "launch__shared_mem_per_block",
    **{
        f"stall: {name}": f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio"
        for name in STALLS
    },
}
_TOTAL = ("time (us)", "memory (MB)", "L2 (MB)")
# Of ncu's units, to ours; it writes `usecond` or `us`.
_SCALE = {"ns": 1e-3, "us": 1.0, "ms": 1e3}
_SCALE |= {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}
NOT_PERMITTED = (
    "the driver lets only administrators read GPU counters here. To permit it: put `options nvidia "
    "NVreg_RestrictProfilingToAdminUsers=0` into /etc/modprobe.d/nvidia-profiling.conf, rebuild "
    "the initramfs and reboot; in a container, add --cap-add=SYS_ADMIN"
)
NOT_FOUND = (
    "ncu was not found: it comes with the CUDA toolkit (package cuda-nsight-compute) and has to be "
    "on PATH"
)
_LEAST = 0.05
_UNKNOWN = "Failed to find metric"


class CannotProfile(Exception):
    """Why there is no profile; the message says what to do. No verdict depends on a profile."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One call: the kernels it launched, and METRICS by their names here."""

    kernels: tuple[str, ...]
    values: Mapping[str, float]


def profile(case: str, source: Source) -> Profile:
    """Profiles one call of `case` with `source`'s build. Raises CannotProfile."""
    tool = shutil.which("ncu")
    if tool is None:
        raise CannotProfile(NOT_FOUND)
    metrics = list(METRICS.values())
    while True:
        done = _run(tool, metrics, case, source)
        told = done.stdout + done.stderr
        # A metric that this GPU or version of ncu does not have ends it; the others are asked for.
        unknown = [line for line in told.splitlines() if _UNKNOWN in line]
        known = [m for m in metrics if not any(m in line for line in unknown)]
        if done.returncode == 0 or known == metrics or not known:
            break
        metrics = known
    if "ERR_NVGPUCTRPERM" in told:
        raise CannotProfile(NOT_PERMITTED)
    if done.returncode:
        lines = told.strip().splitlines() or ["no output"]
        # What ncu says of it, and not what the program printed last.
        errors = [line for line in lines if line.startswith("==ERROR==")] or lines[-1:]
        raise CannotProfile(f"ncu failed with exit code {done.returncode}: {errors[0]}")
    return parse(done.stdout)


def _run(
    tool: str, metrics: Sequence[str], case: str, source: Source
) -> subprocess.CompletedProcess[str]:
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    interpreter, option, worker = source.command
    python = [interpreter, option, worker.removesuffix("worker") + "profiled", case]
    return captured(
        [tool, *options, "--metrics", ",".join(metrics), "--target-processes", "all", *python],
        folder=source.folder,
        environment=source.environment,
    )


def parse(text: str) -> Profile:
    """From ncu's raw page as CSV: a row of names, a row of units, and a row for each kernel. Raises
    CannotProfile when it is not that."""
    rows = list(csv.DictReader(line for line in text.splitlines() if line.startswith('"')))
    if len(rows) < 2 or "Kernel Name" not in rows[0]:
        raise CannotProfile("ncu profiled no kernel")
    units, *kernels = rows
    # Metrics that this GPU or version of ncu does not have are left out.
    found = [label for label, metric in METRICS.items() if metric in units]

    def value(row: Mapping[str, str], label: str) -> float:
        metric = METRICS[label]
        scale = _SCALE.get(units[metric].split("/")[0].replace("second", "s"), 1.0)
        if label == "shared memory (KB)":
            scale *= 1e3
        try:
            return float(row[metric].replace(",", "")) * scale
        except ValueError:
            return math.nan

    times = [value(row, "time (us)") if "time (us)" in found else 1.0 for row in kernels]
    values = {}
    for label in found:
        each = [value(row, label) for row in kernels]
        if label in _TOTAL:
            values[label] = math.fsum(each)
        else:
            values[label] = sum(x * t for x, t in zip(each, times, strict=True)) / sum(times)
    told = tuple(row["Kernel Name"].partition("(")[0] for row in kernels)
    return Profile(told, {label: x for label, x in values.items() if not math.isnan(x)})


def differences(base: Profile, head: Profile) -> list[tuple[str, float, float]]:
    """(metric, base, head) for what differs by more than _LEAST of the larger, time always first,
    then the largest relative differences."""

    def size(item: tuple[str, float, float]) -> float:
        _, a, b = item
        return abs(a - b) / max(abs(a), abs(b), 1e-9)

    both = [(k, base.values[k], head.values[k]) for k in base.values if k in head.values]
    time = [item for item in both if item[0] == "time (us)"]
    rest = [item for item in both if item not in time and size(item) > _LEAST]
    return time + sorted(rest, key=size, reverse=True)
