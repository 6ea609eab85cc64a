"""How well untuned problems choose, over the plane, by what was measured there.

    python benchmarks/plane_report.py benchmarks/results/plane-nvidia-h200.jsonl.xz \\
        --picture docs/performance/nvidia-h200-plane.svg

The candidates are the tiles that csrc/instances lists and SDPA; the choice is the one that
flashmoe.planning.plan makes among their predicted times. It is compared with the fastest of them
and of SDPA's backends, on the random problems that the fit did not see, and on the others.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import NamedTuple

from plane_fit import Row, load, work_of
from tables import Verdict

from flashmoe.prediction import kernels
from flashmoe.prediction.costs import Table
from flashmoe.prediction.predict import fastest, microseconds
from flashmoe.ratchet.report import svg
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "flashmoe" / "prediction" / "nvidia-h200.json"
# What the untuned choice must reach where the fit did not see the problem, by a summary's names.
_BOUNDS = {
    "of the best, geometric mean": 0.97,
    "at least 0.90 of it": 0.95,
    "over SDPA's best backend, mean": 1.2,
    "not slower than it by 2 %": 0.99,
}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 320, 60, 40
_MOST = 4.0  # of a speed-up that the picture shows


class Choice(NamedTuple):
    """What was chosen for a problem, and microseconds: of that, of the fastest of all that could
    have been, and of SDPA's fastest backend (None: it does not run the problem)."""

    row: Row
    chosen: str
    us: float
    best: float
    sdpa: float | None

    @property
    def of_best(self) -> float:
        return self.best / self.us

    @property
    def over_sdpa(self) -> float | None:
        return None if self.sdpa is None else self.sdpa / self.us


def listed() -> dict[str, list[str]]:
    """The forward kernels in csrc/instances by "kernel@head_dim", in the order of the lists."""
    spec = importlib.util.spec_from_file_location("build_config", ROOT / "csrc" / "build_config.py")
    assert spec is not None
    assert spec.loader is not None
    config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config)
    found: dict[str, list[str]] = {}
    for instance in config.instances():
        if instance.kernel not in ("sm80", "sm90") or instance.variant:
            continue
        fields = instance.to_json()
        head_dim = fields.pop("head_dim")
        flags = {name for name in fields if isinstance(getattr(Tile("sm90", 64, 64), name), bool)}
        tile = Tile(**{name: bool(x) if name in flags else x for name, x in fields.items()})
        name = kernels.tile_name(tile, head_dim)
        found.setdefault(f"{instance.kernel}@{head_dim}", []).append(name)
    return found


def candidates(problem: Problem, tiles: dict[str, list[str]]) -> list[str]:
    """The kernels of the smallest head_dim of each list that holds the problem's, sm90's first."""
    names: list[str] = []
    for kernel in ("sm90", "sm80"):
        dims = [int(key.partition("@")[2]) for key in tiles if key.startswith(kernel)]
        names += tiles[f"{kernel}@{min(d for d in dims if d >= problem.head_dim)}"]
    return names


def choose(row: Row, table: Table, tiles: dict[str, list[str]], sm_count: int) -> Choice:
    """Among what was measured."""
    us = row.microseconds
    theirs = [time for name, time in us.items() if name.startswith("sdpa")]
    predicted: dict[str, float] = {}
    for name in candidates(row.problem, tiles):
        tile, _, head_dim = name.partition("@")
        costs = table.of_tile(Tile.parse(tile), int(head_dim))
        work = work_of(name, row.problem, sm_count)
        if costs is not None and work is not None and name in us:
            predicted[name] = microseconds(work, costs)
    best = min([us[name] for name in predicted] + theirs)
    if theirs:
        for kernel, work in kernels.sdpa_works(row.problem, sm_count).items():
            name = kernels.sdpa_name(kernel, row.problem.head_dim)
            costs = table.named(name)
            if costs is not None and name in us:
                predicted[name] = microseconds(work, costs)
    chosen = fastest(predicted)
    return Choice(row, chosen, us[chosen], best, min(theirs, default=None))


