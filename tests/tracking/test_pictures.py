"""The pictures of a run are drawn from what its stages left."""

import numpy as np
import pytest
from bundle_files import training

from pipeline import plots
from pipeline.tracking import pictures


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_curves_and_samples_of_a_training(tmp_path, out):
    record = training()
    for epoch in record["epochs"]:
        epoch["figures"] |= {"train/f1": 0.25, "val/f1": 0.125}  # a metric of a newcomer
    pictures.draw_training(record, tmp_path, out)
    assert names(out) == ["accuracy.png", "f1.png", "loss.png"]
    np.save(tmp_path / pictures.SAMPLES, np.zeros((2, 8, 8, 3), np.uint8))
    record["facts"]["samples"] = ["cat", "dog"]
    pictures.draw_training(record, tmp_path, out)
    assert "samples.png" in names(out)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.iterdir())


def test_samples_with_code_in_them_are_not_loaded(tmp_path, out):
    np.save(tmp_path / pictures.SAMPLES, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        pictures.draw_training(training(), tmp_path, out)


def test_the_confusion_matrix_counts_the_predictions(tmp_path, out, monkeypatch):
    drawn = []
    draw = plots.confusion_matrix
    monkeypatch.setattr(plots, "confusion_matrix", lambda *a, **k: drawn.append((a, k)) or draw(*a, **k))
    pictures.draw_evaluation(training(), tmp_path, out)
    assert names(out) == []
    rows = ["actual,predicted", "cat,cat", "cat,dog", "cat,dog", "dog,dog"]
    (tmp_path / "predictions.csv").write_text("\n".join(rows) + "\n")
    pictures.draw_evaluation(training(), tmp_path, out)
    (((counts, classes), options),) = drawn
    assert (counts.tolist(), classes, options["accuracy"]) == ([[1, 2], [0, 1]], ["cat", "dog"], 0.5)
    assert names(out) == ["confusion_matrix.png"]
