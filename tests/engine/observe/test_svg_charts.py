"""Curves: round ticks, gaps where there is no number, every point in its place."""

import re
from xml.etree import ElementTree

import pytest

from glm_rlhf.engine.observe.svg_charts import line_chart, number, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (3.0, 17.0, [0.0, 5.0, 10.0, 15.0, 20.0]),
        (-0.4, 0.3, [-0.4, -0.2, 0.0, 0.2, 0.4]),
        (5.0, 5.0, [4.5, 4.75, 5.0, 5.25, 5.5]),
        (0.0, 0.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("exponent", range(-12, 13, 3))
def test_ticks_enclose_at_every_scale(exponent):
    low, high = 1.37 * 10.0**exponent, 8.91 * 10.0**exponent
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 3 <= len(found) <= 7


def test_a_curve_has_its_points_in_place_and_a_gap():
    picture = ElementTree.fromstring(line_chart("a<b", [(1, 0.0), (2, 1.0), (3, None), (5, 0.5)]))
    assert picture.get("aria-label") == "a<b"
    (line,) = picture.findall("polyline")
    (dot,) = picture.findall("circle")
    (left, bottom), (middle, top) = [
        tuple(map(float, pair.split(","))) for pair in line.get("points").split()
    ]
    right, half = float(dot.get("cx")), float(dot.get("cy"))
    assert bottom > half > top
    assert half == pytest.approx((bottom + top) / 2, abs=0.1)
    assert (middle - left) / (right - left) == pytest.approx(1 / 4, abs=0.01)


def test_a_long_curve_is_drawn_as_means():
    picture = line_chart("long", [(step, float(step % 2)) for step in range(4000)])
    (points,) = re.findall(r'points="([^"]*)"', picture)
    heights = {pair.split(",")[1] for pair in points.split()}
    assert len(points.split()) == 400
    assert len(heights) == 1  # ten points each, half of them 0 and half 1


def test_a_metric_without_values_says_so():
    assert "no number" in line_chart("nothing", [(1, None)])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1e-7, "1e-07"), (0.123456, "0.1235"), (12345.6, "12346"), (2.5e8, "2.5e+08"), (-3.0, "-3")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
