"""Curves keep their spikes, their axes are round, and what is drawn is what the values are."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from ftjax.reporting import charts
from ftjax.reporting.charts import Chart, Series


def test_thinning_keeps_both_ends_and_every_columns_lowest_and_highest():
    rng = np.random.default_rng(0)
    points = [(step, float(value)) for step, value in enumerate(rng.normal(size=20000))]
    points[7777] = (7777, 99.0)
    kept = charts.thin(points, 300)
    assert len(kept) <= 1200
    assert kept == sorted(set(kept) & set(points))
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    columns = np.minimum(np.ceil(np.arange(20000) * 300 / 19999).astype(int), 300)
    for column in (1, 50, 117, 300):
        values = [points[i][1] for i in np.flatnonzero(columns == column)]
        there = {value for _, value in kept}
        assert {min(values), max(values)} <= there
    assert charts.thin(points[:5], 300) == points[:5]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 0.9, [0, 0.2, 0.4, 0.6, 0.8]), (1.0, 80.0, [20, 40, 60, 80]), (-3.0, 3.0, [-2, 0, 2]), (0, 2e-4, None)],
)
def test_ticks_are_round_and_inside(low, high, expected):
    found = charts.ticks(low, high, 4)
    assert 3 <= len(found) <= 6
    assert all(low <= tick <= high * (1 + 1e-9) for tick in found)
    if expected:
        assert found == pytest.approx(expected)


def test_a_drawing_is_well_formed_says_its_values_and_puts_them_where_they_belong():
    chart = Chart(
        "<Loss> & co", [Series('a "quoted" run', [(0, 3.0), (10, 1.0), (20, 2.0)]), Series("one", [(20, 1.5)])]
    )
    root = ElementTree.fromstring(charts.svg(chart))
    assert root.get("aria-label").startswith(
        '<Loss> & co by step. a "quoted" run: 3 at step 0, 2 at step 20; lowest 1 at'
    )
    groups = root.findall("g")
    titles = [title.text for group in groups for title in group.iter("title")]
    assert titles[1:3] == ['a "quoted" run, step 10: 1', 'a "quoted" run, step 20: 2']
    line = [tuple(map(float, point.split(","))) for point in groups[0].find("polyline").get("points").split()]
    assert line[1][1] > line[2][1] > line[0][1]  # down is more
    assert np.allclose(np.diff([x for x, _ in line]), (line[2][0] - line[0][0]) / 2, atol=0.1)
    assert groups[1].find("circle").get("cx") == f"{line[2][0]:.1f}"
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in line)


@pytest.mark.parametrize("points", [[(0, 0.0)], [(5, 2.0), (6, 2.0)], [(1, 1e-30), (2, 1e30)], [(1, -1.0), (2, 1.0)]])
def test_any_values_can_be_drawn(points):
    text = charts.svg(Chart("x", [Series("y", points), Series("empty", [])]))
    ElementTree.fromstring(text)
    assert not re.search(r"\b(nan|inf)", text.replace("aria-label", ""))


def test_a_table_has_the_ends_and_all_of_a_short_series():
    chart = Chart(
        "score", [Series("many", [(i, i / 999) for i in range(1000)]), Series("few", [(333, 0.25)])], share=True
    )
    rows = charts.table(chart)
    assert (rows[0], rows[-1]) == (["0", "0 %", ""], ["999", "100 %", ""])
    assert ["333", "33.3 %", "25 %"] in rows
    assert len(rows) == 13


@pytest.mark.parametrize(
    ("value", "text"),
    [(66492, "66,492"), (1200.4, "1,200"), (0.0578832, "0.05788"), (5e-6, "5e-06"), (2, "2"), (0, "0")],
)
def test_figures_are_short(value, text):
    assert charts.figure(value) == text


def test_a_bar_reaches_as_far_as_its_score():
    root = ElementTree.fromstring(charts.whisker(0.4, (0.3, 0.5), 0.8))
    assert root.find("rect").get("width") == "50.0"
    assert root.find("path").get("d").startswith("M37.5 3v8M62.5 ")
