"""Plain SVG charts: bars and lines, readable on white and on dark pages.

The background stays transparent, and all ink is of middling brightness. No plotting library is
needed, text stays text, and the same figures give the same file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

INK = "#787c84"
PALETTE = ("#337bd0", "#da7e1e", "#00986c", "#d83f66", "#9f5dcb", "#8b8d2e", "#008192")
FONT = "font-family:system-ui,Segoe UI,Helvetica,Arial,sans-serif"
ROW, LEFT, WIDTH = 30, 270, 820


@dataclass(frozen=True)
class Bar:
    """label and remark stand beside the bar, the remark smaller; value None: the remark alone."""

    label: str
    value: float | None
    remark: str = ""
    colour: int = 0


@dataclass(frozen=True)
class Line:
    """points: (x, y), x ascending; dashed tells two lines of one colour apart."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False


def bar_chart(
    title: str, bars: Sequence[Bar], *, unit: str, notes: Sequence[str] = (), log: bool = False
) -> str:
    """Horizontal bars with their values at the end; notes are small lines below.

    log: a logarithmic axis, one vertical line a power of ten; it begins at the power of ten below
    the smallest value, or one further down, so that no bar vanishes. Raises ValueError without any
    value, or for one that is not positive.
    """
    values = [bar.value for bar in bars if bar.value is not None]
    if not values or min(values) <= 0:
        raise ValueError(f"bars={values!r} must hold at least one value, and only positive ones")
    room = WIDTH - LEFT - 150
    low = math.floor(math.log10(min(values)))
    if min(values) < 2 * 10.0**low:
        low -= 1
    high = math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def place(value: float) -> float:
        share = (math.log10(value) - low) / (high - low) if log else value / max(values)
        return LEFT + room * share

    top = 46
    bottom = top + ROW * len(bars)
    parts = [_text(12, 24, title, size=16, weight="600")]
    if log:
        for power in range(low, high + 1):
            x = place(10.0**power)
            parts.append(_rule(x, top - 6, x, bottom))
            parts.append(_text(x, bottom + 16, f"{10.0**power:,.{max(0, -power)}f}", 11, "middle"))
        parts.append(_text(LEFT + room + 22, bottom + 16, unit, 11))
    for number, bar in enumerate(bars):
        y = top + ROW * number
        parts.append(_text(LEFT - 10, y + 18, bar.label, 13, "end"))
        if bar.value is None:
            parts.append(_text(LEFT + 6, y + 18, bar.remark, 11))
            continue
        end = place(bar.value)
        parts.append(
            f'<rect x="{LEFT}" y="{y + 4}" width="{max(end - LEFT, 1):.1f}" height="{ROW - 9}" '
            f'rx="3" fill="{PALETTE[bar.colour % len(PALETTE)]}"/>'
        )
        text = f"{bar.value:,.0f}" if bar.value >= 100 else f"{bar.value:.3g}"
        text = f"{text} {unit}" if not log else text
        parts.append(_text(end + 6, y + 18, f"{text}  {bar.remark}".rstrip(), 12, weight="600"))
    foot = bottom + (38 if log else 20)
    parts += [_text(12, foot + 16 * number, note, 11) for number, note in enumerate(notes)]
    return _page(WIDTH, foot + 16 * len(notes), parts, title)


def line_charts(
    title: str,
    panels: Sequence[tuple[str, Sequence[Line]]],
    *,
    x_label: str,
    notes: Sequence[str] = (),
) -> str:
    """Panels side by side over the same x, each with its own heading and scale from 0.

    panels: (heading, lines). The legend, drawn once, is that of the first panel. Raises ValueError
    if no line has a point.
    """
    points = [point for _, lines in panels for line in lines for point in line.points]
    if not points:
        raise ValueError("panels hold no point; give at least one line with one")
    wide, tall, left, top = 250, 180, 56, 66
    most_x = max(x for x, _ in points) or 1.0
    parts = [_text(12, 24, title, size=16, weight="600")]
    for number, (heading, lines) in enumerate(panels):
        x0, y0 = left + number * (wide + 66), top + tall
        most_y = _round_up(max((y for line in lines for _, y in line.points), default=1.0))
        parts.append(_text(x0, top - 10, heading, 12, weight="600"))
        for share in (0.0, 0.5, 1.0):
            y = y0 - tall * share
            parts.append(_rule(x0, y, x0 + wide, y))
            parts.append(_text(x0 - 6, y + 4, f"{most_y * share:,.4g}", 11, "end"))
        for share in (0.0, 0.5, 1.0):
            value = f"{most_x * share:.3g}"
            parts.append(_text(x0 + wide * share, y0 + 16, value, 11, "middle"))
        parts.append(_text(x0 + wide / 2, y0 + 32, x_label, 11, "middle"))
        for line in lines:
            places = [(x0 + wide * x / most_x, y0 - tall * y / most_y) for x, y in line.points]
            parts += _polyline(places, line)
    legend = top + tall + 54
    for number, line in enumerate(panels[0][1]):
        x, y = left + (number % 3) * 250, legend + 18 * (number // 3)
        parts += _polyline([(x, y - 4), (x + 26, y - 4)], line)
        parts.append(_text(x + 34, y, line.label, 12))
    foot = legend + 18 * -(-len(panels[0][1]) // 3) + 8
    parts += [_text(12, foot + 16 * number, note, 11) for number, note in enumerate(notes)]
    width = max(WIDTH, left + len(panels) * (wide + 66))
    return _page(width, foot + 16 * len(notes), parts, title)


def write_svg(file: str | Path | None, picture: str) -> None:
    """Write it, if a file is named."""
    if file is not None:
        Path(file).write_text(picture, encoding="utf-8")


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    if not value > 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * 0.9999)


def _polyline(places: Sequence[tuple[float, float]], line: Line) -> list[str]:
    colour = PALETTE[line.colour % len(PALETTE)]
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
    return drawn + [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{INK}" '
        'stroke-opacity="0.3"/>'
    )


def _text(
    x: float, y: float, text: str, size: int = 12, anchor: str = "start", weight: str = "400"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{INK}">{escape(text)}</text>'
    )


def _page(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}" role="img" style="{FONT}">',
            f"<title>{escape(title)}</title>",
            *parts,
            "</svg>",
            "",
        ]
    )
