"""Causal launches of the Hopper kernel draw their blocks from counters: launches that wait, run
beside one another, or are replayed by two instances of a graph."""

from __future__ import annotations

import ctypes

import pytest
import torch
from support import assert_matches_reference
from torch import Tensor

from flashmoe import flash_attn_func

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

# More blocks of rows than the GPU holds at once, so that they are drawn.
SHAPE = (4, 2048, 16, 64)


def inputs(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)
        for _ in range(3)
    ]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = flash_attn_func(q, k, v, causal=True, backend="cuda")
    assert isinstance(out, Tensor)
    return out


@pytest.fixture
def expected() -> tuple[list[Tensor], Tensor]:
    q, k, v = inputs()
    out = attend(q, k, v)
    assert_matches_reference(out[:1], None, q[:1], k[:1], v[:1], causal=True)
    return [q, k, v], out


def test_a_launch_may_wait_while_thousands_of_others_run(expected) -> None:
    (q, k, v), want = expected
    small = inputs((8, 512, 16, 64), seed=1)
    want_small = attend(*small)
    torch.cuda.synchronize()
    waiting, busy = torch.cuda.Stream(), torch.cuda.Stream()
    for launches in (2**14 - 1, 2**14, 3000):
        gate = torch.cuda.Event()
        with torch.cuda.stream(busy):
            torch.cuda._sleep(1_000_000)
            for _ in range(launches - 64):
                attend(*small)
            gate.record()
        waiting.wait_event(gate)
        with torch.cuda.stream(waiting):
            late = [attend(q, k, v) for _ in range(8)]
        with torch.cuda.stream(busy):
            beside = [attend(*small) for _ in range(128)]
        torch.cuda.synchronize()
        assert all(torch.equal(x, want) for x in late)
        assert all(torch.equal(x, want_small) for x in beside)


def test_two_instances_of_a_graph_may_run_at_once(expected) -> None:
    (q, k, v), want = expected
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        out = attend(q, k, v)
    instances = []
    for _ in range(2):
        instance = ctypes.c_void_p()
        error = cudart().cudaGraphInstantiate(
            ctypes.byref(instance), ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_ulonglong(0)
        )
        assert error == 0
        instances.append(instance)
    streams = [torch.cuda.Stream() for _ in instances]
    torch.cuda.synchronize()
    for _ in range(200):
        out.fill_(float("nan"))
        torch.cuda.synchronize()
        for instance, stream in zip(instances, streams, strict=True):
            assert cudart().cudaGraphLaunch(instance, ctypes.c_void_p(stream.cuda_stream)) == 0
        torch.cuda.synchronize()
        assert torch.equal(out, want)
    # And the counter is left as any launch needs it.
    for instance in instances:
        out.fill_(float("nan"))
        assert cudart().cudaGraphLaunch(instance, ctypes.c_void_p(streams[0].cuda_stream)) == 0
        torch.cuda.synchronize()
        assert torch.equal(out, want)


def cudart() -> ctypes.CDLL:
    """The runtime library that torch loaded."""
    with open("/proc/self/maps") as maps:
        path = next(line.split()[-1] for line in maps if "libcudart" in line)
    return ctypes.CDLL(path)
