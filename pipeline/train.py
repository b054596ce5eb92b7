"""Trains the chosen recipe's model, and leaves its record, curves, pictures and best checkpoint."""

import csv
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import (
    backends,
    config,
    data,
    engine,
    files,
    machine,
    model,
    optim,
    plots,
    records,
    sources,
    terminal,
    tracking,
    weights,
)
from pipeline.clock import Clock
from pipeline.errors import UsageError

Splits = dict[str, data.Split]


def run(settings: config.Settings, folder: Path) -> dict[str, Any]:
    """Trains, as one run in MLflow, from `hardware.json` and `inputs.json` in `folder`; leaves `folder/train`."""
    recipe = settings.work
    optim.check(recipe.optimizer, recipe.scheduler, recipe.resolved())
    model.check(recipe.model)
    backend = backends.select(settings.device)
    backend.set_precision(recipe.precision)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    inputs = _inputs(settings, folder)
    clock = Clock(backend.synchronise)
    with clock.span("decode"):
        splits, samples = _splits(settings, inputs)

    with clock.span("setup"), backend.memory_errors():
        net, on_device, job = _build(settings, inputs, splits, backend, clock)
    out = folder / "train"
    shutil.rmtree(out, ignore_errors=True)  # nothing of an earlier training may pass for this one's
    record = _record(settings, folder, inputs, net, splits, job)
    _say(record)

    handle = tracking.start(record)
    try:
        with tracking.SystemMetrics(handle.run_id) as system, backend.memory_errors():
            _place(net, splits, on_device, job, recipe)
            for figures in _epochs(job, record, net, out):
                epoch = {"at": tracking.now(), "figures": figures, "system": system.take()}
                record["epochs"].append(epoch)
                tracking.log_epoch(handle, epoch)
        record["metrics"] |= _once(record, clock, job, splits)
        record["ended"] = tracking.now()
        _leave(record, settings, samples, out)
        tracking.log_training(handle, record, out)
    except BaseException as error:
        tracking.end(handle, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracking.end(handle, "FINISHED", record["ended"])
    return record


def _inputs(settings: config.Settings, folder: Path) -> dict[str, Any]:
    """What `download` found. Raises UsageError where that was for other settings."""
    inputs: dict[str, Any] = files.read_json(folder / "inputs.json")
    found = inputs["data"], inputs["weights"]
    weights_name = Path(settings.work.weights).name
    for key, wanted, have in (
        ("data.source", settings.data.source, found[0]["requested"]),
        ("data.limit", settings.data.limit, found[0]["limit"]),
        ("model", settings.work.model, found[1]["model"]),
        ("weights", weights_name, found[1]["requested"]),
    ):
        if wanted != have:
            raise UsageError(
                f"{key}: {json.dumps(wanted)} is not what `download` looked at ({json.dumps(have)}): "
                "run `python -m pipeline.download` with the same settings first"
            )
    return inputs


def _splits(settings: config.Settings, inputs: Mapping[str, Any]) -> tuple[Splits, tuple[np.ndarray, list[str]]]:
    """Decoded train and validation images in host memory, and six of them with their class names to show."""
    recipe, found = settings.work, dict(inputs["data"])
    images, labels = sources.decode(settings.data, found, "train", recipe.image_size)
    every = data.as_split(images, labels)
    if recipe.validation == "test":
        test = data.as_split(*sources.decode(settings.data, found, "test", recipe.image_size))
        splits = {"train": every, "test": test}
    else:
        kept, held_out = data.stratified(labels, settings.seed)
        splits = {"train": every.take(kept), "validation": every.take(held_out)}
    shown = np.random.default_rng(settings.seed).permutation(len(labels))[:6]
    return splits, (images[shown], [found["classes"][labels[index]] for index in shown])


def _build(
    settings: config.Settings,
    inputs: Mapping[str, Any],
    splits: Splits,
    backend: backends.Backend,
    clock: Clock,
) -> tuple[model.Classifier, Splits, engine.Job]:
    """The model on the device and the job that trains it, warmed up. The job reads its samples from the mapping
    that comes with it, which `_place` fills."""
    recipe = settings.work
    torch.manual_seed(settings.seed)
    net = model.build(recipe, len(inputs["data"]["classes"]), weights.located(inputs["weights"], recipe))
    channels_last = backend.channels_last if recipe.channels_last == "auto" else bool(recipe.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(backend.device, memory_format=layout)

    def ready(batches: engine.Batches) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in batches:
            yield data.prepare(images, recipe.image_size, channels_last=channels_last), labels

    sizes = sorted({min(recipe.batch_size, len(splits["train"])), len(splits["train"]) % recipe.batch_size} - {0})
    first = [splits["train"].take(np.arange(size)).to(backend.device) for size in sizes]
    warm = list(ready((split.inputs, split.labels) for split in first))
    cached = _features_cached(recipe, net, warm[-1][0])
    parameters = [p for p in net.parameters() if p.requires_grad]
    steps = -(-len(splits["train"]) // recipe.batch_size)
    chosen = recipe.resolved()
    optimizer = optim.build_optimizer(
        recipe.optimizer,
        parameters,
        lr=recipe.lr,
        options=chosen["optimizer_options"],
        total_steps=steps * recipe.epochs,
    )
    scheduler = optim.build_scheduler(
        recipe.scheduler,
        optimizer,
        options=chosen["scheduler_options"],
        lr=recipe.lr,
        epochs=recipe.epochs,
        steps_per_epoch=steps,
        per_batch=recipe.scheduler_step == "batch",
        warmup_epochs=recipe.warmup_epochs,
    )
    on_device: Splits = {}
    validated = "test" if "test" in splits else "validation"

    def train_batches(epoch: int) -> engine.Batches:
        drawn = data.shuffled(
            on_device["train"], recipe.batch_size, settings.seed, epoch, flip=recipe.flip and not cached
        )
        return drawn if cached else ready(drawn)

    def val_batches() -> engine.Batches:
        cut = data.batches(on_device[validated], recipe.batch_size)
        return cut if cached else ready(cut)

    job = engine.Job(
        network=net.head if cached else net,
        optimizer=optimizer,
        scheduler=scheduler,
        train_batches=train_batches,
        val_batches=val_batches,
        set_mode=lambda: model.set_mode(net, recipe.frozen_batch_norm),
        features=(lambda batches: ((net.features(x), y) for x, y in ready(batches))) if cached else None,
        epochs=recipe.epochs,
        per_batch=recipe.scheduler_step == "batch",
        precision=recipe.precision,
        backend=backend,
        clock=clock,
    )
    engine.warm_up(job, warm)
    torch.manual_seed(settings.seed)  # warming up drew numbers where the model has dropout
    return net, on_device, job
