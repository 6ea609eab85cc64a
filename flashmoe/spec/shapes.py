"""Which problems a model runs, and how often: recorded around it, tuned later."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.machine.files import require_writable, write_whole
from flashmoe.spec.problem import Problem
from flashmoe.spec.sequence import sequences_of

if TYPE_CHECKING:
    from flashmoe.spec.call import Call
    from flashmoe.spec.mask import Mask

SCHEMA = 1
# Sums of weights times FLOPs stay finite.
MAX_WEIGHT = 1e18


# Counts of the problems that run while record_problems is active.
recorder: Counter[Problem] | None = None


class ShapesError(ValueError):
    """A file of problems that cannot be understood; the message names it and says why."""


@contextlib.contextmanager
def record_problems(path: str | os.PathLike[str]) -> Iterator[None]:
    """Write the problems that run inside the `with` block, and how often, to a file: forward and
    backward, dense, packed and of caches, the last two with their lengths, for which it waits.

        with flashmoe.record_problems("shapes.json"):
            model(x)

    `python -m flashmoe.autotune --shapes shapes.json` then tunes for that model. Lengths are
    rounded up by at most an eighth, so that similar steps count as one; while a CUDA graph is
    captured they are not read, and each sequence is taken to be as long as may be. Raises OSError
    at once where the file cannot be written.
    """
    global recorder
    require_writable(Path(path))
    outer, recorder = recorder, Counter()
    try:
        yield
    finally:
        counts, recorder = recorder, outer
        if recorder is not None:
            recorder.update(counts)
        write(Path(path), counts)


def record(call: Call, mask: Mask, direction: str = "fwd") -> None:
    """Count the problem of `call`, while record_problems is active."""
    if recorder is None:
        return
    problem = Problem.of_call(call, mask, direction)
    if problem.layout != "dense" and not _is_captured(call):
        bounds = problem.seqlen_q, problem.seqlen_kv
        is_packed = problem.layout.startswith("packed")
        counts = Counter(
            (
                min(_rounded(each.seqlen_q), bounds[0]) if is_packed else bounds[0],
                min(_rounded(each.seqlen_kv), bounds[1]),
            )
            for each in sequences_of(call)
        )
        lengths = tuple((*pair, count) for pair, count in counts.items())
        problem = dataclasses.replace(problem, lengths=lengths)
    recorder[problem] += 1


def _is_captured(call: Call) -> bool:
    import torch

    return call.q.is_cuda and torch.cuda.is_current_stream_capturing()


def _rounded(length: int) -> int:
    """Up to one of eight lengths between two powers of two."""
    step = 1 << max(length.bit_length() - 4, 0)
    return -(-length // step) * step


def write(path: Path, counts: Mapping[Problem, int]) -> None:
    """Problems with their counts, the most frequent first, as read() and --shapes take them."""
    rows = [
        {"weight": count, "problem": problem.to_json()}
        for problem, count in Counter(counts).most_common()
        if problem.flops  # what is empty runs no kernel
    ]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    write_whole(path, f'{{"schema": {SCHEMA}, "problems": [\n{lines}\n]}}\n')


def read(path: Path) -> list[tuple[Problem, float]]:
    """Problems with their weights. Raises OSError, and ShapesError for what is not understood."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, got {data['schema']!r}")
        found = [(_problem(row), _weight(row)) for row in data["problems"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        raise ShapesError(f"{path} is no file of problems: {text}") from None
    if not found:
        raise ShapesError(f"{path} holds no problems")
    return found


def _problem(row: Mapping[str, Any]) -> Problem:
    problem = Problem.from_json(row["problem"])
    for name in ("batch", "seqlen_q", "seqlen_kv"):
        if not getattr(problem, name):
            raise ValueError(f"{name} must be at least 1 in a problem to tune, got 0")
    return problem


def _weight(row: Mapping[str, object]) -> float:
    weight = row.get("weight", 1)
    if (
        not isinstance(weight, int | float)
        or isinstance(weight, bool)
        or not 0 < weight <= MAX_WEIGHT
    ):
        raise ValueError(
            f"weight must be a positive number of at most {MAX_WEIGHT:g}, got {weight!r}"
        )
    return float(weight)
