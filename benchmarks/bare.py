"""A training as `train` does it, without MLflow, files or plots: what the other benchmarks take turns with."""

from pathlib import Path
from typing import Any

from pipeline import backends, config, data, engine, sources, training
from pipeline.clock import Clock


def splits_of(settings: config.Settings) -> training.Splits:
    """The images that `train` trains on and validates on, in host memory."""
    found = sources.resolve(settings.data)
    images, labels = sources.decode(settings.data, found, "train", settings.work.image_size)
    every = data.as_split(images, labels)
    if settings.work.validation == "test":
        test = sources.decode(settings.data, found, "test", settings.work.image_size)
        return {"train": every, "test": data.as_split(*test)}
    kept, held_out = data.stratified(labels, settings.seed)
    return {"train": every.take(kept), "validation": every.take(held_out)}


def train(settings: config.Settings, splits: training.Splits, classes: int = 10) -> dict[str, Any]:
    """Trains with random weights (or those of a file); gives `epochs` (figures by epoch), `seconds` (data in host
    memory to the last epoch validated, as `time/total_seconds`), `setup` and, of a frozen network, `features` (images a
    second)."""
    recipe = settings.work
    backend = backends.select(settings.device)
    backend.set_precision(recipe.precision)
    clock = Clock(backend.synchronise)
    path = None if recipe.weights == "random" else Path(recipe.weights)
    with clock.span("setup"):
        work = training.build(recipe, settings.seed, classes, path, splits, backend, clock)
        working = training.warm_up(work, splits)
        training.restart(work, settings.seed)
    with clock.span("upload"):
        samples, _ = training.place(work, splits, working, settings.data.device_gib)
    if work.job.on_features:
        work.net.eval()
        with clock.span("features"):
            for name, split in samples.items():
                batches = data.batches(split, recipe.batch_size, backend)
                samples[name] = engine.compute_features(work.features, split, batches)
    rows = list(
        engine.train(
            work.job,
            lambda epoch: data.shuffled(
                samples["train"], recipe.batch_size, backend, settings.seed, epoch, flip=recipe.flip
            ),
            lambda: data.batches(training.validated_in(samples), recipe.batch_size, backend),
        )
    )
    images = sum(map(len, splits.values()))
    return {
        "epochs": rows,
        "seconds": clock.total("upload", "features", "train", "validate"),
        "upload": clock.total("upload"),
        "setup": clock.total("setup"),
        "steps": work.job.times.percentiles(),
        "fault": backend.recording_fault,
        **({"features": images / clock.total("features")} if work.job.on_features else {}),
    }
