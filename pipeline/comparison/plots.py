"""The charts of a comparison: bars, ratios, and accuracy against time."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from pipeline.plots import BLUE, GREY, VERMILLION, shorten, styled

# The bars of a comparison: colour, hatch and edge say the same, so that each one of them is enough.
BARS: dict[str, dict[str, Any]] = {
    "plain": {"facecolor": BLUE},
    "faster": {"facecolor": BLUE},
    "slower": {"facecolor": VERMILLION, "hatch": "////"},
    "none": {"facecolor": "white", "edgecolor": GREY, "linewidth": 1.2},
    "small": {"facecolor": "white", "edgecolor": GREY, "linewidth": 1.2, "linestyle": "--"},
    "few": {"facecolor": "white", "edgecolor": GREY, "linewidth": 1.2, "linestyle": ":"},
    "reference": {"facecolor": GREY},
    "problem": {"facecolor": "#DDDDDD", "hatch": "xxxx"},
}

CURVES = (
    ("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"), ("#CC79A7", ":", "D"), ("#000000", "-", "v"),
    ("#56B4E9", "--", "P"),
)  # fmt: skip
"""Colour, dashes and marker of each curve of a chart; with more of them each has a chart of its own."""

CHART_WIDTH = 4.1  # inches: a chart of a comparison is as wide as a phone, where its writing must be readable

ROW_HEIGHT = 0.42

SMALL = 8.5  # points

FAR_APART = 50.0
"""From this ratio of the largest value to the smallest on, an axis is logarithmic."""

LOGARITHMIC = "(logarithmic axis)"


@dataclass(frozen=True)
class Bar:
    """A machine in a chart: its name, its figure as text, and a bar with its interval if it has one. `look` is a key of
    BARS. `link` is the address of its run."""

    label: str
    text: str
    link: str
    look: str = "plain"
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """A machine's accuracy over time: points are (seconds, accuracy from 0 to 1)."""

    label: str
    link: str
    points: Sequence[tuple[float, float]]


