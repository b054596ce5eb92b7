"""Measures the best checkpoint on the test split, and completes the training's run with it."""

from pipeline import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import (
    backends,
    config,
    data,
    engine,
    files,
    model,
    plots,
    publish,
    records,
    sources,
    terminal,
    tracking,
    training,
)
from pipeline.clock import Clock
from pipeline.errors import UsageError


def run(settings: config.Settings, folder: Path) -> dict[str, Any]:
    """Evaluates the best checkpoint of each repeat in `folder/train`, as part of the run that trained it; leaves
    `folder/evaluate`. Gives the first result."""
    recipe = settings.work
    backend = training.device_for(settings.device, recipe)
    inputs = records.inputs_for(settings, folder)
    trained = records.trained(folder)
    classes = inputs["data"]["classes"]
    images, labels = sources.decode(settings.data, inputs["data"], "test", recipe.image_size)
    test = data.as_split(images, labels)
    measured = []
    for record in trained:  # all of them, before anything is written
        best = records.folders(folder, records.repeat_of(record))["train"] / "best.safetensors"
        net = _checkpoint(settings, inputs, record, best)
        with backend.memory_errors():
            measured.append(_measured(net, test, settings, record, backend))

    shutil.rmtree(folder / "evaluate", ignore_errors=True)
    experiment = records.experiment(settings, trained[0]["tags"])
    results = []
    for record, (predictions, metrics) in zip(trained, measured, strict=True):
        folders = records.folders(folder, records.repeat_of(record))
        result = {
            "id": record["id"],
            "metrics": metrics,
            "tags": {"label": settings.label},
            "datasets": [
                dataset
                for dataset in records.datasets(inputs, {"test": len(labels)}, settings.seed)
                if dataset not in record["datasets"]
            ],
            "ended": tracking.now(),
        }
        _leave(result, labels, predictions, classes, record["name"], folders["evaluate"])
        publish.complete("evaluate", record, result, experiment, folders)
        _announce(record, metrics)
        results.append(result)
    publish.gather(trained[0], experiment)
    figures = [result["metrics"] for result in results]
    records.write_summary(folder, "evaluate", trained, figures)
    if len(trained) > 1:
        terminal.say(f"repeats  {records.spread([record['metrics'] for record in trained], figures)}")
    else:
        terminal.say("repeats  a single run has no interval: -S repeats=3 trains three times")
    return results[0]


def _checkpoint(
    settings: config.Settings, inputs: Mapping[str, Any], record: Mapping[str, Any], path: Path
) -> model.Classifier:
    """The model of the checkpoint. Raises UsageError where it is not of this work."""
    wanted, trained = config.workload(settings.work, inputs), record["tags"]["workload"]
    if wanted != trained:
        raise UsageError(
            f'recipe: "{settings.recipe}" as it is set now is workload {wanted}, but {path.name} was trained for '
            f"{trained}: run `python -m pipeline.train` with the same settings first"
        )
    net, facts = model.load_checkpoint(path)
    for what, have, expected in (
        ("training", facts.record, record["id"]),
        ("model", facts.model, settings.work.model),
        ("classes", list(facts.classes), inputs["data"]["classes"]),
    ):
        if have != expected:
            raise UsageError(
                f"{path.name}: it is a checkpoint of another {what} ({have}), expected {expected}: "
                "run `python -m pipeline.train` again"
            )
    return net


def _measured(
    net: model.Classifier,
    test: data.Split,
    settings: config.Settings,
    record: Mapping[str, Any],
    backend: backends.Backend,
) -> tuple[NDArray[np.int64], dict[str, float]]:
    """The label predicted for each test image, and the figures. A batch of each size is passed before the
    clock starts."""
    recipe, channels_last = settings.work, record["facts"]["channels_last"]
    net = net.to(backend.device).to(memory_format=training.layout(channels_last))

    height, width, _ = test.inputs.shape[1:]
    enlarge = data.filters(height, width, recipe.image_size, backend.device)

    def ready(images: Tensor) -> Tensor:
        return data.prepare(images, recipe.image_size, enlarge, channels_last=channels_last)

    totals = engine.Totals(backend.device)
    score = engine.scorer(net, ready, backend, recipe.precision, totals)
    sizes = training.sizes(test, recipe.batch_size)
    engine.evaluate(net, score, totals, [training.first(test, size, backend) for size in sizes])
    clock = Clock(backend.synchronise)
    predictions: list[Tensor] = []
    with terminal.progress("test", len(test)) as advance, clock.span("test") as span:
        if record["tags"]["data.placement"] == "device":
            test = test.to(backend.device)
        batches = data.batches(test, recipe.batch_size, backend)
        loss, accuracy = engine.evaluate(net, score, totals, batches, predictions, advance)
    metrics = {
        "test/accuracy": accuracy,
        "test/loss": loss,
        "speed/test_images_per_second": len(test) / span.seconds,
    }
    return torch.cat(predictions).cpu().numpy(), metrics


def _leave(
    result: Mapping[str, Any],
    labels: NDArray[np.int64],
    predictions: NDArray[np.int64],
    classes: Sequence[str],
    title: str,
    out: Path,
) -> None:
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    figure = plots.confusion_matrix(counts, classes, accuracy=result["metrics"]["test/accuracy"], title=title)
    plots.save(figure, out / "plots" / "confusion_matrix.png")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("actual", "predicted"))  # what DVC's template `confusion` takes
    writer.writerows((classes[a], classes[p]) for a, p in zip(labels, predictions, strict=True))
    files.write_text(out / "predictions.csv", text.getvalue())
    files.write_json(out / "metrics.json", result["metrics"])
    files.write_json(out / "record.json", result)


def _announce(record: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    once = record["metrics"]
    speed = once.get("speed/feature_images_per_second")
    last = record["epochs"][-1]["figures"]
    terminal.say(
        f"result   {record['name']}: test accuracy {metrics['test/accuracy']:.2%}, "
        f"best validation accuracy {once['best/val_accuracy']:.2%} in epoch {once['best/epoch']:.0f}"
    )
    terminal.say(
        f"time     {once['time/total_seconds']:.2f} s of training and validation in all"
        f" (+ {once['time/setup_seconds']:.2f} s setup"
        + (f", {once['time/data_seconds']:.2f} s decoding); " if "time/data_seconds" in once else "); ")
        + (f"features computed at {speed:,.0f} images/s" if speed else "")
        + ("" if speed else f"trained at {last['speed/train_images_per_second']:,.0f} images/s in the last epoch")
        + (f"; peak memory {last['memory/peak_mib']:,.0f} MiB" if "memory/peak_mib" in last else "")
    )


if __name__ == "__main__":
    cli.main(run, __doc__)
