"""What of a tuned database ships: choices, and what lookups between buckets need."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from suites import SHIPPED

from flashmoe import Problem
from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.verdict.decide import MIN_GAIN
from flashmoe.measure.stats import Interval, ratio_by_process
from flashmoe.planning import database
from flashmoe.planning.database import DEFAULT, SDPA, Entry
from flashmoe.tiles import Tile


class Verdict(NamedTuple):
    """What `tuned_suite.py measure` found of one choice: how many times faster than the default of
    these kernels it is."""

    default: str
    chosen: str
    gain: Interval
    kernels: str

    @property
    def won(self) -> bool:
        return self.chosen != self.default and self.gain.low > 1 and self.gain.value > 1 + MIN_GAIN


def speedup(
    microseconds: Mapping[str, Sequence[Sequence[float]]], name: str, over: str
) -> Interval:
    """How many times faster `name` is than `over`, by [process][round]."""
    seconds = [[[x / 1e6 for x in times] for times in microseconds[key]] for key in (over, name)]
    return ratio_by_process(*seconds)


def candidate_of(entry: Entry) -> Candidate:
    """What was fastest for an entry's problem: a kept default is the one that was kept."""
    name = entry.default if entry.kept else entry.tile or entry.backend
    return Candidate.of_tile(Tile.parse(name)) if ":" in name else Candidate(name)


def read(paths: Sequence[Path]) -> dict[str, Entry]:
    """The entries of databases, those of later ones before those of earlier ones."""
    return {bucket: entry for path in paths for bucket, entry in _parsed(path).items()}


def _parsed(path: Path) -> dict[str, Entry]:
    data = path.read_bytes()
    return database.parse((lzma.decompress(data) if path.suffix == ".xz" else data).decode())


def verdicts(judged: Sequence[Path]) -> dict[str, Verdict]:
    """By bucket, of the last file that has one."""
    found = {}
    for path in judged:
        document = json.loads(path.read_text(encoding="utf-8"))
        kernels = document["fingerprint"]["kernels"]
        for row in document["problems"]:
            samples, candidates = row["microseconds"], row["candidates"]
            if {"default", "chosen"} <= set(samples):
                gain = speedup(samples, "chosen", over="default")
                verdict = Verdict(candidates["default"], candidates["chosen"], gain, kernels)
                found[Problem.from_json(row["problem"]).bucket] = verdict
    return found


def shipped(entry: Entry, verdict: Verdict | None) -> Entry:
    """What plans need of an entry. Where its choice was judged, that decides whether it won or the
    default is kept; what else was measured holds on where kernels and default are the same."""
    faster = {name: ratio for name, ratio in entry.lookup().items() if ratio < 1}
    slim = Entry(
        entry.problem,
        entry.backend,
        entry.tile,
        entry.default,
        speedup_default=None if entry.kept else entry.speedup_default,
        tile_with_lse=entry.tile_with_lse,
        over_default=faster,
        judged=entry.judged,
    )
    choice = candidate_of(entry)
    if verdict is None or verdict.chosen != str(choice):
        return slim
    if (entry.judged, entry.default) != (verdict.kernels, verdict.default):
        faster = {}
    faster.pop(verdict.chosen, None)
    if not verdict.won:
        lse = entry.tile_with_lse if verdict.default == SDPA else ""
        slim = replace(slim, backend=DEFAULT, tile="", speedup_default=None, tile_with_lse=lse)
    else:
        faster[verdict.chosen] = round(1 / verdict.gain.value, 4)
        slim = replace(
            slim,
            backend=choice.backend,
            tile=str(choice.tile or ""),
            speedup_default=(verdict.gain.value, verdict.gain.low, verdict.gain.high),
        )
    return replace(slim, default=verdict.default, over_default=faster, judged=verdict.kernels)


def ship(
    databases: Sequence[Path], judged: Sequence[Path], output: Path, evidence: Path | None
) -> None:
    """The suite's entries, and the same ones whole."""
    buckets = {problem.bucket for problem in SHIPPED}
    whole = {k: replace(e, storage="") for k, e in read(databases).items() if k in buckets}
    found = verdicts(judged)
    entries = {bucket: shipped(entry, found.get(bucket)) for bucket, entry in whole.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(database.text_of(entries), encoding="utf-8")
    if evidence is not None:
        text = database.text_of(whole).encode()
        evidence.write_bytes(lzma.compress(text) if evidence.suffix == ".xz" else text)
    unjudged = sum(k not in found or found[k].chosen != str(candidate_of(whole[k])) for k in whole)
    won = sum(not entry.kept for entry in entries.values())
    print(
        f"{output}: {len(entries)} of the suite's {len(buckets)} problems, {won} with a winner, "
        f"{unjudged} not judged"
    )
