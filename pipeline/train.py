"""Train the chosen recipe. Write its record, curves, pictures and best checkpoint."""

from pipeline import repeats

if __name__ == "__main__":
    repeats.start_stage(__doc__, "train")

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import config, devices, files, terminal
from pipeline.data import batching
from pipeline.errors import OutOfMemoryError, StageError
from pipeline.models import checkpoints, classifier, weights
from pipeline.profiling import energy, system_info, system_state
from pipeline.profiling.clock import Clock
from pipeline.tracking import publisher, records, store, training_record
from pipeline.training import loop, measured, setup

Record = dict[str, Any]


def run(settings: config.Settings, folder: Path, number: int = 1, earlier: float = 0.0) -> Record:
    """Train once, as a run in MLflow, from `hardware.json` and `inputs.json` in `folder`. Returns the record.

    Writes `folder/train`, or the subfolder of repeat `number` (from 1). `earlier`: seconds that this process spent on
    earlier stages.
    """
    recipe = settings.work
    startup = system_info.process_age() - earlier
    store.store_uri()  # raises for a store that would be lost, before any work
    setup.check(settings.device, recipe)
    energy.check(settings.energy.source)
    backend = setup.configure_backend(settings.device, recipe)
    clock = Clock(backend.synchronize)
    machine = files.read_json(folder / "hardware.json")
    inputs = records.load_inputs(settings, folder)
    unused_gpu = devices.unused_gpu() if settings.device == "auto" else None
    if unused_gpu:
        terminal.warn("DEMO: this trains on the CPU beside a GPU, and its figures say nothing of that GPU", unused_gpu)
    settings = dataclasses.replace(settings, seed=settings.seed + number - 1)
    with clock.span("inspect"):
        before = system_state.sample(backend.gpu_uuid())  # before our own work loads the device
    with clock.span("decode"):
        decoded = setup.decode_splits(settings, inputs["data"])
        splits = setup.hold_out(decoded, settings)
    with clock.span("setup"), backend.memory_errors():
        path = weights.locate(inputs["weights"], recipe)
        classes = len(inputs["data"]["classes"])
        training = setup.TrainingSetup(recipe, settings.seed, classes, path, splits, backend, clock)

    out = repeats.clear_outputs(folder, "train", number, settings.repeats)
    with clock.span("inspect"):
        facts = {"machine": machine, "accelerator": backend.facts(), "torch": devices.torch_facts()}
        hardware = facts | {"conditions": {"before": before}}
        images = {name: len(split) for name, split in splits.items()}
        record = training_record.new_record(settings, inputs, hardware, training, images, unused_gpu)
    record["tags"] |= repeats.repeat_tags(settings, folder, number)
    record["name"] = records.run_name(record["tags"])
    record["metrics"]["time/startup_seconds"] = startup
    training_record.announce(record)
    out_of_memory: str | None = None
    try:
        _train(training, splits, decoded, settings, record, out, earlier)
    except OutOfMemoryError as error:
        out_of_memory = str(error)
    if out_of_memory:  # not in the except clause, since the error holds memory that a smaller batch needs
        del training
        raise StageError(_suggest_batch(out_of_memory, settings, splits, classes, backend))
    return record


def _train(
    training: setup.TrainingSetup,
    splits: setup.Splits,
    decoded: setup.Splits,
    settings: config.Settings,
    record: Record,
    out: Path,
    earlier: float,
) -> None:
    """Train in an MLflow run for `record`, complete the record, and write the files in `out`."""
    clock, backend = training.loop.clock, training.loop.backend
    with clock.span("log"):
        handle = store.start_run(record, _parent_run(record))
    with store.end_on_failure(handle):
        with clock.span("log"):
            store.mark_run(handle, record)
        with store.SystemMetrics(handle.run_id) as system, backend.memory_errors():
            limits = measured.measure_limits(training, splits)
            best = None
            for figures in measured.train(training, splits, settings, record, limits):
                _note_target(record, settings, figures, clock)
                if best is None or figures["val/accuracy"] > best:  # of equal epochs, the first is best
                    best = figures["val/accuracy"]
                    with clock.span("checkpoint"):
                        _save_checkpoint(training.net, record, figures, settings, out)
                with clock.span("log"):
                    record["epochs"].append({"at": store.now(), "figures": figures, "system": system.take()})
                    store.log_epoch(handle, record["epochs"][-1])
        record["ended"] = store.now()
        record["metrics"] |= training_record.span_metrics(clock, setup.TOTAL_SPANS) | training.loop.times.percentiles()
        training_record.add_conditions(record, system_state.sample(backend.gpu_uuid()))
        training_record.add_best_epoch(record)
        _draw(record, settings, decoded["train"], out)
        record["metrics"]["time/process_seconds"] = system_info.process_age() - earlier
        training_record.write_files(record, settings, out)
        publisher.publish_training(handle, record, out)
        # Written last: without this file, the training counts as not completely logged.
        files.write_json(out / "record.json", record)
        store.end_run(handle, "FINISHED", record["ended"])


