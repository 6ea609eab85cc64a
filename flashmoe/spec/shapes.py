"""Which problems a model runs, and how often: recorded around it, tuned later."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flashmoe.machine.files import require_writable, write_whole
from flashmoe.spec.problem import Problem

SCHEMA = 1
# Sums of weights times FLOPs stay finite.
MAX_WEIGHT = 1e18


# Counts of the problems that run while record_problems is active; who runs one adds to it.
recorder: Counter[Problem] | None = None


class ShapesError(ValueError):
    """A file of problems that cannot be understood; the message names it and says why."""


@contextlib.contextmanager
def record_problems(path: str | os.PathLike[str]) -> Iterator[None]:
    """Write the forward problems that run inside the `with` block, and how often, to a file:

        with flashmoe.record_problems("shapes.json"):
            model(x)

    `python -m flashmoe.autotune --shapes shapes.json` then tunes for that model. Raises OSError at
    once where the file cannot be written.
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
