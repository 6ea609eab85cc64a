"""Pictures as SVG text: small, without dependencies, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

import numpy as np

from flashmoe.measure.stats import Interval

GRAY = "#8b949e"
COLOURS = {
    "FAIL": "#d1242f",
    "INTEGRITY": "#bc4c00",
    "IMPROVED": "#1a7f37",
    "INCONCLUSIVE": "#8b949e",
    "PASS": "#0969da",
}
_FONT = "font-family='system-ui,sans-serif' font-size='12'"


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a forest plot: an estimate with its interval, and the name of its colour."""

    label: str
    at: Interval
    colour: str


def forest(groups: Mapping[str, Sequence[Bar]], marks: Sequence[float], unit: str) -> str:
    """Intervals below each other on one axis, under the names of their groups; `marks` are vertical
    lines, 0 is one of them. What lies far outside of them is cut off."""
    left, width, row = 430, 410, 24
    lines: list[str | Bar] = []
    for group, bars in groups.items():
        lines += [group, *bars] if bars else []
    # How far bars reach, with no regard to very long intervals.
    intervals = [bar.at for bars in groups.values() for bar in bars]
    reach = [min(max(abs(x.low), abs(x.high)), 2 * abs(x.value) + 10) for x in intervals]
    span = 1.3 * max(*(abs(mark) for mark in marks), *reach)
    x = partial(np.interp, xp=(-span, span), fp=(left, left + width))
    height = row * len(lines) + 40
    parts = []
    for mark in (0.0, *marks):
        dash = " stroke-dasharray='4 3'" if mark else ""
        parts.append(line(x(mark), 4, x(mark), height - 28, more=dash))
        if mark:  # the solid line is 0, and has no room for a label between these
            anchor = "end" if mark < 0 else "start"
            parts.append(text(x(mark), height - 12, anchor, f"{mark:+g}{unit}", GRAY))
    for i, bar in enumerate(lines):
        y = row * i + 16
        if isinstance(bar, str):
            parts.append(text(left - 12, y + 4, "end", bar, more=" font-weight='600'"))
            continue
        colour, wide = COLOURS.get(bar.colour, GRAY), " stroke-width='3' stroke-linecap='round'"
        parts += [
            text(left - 12, y + 4, "end", bar.label),
            line(x(bar.at.low), y, x(bar.at.high), y, colour, wide),
            f"<circle cx='{x(bar.at.value):.1f}' cy='{y}' r='5' fill='{colour}'/>",
            text(left + width + 12, y + 4, "start", f"{bar.at.value:+.1f}{unit}", colour),
        ]
    return picture(left + width + 90, height, "".join(parts))


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a series. `segment` numbers the environments; lines do not cross from one to the
    next. `changed`: the series takes another level from here on."""

    label: str
    at: Interval
    segment: int
    changed: bool


def series(title: str, points: Sequence[Point], reference: float = 1.0) -> str:
    """One small picture: values over time with intervals, changes of level as triangles, changes of
    environment as dashed lines, and a line at `reference`. Runs are evenly spaced."""
    width, height, left, top, bottom = 440, 170, 44, 28, 16
    lowest = min(reference, *(p.at.low for p in points))
    highest = max(reference, *(p.at.high for p in points))
    margin = 0.08 * (highest - lowest or 1.0)
    lowest, highest = lowest - margin, highest + margin
    x = partial(np.interp, xp=(-0.5, len(points) - 0.5), fp=(left, width - 12))
    y = partial(np.interp, xp=(lowest, highest), fp=(height - bottom, top))
    blue = COLOURS["PASS"]
    parts = [text(4, 14, "start", title)]
    for value in (reference, points[-1].at.value):
        parts.append(text(left - 6, y(value) + 4, "end", f"{value:.2f}", GRAY))
    thin = " stroke-width='0.5'"
    parts.append(line(left, y(reference), width - 8, y(reference), more=thin))
    for i, point in enumerate(points):
        before = points[i - 1] if i else None
        if before and before.segment != point.segment:
            dash = " stroke-dasharray='4 3'"
            parts.append(line(x(i - 0.5), top, x(i - 0.5), height - bottom, more=dash))
        elif before:
            parts.append(line(x(i - 1), y(before.at.value), x(i), y(point.at.value), blue))
        wide = " opacity='0.5' stroke-width='3'"
        parts.append(line(x(i), y(point.at.low), x(i), y(point.at.high), blue, wide))
        parts.append(
            f"<circle cx='{x(i):.1f}' cy='{y(point.at.value):.1f}' r='2.5' fill='{blue}'>"
            f"<title>{escape(point.label)}: {point.at.value:.3f}</title></circle>"
        )
        if point.changed and before:
            colour = COLOURS["IMPROVED" if point.at.value > before.at.value else "FAIL"]
            parts.append(
                f"<path d='M {x(i):.1f} {height - bottom - 8} l 5 8 l -10 0 z' fill='{colour}'/>"
            )
    return picture(width, height, "".join(parts))


def grid(pictures: Sequence[str], columns: int = 2) -> str:
    """Pictures of one size beside and below each other, as one."""
    if not pictures:
        return picture(1, 1, "")
    width, height = 440, 170
    cells = "".join(
        f"<g transform='translate({width * (i % columns)} {height * (i // columns)})'>{inner}</g>"
        for i, inner in enumerate(pictures)
    )
    rows = -(-len(pictures) // columns)
    return picture(width * min(columns, len(pictures)), height * rows, cells)


def text(
    x: float, y: float, anchor: str, words: str, colour: str = "currentColor", more: str = ""
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{colour}' {_FONT}{more}>"
        f"{escape(words)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str = GRAY, more: str = "") -> str:
    return (
        f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}'{more}/>"
    )


def rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return (
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:g}' fill='{colour}'/>"
    )


def picture(width: float, height: float, content: str, title: str = "") -> str:
    told = f"<title>{escape(title)}</title>" if title else ""
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' viewBox='0 0 {width:g} {height:g}' "
        f"width='{width:g}' height='{height:g}'>{told}{content}</svg>"
    )


def document(drawn: str) -> str:
    """A picture as a file of its own: its text takes the colour of the reader's scheme, since there
    is no page around it that says one."""
    style = (
        "<style>:root{color:#1f2328}"
        "@media (prefers-color-scheme:dark){:root{color:#e6edf3}}</style>"
    )
    start = drawn.index(">") + 1
    return f"{drawn[:start]}{style}{drawn[start:]}\n"