def summary(choices: Iterable[Choice]) -> dict[str, float]:
    found = list(choices)
    shares = [c.of_best for c in found]
    gains = [gain for c in found if (gain := c.over_sdpa) is not None]
    return {
        "problems": len(found),
        "of the best, geometric mean": geometric_mean(shares),
        "at least 0.90 of it": fmean(share >= 0.9 for share in shares),
        "over SDPA's best backend, mean": fmean(gains) if gains else float("nan"),
        "not slower than it by 2 %": fmean(gain >= 1 / 1.02 for gain in gains) if gains else 1.0,
    }


def picture(choices: Sequence[Choice]) -> str:
    """Two distributions: of the choice's share of the best, and of its gain over SDPA."""
    shares = sorted(c.of_best for c in choices)
    gains = sorted(gain for c in choices if (gain := c.over_sdpa) is not None)
    panels = (
        _panel(shares, (0.5, 1.0), (0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "of the fastest candidate"),
        _panel(gains, (0.8, _MOST), (0.8, 1.0, 1.5, 2.0, 3.0, 4.0), "as fast as SDPA's best"),
    )
    inner = "".join(
        f"<g transform='translate({_WIDTH * i} 0)'>{p}</g>" for i, p in enumerate(panels)
    )
    title = "How fast the untuned choice is, over random problems"
    return svg.document(svg.picture(_WIDTH * len(panels), _HEIGHT, inner, title))


def _panel(
    values: Sequence[float], ends: tuple[float, float], ticks: Sequence[float], what: str
) -> str:
    """One value a problem, from the least to the most, on a logarithmic axis."""
    low, high = map(math.log, ends)
    top, bottom = 30, _HEIGHT - _BOTTOM

    def y(value: float) -> float:
        share = (math.log(min(max(value, ends[0]), ends[1])) - low) / (high - low)
        return bottom - (bottom - top) * share

    def x(rank: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 20) * rank

    font = "font-family='system-ui,sans-serif' font-size='12'"
    parts = [
        f"<text x='{_LEFT}' y='18' fill='currentColor' {font}>"
        f"the untuned choice, times {what} ({len(values)} problems, sorted)</text>"
    ]
    for tick in ticks:
        dash = "" if tick == 1.0 else " stroke-dasharray='2 4'"
        parts.append(
            f"<line x1='{x(0)}' x2='{x(1)}' y1='{y(tick):.1f}' y2='{y(tick):.1f}' "
            f"stroke='{svg.GRAY}'{dash}/><text x='{_LEFT - 8}' y='{y(tick) + 4:.1f}' "
            f"text-anchor='end' fill='{svg.GRAY}' {font}>{tick:g}</text>"
        )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(
            f"<text x='{x(share):.1f}' y='{bottom + 20}' text-anchor='middle' fill='{svg.GRAY}' "
            f"{font}>{100 * share:g} %</text>"
        )
    points = " ".join(
        f"{x((i + 0.5) / len(values)):.1f},{y(value):.1f}" for i, value in enumerate(values)
    )
    colour = svg.COLOURS["PASS"]
    parts.append(f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='2'/>")
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, nargs="+", help="what plane.py wrote")
    parser.add_argument("--table", type=Path, default=SHIPPED, help="of Costs; default: shipped")
    parser.add_argument("--picture", type=Path, help="the SVG to write, of what was held out")
    parser.add_argument("--worst", type=int, default=10, help="how many to list of each set")
    arguments = parser.parse_args()
    rows, sm_count = load(arguments.measured)
    table = Table.from_json(json.loads(arguments.table.read_text(encoding="utf-8")))
    tiles = listed()
    sets: dict[str, list[Choice]] = {}
    for row in rows:
        kind = "held out" if row.held_out else row.name.partition(" ")[0]
        sets.setdefault(kind, []).append(choose(row, table, tiles, sm_count))
    for kind, choices in sets.items():
        print(kind, *(f"{name} {value:.4g}" for name, value in summary(choices).items()), sep="; ")
        for c in sorted(choices, key=lambda c: c.of_best)[: arguments.worst]:
            print(f"  {c.of_best:.3f} {c.row.problem.label}: {c.chosen} {c.us:.1f}, {c.best:.1f}")
    known = summary(sets["held out"]) if "held out" in sets else {}
    for name, bound in _BOUNDS.items():
        print(Verdict(f"held out: {name}", known.get(name), bound, at_least=True))
    if arguments.picture:
        arguments.picture.write_text(picture(sets["held out"]), encoding="utf-8")


if __name__ == "__main__":
    main()
