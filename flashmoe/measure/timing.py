"""The one timing engine: candidates interleaved, order shuffled every round, raw samples kept."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from flashmoe.measure.instruction_cache import evictor

# How a sample is taken, by the kind of device: times that were taken otherwise do not compare.
HOW = {"cpu": "wall time", "cuda": "device time, L2 flushed, code evicted"}
STATUSES = ("ok", "illegal", "unsupported", "wrong", "failed", "timeout")
# Larger than any L2 (H200: 60 MB), zeroed before every timed call so that none finds its data.
_FLUSH_BYTES = 256 << 20
# About 0.3 ms of idle GPU work, so that the host has enqueued the call before it starts.
SLEEP_CYCLES = 500_000


@dataclass(frozen=True, slots=True)
class Measurement:
    """Raw samples in seconds, one a round, with what became of the candidate.

    status is one of STATUSES; for any but `ok`, `reason` says why and `samples` holds what was
    taken before it went wrong.
    """

    status: str
    samples: tuple[float, ...] = ()
    reason: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {self.status!r}")


class DeviceLost(RuntimeError):
    """What ran left the device unusable for this process, as an illegal memory access does. `name`
    is the candidate's; the message is its error."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def usable(device: torch.device) -> bool:
    """Whether this process can still use `device`: an illegal access ends a CUDA context."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True


@dataclass(slots=True)
class _Candidate:
    call: Callable[[], object]
    samples: list[float] = field(default_factory=list)
    reason: str = ""


def measure(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 3,
    seed: int = 0,
    max_seconds: float | None = None,
    after_round: Callable[[], None] | None = None,
    before_sample: Callable[[str], None] | None = None,
    sleep_cycles: int = SLEEP_CYCLES,
) -> dict[str, Measurement]:
    """Time every candidate once a round, in an order shuffled each round.

    On CUDA a sample is device time between events around one call, with L2 flushed, none of its
    code in an instruction cache, and the host running ahead; on a CPU it is wall time. A candidate
    that raises is `failed` from then on and the others go on. `max_seconds` ends the rounds early
    (after at least one), for all candidates alike, so samples stay paired by round. `before_sample`
    is told whose turn it is, and `after_round` is called after each timed round. `sleep_cycles`:
    more of them where calls take the host longer to launch. Raises DeviceLost when a failure left
    the device unusable.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    sample: Callable[[Callable[[], object]], float] = _cpu_sample
    if device.type == "cuda":
        sample = cuda_sampler(device, sleep_cycles=sleep_cycles)
    running = {name: _Candidate(call) for name, call in candidates.items()}
    rng = random.Random(seed)
    deadline = None if max_seconds is None else time.perf_counter() + max_seconds
    for number in range(-warmup, rounds):
        order = [name for name, candidate in running.items() if not candidate.reason]
        rng.shuffle(order)
        for name in order:
            candidate = running[name]
            if before_sample is not None:
                before_sample(name)
            try:
                seconds = sample(candidate.call)
            except Exception as error:
                candidate.reason = f"{type(error).__name__}: {error}"
                if not usable(device):
                    raise DeviceLost(name, candidate.reason) from error
                continue
            if number >= 0:
                candidate.samples.append(seconds)
        if after_round is not None and number >= 0:
            after_round()
        if deadline is not None and number >= 0 and time.perf_counter() >= deadline:
            break
    return {
        name: Measurement("failed" if c.reason else "ok", tuple(c.samples), c.reason)
        for name, c in running.items()
    }


def _cpu_sample(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_sampler(
    device: torch.device, *, evict_code: bool = True, sleep_cycles: int = SLEEP_CYCLES
) -> Callable[[Callable[[], object]], float]:
    """What times one call on `device`, in seconds, as `measure` does; without `evict_code` a call
    may find its code in the instruction caches."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    evict = evictor(flush.device)
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def sample(call: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            flush.zero_()
            if evict_code:
                evict()
            torch.cuda._sleep(sleep_cycles)  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    return sample


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device sustains in this run: matmul rate in FLOP/s and copy rate in bytes/s (bytes
    read plus bytes written)."""

    matmul_flops: float
    copy_bytes: float

    def floor(self, flops: float, nbytes: float) -> float:
        """Seconds below which no kernel runs: max of the arithmetic and the traffic time."""
        return max(flops / self.matmul_flops, nbytes / self.copy_bytes)


def measure_limits(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> Limits:
    """Measure both limits: on CUDA an 8192^3 matmul and a 1 GiB copy, on a CPU 1024^3 and 128 MiB
    (an aarch64 or x86 laptop finishes that in well under a second).

    A CPU's are float32's whatever the dtype: most have no 16-bit matrix units, where torch's own
    16-bit matmul is a hundred times slower than any kernel here."""
    n, nbytes = 8192, 1 << 30
    if device.type != "cuda":
        n, nbytes, dtype = 1024, 128 << 20, torch.float32
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    source = torch.ones(nbytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    measured = measure(
        {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, rounds=rounds
    )
    for name, measurement in measured.items():
        if measurement.status != "ok":
            raise RuntimeError(f"measuring the {name} limit failed: {measurement.reason}")
    matmul, copy = (sorted(measured[x].samples)[rounds // 2] for x in ("matmul", "copy"))
    return Limits(2.0 * n**3 / matmul, 2.0 * nbytes / copy)


def limits_of(device: torch.device, dtypes: Iterable[str]) -> dict[str, Limits]:
    """Limits by dtype; a CPU's do not depend on it."""
    names = sorted({*dtypes})
    if device.type == "cpu":
        return dict.fromkeys(names, measure_limits(device, torch.float32))
    return {name: measure_limits(device, getattr(torch, name)) for name in names}
