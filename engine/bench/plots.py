"""Plots of a benchmark as SVG files that need nothing else."""

import html
import math
from collections.abc import Mapping, Sequence

from glm_rlhf.engine.observe.svg_charts import number, ticks

_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")
_STYLE = (
    "text{font:12px sans-serif;fill:#1f2937}.title{font-size:14px;font-weight:600}"
    ".grid{stroke:#d1d5db}.ideal{stroke:#9ca3af;stroke-dasharray:4 4;fill:none}"
)
_WIDTH, _LABELS, _LINE, _TOP = 720, 250, 24, 56


def bar_chart(title: str, unit: str, bars: Sequence[tuple[str, float]], *, mark: float | None = None) -> str:
    """Return horizontal bars, a line each, as an SVG file's text.

    Args:
        title, unit: stand above.
        bars: (label, value from 0 up) from top to bottom.
        mark: where a dashed line stands, such as a limit.
    """
    highest = max([value for _, value in bars] + ([mark] if mark is not None else []), default=1.0)
    steps = ticks(0.0, highest or 1.0)
    height = _TOP + _LINE * len(bars) + 30

    def across(value: float) -> float:
        return _LABELS + (value / steps[-1]) * (_WIDTH - _LABELS - 60)

    parts = _head(title, unit)
    for tick in steps:
        parts.append(_line(across(tick), _TOP - 6, across(tick), height - 26, "grid"))
        parts.append(_text(across(tick), height - 8, number(tick), "middle"))
    for place, (label, value) in enumerate(bars):
        down = _TOP + _LINE * place
        width = across(value) - _LABELS
        parts.append(_text(_LABELS - 8, down + 12, label, "end"))
        parts.append(_rect(_LABELS, down, width, 16, _COLOURS[0], f"{label}: {number(value)}"))
        parts.append(_text(_LABELS + width + 6, down + 12, number(value)))
    if mark is not None:
        parts.append(_line(across(mark), _TOP - 6, across(mark), height - 26, "ideal"))
    return _svg(title, height, parts)


def stacked_bar(title: str, unit: str, parts_of: Mapping[str, float]) -> str:
    """Return one bar made of named parts, with a legend, as an SVG file's text."""
    total = sum(parts_of.values()) or 1.0
    drawn, start = _head(title, f"{unit}, {number(total)} together"), 20.0
    for place, (name, value) in enumerate(parts_of.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        width = value / total * (_WIDTH - 40)
        label = f"{name} {number(value)} ({value / total:.0%})"
        drawn.append(_rect(start, _TOP, width, 40, colour, label))
        drawn.append(_rect(20, _TOP + 56 + _LINE * place, 14, 14, colour, name))
        drawn.append(_text(42, _TOP + 68 + _LINE * place, label))
        start += width
    return _svg(title, _TOP + 70 + _LINE * len(parts_of), drawn)


def scaling_chart(title: str, ranks: Sequence[int], series: Mapping[str, Sequence[float]]) -> str:
    """Return efficiency over the number of ranks, one curve a series, as an SVG file's text.

    Args:
        title: stands above.
        ranks: of the points, ascending; drawn at their logarithms.
        series: by name, the share of the ideal at each; 1 is the dashed line.
    """
    top, bottom, left, right = _TOP, 260, 60, _WIDTH - 130
    steps = ticks(0.0, max([1.0, *(value for values in series.values() for value in values)]))
    span = math.log2(ranks[-1] / ranks[0]) or 1.0

    def at(count: int, value: float) -> tuple[float, float]:
        share = math.log2(count / ranks[0]) / span
        return left + share * (right - left), bottom - value / steps[-1] * (bottom - top)

    parts = _head(title, "share of the ideal, over ranks")
    for tick in steps:
        down = at(ranks[0], tick)[1]
        parts += [_line(left, down, right, down, "grid"), _text(left - 8, down + 4, number(tick), "end")]
    parts.append(_line(left, at(ranks[0], 1.0)[1], right, at(ranks[0], 1.0)[1], "ideal"))
    parts += [_text(at(count, 0.0)[0], bottom + 18, str(count), "middle") for count in ranks]
    for place, (name, values) in enumerate(series.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        points = [at(count, value) for count, value in zip(ranks, values, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
        parts.append(_rect(right + 20, top + _LINE * place, 14, 14, colour, name))
        parts.append(_text(right + 40, top + 12 + _LINE * place, name))
    return _svg(title, bottom + 34, parts)


def _head(title: str, unit: str) -> list[str]:
    return [f'<text class="title" x="20" y="22">{html.escape(title)}</text>', _text(20, 40, unit)]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    size = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}"'
    return f'<rect {size} fill="{colour}"><title>{html.escape(title)}</title></rect>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{html.escape(title)}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )
