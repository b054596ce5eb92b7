"""Measure the best checkpoint on the test split, as part of the training's run."""

from pipeline import repeats

if __name__ == "__main__":
    repeats.start_stage(__doc__, "evaluate")

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import config, files, terminal
from pipeline.data import batching, datasets
from pipeline.errors import UsageError
from pipeline.models import checkpoints, classifier
from pipeline.profiling.clock import Clock
from pipeline.tracking import pending, records
from pipeline.training import evaluation, setup


def run(
    settings: config.Settings, folder: Path, number: int = 1, net: classifier.Classifier | None = None
) -> dict[str, Any]:
    """Evaluate the best checkpoint of repeat `number` (from 1), as part of the run that trained it. `net`: the model
    that this process trained, whose weights are replaced; without it one is built.

    Writes `folder/evaluate` and returns its record.
    """
    recipe = settings.work
    backend = setup.configure_backend(settings.device, recipe)
    inputs = records.load_inputs(settings, folder)
    folders = records.stage_folders(folder, number)
    record = files.read_json(folders["train"] / "record.json")
    images, labels = datasets.decode(settings.data, inputs["data"], "test", recipe.image_size)
    net = _load_checkpoint(settings, inputs, record, folders["train"] / "best.safetensors", net)
    with backend.memory_errors():
        predictions, metrics = evaluation.measure(
            net,
            batching.as_split(images, labels),
            recipe,
            backend,
            Clock(backend.synchronize),
            channels_last=record["facts"]["channels_last"],
            upload=record["tags"]["data.placement"] == "device",
        )

    planned = records.planned_repeats(folder)
    out = repeats.clear_outputs(folder, "evaluate", number, planned)
    datasets_of_test = records.dataset_inputs(inputs, {"test": len(labels)}, settings.seed)
    result = {
        "id": record["id"],
        "metrics": metrics,
        "tags": {"label": settings.label},
        "datasets": [dataset for dataset in datasets_of_test if dataset not in record["datasets"]],
        "ended": records.now(),
    }
    _write_predictions(labels, predictions, inputs["data"]["classes"], out)
    files.write_json(out / "metrics.json", metrics)
    files.write_json(out / "record.json", result)
    pending.submit(record, folders, records.experiment_name(settings, record["tags"]))
    _announce(record, metrics)
    if planned == 1:
        terminal.say("repeats  a single run has no interval: -S repeats=3 trains three times")
    return result


def _load_checkpoint(
    settings: config.Settings,
    inputs: Mapping[str, Any],
    record: Mapping[str, Any],
    path: Path,
    net: classifier.Classifier | None,
) -> classifier.Classifier:
    """The model of the checkpoint: `net` with its weights, or a new one. Raises UsageError if it belongs to another
    workload or training."""
    wanted, trained = config.workload(settings.work, inputs), record["tags"]["workload"]
    if wanted != trained:
        raise UsageError(
            f'recipe: "{settings.recipe}" as it is set now is workload {wanted}, but {path.name} was trained for '
            f"{trained}: run `python -m pipeline.train` with the same settings first"
        )
    net, facts = checkpoints.load(path, net)
    for name, value, expected in (
        ("training", facts.record, record["id"]),
        ("model", facts.model, settings.work.model),
        ("classes", list(facts.classes), inputs["data"]["classes"]),
    ):
        if value != expected:
            raise UsageError(
                f"{path.name}: it is a checkpoint of another {name} ({value}), expected {expected}: "
                "run `python -m pipeline.train` again"
            )
    return net


def _write_predictions(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: Sequence[str], out: Path
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("actual", "predicted"))  # the columns of DVC's template `confusion`
    writer.writerows((classes[a], classes[p]) for a, p in zip(labels, predictions, strict=True))
    files.write_text(out / "predictions.csv", text.getvalue())


def _announce(record: Mapping[str, Any], test_metrics: Mapping[str, float]) -> None:
    metrics, last_epoch = record["metrics"], record["epochs"][-1]["figures"]
    terminal.say(
        f"result   {record['name']}: test accuracy {test_metrics['test/accuracy']:.2%}, "
        f"best validation accuracy {metrics['best/val_accuracy']:.2%} in epoch {metrics['best/epoch']:.0f}"
    )
    extra = f"{metrics['time/setup_seconds']:.2f} s setup"
    if "time/data_seconds" in metrics:
        extra += f", {metrics['time/data_seconds']:.2f} s decoding"
    if "speed/feature_images_per_second" in metrics:
        speed = f"features computed at {metrics['speed/feature_images_per_second']:,.0f} images/s"
    else:
        speed = f"trained at {last_epoch['speed/train_images_per_second']:,.0f} images/s in the last epoch"
    if "memory/peak_mib" in last_epoch:
        speed += f"; peak memory {last_epoch['memory/peak_mib']:,.0f} MiB"
    total = metrics["time/total_seconds"]
    terminal.say(f"time     {total:.2f} s of training and validation in all (+ {extra}); {speed}")


if __name__ == "__main__":
    repeats.run_stage(run, __doc__)
