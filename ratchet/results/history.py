"""The history of accepted runs: one JSON object a line, appended and never rewritten."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashmoe.measure.stats import Interval
from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.gate.integrity import COMPARED, FORMERLY, how_timed
from flashmoe.ratchet.results.fields import get, positive
from flashmoe.ratchet.results.files import read_text
from flashmoe.ratchet.results.values import Results


@dataclass(frozen=True, slots=True)
class Entry:
    """One run: when, of which source, where and how it was timed, and each case's speedup over
    SDPA."""

    run: str
    started: str
    commit: str
    fingerprint: dict[str, Any]
    speedups: dict[str, Interval]

    @property
    def environment(self) -> tuple[Any, ...]:
        """What has to be the same for two entries to be compared."""
        kind = "cpu" if self.fingerprint.get("threads") else "cuda"
        timing = self.fingerprint.get("timing", FORMERLY[kind])
        return (*(self.fingerprint.get(name) for name in COMPARED), timing)

    def to_json(self) -> dict[str, Any]:
        speedups = {name: interval.to_json() for name, interval in self.speedups.items()}
        return {**asdict(self), "speedups": speedups}


def entry(results: Results) -> Entry:
    """Cases without figures are left out."""
    speedups = {case.name: case.speedup for case in results.cases if case.ok}
    fingerprint = {**results.fingerprint.to_json(), "timing": how_timed(results)}
    return Entry(results.run, results.started, results.commit, fingerprint, speedups)


def append(path: Path, new: Entry) -> bool:
    """Whether it was added: a run that is there already is not added twice."""
    if path.exists() and any(old.run == new.run for old in load(path)):
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as opened:
            # A line that was written by hand, or cut, may lack its end.
            if opened.seek(0, os.SEEK_END):
                opened.seek(-1, os.SEEK_END)
            ended = opened.read() in (b"", b"\n")
            line = json.dumps(new.to_json(), allow_nan=False) + "\n"
            opened.write(("" if ended else "\n").encode() + line.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return True


def load(path: Path) -> list[Entry]:
    """In the order of time. Raises UserError naming the path, the line and what is wrong."""
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            found.append(_entry(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is damaged: {error}") from None
    return sorted(found, key=lambda one: one.started)


def _entry(data: Any) -> Entry:
    run, started, commit = (get(data, key, str) for key in ("run", "started", "commit"))
    speedups = {}
    for name, values in get(data, "speedups", dict).items():
        if not isinstance(values, list) or len(values) != 3:
            raise ValueError(f"speedups[{name!r}] must be [value, low, high], got {values!r}")
        keyed = dict(zip(("value", "low", "high"), values, strict=True))
        speedups[name] = Interval(*(positive(keyed, key) for key in keyed))
    return Entry(run, started, commit, get(data, "fingerprint", dict), speedups)
