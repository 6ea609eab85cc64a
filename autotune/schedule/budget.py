"""Tunes problems one after the other, within the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from flashmoe.autotune.running.runner import Bench
from flashmoe.autotune.schedule.place import Options, Place
from flashmoe.autotune.schedule.problem import Starved, Tuning, Unmeasurable
from flashmoe.autotune.schedule.result import Result, Watch
from flashmoe.autotune.schedule.suite import Group
from flashmoe.autotune.search.race import AnchorFailed
from flashmoe.autotune.search.storage import StorageError, failure
from flashmoe.autotune.search.trials import Search, best_so_far
from flashmoe.planning.database import Entry

# A second turn is worth its while with so many times what it takes besides its search.
_WORTH_STARTING = 2.0
# What is kept back for second turns where there are several groups, and of the rest the share that
# is divided by what a call of a problem costs.
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
    """Results as they come, the cheapest group first: the time it leaves goes to the others, and
    its winner is tried early by them. What is kept back and what is left in the end goes to second
    turns, whose result then comes a second time: of those that had too little to be decided, then
    of those whose search was cut short. `now` is the clock of the budget, of which `spent` seconds
    are gone already."""
    deadline = now() + (options.budget - spent)
    watch.begin(options.budget)
    order = sorted(groups, key=lambda group: group.cost)
    found: dict[str, Entry] = {}

    def turn(number: int, until: float, options: Options, *, more: bool = False) -> Result:
        group, start = order[number], now()
        watch.problem(group.main, number + 1, len(order))
        known = dataclasses.replace(place, stored={**place.stored, **found}) if more else place
        result = _tune_one(group, known, options, watch, found, until, now, make_bench, more)
        # What was not decided is no winner that others should try, nor one that is in place.
        if result.best is not None and not result.starved:
            found[group.main.bucket] = result.entry(place.fingerprint, "")
        return dataclasses.replace(result, elapsed=now() - start)

    first: list[Result] = []
    starved: list[int] = []
    searched: dict[int, Search] = {}
    # What a turn took besides its search.
    beside: dict[int, float] = {}

    def second_turns(
        numbers: Sequence[int], options: Options, takes: Mapping[int, float], *, more: bool
    ) -> Iterator[Result]:
        for done, number in enumerate(numbers):
            left, needed = deadline - now(), _WORTH_STARTING * takes[number]
            if left < needed:
                continue
            # The first ones have what they need, if the last ones then have nothing.
            share = max(left / (len(numbers) - done), needed)
            result = turn(number, now() + share, options, more=more)
            if result.best is not None and not result.starved:
                watch.result(result)
                yield result.after(first[number])

    kept_back = _KEPT_BACK * (deadline - now()) if len(order) > 1 else 0.0
    try:
        for number, group in enumerate(order):
            # A part of the time by what they cost, the rest to all alike: all compile as many
            # tiles, and start processes.
            rest = order[number:]
            if kept_back < _WORTH_STARTING * min(beside.values(), default=0.0):
                kept_back = 0.0  # it pays for no second turn
            by_cost = group.cost / sum(other.cost for other in rest)
            share = _BY_COST * by_cost + (1 - _BY_COST) / len(rest)
            left = max(deadline - kept_back - now(), 0.0)
            result = turn(number, now() + left * share, options)
            first.append(result)
            if result.search is not None:
                beside[number] = result.elapsed - result.search.seconds
            if result.starved:
                starved.append(number)
            elif result.store and result.search is not None:
                searched[number] = result.search
            watch.result(result)
            yield result
        # Of one that was starved its first turn does not tell what another takes.
        least = dict.fromkeys(starved, min(beside.values(), default=0.0))
        yield from second_turns(starved, options, least, more=False)
        # What was to be searched anew, and was not, is so now; the others have been.
        again = dataclasses.replace(options, force=False)
        short = [n for n, search in searched.items() if search.cut_short]
        short.sort(key=lambda n: len(searched[n].trials) / searched[n].space)
        yield from second_turns(short, again, beside, more=True)
    except _Interrupted as interrupted:
        yield interrupted.result
        raise KeyboardInterrupt from None


class _Interrupted(Exception):
    """Ctrl-C, with what was known of the problem at hand."""

    def __init__(self, result: Result) -> None:
        super().__init__()
        self.result = result


def _tune_one(
    group: Group,
    place: Place,
    options: Options,
    watch: Watch,
    found: Mapping[str, Entry],
    deadline: float,
    now: Callable[[], float],
    make_bench: MakeBench,
    more: bool = False,
) -> Result:
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
        return Tuning(group, place, options, watch, found, bench, deadline, more).run()
    except KeyboardInterrupt:
        best = best_so_far(watch.seen) or "nothing timed yet"
        reason = f"interrupted after {len(watch.seen)} tiles: {best}, not confirmed"
        weight = sum(group.weights)
        raise _Interrupted(Result(group.main, "unmeasured", reason, weight=weight)) from None
    except Exception as error:  # noqa: BLE001 - one problem's, and others may do better
        reason = failure(error)
        if not reason:
            reason = str(error).strip().split("\n")[0]
            if not isinstance(error, _SAY_ALL):
                reason = f"{type(error).__name__}: {reason}"
        return Result(
            group.main,
            "unmeasured",
            reason,
            weight=sum(group.weights),
            starved=isinstance(error, Starved),
        )
    finally:
        if bench is not None:
            bench.close()
