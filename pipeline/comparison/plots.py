"""Draw the charts of a comparison: bars, ratios, and accuracy against time. Every chart is as wide as a phone."""

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
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.comparison.stats import Contrast, Estimate
from pipeline.plots import BLUE, GREY, VERMILLION, shorten, styled

LOOKS: dict[str, dict[str, Any]] = {
    "plain": {"facecolor": BLUE},
    "faster": {"facecolor": BLUE},
    "slower": {"facecolor": VERMILLION, "hatch": "////"},
    "none": {"facecolor": "white", "edgecolor": GREY, "linewidth": 1.2},
    "small": {"facecolor": "white", "edgecolor": GREY, "linewidth": 1.2, "linestyle": "--"},
    "few": {"facecolor": "white", "edgecolor": GREY, "linewidth": 1.2, "linestyle": ":"},
    "reference": {"facecolor": GREY},
    "problem": {"facecolor": "#DDDDDD", "hatch": "xxxx"},
}
"""How the bar of each kind of claim looks. Kinds also differ in hatch or edge, for readers who see no colour."""

LINES = (
    ("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"), ("#CC79A7", ":", "D"), ("#000000", "-", "v"),
    ("#56B4E9", "--", "P"),
)  # fmt: skip
"""Colour, dashes and marker of each curve in a shared chart."""

WIDTH = 4.1  # of a chart, in inches
ROW_HEIGHT = 0.42  # of a bar with its label, in inches
SMALL = 8.5  # font size, in points

FAR_APART = 50.0
"""If the largest value is this many times the smallest, the axis is logarithmic."""

NUMBERS = "{x:,.6g}"
LOGARITHMIC = "(logarithmic axis)"


@dataclass(frozen=True)
class Bar:
    """A row of a chart: a machine's name, its figure as text, the address of its run, and a bar with its interval.
    `look`: a key of LOOKS. Without an `estimate` the row has no bar."""

    label: str
    text: str
    link: str
    look: str
    estimate: Estimate | Contrast | None


@dataclass(frozen=True)
class Curve:
    """A machine's accuracy over time. `points`: (seconds, accuracy from 0 to 1); `link`: the address of its run."""

    label: str
    link: str
    points: Sequence[tuple[float, float]]


@styled
def bars(rows: Sequence[Bar], *, title: str, unit: str) -> Figure:
    """Draw a bar from 0 for each row. If values are FAR_APART, the axis is logarithmic and the bars start at the power
    of ten below the smallest value."""
    estimates = [row.estimate for row in rows if row.estimate is not None]
    lowest, highest = min(estimate.value for estimate in estimates), max(_visible_ends(estimates))
    far_apart = max(estimate.value for estimate in estimates) >= FAR_APART * lowest > 0
    figure, axes = _chart(rows, title, f"{unit} {LOGARITHMIC}" if far_apart else unit)
    start = 0.0
    if far_apart:
        exponent = math.floor(math.log10(lowest) - 0.05)  # below the smallest value, so that its bar has a length
        start = 10.0**exponent
        decades = 1.04 * (math.log10(highest) - exponent)
        axes.set_xscale("log")
        axes.set_xlim(start, 10.0 ** (exponent + decades))
        # No tick close to the right edge, where its label would be cut.
        exponents = range(exponent, math.floor(exponent + 0.93 * decades) + 1, math.ceil(decades / 5))
        axes.set_xticks([10.0**tick for tick in exponents])
        axes.minorticks_off()
    else:
        axes.set_xlim(0, 1.05 * highest)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(NUMBERS)
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    _draw_bars(axes, rows, start)
    return figure


@styled
def ratios(rows: Sequence[Bar], *, title: str) -> Figure:
    """Draw a bar from 1 for each row on a logarithmic axis, so that twice as fast is as long as half as fast."""
    figure, axes = _chart(rows, title, f"times as fast {LOGARITHMIC}")
    estimates = [row.estimate for row in rows if row.estimate is not None]
    ends = [1.0, *_visible_ends(estimates)]
    low, high = min(ends), max(ends)
    margin = max((high / low) ** 0.06, 1.01)
    low, high = low / margin, high * margin
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.spines["left"].set_visible(False)
    axes.set_xticks(_ratio_ticks(low, high))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(NUMBERS)
    axes.axvline(1, color="black", linewidth=1)
    _draw_bars(axes, rows, 1)
    return figure


@styled
def courses(curves: Sequence[Curve], *, target: float | None, title: str) -> Figure:
    """Draw validation accuracy against time, with a line at `target`. If there are more curves than LINES, each has a
    small chart of its own, with the first curve for comparison."""
    seconds = [point[0] for curve in curves for point in curve.points]
    accuracies = [point[1] for curve in curves for point in curve.points]
    durations = [curve.points[-1][0] for curve in curves]
    far_apart = max(durations) > 20 * min(durations)
    limits = {
        "xlim": (0.9 * min(seconds), 1.1 * max(seconds)) if far_apart else (0, 1.05 * max(seconds)),
        "ylim": (math.floor(10 * min(accuracies)) / 10, math.ceil(10 * max(accuracies) + 1e-9) / 10),
        "xscale": "log" if far_apart else "linear",
    }
    draw = _shared_chart if len(curves) <= len(LINES) else _small_charts
    return draw(curves, title, limits, target)


