"""Line charts as inline SVG, for a page that may not load anything."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from opd_core.brief import others

_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_POINTS = 300  # more cannot be seen
_DASHES = {"solid": "", "dashed": ' stroke-dasharray="4 3"', "dotted": ' stroke-dasharray="1 3"'}

COLOURS = len(_COLOURS)  # more names could not be told apart
Style = Literal["solid", "dashed", "dotted"]  # as CSS and, above, SVG say it


@dataclass(frozen=True)
class Line:
    """Lines whose names agree up to a comma have one colour. `faint`: one of many, in grey behind the others, which the
    legend only counts."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style = "solid"
    faint: bool = False


def line_chart(lines: Sequence[Line], x_label: str, *, log: bool = False, from_zero: bool = True) -> str:
    """An SVG element. With `log` the y axis is logarithmic, if all values allow it; else it begins at zero, or with
    the smallest value."""
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y]
    log = log and min(ys) > 0
    low, high = (math.log10(min(ys)), math.log10(max(ys))) if log else (min([0.0, *ys] if from_zero else ys), max(ys))
    if high <= low:
        high = low + 1

    def place(x: float, y: float) -> tuple[float, float]:
        value = math.log10(y) if log else y
        across = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        up = (value - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(x_label)}">']
    for value in _ticks(low, high, log):
        _, y = place(min(xs), 10**value if log else value)
        text = f"{10**value if log else value:.3g}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for x in (min(xs), (min(xs) + max(xs)) / 2, max(xs)):
        across, _ = place(x, 10**low if log else low)
        parts.append(f'<text x="{across:.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    names = list(dict.fromkeys(_subject(line) for line in lines if not line.faint))
    for line in sorted(lines, key=lambda line: not line.faint):
        colour = "" if line.faint else f' stroke="{_COLOURS[names.index(_subject(line)) % COLOURS]}" stroke-width="1.6"'
        stride = max(1, len(line.x) // _POINTS)
        points = [place(x, y) for x, y in zip(line.x[::stride], line.y[::stride], strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        kind = ' class="faint"' if line.faint else ""
        parts.append(f'<polyline fill="none"{kind}{colour}{_DASHES[line.style]} points="{path}"/>')
    parts.append("</svg>")
    legend = "".join(
        f'<span><i style="border-top: 2px {line.style} {_COLOURS[names.index(_subject(line)) % COLOURS]}"></i>'
        f"{escape(line.name)}</span>"
        for line in lines
        if not line.faint
    )
    if faint := len({line.name for line in lines if line.faint}):
        legend += f'<span><i class="faint"></i>{others(faint)}</span>'
    return "".join(parts) + f'<div class="legend">{legend}</div>'


def _subject(line: Line) -> str:
    return line.name.split(",")[0]


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log and high - low >= 1:
        return [float(power) for power in range(math.ceil(low), math.floor(high) + 1)]
    return [low + (high - low) * i / 4 for i in range(5)]
