"""The pictures hold the data they were given, and survive any class name."""

import json
import math
import re
import subprocess
import sys
import warnings
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from pipeline import plots
from pipeline.errors import StageError

TITLE = "NVIDIA H200 · blog · fp32"
ODD_NAMES = ["$5_a$", "猫", "a_b", "emoji 🐈", "two\nlines", "not unicode \udcff", "x" * 200]


def records(count):
    return [
        {
            "epoch": epoch,
            "train/loss": 2 / epoch,
            "val/loss": 2.5 / epoch,
            "train/accuracy": 0.9 - 0.6 / epoch,
            "val/accuracy": 0.8 - 0.5 / epoch,
        }
        for epoch in range(1, count + 1)
    ]


def confusion(classes):
    counts = np.ones((classes, classes), int)
    np.fill_diagonal(counts, range(50, 50 + classes))
    return counts


def lines(figure):
    """What the legend calls a line -> the line."""
    return {line.get_label(): line for axes in figure.axes for line in axes.lines}


def legend(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def values(figure, key):
    return list(lines(figure)[key].get_ydata())


def epoch_ticks(figure):
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    return [text.get_text() for text in figure.axes[0].get_xticklabels() if low <= text.get_position()[0] <= high]


@pytest.mark.parametrize("count", [1, 4, 6])
def test_samples_show_each_image_under_its_name(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    names = [f"class {index}" for index in range(count)]
    figure = plots.samples(images, names, title=TITLE)
    assert [axes.get_title() for axes in figure.axes] == names
    for axes, image in zip(figure.axes, images, strict=True):
        assert np.array_equal(axes.images[0].get_array(), image)
    assert figure.get_suptitle() == TITLE


@pytest.mark.parametrize(("side", "interpolation"), [(32, "nearest"), (500, "auto")])
def test_only_tiny_samples_are_drawn_in_squares(side, interpolation):
    figure = plots.samples(np.zeros((1, side, side, 3), np.uint8), ["cat"], title=TITLE)
    assert figure.axes[0].images[0].get_interpolation() == interpolation


def test_samples_need_a_name_each():
    with pytest.raises(ValueError, match="zip"):
        plots.samples(np.zeros((2, 8, 8, 3), np.uint8), ["cat"], title=TITLE)


@pytest.mark.parametrize("count", [1, 10, 100])
def test_loss_holds_both_losses_from_zero(count):
    epochs = records(count)
    figure = plots.loss(epochs, title=TITLE)
    assert values(figure, "training") == [record["train/loss"] for record in epochs]
    assert values(figure, "validation") == [record["val/loss"] for record in epochs]
    assert list(lines(figure)["training"].get_xdata()) == [record["epoch"] for record in epochs]
    assert figure.axes[0].get_ylim()[0] == 0
    assert figure.axes[0].get_ylim()[1] > 2.5


@pytest.mark.parametrize("count", [1, 2, 3, 10, 100])
def test_epoch_ticks_are_few_whole_numbers(count):
    ticks = epoch_ticks(plots.loss(records(count), title=TITLE))
    assert 1 <= len(ticks) <= 12
    assert all(1 <= int(tick) <= count for tick in ticks)
    assert count > 10 or ticks == [str(epoch) for epoch in range(1, count + 1)]


def test_one_epoch_has_markers_and_many_have_none():
    assert lines(plots.loss(records(1), title=TITLE))["training"].get_marker() == "o"
    assert lines(plots.loss(records(100), title=TITLE))["training"].get_marker() == ""


def test_lines_differ_in_more_than_colour():
    drawn = lines(plots.accuracy(records(3), best_epoch=1, validation="test split", title=TITLE))
    shown = [drawn[key] for key in ("training accuracy", "test split accuracy", "training loss (right axis)")]
    assert len({line.get_linestyle() for line in shown}) == 3
    assert len({line.get_marker() for line in shown}) == 3
    assert len({line.get_color() for line in shown}) == 3


@pytest.mark.parametrize("count", [1, 10, 100])
def test_accuracy_holds_its_three_lines(count):
    epochs = records(count)
    figure = plots.accuracy(epochs, best_epoch=count, validation="test split", title=TITLE)
    assert values(figure, "training accuracy") == [record["train/accuracy"] for record in epochs]
    assert values(figure, "test split accuracy") == [record["val/accuracy"] for record in epochs]
    assert values(figure, "training loss (right axis)") == [record["train/loss"] for record in epochs]
    left, right = figure.axes
    assert left.get_ylim() == (0, 1)
    assert left.yaxis.get_major_formatter()(0.8) == "80%"
    assert right.get_ylim()[0] == 0


def test_the_best_epoch_is_marked_where_it_is():
    figure = plots.accuracy(records(10), best_epoch=5, validation="validation split", title=TITLE)
    ring = lines(figure)["best: epoch 5, 70.00%"]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([5], [pytest.approx(0.7)])
    assert "best: epoch 5, 70.00%" in legend(figure)


def test_an_axis_that_does_not_start_at_zero_says_so():
    epochs = [{"epoch": 1, "train/accuracy": 0.8, "val/accuracy": 0.95}]
    axes = plots.accuracy(epochs, best_epoch=1, validation="test split", title=TITLE).axes[0]
    assert axes.get_ylim() == (0.8, 1)
    assert "starts at 80%" in axes.get_ylabel()
    epochs[0]["train/accuracy"] = 0.79
    axes = plots.accuracy(epochs, best_epoch=1, validation="test split", title=TITLE).axes[0]
    assert axes.get_ylim() == (0, 1)
    assert axes.get_ylabel() == "accuracy"


def test_what_was_not_measured_is_not_drawn(tmp_path):
    epochs = [{"epoch": 1, "train/loss": 2.0}, {"epoch": 2, "train/loss": 1.0, "val/loss": 3.0}, {"epoch": 3}]
    figure = plots.loss(epochs, title=TITLE)
    assert list(lines(figure)["training"].get_xdata()) == [1, 2]
    assert list(lines(figure)["validation"].get_xdata()) == [2]
    figure = plots.accuracy(epochs, best_epoch=2, validation="test split", title=TITLE)
    assert legend(figure) == ["training loss (right axis)"]
    plots.save(figure, tmp_path / "accuracy.png")
    plots.save(plots.loss([{"epoch": 1}], title=TITLE), tmp_path / "loss.png")


def test_a_loss_that_is_not_a_number_is_a_gap(tmp_path):
    epochs = [
        {"epoch": 1, "train/loss": 2.0, "val/loss": float("inf")},
        {"epoch": 2, "train/loss": float("nan")},
    ]
    figure = plots.loss(epochs, title=TITLE)
    plots.save(figure, tmp_path / "loss.png")
    assert 2 < figure.axes[0].get_ylim()[1] < 3


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 20])
def test_confusion_matrix_writes_each_count_in_its_cell(classes):
    counts = confusion(classes)
    names = [f"class {index}" for index in range(classes)]
    figure = plots.confusion_matrix(counts, names, accuracy=0.9431, title=TITLE)
    axes = figure.axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(column, row): str(count) for (row, column), count in np.ndenumerate(counts)}
    assert np.allclose(axes.images[0].get_array(), counts / counts.sum(axis=1, keepdims=True))
    assert [text.get_text() for text in axes.get_yticklabels()] == names
    assert [text.get_text() for text in axes.get_xticklabels()] == names
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("actual class", "predicted class")
    assert axes.get_title() == "Confusion matrix, accuracy 94.31%"
    assert figure.get_suptitle() == TITLE


