"""The pictures of a run's page in MLflow, drawn from the files that its stages left."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = "samples.npy"
"""File of a training: the images of `facts.samples`, (N, H, W, 3) uint8."""


def draw_training(record: Mapping[str, Any], folder: Path, out: Path) -> None:
    """Draw the curves of a training into `out`, and its samples if `folder` holds them."""
    from pipeline import plots  # not above: a training needs only SAMPLES, and no matplotlib

    epochs, title = [epoch["figures"] for epoch in record["epochs"]], record["name"]
    validation = "test split" if record["params"].get("train.validation") == "test" else "validation split"
    best = int(record["metrics"]["best/epoch"])
    figures = {"accuracy": plots.accuracy(epochs, best_epoch=best, validation=validation, title=title)}
    names = [key.removeprefix("val/") for key in epochs[-1] if key.startswith("val/") and key != "val/accuracy"]
    figures |= {name: plots.metric(epochs, name, title=title) for name in names}
    if (folder / SAMPLES).exists():
        images = np.load(folder / SAMPLES, allow_pickle=False)
        figures["samples"] = plots.samples(images, record["facts"]["samples"], title=title)
    for name, figure in figures.items():
        plots.save(figure, out / f"{name}.png")


def draw_evaluation(record: Mapping[str, Any], folder: Path, out: Path) -> None:
    """Draw the confusion matrix of an evaluation into `out`, if `folder` holds its predictions."""
    from pipeline import plots  # not above: a training needs only SAMPLES, and no matplotlib

    if not (folder / "predictions.csv").exists():
        return
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["actual"], row["predicted"]) for row in csv.DictReader(file)]
    classes = record["facts"]["classes"]
    numbers = {name: number for number, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), np.int64)
    for actual, predicted in rows:
        counts[numbers[actual], numbers[predicted]] += 1
    accuracy = counts.trace() / counts.sum()
    figure = plots.confusion_matrix(counts, classes, accuracy=accuracy, title=record["name"])
    plots.save(figure, out / "confusion_matrix.png")
