"""Draw the pictures of a run: samples, loss, accuracy, confusion matrix. Charts of comparisons share their style.

Figures are made without pyplot, so that there is no window, no backend to choose and nothing to close.
"""

import math
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, font_manager, rc_context, rcParams, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.files import atomic_write

# Okabe and Ito's colours, which colour-blind people can distinguish. For print, lines differ in dashes and markers too.
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#595959"
TRAINING: dict[str, Any] = {"color": BLUE, "linestyle": "-", "marker": "o", "markersize": 8}
VALIDATION: dict[str, Any] = {"color": VERMILLION, "linestyle": "--", "marker": "s"}
TRAINING_LOSS: dict[str, Any] = {"color": GREY, "linestyle": ":", "marker": "^"}

MAX_MARKED_EPOCHS = 25  # with more epochs, markers would hide the line
MAX_NUMBERED_CLASSES = 20  # with more classes, numbers don't fit in their cells
MAX_LABELS = 100  # with more classes, only every second, third, ... has a label


# DejaVu comes with matplotlib. The others add Chinese, Japanese and Korean on Linux, macOS and Windows.
FONTS = ["DejaVu Sans", "Noto Sans CJK JP", "Arial Unicode MS", "Microsoft YaHei"]

# "default" comes first, so that the user's matplotlibrc has no effect.
styled = style.context(
    [
        "default",
        {
            "font.family": [font for font in FONTS if font in font_manager.get_font_names()],
            "font.size": 11,
            "text.parse_math": False,  # a class may be called "$5" or "a_b"
            "axes.titlesize": "medium",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "grid.color": "#DDDDDD",
            "lines.linewidth": 2,
            "lines.markersize": 6,
            "legend.frameon": False,
            "legend.handlelength": 3,
        },
    ]
)


@styled
def samples(images: npt.NDArray[np.uint8], names: Sequence[str], *, title: str) -> Figure:
    """Draw one to six images with their class names, three in a row.

    `images`: (N, H, W, 3) uint8. `names`: N class names.
    """
    rows = math.ceil(len(images) / 3)
    height, width = images.shape[1:3]
    figure = _figure(7.8, rows * (2.6 * np.clip(height / width, 0.4, 2.5) + 0.3) + 0.4, title)
    # Smoothing would blur small images.
    interpolation = "nearest" if max(height, width) <= 128 else "auto"
    for position, (image, name) in enumerate(zip(images, names, strict=True), start=1):
        axes = figure.add_subplot(rows, 3, position)
        axes.imshow(image, interpolation=interpolation)
        axes.set_title(shorten(name))
        axes.set_axis_off()
    return figure


@styled
def metric(epochs: Sequence[Mapping[str, float]], name: str, *, title: str) -> Figure:
    """Draw `train/<name>` and `val/<name>` over the epochs.

    `epochs`: one or more, each with "epoch" (from 1) and those of the two metrics that were measured.
    """
    words = name.replace("_", " ")
    figure = _figure(8, 5, title)
    axes = figure.add_subplot(title=words.capitalize(), ylabel=words)
    _line(axes, epochs, f"train/{name}", label="training", **TRAINING)
    _line(axes, epochs, f"val/{name}", label="validation", **VALIDATION)
    axes.set_ylim(bottom=0)
    _finish(figure, axes, epochs)
    return figure


@styled
def accuracy(epochs: Sequence[Mapping[str, float]], *, best_epoch: int, validation: str, title: str) -> Figure:
    """Draw training and validation accuracy (left axis) and training loss (right axis) over the epochs.

    `epochs`: one or more, each with "epoch" (from 1) and those of "train/accuracy", "val/accuracy" (0 to 1) and
    "train/loss" (cross-entropy in nats) that were measured. `best_epoch` gets a ring. `validation`: "validation split"
    or "test split".
    """
    figure = _figure(8, 5, title)
    axes = figure.add_subplot(title="Accuracy and training loss")
    _line(axes, epochs, "train/accuracy", label="training accuracy", **TRAINING)
    _line(axes, epochs, "val/accuracy", label=f"{validation} accuracy", **VALIDATION)

    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.set_ylabel("training loss", color=GREY)
    right.tick_params(axis="y", colors=GREY)
    _line(right, epochs, "train/loss", label="training loss (right axis)", **TRAINING_LOSS)
    right.set_ylim(bottom=0)

    best = next((epoch.get("val/accuracy") for epoch in epochs if epoch["epoch"] == best_epoch), None)
    if best is not None:
        axes.axvline(best_epoch, color=GREY, linewidth=1, zorder=1)
        axes.plot(
            [best_epoch],
            [best],
            label=f"best: epoch {best_epoch}, {_percent(best)}",
            color="black",
            linestyle="",
            marker="o",
            markersize=15,
            markerfacecolor="none",  # a ring, so that the points under it stay visible
            markeredgewidth=1.5,
            clip_on=False,
        )

    # The axis starts at 0, unless all values are high: then the lines would be squeezed at the top.
    values = [epoch[key] for epoch in epochs for key in ("train/accuracy", "val/accuracy") if key in epoch]
    if min(values, default=0) >= 0.8:
        axes.set(ylim=(0.8, 1), yticks=[0.8, 0.85, 0.9, 0.95, 1], ylabel="accuracy (axis starts at 80%)")
    else:
        axes.set(ylim=(0, 1), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1], ylabel="accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish(figure, axes, epochs)
    return figure