def _parent_run(record: Record) -> store.Handle | None:
    """Create or resume the parent run of the repeats. None for a single training."""
    if store.REPEATS_TAG not in record["tags"]:
        return None
    parent, is_new = publisher.parent_run(record, record["experiment"])
    if not is_new and not store.is_deleted(parent):
        store.set_status(parent, "RUNNING")
    return parent


def _note_target(record: Record, settings: config.Settings, figures: dict[str, float], clock: Clock) -> None:
    """Record the time of the first epoch that reaches the target accuracy."""
    target = settings.work.target_accuracy
    if target is not None and figures["val/accuracy"] >= target:
        record["metrics"].setdefault("time/to_target_seconds", clock.total(*setup.TOTAL_SPANS))


def _save_checkpoint(
    net: classifier.Classifier, record: Record, figures: dict[str, float], settings: config.Settings, out: Path
) -> None:
    mean, std = net.normalization
    facts = checkpoints.Checkpoint(
        model=settings.work.model,
        classes=tuple(record["facts"]["classes"]),
        image_size=settings.work.image_size,
        mean=mean,
        std=std,
        epoch=int(figures["epoch"]),
        val_accuracy=figures["val/accuracy"],
        record=record["id"],
    )
    checkpoints.save(out / "best.safetensors", net, facts)


def _draw(record: Record, settings: config.Settings, images: batching.Split, out: Path) -> None:
    """Draw the plots for the run's page in MLflow, and six samples of `images`."""
    from pipeline import plots  # importing matplotlib takes a third of a second

    epochs = [epoch["figures"] for epoch in record["epochs"]]
    classes, title = record["facts"]["classes"], record["name"]
    chosen = np.random.default_rng(settings.seed).permutation(len(images))[:6]
    names = [classes[label] for label in images.labels.numpy()[chosen]]
    split = "test split" if settings.work.validation == "test" else "validation split"
    best = int(record["metrics"]["best/epoch"])
    curves = ["loss", *(name for name in loop.METRICS if name != "accuracy")]
    figures = {
        "samples": plots.samples(images.inputs.numpy()[chosen], names, title=title),
        "accuracy": plots.accuracy(epochs, best_epoch=best, validation=split, title=title),
        **{name: plots.metric(epochs, name, title=title) for name in curves},
    }
    for name, figure in figures.items():
        plots.save(figure, out / "plots" / f"{name}.png")


def _suggest_batch(
    reason: str, settings: config.Settings, splits: setup.Splits, classes: int, backend: devices.Backend
) -> str:
    """Advice for a batch that is too large: the largest power of two that fits, if there is one; else `reason`."""
    tried = settings.work.batch_size
    backend.release_memory()
    if tried == 1:
        return reason
    eager = dataclasses.replace(settings.work, weights="random", graph=False, compile="off")
    with backend.memory_errors():
        clock = Clock(backend.synchronize)
        training = setup.TrainingSetup(eager, settings.seed, classes, None, splits, backend, clock)
    largest = setup.largest_batch_below(training, tuple(splits["train"].inputs.shape[1:]), tried)
    if not largest:
        return reason
    return f"batch_size: {tried} is too much for the memory of {backend.kind}: the largest that fits is {largest}"


if __name__ == "__main__":
    repeats.run_stage("train", run, __doc__)
