"""--dry-run: the space, and an estimate of the time, from one tile that is really timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from flashmoe.autotune.running.candidate import default_candidate, legality, searched_backends
from flashmoe.autotune.schedule.budget import MakeBench
from flashmoe.autotune.schedule.suite import Group
from flashmoe.autotune.search.search import FINALISTS, estimate
from flashmoe.autotune.verdict import final

_ROUNDS = 5


def lines(
    groups: Sequence[Group], device: torch.device, backend: str | None, make_bench: MakeBench
) -> Iterator[str]:
    """Two lines a group and one for them all together. Nothing is stored."""
    total = 0.0
    for group in groups:
        problem = group.main
        space = legality(problem, device, searched_backends(problem, device, backend))
        yield f"{problem.label}: {space}"
        bench = make_bench(group)
        try:
            default = default_candidate(problem, device)
            prepared = bench.prepare(default)
            if prepared.status != "ok":
                yield f"  the default, {default}, is {prepared.status}: {prepared.reason}"
                continue
            start = bench.now()
            measured = bench.measure({str(default): default}, rounds=_ROUNDS, warmup=1)
            sample = (bench.now() - start) / (len(measured[str(default)].samples) + 1)
            search = estimate(space.legal, prepared.samples[0], sample)
            last = final.seconds_wanted(sample, FINALISTS + 3, bench.fresh_seconds)
            total += search + last
            yield (
                f"  about {search:.0f} s to try all ({prepared.samples[0]:.2f} s to compile and "
                f"check a tile, one by one; {sample * 1e3:.2f} ms a sample), "
                f"{last:.0f} s for the final"
            )
        finally:
            bench.close()
    yield f"about {total:.0f} s for everything; --budget cuts what does not fit"
