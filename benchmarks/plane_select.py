"""Chooses the sm90 tiles that are compiled in: those that cover the plane best.

    python benchmarks/plane_select.py benchmarks/results/plane-nvidia-h200.jsonl.xz --tiles 44

Prints csrc/instances/covering.txt. Tiles are added one by one, each time the one that takes most
off the time of all problems, as the mean of its logarithm, if the best tile is chosen everywhere;
first what keeps the rows of benchmarks/hopper/rows.py within half a percent of their best. A
problem runs on the smallest head_dim that is compiled in and holds its own, or on sm80 tiles, which
are there anyway.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from plane_fit import Row, load

from flashmoe import _extension
from flashmoe.tiles import Tile

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 256)
# How far the rows may be from their best, and how much more they count until they are that near.
_ROW_LOSS, _ROW_WEIGHT = 1.005, 100.0


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


def choose(times: Sequence[Times], count: int) -> list[str]:
    """The names of `count` tiles, the most useful first."""
    now = [t.other for t in times]
    chosen: list[str] = []
    while len(chosen) < count:
        gains: Counter[str] = Counter()
        for t, best in zip(times, now, strict=True):
            least = min(t.tiles.values())
            near = best <= least * _ROW_LOSS
            weight = _ROW_WEIGHT if t.name.startswith("row") and not near else 1.0
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
    fields = _extension.load().fields["sm90"]
    lines = []
    for name in chosen:
        text, _, head_dim = name.partition("@")
        tile = Tile.parse(text)
        lines.append((int(head_dim), " ".join(str(int(getattr(tile, field))) for field in fields)))
    return [f"{head_dim} {text}" for head_dim, text in sorted(lines, key=lambda line: line[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, nargs="+", help="what plane.py wrote")
    parser.add_argument("--tiles", type=int, default=44)
    parser.add_argument("--head-dims", default=",".join(map(str, HEAD_DIMS)))
    arguments = parser.parse_args()
    rows, _ = load(arguments.measured)
    times = times_of(rows, [int(d) for d in arguments.head_dims.split(",")])
    chosen = choose(times, arguments.tiles)
    print(*lines_of(chosen), sep="\n")
    print(f"# {100 * loss(times, chosen):.2f} % slower than with all that were measured")


if __name__ == "__main__":
    main()
