"""Tunes problems one after the other, within the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from flashmoe.autotune.bench import Bench
from flashmoe.autotune.place import Options, Place
from flashmoe.autotune.race import AnchorFailed
from flashmoe.autotune.result import Result, Watch
from flashmoe.autotune.suite import Group
from flashmoe.autotune.tuning import Tuning, Unmeasurable
from flashmoe.database import Entry

MakeBench = Callable[[Group], Bench]


def tune(
    groups: Sequence[Group],
    place: Place,
    options: Options,
    watch: Watch,
    now: Callable[[], float],
    make_bench: MakeBench,
    spent: float = 0.0,
) -> Iterator[Result]:
    """Results as they come, the cheapest group first: the time it leaves goes to the others, and
    its winner is tried early by them. `now` is the clock of the budget, of which `spent` seconds
    are gone already."""
    deadline = now() + options.budget - spent
    watch.begin(options.budget)
    order = sorted(groups, key=lambda group: group.cost)
    found: dict[str, Entry] = {}
    for number, group in enumerate(order):
        watch.problem(group.main, number + 1, len(order))
        start = now()
        # Half of the time by what they cost, half to all alike, for all start processes.
        rest = order[number:]
        total = sum(other.cost for other in rest)
        share = (group.cost / total + 1 / len(rest)) / 2
        mine = start + (deadline - start) * share
        result = _tune_one(group, place, options, watch, found, mine, now, make_bench)
        result = dataclasses.replace(result, elapsed=now() - start)
        if result.best is not None:
            found[group.main.bucket] = result.entry(place.fingerprint, "")
        watch.result(result)
        yield result


def _tune_one(
    group: Group,
    place: Place,
    options: Options,
    watch: Watch,
    found: Mapping[str, Entry],
    deadline: float,
    now: Callable[[], float],
    make_bench: MakeBench,
) -> Result:
    bench: Bench | None = None
    try:
        if now() >= deadline:
            raise Unmeasurable("the budget was spent before its turn; raise --budget")
        watch.stage("computing the reference")
        try:
            bench = make_bench(group)
        except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors among them
            raise Unmeasurable(f"the inputs and the reference do not fit: {error}") from error
        return Tuning(group, place, options, watch, found, bench, deadline).run()
    except (AnchorFailed, Unmeasurable, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        return Result(group.main, "unmeasured", reason, weight=sum(group.weights))
    finally:
        if bench is not None:
            bench.close()
