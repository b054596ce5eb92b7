"""The charts of a comparison show the figures that they were given, whatever machines are called."""

import math
import re
from itertools import pairwise

import pytest

from pipeline.comparison import plots
from pipeline.comparison.stats import Estimate

TITLE = "Speed-up against NVIDIA H200"


def bar(label, value=None, low=None, high=None):
    estimate = Estimate(value, low, high, 5) if value is not None else None
    return plots.Bar(label, "text", f"http://h/{label}", "plain", estimate)


def curve(label, seconds=10.0, count=5):
    points = [(seconds * (epoch + 1) / count, 0.5 + 0.05 * epoch) for epoch in range(count)]
    return plots.Curve(label=label, link=f"http://h/{label}", points=points)


def patches(figure):
    return [(patch.get_x(), patch.get_width()) for patch in figure.axes[0].patches]


def test_bars_begin_at_zero_and_ratios_at_one():
    assert patches(plots.bars([bar("A", 3.0), bar("B"), bar("C", 1.0)], title=TITLE, unit="s")) == [(0, 3), (0, 1)]
    figure = plots.ratios([bar("A", 3.0), bar("B", 0.5)], title=TITLE)
    assert patches(figure) == [(1, 2), (1, -0.5)]
    low, high = figure.axes[0].get_xlim()
    assert low < 0.5 and high > 3 and figure.axes[0].get_xscale() == "log"
    assert 1 in figure.axes[0].get_xticks()


@pytest.mark.parametrize(("smallest", "scale"), [(2.0, "log"), (2.1, "linear")])
def test_values_fiftyfold_apart_have_a_logarithmic_axis_that_says_so(smallest, scale):
    figure = plots.bars([bar("A", 100.0), bar("B", smallest), bar("C")], title=TITLE, unit="images/s")
    (axes,) = figure.axes
    assert axes.get_xscale() == scale and axes.get_xlabel().startswith("images/s")
    assert ("logarithmic" in axes.get_xlabel()) == (scale == "log")
    assert all(width > 0 for _, width in patches(figure))
    low, high = axes.get_xlim()
    assert low < smallest and high >= 100


@pytest.mark.parametrize("values", [(1.0, 100.0), (1e-12, 1e12), (9.5, 7875.0), (999.0, 1e6)])
def test_a_logarithmic_axis_of_bars_has_labels_that_stay_apart_and_inside(values):
    figure = plots.bars([bar(f"M{value}", value) for value in values], title=TITLE, unit="s")
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    shown = [tick for tick in figure.axes[0].xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [tick.label1.get_window_extent() for tick in shown]
    assert len(boxes) >= 2 and all(left.x1 <= right.x0 for left, right in pairwise(boxes))
    assert boxes[0].x0 >= 0 and boxes[-1].x1 <= figure.bbox.x1


def test_few_courses_share_a_chart_and_many_have_one_each():
    few = plots.courses([curve("A"), curve("B", 5.0)], target=0.65, title=TITLE)
    assert len(few.axes) == 2  # the chart and its names
    assert [list(line.get_xdata()) for line in few.axes[0].lines[1:3]] == [[2, 4, 6, 8, 10], [1, 2, 3, 4, 5]]
    many = plots.courses([curve(f"M{number}") for number in range(40)], target=None, title=TITLE)
    assert len(many.axes) == 40
    assert {axes.get_xlim() for axes in many.axes} == {many.axes[0].get_xlim()}


@pytest.mark.parametrize("count", [1, 2, 40])
def test_an_svg_is_the_same_each_time_and_holds_its_text_and_links(count):
    def made():
        return plots.svg(
            plots.bars([bar(f"M{number}", number + 1.0) for number in range(count)], title=TITLE, unit="s")
        )

    text = made()
    assert text == made() and text.startswith("<svg")
    assert 'viewBox="0 0 295' in text and "pt" not in text.split(">")[0]
    assert all(f">M{number}</text>" in text and f"http://h/M{number}" in text for number in range(count))
    assert "'DejaVu Sans', system-ui, sans-serif" in text


def test_an_interval_is_drawn_and_one_without_end_does_not_hide_the_others():
    rows = [bar("A", 2.0, 1.9, 2.1), bar("B", 1.5, 1e-9, math.inf), bar("C", 1.2, 0.0, 1e12)]
    figure = plots.ratios(rows, title=TITLE)
    assert len(figure.axes[0].collections) == 3
    low, high = figure.axes[0].get_xlim()
    assert low > 0.2 and high < 9
    plots.svg(figure)
    assert plots.bars(rows, title=TITLE, unit="s").axes[0].get_xlim()[1] < 9


@pytest.mark.parametrize(
    "name", ["$5_a$", "猫", "emoji 🐈", "two\nlines", "not unicode \udcff", "<script>&\"'" + "x" * 200]
)
def test_any_name_can_be_drawn_and_is_no_markup(name):
    svg = plots.svg(plots.ratios([bar(name, 2.0), bar("B", 1.0)], title=TITLE))
    assert svg.startswith("<svg") and ">B</text>" in svg and "<script" not in svg
    assert not re.search(r' id="(figure|axes|patch|text|line2d)_\d+"', svg)  # a page has many of them
