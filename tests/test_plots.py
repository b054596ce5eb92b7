"""The pictures show their data, and work with any class name."""

import json
import subprocess
import sys
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


@pytest.mark.parametrize("count", [1, 4, 6])
def test_samples_show_each_image_under_its_name(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    names = [f"class {index}" for index in range(count)]
    figure = plots.samples(images, names, title=TITLE)
    assert [axes.get_title() for axes in figure.axes] == names
    for axes, image in zip(figure.axes, images, strict=True):
        assert np.array_equal(axes.images[0].get_array(), image)
    assert figure.get_suptitle() == TITLE


@pytest.mark.parametrize("count", [1, 10, 100])
def test_loss_holds_both_losses_from_zero(count):
    epochs = records(count)
    figure = plots.metric(epochs, "loss", title=TITLE)
    assert values(figure, "training") == [record["train/loss"] for record in epochs]
    assert values(figure, "validation") == [record["val/loss"] for record in epochs]
    assert list(lines(figure)["training"].get_xdata()) == [record["epoch"] for record in epochs]
    assert figure.axes[0].get_ylim()[0] == 0
    assert figure.axes[0].get_ylim()[1] > 2.5


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


def test_the_best_epoch_is_marked():
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
    figure = plots.metric(epochs, "loss", title=TITLE)
    assert list(lines(figure)["training"].get_xdata()) == [1, 2]
    assert list(lines(figure)["validation"].get_xdata()) == [2]
    figure = plots.accuracy(epochs, best_epoch=2, validation="test split", title=TITLE)
    assert legend(figure) == ["training loss (right axis)"]
    plots.save(figure, tmp_path / "accuracy.png")
    plots.save(plots.metric([{"epoch": 1}], "loss", title=TITLE), tmp_path / "loss.png")


def test_a_loss_that_is_not_a_number_is_a_gap(tmp_path):
    epochs = [
        {"epoch": 1, "train/loss": 2.0, "val/loss": float("inf")},
        {"epoch": 2, "train/loss": float("nan")},
    ]
    figure = plots.metric(epochs, "loss", title=TITLE)
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
def test_many_classes_have_no_numbers_and_labels_that_do_not_overlap(classes, labels):
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


def test_a_class_without_images_is_grey_and_says_so():
    counts = np.array([[5, 1, 0], [0, 0, 0], [0, 2, 4]])
    axes = plots.confusion_matrix(counts, ["cat", "dog", "wild"], accuracy=0.75, title=TITLE).axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["cat", "dog (no images)", "wild"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["cat", "dog", "wild"]
    assert np.array_equal(axes.images[0].get_array().mask, [[False] * 3, [True] * 3, [False] * 3])


def test_odd_class_names_are_drawn_unchanged(tmp_path):
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


def all_figures():
    return {
        "samples": plots.samples(np.full((6, 32, 32, 3), 99, np.uint8), list("abcdef"), title=TITLE),
        "loss": plots.metric(records(10), "loss", title=TITLE),
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
    figure = plots.metric(records(1), "loss", title=TITLE)

    def full(file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(StageError, match="no disk space"):
        plots.save(figure, path)
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    assert path.read_bytes() == b"old"


def test_plots_change_no_matplotlib_setting_and_import_no_torch():
    program = """
import json, sys, matplotlib
before = {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams}
from pipeline import plots
plots.metric([{"epoch": 1, "train/loss": 1.0}], "loss", title="t")
changed = [key for key, value in before.items() if dict.__getitem__(matplotlib.rcParams, key) != value]
print(json.dumps({"loaded": [name for name in ("torch", "matplotlib.pyplot") if name in sys.modules],
                  "changed": [key for key in changed if key != "backend"]}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"loaded": [], "changed": []}
