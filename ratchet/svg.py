"""Pictures as SVG text: small, without dependencies, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

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
    value: float
    low: float
    high: float
    colour: str


def forest(bars: Sequence[Bar], marks: Sequence[float], unit: str) -> str:
    """Intervals below each other on one axis; `marks` are vertical lines, 0 is one of them. What
    lies outside the middle part of the axis is cut off with an arrow."""
    left, width, row = 380, 460, 24
    span = 1.3 * max([abs(mark) for mark in marks] + [_reach(bar) for bar in bars])

    def x(value: float) -> float:
        return left + width * (min(max(value, -span), span) + span) / (2 * span)

    height = row * len(bars) + 40
    parts = []
    for mark in (0.0, *marks):
        dash = "" if mark == 0 else " stroke-dasharray='4 3'"
        parts.append(
            f"<line x1='{x(mark):.1f}' x2='{x(mark):.1f}' y1='4' y2='{height - 28}' "
            f"stroke='{GRAY}'{dash}/>"
            f"<text x='{x(mark):.1f}' y='{height - 12}' text-anchor='middle' fill='{GRAY}' "
            f"{_FONT}>{mark:+g}{unit}</text>"
        )
    for i, bar in enumerate(bars):
        y, colour = row * i + 16, COLOURS.get(bar.colour, GRAY)
        parts.append(
            f"<text x='{left - 12}' y='{y + 4}' text-anchor='end' fill='currentColor' {_FONT}>"
            f"{escape(bar.label)}</text>"
            f"<line x1='{x(bar.low):.1f}' x2='{x(bar.high):.1f}' y1='{y}' y2='{y}' "
            f"stroke='{colour}' stroke-width='3' stroke-linecap='round'/>"
            f"<circle cx='{x(bar.value):.1f}' cy='{y}' r='5' fill='{colour}'/>"
            f"<text x='{left + width + 12}' y='{y + 4}' fill='{colour}' {_FONT}>"
            f"{bar.value:+.1f}{unit}</text>"
        )
    return picture(left + width + 90, height, "".join(parts))


def _reach(bar: Bar) -> float:
    """How far a bar reaches, with no regard to very long intervals."""
    return min(max(abs(bar.low), abs(bar.high)), 2 * abs(bar.value) + 10)


def picture(width: float, height: float, content: str, title: str = "") -> str:
    told = f"<title>{escape(title)}</title>" if title else ""
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' viewBox='0 0 {width:g} {height:g}' "
        f"width='{width:g}' height='{height:g}'>{told}{content}</svg>"
    )