@pytest.mark.parametrize(("classes", "labels"), [(21, 21), (100, 100), (101, 51), (250, 84)])
def test_many_classes_have_no_numbers_and_labels_that_stay_apart(classes, labels):
    names = [f"n{index}" for index in range(classes)]
    figure = plots.confusion_matrix(confusion(classes), names, accuracy=0.5, title=TITLE)
    axes = figure.axes[0]
    assert not axes.texts
    assert axes.images[0].get_array().shape == (classes, classes)
    step = -(-classes // 100)
    assert [text.get_text() for text in axes.get_xticklabels()] == names[::step]
    assert len(axes.get_yticks()) == labels
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))


@pytest.mark.parametrize(("classes", "count"), [(3, 400), (10, 1000), (20, 12345)])
def test_numbers_stay_in_their_cells(classes, count):
    counts = np.full((classes, classes), count)
    names = [f"a long name of class {index}" for index in range(classes)]
    figure = plots.confusion_matrix(counts, names, accuracy=0.5, title=TITLE)
    figure.canvas.draw()
    cell = figure.axes[0].get_window_extent().width / classes
    assert max(text.get_window_extent().width for text in figure.axes[0].texts) < cell


def test_a_class_without_images_is_grey_and_says_so():
    counts = np.array([[5, 1, 0], [0, 0, 0], [0, 2, 4]])
    axes = plots.confusion_matrix(counts, ["cat", "dog", "wild"], accuracy=0.75, title=TITLE).axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["cat", "dog (no images)", "wild"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["cat", "dog", "wild"]
    assert np.array_equal(axes.images[0].get_array().mask, [[False] * 3, [True] * 3, [False] * 3])


def test_odd_class_names_are_drawn_as_they_are(tmp_path):
    count = len(ODD_NAMES)
    figure = plots.confusion_matrix(confusion(count), ODD_NAMES, accuracy=0.5, title="DEMO · $x_1$")
    labels = figure.axes[0].get_xticklabels()
    shown = [text.get_text() for text in labels]
    assert shown[:6] == ["$5_a$", "猫", "a_b", "emoji 🐈", "two lines", "not unicode ?"]
    assert len(shown[6]) == 24
    assert "…" in shown[6]
    assert not any(text.get_parse_math() for text in [*labels, *figure.axes[0].get_yticklabels()])
    plots.save(figure, tmp_path / "confusion_matrix.png")
    figure = plots.samples(np.zeros((count, 8, 8, 3), np.uint8), ODD_NAMES, title="DEMO · $x_1$")
    assert not any(axes.title.get_parse_math() for axes in figure.axes)
    plots.save(figure, tmp_path / "samples.png")


def test_save_hides_no_other_warning(tmp_path, monkeypatch):
    figure = plots.loss(records(1), title=TITLE)
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: warnings.warn("something else", stacklevel=1))
    with pytest.raises(UserWarning, match="something else"):
        plots.save(figure, tmp_path / "loss.png")


