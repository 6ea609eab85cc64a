"""What the ratchet can only be asked on a GPU."""

from __future__ import annotations

import pytest
import torch

from flashmoe.machine import nvml
from flashmoe.measure.timing import measure
from flashmoe.ratchet.measuring.slow import delayed
from flashmoe.ratchet.measuring.suite import SUITES, parse
from flashmoe.ratchet.measuring.workload import Workload

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CASES = (
    "fwd-b2-h8-s1024-d128-bfloat16-causal",
    "fwd-b2-h8k2-s512-d64-float16",
    "fwd-b1-h4-s256-d64-float32",
)
# Parts of kernels' names, by the backend that launches them.
KERNELS = {
    "cudnn_attention": ("cudnn", "sm90_"),
    "flash_attention": ("flash",),
    "efficient_attention": ("fmha", "cutlass"),
    "math": ("softmax",),
}


@pytest.mark.parametrize("name", CASES)
def test_the_sdpa_backend_told_is_the_one_that_runs(name: str) -> None:
    workload = Workload(parse(name), torch.device("cuda"), seed=0)
    workload.sdpa()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        workload.sdpa()
        torch.cuda.synchronize()
    launched = " ".join(event.key.lower() for event in profiler.key_averages())
    assert any(part in launched for part in KERNELS[workload.sdpa_backend()]), launched


@pytest.mark.parametrize("name", SUITES["full"]["cuda"])
def test_every_case_of_the_suites_is_right(name: str) -> None:
    assert Workload(parse(name), torch.device("cuda"), seed=0).check().reason == ""


def test_the_driver_tells_clocks() -> None:
    reading = nvml.read(torch.device("cuda", 0))
    if reading is None:
        pytest.skip("NVML tells nothing here")
    assert 100 < reading.sm_mhz < 5000
    assert 0 < reading.celsius < 110


def test_a_delay_is_as_long_as_it_was_told() -> None:
    device = torch.device("cuda")
    workload = Workload(parse(CASES[0]), device, seed=0)
    calls = {"plain": workload.ours, "slow": delayed(workload.ours, device, 100.0)}
    taken = measure(calls, device, rounds=30, warmup=5)
    plain, slow = (sorted(taken[name].samples)[15] for name in calls)
    assert 1.5 < slow / plain < 3
