"""What the timing engine does on a GPU between two calls."""

from __future__ import annotations

import pytest
import torch

from flashmoe.measure.instruction_cache import evictor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_what_evicts_code_runs_on_every_stream_and_touches_no_data() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    evict, data = evictor(device), torch.arange(1 << 20, device=device)
    side = torch.cuda.Stream()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        evict()
        with torch.cuda.stream(side):
            evict()
        torch.cuda.synchronize()
    assert [event.count for event in profiler.key_averages() if event.key == "evict"] == [2]
    assert torch.equal(data, torch.arange(1 << 20, device=device))
