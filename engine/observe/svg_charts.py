"""Charts as SVG text, without a plotting library.

`line_chart` is an element for an HTML page that has its style; the others are files that need nothing else.
"""

import html
import itertools
import math
from collections.abc import Mapping, Sequence

_MAX_POINTS = 400
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 190, 58, 10, 26, 24
"""Of an element in a page."""
_FILE_WIDTH, _FILE_LABELS, _FILE_LINE, _FILE_TOP = 720, 250, 24, 56
"""Of a file: its width, the room for labels, the height of a line, the first line below title and unit."""
_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")
_FILE_STYLE = (
    "text{font:12px sans-serif;fill:#1f2937}.title{font-size:14px;font-weight:600}"
    ".grid{stroke:#d1d5db}.ideal{stroke:#9ca3af;stroke-dasharray:4 4;fill:none}"
)

Point = tuple[float, float | None]
"""A step and its value; None is a gap of the curve."""


def line_chart(title: str, points: Sequence[Point]) -> str:
    """Return a curve over steps as one `<svg>` element; beyond 400 points, means of equal spans are drawn.

    Args:
        title: any text, drawn above the curve.
        points: ascending in step.
    """
    thinned = _thinned(points)
    known = [(x, y) for x, y in thinned if y is not None]
    parts = [_text(8, 16, title, kind="title")]
    if not known:
        return _element(title, [*parts, _text(_WIDTH / 2, _HEIGHT / 2, "no number", "middle")])
    ticks_y = ticks(min(y for _, y in known), max(y for _, y in known))
    x_low, x_high = known[0][0], known[-1][0]
    y_low, y_high = ticks_y[0], ticks_y[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    for tick in ticks_y:
        _, down = at(x_low, tick)
        parts += [
            _line(_LEFT, down, _WIDTH - _RIGHT, down, "grid"),
            _text(_LEFT - 6, down + 3.5, number(tick), "end"),
        ]
    parts.append(_text(_LEFT, _HEIGHT - 8, number(x_low)))
    if x_high > x_low:
        parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 8, number(x_high), "end"))
    for run in _runs(thinned):
        places = [at(x, y) for x, y in run]
        parts += [_curve(places)] if len(places) > 1 else _dots(places, 2.5)
    return _element(title, parts)


def bar_chart(title: str, unit: str, bars: Sequence[tuple[str, float]], *, mark: float | None = None) -> str:
    """Return horizontal bars, a line each, as an SVG file's text.

    Args:
        title, unit: two lines above the bars.
        bars: (label, value from 0 up) from top to bottom.
        mark: where a dashed line stands, such as a limit.
    """
    highest = max([value for _, value in bars] + ([mark] if mark is not None else []), default=1.0)
    steps = ticks(0.0, highest or 1.0)
    height = _FILE_TOP + _FILE_LINE * len(bars) + 30

    def across(value: float) -> float:
        return _FILE_LABELS + (value / steps[-1]) * (_FILE_WIDTH - _FILE_LABELS - 60)

    parts = []
    for tick in steps:
        parts.append(_line(across(tick), _FILE_TOP - 6, across(tick), height - 26, "grid"))
        parts.append(_text(across(tick), height - 8, number(tick), "middle"))
    for index, (label, value) in enumerate(bars):
        down = _FILE_TOP + _FILE_LINE * index
        width = across(value) - _FILE_LABELS
        parts.append(_text(_FILE_LABELS - 8, down + 12, label, "end"))
        parts.append(_rect(_FILE_LABELS, down, width, 16, _COLOURS[0], f"{label}: {number(value)}"))
        parts.append(_text(_FILE_LABELS + width + 6, down + 12, number(value)))
    if mark is not None:
        parts.append(_line(across(mark), _FILE_TOP - 6, across(mark), height - 26, "ideal"))
    return _file(title, unit, height, parts)


