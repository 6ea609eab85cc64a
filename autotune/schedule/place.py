"""How and where to tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from optuna.storages import BaseStorage, InMemoryStorage

from flashmoe.measure.fingerprint import Fingerprint
from flashmoe.planning.database import Entry

# A stored result holds while these agree, and trials share a study; the rest of the fingerprint is
# for the reader.
FINGERPRINT_FIELDS = ("device", "kernels", "torch", "triton", "cuda", "threads")


@dataclass(frozen=True, slots=True)
class Options:
    """How to tune. `backend` limits the search; `trials` is in tiles a problem, `budget` in
    seconds over all problems; `sampler` is one of SAMPLERS (None: by what fits the time); `force`
    searches what is stored already, in a new study; `study` begins the studies' names.
    `helping`: only search, for the run that began at this time, in seconds since the epoch."""

    backend: str | None = None
    trials: int | None = None
    budget: float = 100.0
    seed: int = 0
    force: bool = False
    sampler: str | None = None
    study: str = "flashmoe"
    helping: float | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where to tune and what is known there: the device, its fingerprint, the entries that plans
    use now by bucket, those of other device models, and the studies' storage."""

    device: torch.device
    fingerprint: Fingerprint
    stored: Mapping[str, Entry] = field(default_factory=dict)
    elsewhere: Sequence[Entry] = ()
    storage: BaseStorage = field(default_factory=InMemoryStorage)
    storage_name: str = ""

    def is_current(self, bucket: str) -> bool:
        """Whether what is stored was measured with this very software on this very device."""
        entry = self.stored.get(bucket)
        return entry is not None and not self.fingerprint.differences(
            dict(entry.fingerprint), FINGERPRINT_FIELDS
        )
