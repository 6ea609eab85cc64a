"""The final: the finalists once more, on fresh samples from fresh processes, and who won."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.running.runner import Bench
from flashmoe.autotune.search.race import AnchorFailed
from flashmoe.autotune.verdict.decide import AGAIN, MIN_ROUNDS, Decision, Samples, decide

ROUNDS = 300
# Beside the first call, which refresh makes.
WARMUP = 1
# The process is what varies most: so many decide, where there is time for them.
PROCESSES = 2
# Of the time that is left, the least that one of them is worth being started for.
_LEAST_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Final:
    """The decision, with the samples it rests on."""

    decision: Decision
    samples: Samples


def hold(
    bench: Bench,
    anchor: Candidate,
    in_place: Candidate | None,
    rivals: Sequence[Candidate],
    deadline: float,
    *,
    rounds: int = ROUNDS,
    processes: int = PROCESSES,
    grace: float = 0.0,
) -> Final:
    """Time the anchor (twice), what is in place and the rivals, interleaved, in fresh `processes`
    (0: in the one that runs). Where too little is left for the first one, it has `grace` seconds,
    but ends no more than that past the deadline. AnchorFailed when the anchor cannot be timed."""
    field = {AGAIN: anchor, str(anchor): anchor}
    field |= {str(candidate): candidate for candidate in (*filter(None, [in_place]), *rivals)}
    parts: list[dict[str, tuple[float, ...]]] = []
    for part in range(max(processes, 1)):
        if processes:
            # The first one told what another one takes.
            if parts and bench.fresh_seconds > deadline - bench.now():
                break
            bench.refresh(field)
        measured = bench.measure(
            field,
            rounds=-(-rounds // max(processes, 1)),
            warmup=WARMUP,
            max_seconds=max(
                _share(bench, deadline, max(processes, 1) - part),
                0.0 if parts else min(grace, deadline + grace - bench.now()),
            ),
        )
        for name in (str(anchor), AGAIN):
            if measured[name].status != "ok":
                raise AnchorFailed(f"{anchor} failed: {measured[name].reason}")
        field = {name: c for name, c in field.items() if measured[name].status == "ok"}
        # To the nanosecond: the database need not carry more.
        parts.append({name: tuple(round(x, 9) for x in measured[name].samples) for name in field})
    samples = {name: tuple(part[name] for part in parts) for name in field}
    base = in_place if in_place is not None and str(in_place) in samples else anchor
    alive = [c for c in (anchor, *rivals) if str(c) in samples]
    return Final(decide(samples, base, anchor, alive), samples)


def _share(bench: Bench, deadline: float, parts: int) -> float:
    """Seconds for one of the `parts` that are left, with what starting the later ones takes; all,
    where that would take most of the time."""
    left = max(deadline - bench.now(), 0.0)
    share = (left - bench.fresh_seconds * (parts - 1)) / parts
    return share if share > _LEAST_SHARE * left else left


def seconds_wanted(sample_seconds: float, candidates: int, fresh_seconds: float) -> float:
    """What a final with all its rounds takes."""
    rounds = ROUNDS + PROCESSES * WARMUP
    return sample_seconds * rounds * candidates + PROCESSES * fresh_seconds


def seconds_needed(sample_seconds: float) -> float:
    """What one candidate costs in the shortest final that may change anything."""
    return sample_seconds * (MIN_ROUNDS + WARMUP)
