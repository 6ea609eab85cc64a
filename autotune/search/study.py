"""One problem's Optuna study, found again after whatever happened."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage

# A study's attribute: set once its winner was decided and stored.
FINISHED = "finished"


def open_study(
    storage: BaseStorage, name: str, facts: Mapping[str, Any], *, fresh: float | None = None
) -> optuna.Study:
    """The study `name`, made if need be with `facts` as its attributes.

    `fresh` wants none that was finished before that time, in seconds since the epoch: then the next
    generation `name#2`, `name#3`... is used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    generation = 1
    while True:
        full = name if generation == 1 else f"{name}#{generation}"
        study = optuna.create_study(
            storage=storage,
            study_name=full,
            sampler=RandomSampler(),
            direction="minimize",
            load_if_exists=True,
        )
        finished = float(study.user_attrs.get(FINISHED, {}).get("at", math.inf))
        stale = fresh is not None and finished < fresh
        if not stale and not (finished < math.inf and _exists(storage, name, generation)):
            break
        generation += 1
    known = study.user_attrs
    for key, value in facts.items():
        if key not in known:
            study.set_user_attr(key, value)
    return study


def _exists(storage: BaseStorage, name: str, generation: int) -> bool:
    """Whether there is a generation after this one."""
    try:
        storage.get_study_id_from_name(f"{name}#{generation + 1}")
    except KeyError:
        return False
    return True


def study_name(prefix: str, problem: str, facts: Mapping[str, Any]) -> str:
    """A study's name: prefix, problem, and a digest of what its times depend on."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return f"{prefix}/{problem}/{digest}"
