"""Measures the best checkpoint on the test split, and completes the training's run with it."""

from pipeline import repeats

if __name__ == "__main__":
    repeats.start_stage(__doc__, "evaluate")

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import config, devices, files, plots, terminal
from pipeline.data import batching, datasets
from pipeline.errors import UsageError
from pipeline.models import checkpoints, classifier
from pipeline.profiling.clock import Clock
from pipeline.tracking import publisher, records, store
from pipeline.training import loop, setup


def run(settings: config.Settings, folder: Path, number: int = 1) -> dict[str, Any]:
    """Evaluates the best checkpoint of the repeat `number` (from 1) in `folder/train`, as part of the run that trained
    it; leaves its part of `folder/evaluate`. Returns the result."""
    recipe = settings.work
    backend = setup.device_for(settings.device, recipe)
    inputs = records.load_inputs(settings, folder)
    folders = records.stage_folders(folder, number)
    record = files.read_json(folders["train"] / "record.json")
    classes = inputs["data"]["classes"]
    images, labels = datasets.decode(settings.data, inputs["data"], "test", recipe.image_size)
    net = _checkpoint(settings, inputs, record, folders["train"] / "best.safetensors")
    with backend.memory_errors():
        predictions, metrics = _measured(net, batching.as_split(images, labels), settings, record, backend)

    planned = records.planned_repeats(folder)
    out = repeats.clear_outputs(folder, "evaluate", number, planned)
    result = {
        "id": record["id"],
        "metrics": metrics,
        "tags": {"label": settings.label},
        "datasets": [
            dataset
            for dataset in records.dataset_inputs(inputs, {"test": len(labels)}, settings.seed)
            if dataset not in record["datasets"]
        ],
        "ended": store.now(),
    }
    _leave(result, labels, predictions, classes, record["name"], out)
    publisher.publish_stage("evaluate", record, result, records.experiment_name(settings, record["tags"]), folders)
    _announce(record, metrics)
    if planned == 1:
        terminal.say("repeats  a single run has no interval: -S repeats=3 trains three times")
    return result


def _checkpoint(
    settings: config.Settings, inputs: Mapping[str, Any], record: Mapping[str, Any], path: Path
) -> classifier.Classifier:
    """The model of the checkpoint. Raises UsageError where it is not of this work."""
    wanted, trained = config.workload(settings.work, inputs), record["tags"]["workload"]
    if wanted != trained:
        raise UsageError(
            f'recipe: "{settings.recipe}" as it is set now is workload {wanted}, but {path.name} was trained for '
            f"{trained}: run `python -m pipeline.train` with the same settings first"
        )
    net, facts = checkpoints.load(path)
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
    net: classifier.Classifier,
    test: batching.Split,
    settings: config.Settings,
    record: Mapping[str, Any],
    backend: devices.Backend,
) -> tuple[NDArray[np.int64], dict[str, float]]:
    """The label predicted for each test image, and the figures. A batch of each size is passed before the
    clock starts."""
    recipe, channels_last = settings.work, record["facts"]["channels_last"]
    net = net.to(backend.device).to(memory_format=setup.memory_format(channels_last))

    prepare = setup.make_prepare(test, recipe.image_size, backend, channels_last=channels_last)
    running = loop.RunningMetrics(backend.device)
    eval_step = loop.make_eval_step(net, prepare, backend, recipe.precision, running)
    sizes = setup.batch_sizes(test, recipe.batch_size)
    loop.evaluate(net, eval_step, running, [setup.first_batch(test, size, backend) for size in sizes])
    clock = Clock(backend.synchronize)
    predictions: list[Tensor] = []
    with terminal.progress("test", len(test)) as advance, clock.span("test") as span:
        if record["tags"]["data.placement"] == "device":
            test = test.to(backend.device)
        batches = batching.batches(test, recipe.batch_size, backend)
        loss, accuracy = loop.evaluate(net, eval_step, running, batches, predictions, advance)
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
    repeats.run_stage("evaluate", run, __doc__)
