"""Tunes problems one after the other, within the budget: its policy, all of it.

The cheapest problem comes first, for what it leaves over goes to the others, and its winner is the
first that they try. Of the time that is left, a problem gets a share: three quarters of it go to
all alike, since all compile as many tiles and start as many processes, and a quarter by the fourth
root of their FLOPs, since timing takes longer. Within its share, a problem keeps back what its
final needs, at most 35 % (schedule/problem.py), and its search what a second look at the best
needs, at most 30 % of that (search/search.py). A search that finds nothing better for long ends
early. Whoever has too little for eight rounds of a final is starved, and the only one to have a
second turn: from then on a tenth of the budget is kept back, and goes to those. Searches that were
cut short have none, since what a second turn found was not worth what it took
(docs/dev/tuner.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from flashmoe.autotune.running.runner import Bench
from flashmoe.autotune.schedule.place import Options, Place
from flashmoe.autotune.schedule.problem import Starved, Tuning, Unmeasurable
from flashmoe.autotune.schedule.result import Result, Watch
from flashmoe.autotune.schedule.suite import Group
from flashmoe.autotune.search.race import AnchorFailed
from flashmoe.autotune.search.storage import StorageError, failure
from flashmoe.autotune.search.trials import best_so_far
from flashmoe.planning.database import Entry

# A second turn is worth its while with so many times what it takes besides its search.
_WORTH_STARTING = 2.0
# What is kept back for second turns once one is needed, and of the rest the share that is divided
# by what a call of a problem costs.
_KEPT_BACK, _BY_COST = 0.1, 0.25

# Errors whose message says all that there is to say.
_SAY_ALL = (AnchorFailed, Unmeasurable, NotImplementedError, StorageError)

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
    """Results as they come; a second turn's comes after the first's. `now` is the clock of the
    budget, of which `spent` seconds are gone already."""
    deadline = now() + (options.budget - spent)
    watch.begin(options.budget)
    order = sorted(groups, key=lambda group: group.cost)
    found: dict[str, Entry] = {}

    def turn(number: int, until: float) -> Result:
        group, start = order[number], now()
        watch.problem(group.main, number + 1, len(order))
        result = _tune_one(group, place, options, watch, found, until, now, make_bench)
        # What was not decided is no winner that others should try, nor one that is in place.
        if result.best is not None and not result.starved:
            found[group.main.bucket] = result.entry(place.fingerprint, "")
        return dataclasses.replace(result, elapsed=now() - start)

    starved: dict[int, Result] = {}
    # What the turns took besides their searches.
    beside: list[float] = []
    kept_back = _KEPT_BACK * (deadline - now())
    try:
        for number, group in enumerate(order):
            rest = order[number:]
            by_cost = group.cost / sum(other.cost for other in rest)
            share = _BY_COST * by_cost + (1 - _BY_COST) / len(rest)
            left = max(deadline - (kept_back if starved else 0.0) - now(), 0.0)
            result = turn(number, now() + left * share)
            if result.search is not None:
                beside.append(result.elapsed - result.search.seconds)
            if result.starved:
                starved[number] = result
            watch.result(result)
            yield result
        needed = _WORTH_STARTING * min(beside, default=0.0)
        for done, (number, first) in enumerate(starved.items()):
            # The first ones have what they need, if the last ones then have nothing.
            if (left := deadline - now()) >= needed:
                result = turn(number, now() + max(left / (len(starved) - done), needed))
                if result.best is not None and not result.starved:
                    watch.result(result)
                    yield result.after(first)
    except KeyboardInterrupt as interrupted:
        yield from interrupted.args  # what was known of the problem at hand
        raise


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
    unmeasured = partial(Result, group.main, "unmeasured", weight=sum(group.weights))
    bench: Bench | None = None
    watch.seen = ()
    try:
        if now() >= deadline:
            raise Starved("the budget was spent before its turn; raise --budget")
        watch.stage("computing the reference")
        try:
            bench = make_bench(group)
        except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors among them
            raise Unmeasurable(f"the inputs and the reference do not fit: {error}") from error
        return Tuning(group, place, options, watch, found, bench, deadline).run()
    except KeyboardInterrupt:
        best = best_so_far(watch.seen) or "nothing timed yet"
        reason = f"interrupted after {len(watch.seen)} tiles: {best}, not confirmed"
        raise KeyboardInterrupt(unmeasured(reason)) from None
    except Exception as error:  # noqa: BLE001 - one problem's, and others may do better
        reason = failure(error)
        if not reason:
            reason = str(error).strip().split("\n")[0]
            if not isinstance(error, _SAY_ALL):
                reason = f"{type(error).__name__}: {reason}"
        return unmeasured(reason, starved=isinstance(error, Starved))
    finally:
        if bench is not None:
            bench.close()
