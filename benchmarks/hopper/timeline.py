"""Draws what the consumer warpgroups of one thread block do over time, from a trace of the kernel.

    python benchmarks/hopper/probe.py build build/hopper 64:192x128-trace=1
    python benchmarks/hopper/probe.py run build/hopper --output FOLDER/probe.json \\
        --trace "(2, 32, 32, 8192, 64, False)"                          # writes FOLDER/trace.json
    python benchmarks/hopper/timeline.py FOLDER/trace.json --clocks 6500 --output timeline.svg

The trace itself costs 45 to 70 clocks an event. Masked tiles are drawn as if they had no maximum.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from xml.sax.saxutils import escape

# What lies between two events of consumer.cuh's trace, and its colour.
PHASES = {
    (1, 2): "its turn",
    (2, 3): "start S and O",
    (3, 4): "wait for S",
    (3, 12): "wait for S",
    (4, 7): "first max, wait for O",
    (12, 7): "wait for O",
    (7, 5): "exponentials",
    (10, 5): "exponentials",
    (5, 6): "wait for K",
    (5, 1): "wait for K",
    (9, 1): "wait for K",
    (6, 1): "loop",
    (5, 8): "next block",
    (6, 8): "next block",
    (8, 9): "wait for Q",
    (7, 10): "store O",
}
# In serial tiles, where it differs.
SERIAL = {
    (1, 2): "wait for K, its turn",
    (2, 3): "start S",
    (4, 11): "first max",
    (11, 12): "first max",
    (12, 5): "exponentials",
    (5, 7): "V, start O, wait for O",
    (7, 1): "loop",
    (10, 1): "next block, its Q",
}
COLOURS = {
    "its turn": "#d8d8d8",
    "wait for K, its turn": "#d8d8d8",
    "start S and O": "#1f6fb4",
    "start S": "#1f6fb4",
    "wait for S": "#9cc7e8",
    "first max": "#f2b134",
    "first max, wait for O": "#f2b134",
    "exponentials": "#e8743b",
    "wait for K": "#b9a3d6",
    "wait for O": "#5b8a8f",
    "V, start O, wait for O": "#5b8a8f",
    "wait for Q": "#7d5fb2",
    "next block": "#777777",
    "next block, its Q": "#777777",
    "loop": "#f0e4c4",
    "store O": "#3f8f4f",
}
LEFT, WIDTH, ROW, GAP = 110, 1000, 34, 12


def events_of(words: list[int]) -> list[tuple[int, int]]:
    """(clock, event) of each word of a trace, whose clocks start again after 28 bits."""
    clock, events = words[0] >> 4, []
    for word in words:
        clock += ((word >> 4) - clock) % (1 << 28)
        events.append((clock, word & 15))
    return events


def without_lag(events: list[tuple[int, int]], serial: bool) -> list[tuple[int, int]]:
    """S there (4), masked (11) and maximum known (12) as one event, 12, where the maximum lags, as
    nothing lies between them: in every tile with these events but the first of a serial tile's
    block of rows."""
    kept: list[tuple[int, int]] = []
    first = serial
    for clock, event in events:
        first = serial and (event == 10 or (first and event != 7))
        if first or event not in (11, 12):
            kept.append((clock, event))
        elif event == 12:
            kept[-1] = (kept[-1][0], 12)
    return kept


def draw(warpgroups: list[list[int]], title: str, first: int, clocks: int) -> str:
    """An SVG of `clocks` clocks from the first event after index `first` of any warpgroup."""
    rows = [events_of(words) for words in warpgroups if words]
    start = min(events[first][0] for events in rows)
    serial = any(pair == (5, 7) for pair in itertools.pairwise(event for _, event in rows[0]))
    phases = PHASES | SERIAL if serial else PHASES
    used: list[str] = []
    bars = []
    for row, events in enumerate(rows):
        y = 40 + row * (ROW + GAP)
        bars.append(f'<text x="8" y="{y + 22}">warpgroup {row}</text>')
        for (begin, event), (end, following) in itertools.pairwise(without_lag(events, serial)):
            phase = phases.get((event, following))
            if phase is None or end <= start or begin >= start + clocks:
                continue
            if phase not in used:
                used.append(phase)
            x0 = LEFT + WIDTH * (max(begin, start) - start) / clocks
            x1 = LEFT + WIDTH * (min(end, start + clocks) - start) / clocks
            bars.append(
                f'<rect x="{x0:.1f}" y="{y}" width="{x1 - x0:.1f}" height="{ROW}" '
                f'fill="{COLOURS[phase]}"><title>{phase}: {end - begin} clocks</title></rect>'
            )
    bottom = 40 + len(rows) * (ROW + GAP)
    for tick in range(0, clocks + 1, 1000):
        x = LEFT + WIDTH * tick / clocks
        bars.append(f'<text x="{x:.0f}" y="{bottom + 14}" text-anchor="middle">{tick}</text>')
    for number, phase in enumerate(used):
        x, y = LEFT + number % 5 * 200, bottom + 34 + number // 5 * 22
        bars.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{COLOURS[phase]}"/>')
        bars.append(f'<text x="{x + 20}" y="{y + 12}">{phase}</text>')
    height = bottom + 60 + (len(used) - 1) // 5 * 22
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 30} {height}" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="8" y="22" font-weight="bold">{escape(title)} (clocks)</text>'
        + "".join(bars)
        + "</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--name", help="which trace of the file; the first one without")
    parser.add_argument("--first", type=int, default=300, help="number of the first event drawn")
    parser.add_argument("--clocks", type=int, default=6500)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    traces = json.loads(arguments.trace.read_text(encoding="utf-8"))
    name = arguments.name or next(iter(traces))
    title = name.replace("-trace=1", "")
    arguments.output.write_text(
        draw(traces[name], title, arguments.first, arguments.clocks), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
