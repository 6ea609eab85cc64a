"""Tunes problems one after the other, within the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from flashmoe.autotune.bench import Bench
from flashmoe.autotune.place import Options, Place
from flashmoe.autotune.race import AnchorFailed
from flashmoe.autotune.result import Result, Watch
from flashmoe.autotune.suite import Group
from flashmoe.autotune.trials import best_so_far
from flashmoe.autotune.tuning import Starved, Tuning, Unmeasurable
from flashmoe.database import Entry

# A second turn is worth its while with this share of the budget, and with so many times what it
# takes besides its search.
_WORTH_MORE, _WORTH_STARTING = 0.1, 2.0

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
    its winner is tried early by them. Time that is left in the end goes to those that had too
    little, those that could not be decided first; their result then comes a second time. `now` is
    the clock of the budget, of which `spent` seconds are gone already."""
    deadline = now() + options.budget - spent
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

    starved: list[int] = []
    # Of searches that should go on, how much of their space they have seen.
    coverage: dict[int, float] = {}
    # What a turn took besides its search.
    beside: dict[int, float] = {}
    try:
        for number, group in enumerate(order):
            # Half of the time by what they cost, half to all alike, for all start processes.
            rest = order[number:]
            share = (group.cost / sum(other.cost for other in rest) + 1 / len(rest)) / 2
            result = turn(number, now() + (deadline - now()) * share, options)
            if result.search is not None:
                beside[number] = result.elapsed - result.search.seconds
            if result.starved:
                starved.append(number)
            elif result.store and result.search is not None and result.search.cut_short:
                coverage[number] = len(result.search.trials) / result.search.space
            watch.result(result)
            yield result
        short = sorted(coverage, key=lambda number: coverage[number])
        # What was to be searched anew, and was not, is so now; the others have been.
        again = dataclasses.replace(options, force=False)
        # Of one that was starved its first turn does not tell what another takes.
        least = dict.fromkeys(starved, min(beside.values(), default=0.0))
        for numbers, how, worth, takes in (
            (starved, options, 0.0, least),
            (short, again, _WORTH_MORE * options.budget, beside),
        ):
            for done, number in enumerate(numbers):
                left = deadline - now()
                share = left / (len(numbers) - done)
                if left < worth or share < _WORTH_STARTING * takes[number]:
                    continue
                result = turn(number, now() + share, how, more=True)
                if result.best is not None and not result.starved:
                    watch.result(result)
                    yield result
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
        reason = str(error).strip().split("\n")[0]
        if not isinstance(error, AnchorFailed | Unmeasurable | NotImplementedError):
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