@styled
def svg(figure: Figure) -> str:
    """The figure as an SVG element for an HTML page, with text as text. The same data gives the same bytes."""
    file = io.StringIO()
    with rc_context({"svg.hashsalt": "trainmark", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # The page sets the size, missing fonts need a substitute, and ids must be unique on a page.
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', system-ui, sans-serif")
    return re.sub(r' id="[A-Za-z.]+[0-9]?[A-Za-z]*_\d+"', "", text)


def _sheet(height: float, title: str) -> tuple[Figure, float]:
    """An empty figure with a title and `height` inches below it. Also returns the height of the whole figure."""
    lines = textwrap.wrap(title, 46)
    whole = height + 0.1 + 0.2 * len(lines)
    figure = Figure(figsize=(WIDTH, whole))
    FigureCanvasAgg(figure)
    top = 1 - 0.06 / whole
    figure.text(0.02, top, "\n".join(lines), fontsize=SMALL + 1.5, fontweight="bold", va="top", linespacing=1.2)
    return figure, whole


def _chart(rows: Sequence[Bar], title: str, unit: str) -> tuple[Figure, Axes]:
    """A figure with a line of text for each row, and room for a bar below it."""
    inside = ROW_HEIGHT * len(rows) + 0.1
    figure, whole = _sheet(inside + 0.5, title)
    axes = figure.add_axes((0.02, 0.45 / whole, 0.96, inside / whole))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks([])
    axes.tick_params(labelsize=SMALL - 0.5, top=len(rows) > 12, labeltop=False)
    axes.set_xlabel(unit, fontsize=SMALL)
    axes.grid(visible=True, axis="x")
    for index, row in enumerate(rows):
        style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "fontsize": SMALL, "va": "center"}
        axes.text(0, index - 0.3, shorten(row.label, 50 - len(row.text)), url=row.link, **style)
        axes.text(1, index - 0.3, row.text, ha="right", **style)
    return figure, axes


def _draw_bars(axes: Axes, rows: Sequence[Bar], start: float) -> None:
    for index, row in enumerate(rows):
        if row.estimate is None:
            continue
        value, low, high, _ = row.estimate
        style: dict[str, Any] = {"edgecolor": "white", "linewidth": 0} | LOOKS[row.look]
        axes.barh([index + 0.12], [value - start], height=0.34, left=start, url=row.link, **style)
        if low is not None and high is not None:
            errors = [[max(value - low, 0)], [max(high - value, 0)]]
            axes.errorbar([value], [index + 0.12], xerr=errors, fmt="none", color="black", linewidth=1.2, capsize=3)


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: 1, and a few others whose labels do not overlap that of 1."""
    decades = math.log10(high / low)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if decades < 0.6:
        ticks = list(MaxNLocator(4).tick_values(low, high))
    elif decades < 2:
        ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    else:
        ticks = [10.0**power for power in powers if power % math.ceil(decades / 5) == 0]
    return [1.0, *(tick for tick in ticks if low <= tick <= high and abs(math.log10(tick)) > decades / 8)]


def _visible_ends(estimates: Sequence[Estimate | Contrast]) -> list[float]:
    """What an axis must show: the values and their intervals, but of an interval at most a quarter and four times the
    value, so that one wide interval does not shrink all bars."""
    ends = [estimate.value for estimate in estimates]
    ends += [max(estimate.low, estimate.value / 4) for estimate in estimates if estimate.low is not None]
    return ends + [min(estimate.high, estimate.value * 4) for estimate in estimates if estimate.high is not None]


def _shared_chart(curves: Sequence[Curve], title: str, limits: Mapping[str, Any], target: float | None) -> Figure:
    legend_height = 0.22 * len(curves)
    figure, whole = _sheet(2.9 + legend_height, title)
    axes = figure.add_axes((0.13, (0.55 + legend_height) / whole, 0.84, 2.3 / whole))
    _course_axes(axes, limits, target)
    axes.set_xlabel(_seconds(limits), fontsize=SMALL)
    legend = figure.add_axes((0.02, 0.02 / whole, 0.96, legend_height / whole))
    legend.set(xlim=(0, 1), ylim=(len(curves), 0))
    legend.set_axis_off()
    for index, (curve, (colour, dashes, marker)) in enumerate(zip(curves, LINES, strict=False)):
        style: dict[str, Any] = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 4.5}
        style["linewidth"] = 1.5
        axes.plot(*zip(*curve.points, strict=True), markevery=math.ceil(len(curve.points) / 12), clip_on=False, **style)
        legend.plot([0.01, 0.06, 0.11], [index + 0.5] * 3, **style)
        legend.text(0.14, index + 0.5, shorten(curve.label, 44), fontsize=SMALL, va="center", url=curve.link)
    return figure


def _small_charts(curves: Sequence[Curve], title: str, limits: Mapping[str, Any], target: float | None) -> Figure:
    height, width = 1.35, WIDTH / 2
    rows = math.ceil(len(curves) / 2)
    figure, whole = _sheet(height * rows + 0.35, title)
    first = curves[0]
    for index, curve in enumerate(curves):
        row, column = divmod(index, 2)
        bottom = whole - (whole - height * rows - 0.3) - height * (row + 1) + 0.25
        corner = ((column * width + 0.38) / WIDTH, (bottom + 0.05) / whole)
        axes = figure.add_axes((*corner, (width - 0.5) / WIDTH, (height - 0.5) / whole))
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
        axes.xaxis.set_major_formatter(NUMBERS)
        axes.minorticks_off()
    if target is not None:
        axes.axhline(target, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
