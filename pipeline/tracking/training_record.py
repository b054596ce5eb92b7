"""The record of one training (see records.py): its beginning, what is added at its end, and the files beside it."""

import csv
import io
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import config, files, terminal
from pipeline.models import classifier
from pipeline.profiling import system_state
from pipeline.profiling.clock import Clock
from pipeline.tracking import records
from pipeline.training import optimizers

if TYPE_CHECKING:
    from pipeline.training.setup import TrainingSetup

Record = dict[str, Any]


def new_record(
    settings: config.Settings,
    inputs: Mapping[str, Any],
    hardware: Mapping[str, Any],
    training: "TrainingSetup",
    images: Mapping[str, int],
    unused_gpu: str | None,
) -> Record:
    """What is known before the training starts. `hardware` has `machine`, `accelerator`, `torch` and `conditions`;
    `images` counts those of each split."""
    recipe, backend = settings.work, training.loop.backend
    threads = {"threads": hardware["torch"]["threads"]}
    fallback = inputs["fallback"] + (["device"] if unused_gpu else [])
    tags = records.run_tags(
        settings,
        inputs,
        hardware["machine"],
        backend,
        hardware["accelerator"] | threads,
        hardware["conditions"]["before"],
        fallback,
    )
    trainable, parameters = classifier.count_parameters(training.net)
    counts = {"model.parameters": str(parameters), "model.trainable_parameters": str(trainable)}
    overridden = optimizers.overrides_schedule(training.loop.optimizer)
    return {
        "id": uuid.uuid4().hex,
        "name": records.run_name(tags),
        "experiment": records.experiment_name(settings, tags),
        "started": records.now(),
        "ended": None,
        "params": records.run_params(settings) | counts,
        "tags": tags,
        "datasets": records.dataset_inputs(inputs, images, settings.seed),
        "epochs": [],
        "metrics": {},
        "warnings": records.run_warnings(settings, inputs, tags, unused_gpu, overridden),
        "facts": {
            "model": recipe.model,
            "classes": inputs["data"]["classes"],
            "images": dict(images),
            "trainable": trainable,
            "parameters": parameters,
            "weights_digest": inputs["weights"]["digest"],
            "features_cached": training.on_features,
            "channels_last": training.channels_last,
            "compile": training.compile_mode,
            "recorded": training.use_cuda_graph,
            "image_size": recipe.image_size,
        },
        "hardware": dict(hardware),
    }


def announce(record: Record) -> None:
    """Say in the terminal what will be trained."""
    facts = record["facts"]
    terminal.say(f"run      {record['name']}")
    terminal.say(
        f"model    {facts['model']}: {facts['trainable']:,} of {facts['parameters']:,} parameters are trained"
        + (", on features computed once" if facts["features_cached"] else "")
    )
    terminal.say("images   " + ", ".join(f"{count:,} {name}" for name, count in facts["images"].items()))
    for warning in record["warnings"]:
        terminal.say(f"note     {warning}")


def span_metrics(clock: Clock, total: tuple[str, ...]) -> dict[str, float]:
    """The seconds of a training's parts, without those that did not happen. `total`: the spans of the training
    itself."""
    spans = {
        "time/setup_seconds": ("setup",),
        "time/data_seconds": ("decode",),
        "time/total_seconds": total,
        "time/ceilings_seconds": ("ceilings",),
        "time/inspect_seconds": ("inspect",),
        "time/checkpoint_seconds": ("checkpoint",),
        "time/logging_seconds": ("log",),
    }
    seconds = {key: clock.total(*names) for key, names in spans.items() if not clock.seconds.keys().isdisjoint(names)}
    return seconds | {"time/unaccounted_seconds": clock.unaccounted()}


def add_conditions(record: Record, after: system_state.SystemState) -> None:
    """Add what disturbed the training, and how the machine itself behaved, with its state at the end."""
    conditions = record["hardware"]["conditions"]
    conditions["after"] = after
    before = conditions["before"]
    # On features an epoch ends before a machine could change its pace.
    epochs = [] if record["facts"]["features_cached"] else record["epochs"]
    seconds = [epoch["figures"]["time/train_seconds"] for epoch in epochs]
    for tag, sentences in (
        ("taints", system_state.taints(before, after)),
        ("behavior", system_state.behavior(before, after, seconds)),
    ):
        if sentences:
            record["tags"][tag] = " ".join([*record["tags"].get(tag, "").split(), *sentences])
        for sentence in sentences.values():
            record["warnings"].append(sentence)
            terminal.say(f"note     {sentence}")
    if "gpu_power_watts" in before:
        record["metrics"]["energy/idle_watts"] = before["gpu_power_watts"]


def add_best_epoch(record: Record) -> None:
    """Add the first epoch of the best validation accuracy."""
    best = max((epoch["figures"] for epoch in record["epochs"]), key=lambda figures: figures["val/accuracy"])
    record["metrics"] |= {"best/epoch": best["epoch"], "best/val_accuracy": best["val/accuracy"]}


def write_files(record: Record, settings: config.Settings, out: Path) -> None:
    """Write the files that the run's page shows, except pictures and the record itself."""
    files.write_json(out / "hardware.json", record["hardware"])
    files.write_text(out / "params.yaml", config.dump(records.effective_settings(settings)))
    files.write_json(out / "metrics.json", records.final_metrics(record))
    epochs = [epoch["figures"] for epoch in record["epochs"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, epochs[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(epochs)
    files.write_text(out / "curves.csv", text.getvalue())