@styled
def bars(rows: Sequence[Bar], *, title: str, unit: str) -> Figure:
    """Draw a bar from 0 for each machine, in the given order. If values are FAR_APART, the axis is logarithmic and the
    bars start at the power of ten below the smallest value."""
    values = [row.value for row in rows if row.value is not None]
    far_apart = bool(values) and max(values) >= FAR_APART * min(values) > 0
    figure, axes = _chart(rows, title, f"{unit} {LOGARITHMIC}" if far_apart else unit)
    highest = max((_within(row.high, row.value) for row in rows if row.value is not None), default=1.0)
    start = 0.0
    if far_apart:
        lowest = math.floor(math.log10(min(values)) - 0.05)  # the shortest bar is still one
        start = 10.0**lowest
        decades = 1.04 * (math.log10(highest) - lowest)
        axes.set_xscale("log")
        axes.set_xlim(start, 10.0 ** (lowest + decades))
        # No label at the right edge, where it would be cut.
        powers = range(lowest, math.floor(lowest + 0.93 * decades) + 1, math.ceil(decades / 5))
        axes.xaxis.set_major_locator(FixedLocator([10.0**power for power in powers]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.05 * highest)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    _bars(axes, rows, start)
    return figure


@styled
def ratios(rows: Sequence[Bar], *, title: str, unit: str) -> Figure:
    """Draw a bar from 1 for each machine on a logarithmic axis, so that twice as fast is as long as half as fast."""
    figure, axes = _chart(rows, title, f"{unit} {LOGARITHMIC}")
    values = [1.0]
    for row in rows:
        if row.value is not None:
            values += [row.value, _within(row.low, row.value), _within(row.high, row.value)]
    margin = max((max(values) / min(values)) ** 0.06, 1.01)
    low, high = min(values) / margin, max(values) * margin
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(FixedLocator(_ratio_ticks(low, high)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.axvline(1, color="black", linewidth=1)
    _bars(axes, rows, 1)
    return figure


@styled
def courses(curves: Sequence[Curve], *, target: float | None, title: str) -> Figure:
    """Draw validation accuracy against time, with a line at `target`. Many machines get a small chart each, with the
    first machine's curve for comparison."""
    seconds = [point[0] for curve in curves for point in curve.points]
    accuracies = [point[1] for curve in curves for point in curve.points]
    limits = {
        "xlim": (0.9 * min(seconds), 1.1 * max(seconds)) if _wide(curves) else (0, 1.05 * max(seconds)),
        "ylim": (math.floor(10 * min(accuracies)) / 10, math.ceil(10 * max(accuracies) + 1e-9) / 10),
        "xscale": "log" if _wide(curves) else "linear",
    }
    if len(curves) <= len(CURVES):
        figure = _course_chart(curves, title, limits, target)
    else:
        figure = _course_charts(curves, title, limits, target)
    return figure


def _wide(curves: Sequence[Curve]) -> bool:
    """Whether the slowest takes more than 20 times as long as the fastest."""
    lasting = [curve.points[-1][0] for curve in curves]
    return max(lasting) > 20 * min(lasting)


@styled
def svg(figure: Figure) -> str:
    """The figure as an SVG element for an HTML page, with text as text. The same data gives the same bytes."""
    file = io.StringIO()
    with rc_context({"svg.hashsalt": "trainmark", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # The page sets the size, a missing font has a substitute, and ids must be unique on a page.
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', system-ui, sans-serif")
    return re.sub(r' id="[A-Za-z.]+[0-9]?[A-Za-z]*_\d+"', "", text)


def _sheet(height: float, title: str) -> tuple[Figure, float]:
    """An empty figure as wide as a phone with `height` inches below its title. Returns it with its whole height."""
    lines = textwrap.wrap(title, 46)
    whole = height + 0.1 + 0.2 * len(lines)
    figure = Figure(figsize=(CHART_WIDTH, whole))
    FigureCanvasAgg(figure)
    top = 1 - 0.06 / whole
    figure.text(0.02, top, "\n".join(lines), fontsize=SMALL + 1.5, fontweight="bold", va="top", linespacing=1.2)
    return figure, whole


def _chart(rows: Sequence[Bar], title: str, unit: str) -> tuple[Figure, Axes]:
    """A figure with a row for each machine: name, figure as text, and room for a bar below."""
    inside = ROW_HEIGHT * len(rows) + 0.1
    figure, whole = _sheet(inside + 0.5, title)
    axes = figure.add_axes((0.02, 0.45 / whole, 0.96, inside / whole))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks([])
    axes.tick_params(labelsize=SMALL - 0.5, top=len(rows) > 12, labeltop=False)
    axes.set_xlabel(unit, fontsize=SMALL)
    axes.grid(visible=True, axis="x")
    for place, row in enumerate(rows):
        room = 50 - len(row.text)
        written: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "fontsize": SMALL, "va": "center"}
        axes.text(0, place - 0.3, shorten(row.label, room), url=row.link, **written)
        axes.text(1, place - 0.3, row.text, ha="right", **written)
    return figure, axes


def _bars(axes: Axes, rows: Sequence[Bar], start: float) -> None:
    for place, row in enumerate(rows):
        if row.value is None:
            continue
        drawn: dict[str, Any] = {"edgecolor": "white", "linewidth": 0} | BARS[row.look]
        axes.barh([place + 0.12], [row.value - start], height=0.34, left=start, url=row.link, **drawn)
        if row.low is not None and row.high is not None:
            ends = [[max(row.value - row.low, 0)], [max(row.high - row.value, 0)]]
            line: dict[str, Any] = {"color": "black", "linewidth": 1.2, "capsize": 3}
            axes.errorbar([row.value], [place + 0.12], xerr=ends, fmt="none", **line)


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: 1, and a few others that do not overlap it."""
    decades = math.log10(high / low)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if decades < 0.6:
        ticks = list(MaxNLocator(4).tick_values(low, high))
    elif decades < 2:
        ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    else:
        ticks = [10.0**power for power in powers if power % math.ceil(decades / 5) == 0]
    return [1.0, *(tick for tick in ticks if low <= tick <= high and abs(math.log10(tick)) > decades / 8)]


def _within(bound: float | None, value: float) -> float:
    """The end of an interval for scaling the axis: at most four times the value, so that one wide interval does not
    squeeze all bars."""
    return value if bound is None else min(max(bound, value / 4), value * 4)


def _course_chart(curves: Sequence[Curve], title: str, limits: Mapping[str, Any], target: float | None) -> Figure:
    named = 0.22 * len(curves)
    figure, whole = _sheet(2.9 + named, title)
    axes = figure.add_axes((0.13, (0.55 + named) / whole, 0.84, 2.3 / whole))
    _course_axes(axes, limits, target)
    axes.set_xlabel(_seconds(limits), fontsize=SMALL)
    names = figure.add_axes((0.02, 0.02 / whole, 0.96, named / whole))
    names.set(xlim=(0, 1), ylim=(len(curves), 0))
    names.set_axis_off()
    for place, (curve, (colour, dashes, marker)) in enumerate(zip(curves, CURVES, strict=False)):
        look: dict[str, Any] = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 4.5}
        look["linewidth"] = 1.5
        often = -(-len(curve.points) // 12)
        axes.plot(*zip(*curve.points, strict=True), markevery=often, clip_on=False, **look)
        names.plot([0.01, 0.06, 0.11], [place + 0.5] * 3, **look)
        names.text(0.14, place + 0.5, shorten(curve.label, 44), fontsize=SMALL, va="center", url=curve.link)
    return figure


def _course_charts(curves: Sequence[Curve], title: str, limits: Mapping[str, Any], target: float | None) -> Figure:
    high, wide = 1.35, CHART_WIDTH / 2
    rows = -(-len(curves) // 2)
    figure, whole = _sheet(high * rows + 0.35, title)
    first = curves[0]
    for place, curve in enumerate(curves):
        row, column = divmod(place, 2)
        bottom = whole - (whole - high * rows - 0.3) - high * (row + 1) + 0.25
        corner = ((column * wide + 0.38) / CHART_WIDTH, (bottom + 0.05) / whole)
        axes = figure.add_axes((*corner, (wide - 0.5) / CHART_WIDTH, (high - 0.5) / whole))
        _course_axes(axes, limits, target)
        axes.set_title(shorten(curve.label, 27), fontsize=SMALL - 1.5, url=curve.link, pad=3, loc="left", x=-0.2)
        axes.plot(*zip(*first.points, strict=True), color=GREY, linestyle=":", linewidth=1)
        axes.plot(*zip(*curve.points, strict=True), color=BLUE, linewidth=1.5)
        axes.tick_params(labelsize=SMALL - 2)
    key = f"{_seconds(limits)}; dotted: {shorten(first.label, 36 if limits['xscale'] == 'linear' else 20)}"
    figure.text(0.5, 0.06 / whole, key, fontsize=SMALL, ha="center")
    return figure


def _seconds(limits: Mapping[str, Any]) -> str:
    return "seconds" if limits["xscale"] == "linear" else f"seconds {LOGARITHMIC}"


def _course_axes(axes: Axes, limits: Mapping[str, Any], target: float | None) -> None:
    axes.set(**limits)
    axes.tick_params(labelsize=SMALL - 0.5)
    axes.grid(visible=True)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if limits["xscale"] == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(4))
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    if target is not None:
        axes.axhline(target, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