def stacked_bar(title: str, unit: str, values: Mapping[str, float]) -> str:
    """Return one bar made of named parts, with a legend, as an SVG file's text."""
    total = sum(values.values()) or 1.0
    parts, start = [], 20.0
    for index, (name, value) in enumerate(values.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        width = value / total * (_FILE_WIDTH - 40)
        label = f"{name} {number(value)} ({value / total:.0%})"
        parts.append(_rect(start, _FILE_TOP, width, 40, colour, label))
        parts += _legend(20, _FILE_TOP + 56 + _FILE_LINE * index, colour, name, label)
        start += width
    height = _FILE_TOP + 70 + _FILE_LINE * len(values)
    return _file(title, f"{unit}, {number(total)} together", height, parts)


def scaling_chart(title: str, ranks: Sequence[int], series: Mapping[str, Sequence[float]]) -> str:
    """Return efficiency over the number of ranks, one curve per series, as an SVG file's text.

    Args:
        title: the line above.
        ranks: of the points, ascending; drawn at their logarithms.
        series: by name, the share of the ideal at each; 1 is the dashed line.
    """
    top, bottom, left, right = _FILE_TOP, 260, 60, _FILE_WIDTH - 130
    steps = ticks(0.0, max([1.0, *(value for values in series.values() for value in values)]))
    span = math.log2(ranks[-1] / ranks[0]) or 1.0

    def at(count: int, value: float) -> tuple[float, float]:
        share = math.log2(count / ranks[0]) / span
        return left + share * (right - left), bottom - value / steps[-1] * (bottom - top)

    parts = []
    for tick in steps:
        down = at(ranks[0], tick)[1]
        parts += [_line(left, down, right, down, "grid"), _text(left - 8, down + 4, number(tick), "end")]
    parts.append(_line(left, at(ranks[0], 1.0)[1], right, at(ranks[0], 1.0)[1], "ideal"))
    parts += [_text(at(count, 0.0)[0], bottom + 18, str(count), "middle") for count in ranks]
    for index, (name, values) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = [at(count, value) for count, value in zip(ranks, values, strict=True)]
        parts.append(_curve(points, f' fill="none" stroke="{colour}" stroke-width="2"'))
        parts += _dots(points, 3.5, f' fill="{colour}"')
        parts += _legend(right + 20, top + _FILE_LINE * index, colour, name, name)
    return _file(title, "share of the ideal, over ranks", bottom + 34, parts)


def ticks(low: float, high: float) -> list[float]:
    """Return a few round, evenly spaced numbers; the first and the last enclose low and high."""
    if high <= low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """Return a number as text of at most about six characters."""
    if value == 0 or 0.01 <= abs(value) < 1e5:
        text = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
        return text.replace("e+0", "e")
    return f"{value:.2g}"


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= _MAX_POINTS:
        return list(points)
    edges = [round(index * len(points) / _MAX_POINTS) for index in range(_MAX_POINTS + 1)]
    thinned: list[Point] = []
    for start, end in itertools.pairwise(edges):
        known = [y for _, y in points[start:end] if y is not None]
        thinned.append((points[end - 1][0], sum(known) / len(known) if known else None))
    return thinned


def _runs(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """Return the runs of consecutive points that have values."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str | None = None) -> str:
    style = "" if kind is None else f' class="{kind}"'
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _curve(points: Sequence[tuple[float, float]], style: str = "") -> str:
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"{style}/>'


def _dots(points: Sequence[tuple[float, float]], radius: float, style: str = "") -> list[str]:
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"{style}/>' for x, y in points]


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    size = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}"'
    return f'<rect {size} fill="{colour}"><title>{html.escape(title)}</title></rect>'


def _legend(x: float, y: float, colour: str, name: str, label: str) -> list[str]:
    return [_rect(x, y, 14, 14, colour, name), _text(x + 22, y + 12, label)]


def _element(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _file(title: str, unit: str, height: float, parts: Sequence[str]) -> str:
    body = "".join([_text(20, 22, title, kind="title"), _text(20, 40, unit), *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_FILE_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{html.escape(title)}"><style>{_FILE_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="white"/>{body}</svg>\n'
    )
