"""`apply`: winners into the list of tiles that are compiled ahead of time."""

from __future__ import annotations

import runpy
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from flashmoe.autotune.cli.arguments import DONE, UsageError, command_parser, device_name, usable
from flashmoe.autotune.running.candidate import known_tile
from flashmoe.planning import database
from flashmoe.tiles import instances

# Where the tiles of a kernel are added; sm90.txt is generated from its list.
_LISTS = {"sm80": "sm80.txt", "sm90": "covering.txt"}


def run(words: Sequence[str]) -> int:
    """Put each head dimension's winners first in csrc/instances."""
    parser = command_parser(
        "apply",
        "Write the winning CUDA tiles of a device into the lists of tiles that are "
        "compiled in, first of their head dimension; build again afterwards. The first is the "
        "default of the mma.sync kernel; the Hopper kernel has its defaults by length in "
        "flashmoe/backends/cuda.py. Where winners of one head dimension differ, the one that won "
        "the most problems comes first.",
    )
    parser.add_argument(
        "--instances",
        type=Path,
        default=Path("csrc/instances"),
        metavar="DIR",
        help="folder of the lists (default: %(default)s, from the repository's root)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only tell what would change")
    args = parser.parse_args(words)
    name = device_name(args)
    # What won in a shipped database is compiled in already where it is worth it.
    winners = winning_lines(database.load(database.user_path(name)))
    if not winners:
        raise UsageError(f"no CUDA tile has won on {name}: there is nothing to compile in")
    for kernel, lines in winners.items():
        path = args.instances / _LISTS[kernel]
        with usable(f"--instances must be the folder of {path.name}", args.instances):
            before = path.read_text(encoding="utf-8")
        after = with_first(before, lines)
        if after == before:
            print(f"{path}: as it should be")
            continue
        if not args.dry_run:
            path.write_text(after, encoding="utf-8")
        old = set(before.splitlines())
        changed = [line for line in after.splitlines() if line not in old]
        print(f"{path}: {'would move or add' if args.dry_run else 'moved or added'} winners")
        for line in changed:
            print(f"  new: {line}")
        generate = args.instances / "generate.py"
        if kernel == "sm90" and not args.dry_run and generate.exists():
            runpy.run_path(str(generate), run_name="__main__")
    return DONE


def winning_lines(entries: Mapping[str, database.Entry]) -> dict[str, dict[int, list[str]]]:
    """By kernel and head dimension of its instances, the lines of the tiles that won, most frequent
    first."""
    counts: dict[str, dict[int, Counter[str]]] = {}
    for entry in entries.values():
        tile = known_tile(entry.best_tile)
        if tile is None or tile.kernel not in instances.COLUMNS:
            continue
        line = instances.line_of(entry.problem, tile)
        of_kernel = counts.setdefault(tile.kernel, {})
        of_kernel.setdefault(int(line.split()[0]), Counter()).update([line])
    return {
        kernel: {
            head_dim: [line for line, _ in lines.most_common()]
            for head_dim, lines in sorted(of_kernel.items())
        }
        for kernel, of_kernel in counts.items()
    }


def with_first(text: str, winners: Mapping[int, Sequence[str]]) -> str:
    """A list of instances (flashmoe/tiles/instances.py says what a line is) with the winners first
    of their head dimension; other lines, comments among them, stay where they are."""
    lines = text.splitlines()
    for head_dim, wanted in winners.items():
        first = next((i for i, line in enumerate(lines) if _head_dim(line) == head_dim), len(lines))
        rest = [line for line in lines[first:] if " ".join(line.split()) not in wanted]
        lines = [*lines[:first], *wanted, *rest]
    return "\n".join(lines) + "\n"


def _head_dim(line: str) -> int | None:
    word = line.split()[:1]
    return int(word[0]) if word and word[0].isdigit() else None