def test_a_long_title_stays_in_the_figure():
    title = "DEMO · AMD EPYC 7763 64-Core Processor · blog · fp32 · 128 threads · one more word and another"
    for figure in (
        plots.loss(records(1), title=title),
        plots.confusion_matrix(confusion(3), ["cat", "dog", "wild"], accuracy=0.5, title=title),
        plots.confusion_matrix(confusion(100), ["class"] * 100, accuracy=0.5, title=title),
    ):
        figure.canvas.draw()
        assert figure._suptitle.get_window_extent().width <= figure.bbox.width
        assert figure.get_suptitle().replace("\n", " ") == title


def all_figures():
    return {
        "samples": plots.samples(np.full((6, 32, 32, 3), 99, np.uint8), list("abcdef"), title=TITLE),
        "loss": plots.loss(records(10), title=TITLE),
        "accuracy": plots.accuracy(records(10), best_epoch=3, validation="test split", title=TITLE),
        "confusion": plots.confusion_matrix(confusion(3), ["a", "b", "c"], accuracy=0.9, title=TITLE),
    }


def test_the_same_data_gives_the_same_bytes(tmp_path, monkeypatch):
    for name, figure in all_figures().items():
        plots.save(figure, tmp_path / f"{name}.png")
    # A person's own settings change nothing either.
    for key, value in {"font.size": 30, "figure.dpi": 50, "axes.facecolor": "red", "savefig.dpi": 20}.items():
        monkeypatch.setitem(matplotlib.rcParams, key, value)
    for name, figure in all_figures().items():
        plots.save(figure, tmp_path / f"{name}_again.png")
        written = (tmp_path / f"{name}.png").read_bytes()
        assert written == (tmp_path / f"{name}_again.png").read_bytes()
        assert written.startswith(b"\x89PNG")
        assert b"Software" not in written
    height, width, _ = imread(tmp_path / "loss.png").shape
    assert width == pytest.approx(8 * 150, rel=0.03)
    assert height == pytest.approx(5 * 150, rel=0.03)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")
    figure = plots.loss(records(1), title=TITLE)

    def full(file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(StageError, match="no disk space"):
        plots.save(figure, path)
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    assert path.read_bytes() == b"old"


def test_plots_leave_matplotlib_and_torch_alone():
    program = """
import json, sys, matplotlib
before = {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams}
from pipeline import plots
plots.loss([{"epoch": 1, "train/loss": 1.0}], title="t")
changed = [key for key, value in before.items() if dict.__getitem__(matplotlib.rcParams, key) != value]
print(json.dumps({"loaded": [name for name in ("torch", "matplotlib.pyplot") if name in sys.modules],
                  "changed": [key for key in changed if key != "backend"]}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"loaded": [], "changed": []}


# --- charts of a comparison


def bar(label, value=None, low=None, high=None, look="plain", text="text"):
    return plots.Bar(label=label, text=text, link=f"http://h/{label}", look=look, value=value, low=low, high=high)


def curve(label, seconds=10.0, count=5):
    points = [(seconds * (epoch + 1) / count, 0.5 + 0.05 * epoch) for epoch in range(count)]
    return plots.Curve(label=label, link=f"http://h/{label}", points=points)


def patches(figure):
    return [(patch.get_x(), patch.get_width()) for patch in figure.axes[0].patches]


def test_bars_begin_at_zero_and_ratios_at_one():
    assert patches(plots.bars([bar("A", 3.0), bar("B"), bar("C", 1.0)], title=TITLE, unit="s")) == [(0, 3), (0, 1)]
    figure = plots.ratios([bar("A", 3.0), bar("B", 0.5)], title=TITLE, unit="times")
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


def test_an_axis_of_ratios_says_that_it_is_logarithmic():
    assert "logarithmic" in plots.ratios([bar("A", 3.0)], title=TITLE, unit="times").axes[0].get_xlabel()


def test_an_interval_is_drawn_and_one_without_end_does_not_hide_the_others():
    rows = [bar("A", 2.0, 1.9, 2.1), bar("B", 1.5, 1e-9, math.inf), bar("C", 1.2, 0.0, 1e12)]
    figure = plots.ratios(rows, title=TITLE, unit="times")
    assert len(figure.axes[0].collections) == 3
    low, high = figure.axes[0].get_xlim()
    assert low > 0.2 and high < 9
    plots.svg(figure)
    assert plots.bars(rows, title=TITLE, unit="s").axes[0].get_xlim()[1] < 9


@pytest.mark.parametrize(
    "values", [(1.0,), (1.0001, 0.9999), (1e6, 1e-3), (3.0, 2.9), (7.0, 0.3), (0.01,), (40.0, 0.9), (1.3, 0.7)]
)
def test_ticks_of_ratios_stay_apart(values):
    figure = plots.ratios([bar(f"M{v}", v) for v in values], title=TITLE, unit="times")
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    shown = [tick for tick in figure.axes[0].xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = sorted((tick.label1.get_window_extent() for tick in shown), key=lambda box: box.x0)
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))


def test_looks_differ_in_more_than_colour():
    looks = [(look["facecolor"], look.get("hatch"), look.get("linestyle")) for look in plots.BARS.values()]
    without_colour = {(face == "white", *rest) for (face, *rest), name in zip(looks, plots.BARS, strict=True) if name in
                      ("faster", "slower", "none", "small", "few", "problem")}  # fmt: skip
    assert len(without_colour) == 6
    assert len({dashes for _, dashes, _ in plots.CURVES[:4]}) == 4
    assert len({marker for *_, marker in plots.CURVES}) == len(plots.CURVES)


def test_few_courses_share_a_chart_and_many_have_one_each():
    few = plots.courses([curve("A"), curve("B", 5.0)], target=0.65, title=TITLE)
    assert len(few.axes) == 2  # the chart and its names
    assert [list(line.get_xdata()) for line in few.axes[0].lines[1:3]] == [[2, 4, 6, 8, 10], [1, 2, 3, 4, 5]]
    many = plots.courses([curve(f"M{place}") for place in range(40)], target=None, title=TITLE)
    assert len(many.axes) == 40
    assert {axes.get_xlim() for axes in many.axes} == {many.axes[0].get_xlim()}


def test_times_that_lie_far_apart_have_a_logarithmic_axis():
    assert plots.courses([curve("A", 1.0), curve("B", 19.0)], target=None, title=TITLE).axes[0].get_xscale() == "linear"
    axes = plots.courses([curve("A", 1.0), curve("B", 21.0)], target=None, title=TITLE).axes[0]
    assert axes.get_xscale() == "log" and "logarithmic" in axes.get_xlabel()


def test_a_course_of_one_epoch_is_drawn():
    figure = plots.courses([curve("A", count=1), curve("B", count=1)], target=0.9, title=TITLE)
    assert "<svg" in plots.svg(figure)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_an_svg_is_the_same_each_time_and_holds_its_text_and_links(count):
    def made():
        return plots.svg(plots.bars([bar(f"M{place}", place + 1.0) for place in range(count)], title=TITLE, unit="s"))

    text = made()
    assert text == made() and text.startswith("<svg")
    assert 'viewBox="0 0 295' in text and "pt" not in text.split(">")[0]
    assert all(f">M{place}</text>" in text and f"http://h/M{place}" in text for place in range(count))
    assert "'DejaVu Sans', system-ui, sans-serif" in text


def test_names_in_an_svg_are_no_markup_and_ids_are_not_shared():
    odd = "<script>&\"'" + "x" * 100
    one, other = (plots.svg(plots.bars([bar(odd, 1.0, 0.9, value)], title=odd, unit="s")) for value in (1.1, 1.2))
    assert "<script" not in one and "…" in one
    ids = [set(re.findall(r' id="([^"]*)"', text)) for text in (one, other)]
    assert not {name for name in ids[0] | ids[1] if re.fullmatch(r"(figure|axes|patch|text|line2d)_\d+", name)}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_can_be_drawn(name):
    plots.svg(plots.ratios([bar(name, 2.0), bar("B", 1.0, look="reference")], title="chart", unit="times"))
