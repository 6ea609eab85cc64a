"""Writes sm90.txt, the tiles of the Hopper kernel that are compiled in:

    python csrc/instances/generate.py

those of covering.txt, from which untuned problems choose, and of each shipped database the tiles
that are the default of one of its problems, or won one by more than 1 %. Build again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from flashmoe.planning import database
from flashmoe.tiles import Tile, instances

FOLDER = Path(__file__).parent
MIN_SPEEDUP = 1.01
_HEAD = f"""\
# Written by generate.py: tiles of the Hopper forward kernel that are compiled ahead of time, each
# for float16 and bfloat16. The others are compiled when they are asked for.
# A line may end with what its variant is for (csrc/common/variant.h): local ones compute windows;
# and last with the head_dim of V where it has its own.
# head_dim {" ".join(instances.COLUMNS["sm90"])}
"""


def covering(text: str) -> Iterator[str]:
    """The lines of covering.txt without its comments."""
    for line in text.splitlines():
        if words := line.partition("#")[0].split():
            yield " ".join(words)


def earned(entries: Mapping[str, database.Entry]) -> Iterator[str]:
    """The lines of a tuned database's defaults and winners that are worth their place."""
    for entry in entries.values():
        name = entry.default if entry.kept else entry.tile
        gain = entry.speedup_default
        if name.startswith("sm90:") and (entry.kept or gain is None or gain[0] > MIN_SPEEDUP):
            yield instances.line_of(entry.problem, Tile.parse(name))


def generated() -> str:
    """The text of sm90.txt: by head dimension, else as they come."""
    found = [*covering((FOLDER / "covering.txt").read_text(encoding="utf-8"))]
    for path in sorted(database.shipped_path("any").parent.glob("*.json")):
        found += earned(database.load(path))
    lines = sorted(dict.fromkeys(found), key=lambda line: int(line.split()[0]))
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    (FOLDER / "sm90.txt").write_text(generated(), encoding="utf-8")
