"""Curves as inline SVG, without a plotting library."""

import html
import itertools
import math
from collections.abc import Sequence

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 26, 24
_MAX_POINTS = 400

Point = tuple[float, float | None]
"""A step, and its number; None where there is none: the curve has a gap there."""


def line_chart(title: str, points: Sequence[Point]) -> str:
    """Return a curve over steps as one `<svg>` element; past 400 points the means of equal spans are drawn.

    Args:
        title: stands above; any text.
        points: ascending in their steps.
    """
    drawn = _thinned(points)
    known = [(x, y) for x, y in drawn if y is not None]
    head = f'<text class="title" x="8" y="16">{html.escape(title)}</text>'
    if not known:
        body = f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">no number</text>'
        return _svg(title, head + body)
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

    parts = [head]
    for tick in ticks_y:
        _, down = at(x_low, tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{down + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{number(x_low)}</text>')
    if x_high > x_low:
        parts.append(
            f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{number(x_high)}</text>'
        )
    for run in _runs(drawn):
        places = [at(x, y) for x, y in run]
        if len(places) == 1:
            parts.append('<circle cx="{:.1f}" cy="{:.1f}" r="2.5"/>'.format(*places[0]))
        else:
            line = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
            parts.append(f'<polyline points="{line}"/>')
    return _svg(title, "".join(parts))


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers evenly apart, few of them; the first and the last enclose low and high."""
    if high <= low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def number(value: float) -> str:
    """Return a number in at most about six characters."""
    if value == 0 or 0.01 <= abs(value) < 1e5:
        text = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
        return text.replace("e+0", "e")
    return f"{value:.2g}"


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= _MAX_POINTS:
        return list(points)
    edges = [round(place * len(points) / _MAX_POINTS) for place in range(_MAX_POINTS + 1)]
    drawn: list[Point] = []
    for start, end in itertools.pairwise(edges):
        known = [y for _, y in points[start:end] if y is not None]
        drawn.append((points[end - 1][0], sum(known) / len(known) if known else None))
    return drawn


def _runs(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """Return the stretches of points that have numbers."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _svg(title: str, body: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{body}</svg>"
    )
