"""Figures of `sota`: rates of every implementation, and the roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from flashmoe.measure.timing import Limits
from flashmoe.ratchet.report.svg import GRAY, line, picture, rect, text
from flashmoe.ratchet.sota.comparison import OURS, Compared
from flashmoe.ratchet.sota.providers import PROVIDERS

_NAMES = (OURS, *(provider.name for provider in PROVIDERS))
# Distinct also for the colour-blind (Okabe and Ito), ours first.
_COLOURS = (
    *("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#8b949e", "#E69F00"),
    *("#CC79A7", "#F0E442", "#6e40c9", "#999933", "#44AA99"),
)


def colour(provider: str) -> str:
    return _COLOURS[_NAMES.index(provider)]


def lead(measured: Sequence[Compared]) -> str:
    """How many times as fast as the fastest other we are, a bar for each case, from 1 on: to the
    right where we are faster, to the left where it is."""
    shown = [(c, row, row.ratio.value) for c in measured if (row := c.fastest_other) and row.ratio]
    height, gap, left, width, right, top = 13, 5, 360, 380, 150, 44
    most = max([1.5, *(max(ratio, 1 / ratio) for *_, ratio in shown)]) * 1.02
    bottom = top + len(shown) * (height + gap)

    def x(ratio: float) -> float:
        return left + width * (math.log(ratio) / math.log(most) + 1) / 2

    title = "flashmoe's speed over the fastest other implementation's"
    parts, y = [text(x(1), 14, "middle", title)], top
    for tick in (t for t in (0.25, 0.5, 0.67, 1, 1.5, 2, 4) if 1 / most < t < most):
        parts.append(text(x(tick), top - 8, "middle", f"{tick:g}"))
        wide = " stroke-width='0.5'" if tick != 1 else ""
        parts.append(line(x(tick), top - 4, x(tick), bottom, more=wide))
    for compared, row, ratio in shown:
        start, end = sorted((x(1), x(ratio)))
        parts.append(text(left - 10, y + height - 2, "end", compared.case.name))
        faster = OURS if ratio >= 1 else row.provider
        parts.append(rect(start, y, end - start, height, colour(faster)))
        words = f"{ratio:.2f} {row.provider}"
        parts.append(text(left + width + 10, y + height - 2, "start", words))
        y += height + gap
    return picture(left + width + right, bottom + 4, "".join(parts), title)


def bars(measured: Sequence[Compared]) -> str:
    """TFLOP/s, a group of bars for each case; what did not run has none."""
    shown = [n for n in _NAMES if any(c.row(n).samples for c in measured)]
    bar, gap, left, width = 13, 16, 330, 420
    most = max(_rate(c, n) for c in measured for n in shown if c.row(n).samples)
    parts, y = [_legend(shown, left), text(left, 38, "start", "TFLOP/s")], 46
    for compared in measured:
        present = [n for n in shown if compared.row(n).samples]
        middle = y + bar * len(present) / 2 + 4
        parts.append(text(left - 10, middle, "end", compared.case.name))
        for name in present:
            rate = _rate(compared, name)
            length = width * rate / most
            parts.append(rect(left, y, length, bar - 2, colour(name)))
            parts.append(text(left + length + 5, y + bar - 3, "start", f"{rate:.3g}"))
            y += bar
        y += gap
    return picture(left + width + 60, y + 4, "".join(parts), "TFLOP/s by case and implementation")


def roofline(measured: Sequence[Compared], limits: Limits) -> str:
    """TFLOP/s over FLOPs a byte, both logarithmic, below the limits measured in the same run."""
    width, height, left, bottom, top = 760, 420, 60, 44, 40
    shown = [n for n in _NAMES if any(c.row(n).samples for c in measured)]
    intensities = [c.case.flops / c.case.bytes for c in measured]
    ridge = limits.matmul_flops / limits.copy_bytes
    x0, x1 = math.log10(min(*intensities, ridge) / 2), math.log10(max(*intensities, ridge) * 2)
    rates = [_rate(c, n) for c in measured for n in shown if c.row(n).samples]
    y1 = math.log10(limits.matmul_flops * 1e-12 * 2)
    y0 = math.log10(min(rates) / 2)

    def x(intensity: float) -> float:
        return left + (width - left - 20) * (math.log10(intensity) - x0) / (x1 - x0)

    def y(rate: float) -> float:
        return top + (height - top - bottom) * (y1 - math.log10(rate)) / (y1 - y0)

    def roof(intensity: float) -> float:
        return min(limits.matmul_flops, intensity * limits.copy_bytes) * 1e-12

    low = max(10**x0, 10**y0 * 1e12 / limits.copy_bytes)
    path = [(i, roof(i)) for i in (low, ridge, 10**x1)]
    roofs = " ".join(f"{x(i):.1f},{y(rate):.1f}" for i, rate in path)
    parts = [_legend(shown, left)]
    parts.append(f"<polyline points='{roofs}' fill='none' stroke='{GRAY}' stroke-width='2'/>")
    parts.append(text(width - 20, y(roof(10**x1)) - 6, "end", f"{roof(10**x1):.3g} TFLOP/s"))
    for exponent in range(math.ceil(x0), math.floor(x1) + 1):
        parts.append(text(x(10**exponent), height - 24, "middle", f"{10**exponent:g}"))
    for exponent in range(math.ceil(y0), math.floor(y1) + 1):
        parts.append(text(left - 8, y(10**exponent) + 4, "end", f"{10**exponent:g}"))
    parts.append(text(width / 2, height - 6, "middle", "FLOPs a byte"))
    parts.append(text(12, 36, "start", "TFLOP/s"))
    for compared, intensity in zip(measured, intensities, strict=True):
        for name in reversed(shown):  # ours on top
            if compared.row(name).samples:
                rate = _rate(compared, name)
                parts.append(
                    f"<circle cx='{x(intensity):.1f}' cy='{y(rate):.1f}' "
                    f"r='{5 if name == OURS else 3.5}' fill='{colour(name)}' opacity='0.85'><title>"
                    f"{escape(compared.case.name)}, {name}: {rate:.3g} TFLOP/s</title></circle>"
                )
    return picture(width, height, "".join(parts), "Roofline")


def _rate(compared: Compared, provider: str) -> float:
    return compared.case.flops / compared.row(provider).seconds * 1e-12


def _legend(shown: Sequence[str], left: float) -> str:
    parts, x = [], 12.0
    for name in shown:
        parts.append(rect(x, 8, 10, 10, colour(name)))
        parts.append(text(x + 14, 17, "start", name))
        x += 26 + 7.2 * len(name)
    return "".join(parts)
