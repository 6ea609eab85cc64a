"""Results made up for tests: any speedup, any noise, no measuring."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashmoe.measure.fingerprint import Fingerprint
from flashmoe.measure.timing import Limits
from flashmoe.ratchet.measuring.suite import parse
from flashmoe.ratchet.results.values import CaseResult, PlanUsed, Results, Series

NAMES = (
    "fwd-b2-h8-s512-d64-float32",
    "fwd-b1-h8k2-s1024-d128-bfloat16-causal",
    "fwdbwd-b4-h8-s128x256-d64-float16",
)
FINGERPRINT = Fingerprint(
    device="Some GPU",
    capability="9.0",
    sm_count=132,
    memory=1 << 37,
    power_limit=700.0,
    driver="580.1",
    cuda="13.0",
    torch="2.13.0",
    triton="3.6.0",
    threads=0,
    kernels="0123456789abcdef",
)


def series(rng: np.random.Generator, seconds: float, noise: float, processes: int) -> Series:
    """20 rounds a process; `noise` is the relative spread between processes and between rounds."""
    level = seconds * np.exp(noise * rng.standard_normal((processes, 1)))
    samples = level * np.exp(noise * rng.standard_normal((processes, 20)))
    return Series("ok", tuple(tuple(map(float, process)) for process in samples))


def case(
    name: str, speedup: float = 1.2, noise: float = 1e-4, processes: int = 5, seed: int = 0
) -> CaseResult:
    rng = np.random.default_rng(seed)
    return CaseResult(
        parse(name),
        series(rng, 1e-3 / speedup, noise, processes),
        series(rng, 1e-3, noise, processes),
        (PlanUsed("fwd", "cuda", "sm80:128x64-stages2-warps4", "heuristic"),),
        0.5,
        "cudnn_attention",
    )


def results(
    names: Sequence[str] = NAMES, noise: float = 1e-4, processes: int = 5, seed: int = 0
) -> Results:
    dtypes = ("float32", "bfloat16", "float16")
    return Results(
        f"{seed:032x}",
        "c0ffee" * 6 + "c0ff",
        "2026-01-02T03:04:05+00:00",
        12.5,
        "python -m flashmoe.ratchet bench",
        {"suite": "quick", "device": "cuda"},
        FINGERPRINT,
        {dtype: Limits(7e14, 4e12) for dtype in dtypes},
        tuple(
            case(name, noise=noise, processes=processes, seed=seed + i)
            for i, name in enumerate(names)
        ),
    )