@styled
def confusion_matrix(
    counts: npt.NDArray[np.integer[Any]], names: Sequence[str], *, accuracy: float, title: str
) -> Figure:
    """Draw how many images of each actual class (row) were predicted as each class (column).

    `counts`: (C, C) integers. `names`: C class names. `accuracy`: 0 to 1. A cell's colour shows its share of the row.
    With few classes, a cell contains its count. A row without images is grey.
    """
    classes = len(names)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.ma.masked_array(counts / np.maximum(totals, 1), np.broadcast_to(totals == 0, counts.shape))
    side = float(np.clip(3.5 + 0.45 * classes, 6, 16))
    # A large figure is shown at a smaller scale, so its text must be larger.
    with rc_context({"font.size": max(11, 1.1 * side)}):
        figure = _figure(side + 0.5, side, title)
        axes = figure.add_subplot(title=f"Confusion matrix, accuracy {_percent(accuracy)}")
        axes.set(xlabel="predicted class", ylabel="actual class")
        axes.spines[:].set_visible(True)
        # The colours show the square root: a few per cent of mistakes would be invisible otherwise.
        colours = colormaps["Blues"].with_extremes(bad="#CCCCCC")
        image = axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, vmin=0, vmax=1))
        bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, label="share of the actual class")
        bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
        bar.formatter = PercentFormatter(1, decimals=0)

    numbered = classes <= MAX_NUMBERED_CLASSES
    labelled = range(0, classes, math.ceil(classes / MAX_LABELS))
    size = min(11, 47 * side / min(classes, MAX_LABELS))  # points, at most the height of a row
    columns = [shorten(names[index]) for index in labelled]
    rows = [shorten(names[index]) + ("" if totals[index] else " (no images)") for index in labelled]
    axes.set_yticks(labelled, rows, fontsize=size)
    # Slanted names are easier to read, but vertical ones need less space.
    rotation: dict[str, Any] = {"rotation": 45} if numbered else {"rotation": 90, "va": "center"}
    axes.set_xticks(labelled, columns, fontsize=size, ha="right", rotation_mode="anchor", **rotation)
    if numbered:
        size = min(14, 65 * side / classes / len(str(counts.max())))  # points, at most the width of a cell
        for (row, column), count in np.ndenumerate(counts):
            colour = "#808080" if not count else "white" if shares[row, column] > 0.45 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=size)
    return figure


@styled
def save(figure: Figure, path: Path) -> None:
    """Write the figure atomically as a PNG of 150 dots per inch. The same data give the same bytes.

    Raises StageError if the disk is full or the folder can't be written.
    """
    with atomic_write(path) as temporary, warnings.catch_warnings():
        # Characters that no installed font has are drawn as boxes.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})


def _figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of width x height inches with a title."""
    figure = Figure(figsize=(width, height), layout="compressed")
    FigureCanvasAgg(figure)
    size = rcParams["font.size"]
    figure.suptitle(textwrap.fill(title, int(99 * width / size)), fontsize=1.2 * size, fontweight="bold")
    return figure


def _line(axes: Axes, epochs: Sequence[Mapping[str, float]], key: str, **properties: Any) -> None:
    """Draw the metric `key` over the epochs that have it, if any. `properties` are matplotlib's of the line."""
    points = [(epoch["epoch"], epoch[key]) for epoch in epochs if key in epoch]
    if not points:
        return
    if len(epochs) > MAX_MARKED_EPOCHS:
        properties["marker"] = ""
    axes.plot(*zip(*points, strict=True), clip_on=False, **properties)  # unclipped: a marker at 100% is drawn in full


def _finish(figure: Figure, axes: Axes, epochs: Sequence[Mapping[str, float]]) -> None:
    """Add the epoch axis, a grid, and a legend below the chart, where it hides no data."""
    numbers = [epoch["epoch"] for epoch in epochs]
    axes.set_xlabel("epoch")
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axes.grid(visible=True)
    if any(chart.lines for chart in figure.axes):  # matplotlib warns of an empty legend
        figure.legend(loc="outside lower center", ncols=2)


def shorten(name: str, longest: int = 24) -> str:
    """Put a name on one line, and replace its middle by "…" if it has more than `longest` characters."""
    name = " ".join(name.encode(errors="replace").decode().split())  # a folder's name may be invalid Unicode
    if any(unicodedata.east_asian_width(character) in "WF" for character in name):
        longest //= 2  # Chinese, Japanese and Korean characters are twice as wide
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[longest // 2 + 1 - longest :]}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%"
