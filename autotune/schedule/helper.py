"""A worker that searches beside another one, on a GPU of its own, and leaves decisions to that."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial

import torch
from optuna.storages import InMemoryStorage

from flashmoe.autotune.running.isolated import IsolatedBench, Processes
from flashmoe.autotune.running.process import Child, Steps
from flashmoe.autotune.schedule.budget import tune
from flashmoe.autotune.schedule.place import Options, Place
from flashmoe.autotune.schedule.result import Watch
from flashmoe.autotune.schedule.suite import Group
from flashmoe.autotune.search.storage import open_storage


class Helper:
    """In a process of its own: searches what it is told to."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def help(
        self,
        groups: Sequence[Group],
        place: Place,
        storage: str,
        options: Options,
        patience: float,
        workers: int,
    ) -> None:
        """`place` comes without its storage, which cannot be sent."""
        assert options.helping is not None
        place = dataclasses.replace(place, storage=open_storage(storage))
        processes = Processes(place.device, workers=workers)
        make_bench = partial(
            IsolatedBench, processes=processes, seed=options.seed, patience=patience
        )
        processes.warm_up()
        try:
            processes.get_ready(groups, options.backend, patience)
            # So that both are at the same problem most of the time.
            spent = time.time() - options.helping
            for _ in tune(groups, place, options, Watch(), time.perf_counter, make_bench, spent):
                pass
        finally:
            processes.close()


def start(
    groups: Sequence[Group],
    place: Place,
    devices: Sequence[torch.device],
    storage: str,
    options: Options,
    patience: float,
) -> list[Child]:
    """A helper on each of `devices`, for whoever searches at `place` and ends them with close().
    None where nothing is searched."""
    options = dataclasses.replace(options, helping=time.time())
    children = []
    for device in devices if groups else ():
        child = Child("flashmoe.autotune.schedule.helper:Helper")
        there = dataclasses.replace(place, device=device, storage=InMemoryStorage())
        child.send("help", tuple(groups), there, storage, options, patience, len(devices) + 1)
        children.append(child)
    return children


def failure(child: Child) -> str:
    """Why a helper has ended, if it did so by an error; empty for one that is at it or done."""
    try:
        for _ in range(2):  # that it is up, then that it is done
            if not child.answers_within(0.0):
                return ""
            child.wait_until_up(0.0)
        child.receive(0.0)
    except Exception as error:  # noqa: BLE001 - told, whatever it is
        return str(error)
    return ""
