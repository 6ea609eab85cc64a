"""The report's charts as inline SVG: strings in, strings out, colours by CSS class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape

import numpy as np

_ROW = 22


def _svg(width: float, height: float, label: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="{escape(label)}">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _shape(tag: str, style: str, told: str = "", **numbers: float) -> str:
    """`told` is its tooltip; numbers are attributes."""
    shown = " ".join(f'{name.replace("_", "-")}="{x:.2f}"' for name, x in numbers.items())
    title = f"<title>{escape(told)}</title>" if told else ""
    return f'<{tag} class="{style}" {shown}>{title}</{tag}>'


def heat_map(
    title: str,
    rows: Sequence[int],
    columns: Sequence[int],
    cells: Mapping[tuple[int, int], tuple[float | None, str]],
    best: float,
    worst: float,
) -> str:
    """BLOCK_M down, BLOCK_N across; a cell is (time over the default's, or None where there is
    none; what to tell). The fastest are the strongest."""
    cell_width, cell_height, left, top = 46, 26, 40, 34
    body = [_text(left, 12, title, style="title"), _text(left, 28, "block_n", style="axis")]
    for j, n in enumerate(columns):
        body.append(_text(left + (j + 0.5) * cell_width, 46, str(n), "middle", "axis"))
    for i, m in enumerate(rows):
        y = top + 16 + i * cell_height
        body.append(_text(left - 6, y + 17, str(m), "end", "axis"))
        for j, n in enumerate(columns):
            value, told = cells.get((m, n), (None, ""))
            x = left + j * cell_width
            box = {"x": x + 1, "y": y + 1, "width": cell_width - 2, "height": cell_height - 2}
            label, style = "n/a" if told else "", "axis"
            if value is None:
                body.append(_shape("rect", "none", told, **box))
            else:
                strength = 0.08 + 0.92 * (worst - value) / max(worst - best, 1e-9)
                strength = min(max(strength, 0.08), 1.0)
                body.append(_shape("rect", "heat", told, **box, fill_opacity=strength))
                label, style = f"{value:.2f}", "on" if strength > 0.55 else "off"
            body.append(_text(x + cell_width / 2, y + 17, label, "middle", style))
    height = top + 16 + len(rows) * cell_height + 4
    width = left + max(len(columns) * cell_width, 8 * len(title)) + 4
    return _svg(width, height, title, body)


def strips(rows: Sequence[tuple[str, Sequence[float], float, float, float]], unit: str) -> str:
    """Samples as ticks, the median and its interval on top. A row is (name, samples, median, low,
    high); samples beyond twice the largest median are left out of the picture."""
    left, top = 8, 8
    labels = [f"{name}  {median:.4g} {unit}" for name, _, median, _, _ in rows]
    width = max(420, 2 * left + 7 * max(map(len, labels)))
    limit = 2 * max(median for _, _, median, _, _ in rows)
    low = min(min(samples) for _, samples, *_ in rows)
    high = min(limit, max(max(samples) for _, samples, *_ in rows))
    span = max(high - low, low * 0.02)
    low, high = low - 0.03 * span, high + 0.03 * span
    at = partial(np.interp, xp=(low, high), fp=(left, width - left))
    body: list[str] = []
    for i, (_, samples, median, bottom, up) in enumerate(rows):
        y = top + i * 46
        body.append(_text(left, y + 10, labels[i]))
        for x in samples[:: max(len(samples) // 150, 1)]:
            if x <= high:
                body.append(_shape("line", "sample", x1=at(x), x2=at(x), y1=y + 16, y2=y + 32))
        wide = max(at(up) - at(bottom), 1.5)
        body.append(_shape("rect", "interval", x=at(bottom), y=y + 21, width=wide, height=6))
        body.append(_shape("circle", "median", cx=at(median), cy=y + 24, r=4))
    y = top + len(rows) * 46
    body.append(_text(left, y + 6, f"{low:.4g}", style="axis"))
    body.append(_text(width - left, y + 6, f"{high:.4g} {unit}", "end", "axis"))
    return _svg(width, y + 14, "samples of the final", body)


def best_so_far(points: Sequence[tuple[float, float]]) -> str:
    """(seconds, time over the default's) of every trial as it was told, and the best until then."""
    left, width, height, bottom = 44, 420, 170, 24
    last = max(points[-1][0], 1e-9)
    best = min(value for _, value in points)
    worst = min(max(value for _, value in points), best * 2)
    span = max(worst - best, 0.01)
    x = partial(np.interp, xp=(0, last), fp=(left, width - 12))
    # What is worse than the worst that is shown is drawn there.
    y = partial(np.interp, xp=(worst - span, worst), fp=(height - bottom - 12, 12))
    body = []
    path, so_far = "", math.inf
    for seconds, value in points:
        body.append(_shape("circle", "trial", cx=x(seconds), cy=y(value), r=3))
        if path:
            path += f"L{x(seconds):.1f} {y(so_far):.1f}"
        so_far = min(so_far, value)
        path += f"{'L' if path else 'M'}{x(seconds):.1f} {y(so_far):.1f}"
    body.append(f'<path class="best" d="{path}"/>')
    for value in dict.fromkeys((best, worst)):
        body.append(_text(left - 6, y(value) + 4, f"{value:.2f}", "end", "axis"))
    body.append(_text(left, height - 6, "0 s", style="axis"))
    body.append(_text(width - 12, height - 6, f"{last:.3g} s", "end", "axis"))
    return _svg(width, height, "time over the default's, best so far", body)


def bars(shares: Mapping[str, float]) -> str:
    """A horizontal bar for each name, the longest first; shares are of 1."""
    left, width = 140, 420
    body: list[str] = []
    for i, (name, share) in enumerate(sorted(shares.items(), key=lambda pair: -pair[1])):
        y = 4 + i * _ROW
        body.append(_text(left - 8, y + 14, name, "end", "axis"))
        length = max(share * (width - left - 56), 1.0)
        body.append(_shape("rect", "bar", x=left, y=y + 3, width=length, height=14))
        body.append(_text(left + length + 6, y + 14, f"{share:.0%}", style="axis"))
    return _svg(width, 8 + len(shares) * _ROW, "importances", body)


def roofline(
    points: Sequence[tuple[str, float, float]], matmul_flops: float, copy_bytes: float
) -> str:
    """Logarithmic axes: FLOP a byte across, TFLOP/s up; points are (name, intensity, FLOP/s)."""
    left, width, height, bottom = 52, 420, 210, 30
    ridge = matmul_flops / copy_bytes
    xs = [ridge, *(intensity for _, intensity, _ in points)]
    ys = [matmul_flops, *(rate for _, _, rate in points)]
    x0, x1 = math.log10(min(xs)) - 0.5, math.log10(max(xs)) + 0.5
    y0, y1 = math.log10(min(ys)) - 0.4, math.log10(max(ys)) + 0.2

    def x(intensity: float) -> float:
        return left + (math.log10(intensity) - x0) / (x1 - x0) * (width - left - 12)

    def y(rate: float) -> float:
        return 10 + (y1 - math.log10(rate)) / (y1 - y0) * (height - bottom - 10)

    start = max(10**x0, 10**y0 / copy_bytes)
    body = [
        f'<path class="roof" d="M{x(start):.1f} {y(start * copy_bytes):.1f}'
        f'L{x(ridge):.1f} {y(matmul_flops):.1f}L{x(10**x1):.1f} {y(matmul_flops):.1f}"/>',
        _text(width - 12, y(matmul_flops) - 5, f"{matmul_flops / 1e12:.3g} TFLOP/s", "end", "axis"),
        _text(left, height - 6, f"{10**x0:.0f} FLOP/byte", style="axis"),
        _text(width - 12, height - 6, f"{10**x1:.0f}", "end", "axis"),
    ]
    taken: list[float] = []
    for name, intensity, rate in points:
        body.append(_shape("circle", "median", cx=x(intensity), cy=y(rate), r=4))
        label = y(rate) + 4
        while any(abs(label - other) < 13 for other in taken):
            label += 13
        taken.append(label)
        beside, anchor = (8, "start") if x(intensity) < width / 2 else (-8, "end")
        body.append(_text(x(intensity) + beside, label, f"{name} {rate / 1e12:.3g}", anchor))
    return _svg(width, height, "roofline", body)
