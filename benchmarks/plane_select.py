"""Chooses the sm90 tiles that are compiled in: those that cover the plane best.

    python benchmarks/plane_select.py benchmarks/results/plane-nvidia-h200.jsonl.xz --tiles 40

Prints csrc/instances/covering.txt. The tiles that were the defaults of benchmarks/hopper/rows.py
come first, so that no row gets slower. Others are added one by one, each time the one that takes
most off the time of all problems, as the mean of its logarithm, if the best tile is chosen
everywhere; before all, what keeps the table's problems near their best. A problem runs on the
smallest head_dim that is compiled in and holds its own, or on sm80 tiles, which are there anyway.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hopper.rows import ROWS
from plane_fit import Row, load

from flashmoe.prediction.kernels import tile_name
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile, instances

# 48, 160 and 224 would save less than more tiles for the others do.
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 256)
_DEFAULTS = Path(__file__).parent / "defaults-0a46d67.json"
# How far the table's problems may be from their best, and how much more they count until they are
# that near.
_TABLE_LOSS, _TABLE_WEIGHT = 1.03, 100.0


_HEAD = (
    "# Tiles of the Hopper kernel among which every problem finds one that is nearly the fastest.",
    f"# head_dim {' '.join(instances.COLUMNS['sm90'])}",
)


class Times(NamedTuple):
    """What a problem takes with each sm90 tile of its head_dim, and with the best of sm80's."""

    name: str
    head_dim: int
    tiles: dict[str, float]
    other: float


def times_of(rows: Sequence[Row], head_dims: Sequence[int]) -> list[Times]:
    found = []
    for row in rows:
        head_dim = next(d for d in head_dims if d >= row.problem.head_dim)
        us = row.microseconds
        tiles = {
            name: t for name, t in us.items() if name.endswith(f"@{head_dim}") and "sm90" in name
        }
        other = min(t for name, t in us.items() if name.startswith("sm80"))
        found.append(Times(row.name, head_dim, tiles, other))
    return found


def defaults() -> list[str]:
    """The names of the sm90 tiles that the rows ran on by default."""
    rows = {row.problem for row in ROWS}
    found = json.loads(_DEFAULTS.read_text(encoding="utf-8"))["problems"]
    return list(
        dict.fromkeys(
            tile_name(Tile.parse(one["default"]), one["problem"]["head_dim"])
            for one in found
            if Problem.from_json(one["problem"]) in rows
        )
    )


def choose(times: Sequence[Times], count: int, first: Sequence[str]) -> list[str]:
    """The names of `count` tiles, `first` and then the most useful."""
    chosen = list(first)
    now = [min([t.other, *(t.tiles[n] for n in chosen if n in t.tiles)]) for t in times]
    while len(chosen) < count:
        gains: Counter[str] = Counter()
        for t, best in zip(times, now, strict=True):
            far = best > min(t.other, *t.tiles.values()) * _TABLE_LOSS
            weight = _TABLE_WEIGHT if far and t.name.startswith("table") else 1.0
            for name, us in t.tiles.items():
                if us < best:
                    gains[name] += weight * math.log(best / us)
        if not gains:
            break
        name, _ = gains.most_common(1)[0]
        chosen.append(name)
        now = [min(best, t.tiles.get(name, best)) for t, best in zip(times, now, strict=True)]
    return chosen


def loss(times: Sequence[Times], chosen: Sequence[str]) -> float:
    """By how much the best chosen tile is slower than the best of all, in the geometric mean."""
    logs = []
    for t in times:
        best = min([t.other, *(t.tiles[name] for name in chosen if name in t.tiles)])
        logs.append(math.log(best / min(t.other, *t.tiles.values())))
    return math.expm1(sum(logs) / len(logs))


def lines_of(chosen: Sequence[str]) -> list[str]:
    lines = []
    for name in chosen:
        text, _, head_dim = name.partition("@")
        lines.append(instances.line(int(head_dim), Tile.parse(text)))
    return sorted(lines, key=lambda line: int(line.split()[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, nargs="+", help="what plane.py wrote")
    parser.add_argument("--tiles", type=int, default=40)
    parser.add_argument("--head-dims", default=",".join(map(str, HEAD_DIMS)))
    arguments = parser.parse_args()
    rows, _ = load(arguments.measured)
    times = times_of(rows, [int(d) for d in arguments.head_dims.split(",")])
    chosen = choose(times, arguments.tiles, defaults())
    print(*_HEAD, *lines_of(chosen), sep="\n")
    print(f"{100 * loss(times, chosen):.2f} % slower than with all tiles", file=sys.stderr)


if __name__ == "__main__":
    main()
