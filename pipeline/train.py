"""Trains the chosen recipe's model, and leaves its record, curves, pictures and best checkpoint."""

import csv
import io
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import (
    backends,
    conditions,
    config,
    data,
    engine,
    files,
    model,
    optim,
    plots,
    publish,
    records,
    sources,
    terminal,
    tracking,
    weights,
)
from pipeline.clock import Clock
from pipeline.errors import StageError

Splits = dict[str, data.Split]

METERED_SECONDS = 1.0
"""Less than this is not metered: NVML's energy counter moves ten to fifty times a second."""


def run(settings: config.Settings, folder: Path) -> dict[str, Any]:
    """Trains as one run in MLflow, from `hardware.json` and `inputs.json` in `folder`; leaves `folder/train`."""
    recipe = settings.work
    tracking.store_uri()  # refuses a store that would be lost, before any work
    _check(recipe)
    backend = backends.select(settings.device)
    clock = Clock(backend.synchronise)
    backend.set_precision(recipe.precision)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    hardware = files.read_json(folder / "hardware.json")
    inputs = records.inputs_for(settings, folder)
    unused = backends.unused_gpu() if settings.device == "auto" else None
    if unused:
        terminal.shout("DEMO: this trains on the CPU beside a GPU, and its figures say nothing of that GPU", unused)
    with clock.span("inspect"):
        before = conditions.sample(backend.gpu_uuid())  # nothing of ours has run on the device yet
    with clock.span("decode"):
        splits, shown = _splits(settings, inputs)
    with clock.span("setup"), backend.memory_errors():
        work = _set_up(settings, inputs, splits, backend, clock)

    out = folder / "train"
    shutil.rmtree(out, ignore_errors=True)  # nothing of an earlier training may pass for this one's
    with clock.span("inspect"):
        record = _record(settings, hardware, inputs, work, splits, unused, before)
    _announce(record)
    with clock.span("log"):
        handle = tracking.start(record)
    with tracking.ended_by_failure(handle):
        with clock.span("log"):
            tracking.mark(handle, record)
        with tracking.SystemMetrics(handle.run_id) as system, backend.memory_errors():
            best = 0.0
            for figures in _epochs(work, splits, settings, record):
                if figures["val/accuracy"] > best or figures["epoch"] == 1:  # the first of equals stays
                    best = figures["val/accuracy"]
                    with clock.span("checkpoint"):
                        _keep(work.net, record, figures, settings, out)
                with clock.span("log"):
                    record["epochs"].append({"at": tracking.now(), "figures": figures, "system": system.take()})
                    tracking.log_epoch(handle, record["epochs"][-1])
        record["ended"] = tracking.now()
        record["metrics"] |= _once(clock)
        _taint(record, before, conditions.sample(backend.gpu_uuid()))
        _leave(record, settings, shown, out)
        publish.training(handle, record, out)
        # Last: without it, a training that could not be logged whole is taken for none.
        files.write_json(out / "record.json", record)
        tracking.end(handle, "FINISHED", record["ended"])
    return record


@dataclass(frozen=True)
class Work:
    """What `_set_up` built: the model on its device, and the job that trains it or its head."""

    net: model.Classifier
    features: Callable[[Tensor], Tensor]
    """The model's, compiled where that is asked for."""
    job: engine.Job
    recipe: config.Recipe
    channels_last: bool
    compile_mode: str

    def ready(self, batches: engine.Batches) -> engine.Batches:
        """Batches of uint8 images as the network takes them."""
        return data.prepared(batches, self.recipe.image_size, channels_last=self.channels_last)


def _check(recipe: config.Recipe) -> None:
    """Refuses what can be refused before data is touched."""
    model.check(recipe.model)
    chosen = recipe.resolved()
    optim.check(
        recipe.optimizer,
        recipe.scheduler,
        optimizer_options=chosen["optimizer_options"],
        scheduler_options=chosen["scheduler_options"],
        lr=recipe.lr,
        epochs=recipe.epochs,
        per_batch=recipe.scheduler_step == "batch",
        warmup_epochs=recipe.warmup_epochs,
    )


def _splits(settings: config.Settings, inputs: Mapping[str, Any]) -> tuple[Splits, tuple[NDArray[np.uint8], list[str]]]:
    """Decoded images in host memory to train and to validate on, and six of them with their class names."""
    recipe, found = settings.work, inputs["data"]
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


def _set_up(
    settings: config.Settings,
    inputs: Mapping[str, Any],
    splits: Splits,
    backend: backends.Backend,
    clock: Clock,
) -> Work:
    """Builds the model, warms the device up with it, and puts it back to its beginning."""
    recipe = settings.work
    train, validated = splits["train"], _validated(splits)
    torch.manual_seed(settings.seed)
    net = model.build(recipe, len(inputs["data"]["classes"]), weights.located(inputs["weights"], recipe))
    auto = recipe.channels_last == "auto"
    channels_last = backend.channels_last(recipe.precision) if auto else bool(recipe.channels_last)
    net = net.to(backend.device).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    beginning = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def samples(split: data.Split, sizes: set[int]) -> list[tuple[Tensor, Tensor]]:
        first = [split.take(np.arange(size)).to(backend.device) for size in sorted(sizes)]
        cut = ((sample.inputs, sample.labels) for sample in first)
        return list(data.prepared(cut, recipe.image_size, channels_last=channels_last))

    # Kernels are chosen, and graphs compiled, by shape: the full batch's and the short last one's.
    training = samples(train, _sizes(train, recipe.batch_size))
    cached = model.caches_features(net, recipe, training[0][0])
    passes = 1 if cached else recipe.epochs
    mode = backend.compile_mode(recipe.compile, (len(train) + len(validated)) * passes)
    validation = samples(validated, _sizes(validated, recipe.batch_size)) if mode != "off" else training[:1]

    def compiled(function: Any) -> Any:
        return function if mode == "off" else torch.compile(function, mode=mode, dynamic=False)

    features = compiled(net.features)
    network = net.head if cached else compiled(net)

    def job() -> engine.Job:
        return _job(recipe, net, network, len(train), backend, clock)

    try:
        if cached:
            net.eval()
            with torch.no_grad(), backend.autocast(recipe.precision):
                training, validation = (
                    [(features(images).float(), labels) for images, labels in some] for some in (training, validation)
                )
        engine.warm_up(job(), training, validation)
    except torch._dynamo.exc.TorchDynamoException as error:
        first = str(error).strip().splitlines()[0]
        raise StageError(f'compile: "{mode}" fails here ({first}): set compile to off') from error
    net.load_state_dict(beginning)
    for parameter in net.parameters():
        parameter.grad = None
    torch.manual_seed(settings.seed)  # what dropout draws does not depend on how the model was built
    return Work(net, features, job(), recipe, channels_last, mode)


def _validated(splits: Splits) -> data.Split:
    return next(split for name, split in splits.items() if name != "train")


def _sizes(split: data.Split, batch_size: int) -> set[int]:
    """The sizes of the split's batches."""
    return {min(batch_size, len(split)), len(split) % batch_size} - {0}


def _job(
    recipe: config.Recipe,
    net: model.Classifier,
    network: torch.nn.Module,
    images: int,
    backend: backends.Backend,
    clock: Clock,
) -> engine.Job:
    steps = -(-images // recipe.batch_size)
    chosen = recipe.resolved()
    optimizer = optim.build_optimizer(
        recipe.optimizer,
        [parameter for parameter in net.parameters() if parameter.requires_grad],
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
    return engine.Job(
        network=network,
        optimizer=optimizer,
        scheduler=scheduler,
        set_mode=lambda: model.set_mode(net, recipe.frozen_batch_norm),
        epochs=recipe.epochs,
        per_batch=recipe.scheduler_step == "batch",
        precision=recipe.precision,
        backend=backend,
        clock=clock,
        on_features=network is net.head,
        scaler=torch.amp.GradScaler(backend.kind) if recipe.precision == "fp16" else None,
    )


def _epochs(
    work: Work, splits: Splits, settings: config.Settings, record: dict[str, Any]
) -> Iterator[dict[str, float]]:
    """Moves the images to the device, computes a frozen backbone's features where that is done once, trains."""
    recipe, job, clock = settings.work, work.job, work.job.clock
    backend, batch_size = job.backend, recipe.batch_size
    joules: dict[str, list[float]] = {}
    with clock.span("upload"):
        samples = {name: split.to(backend.device) for name, split in splits.items()}
    images = sum(map(len, samples.values()))
    if job.on_features:
        work.net.eval()
        with (
            terminal.progress("features", images) as advance,
            _metered(backend, joules),
            clock.span("features") as span,
        ):
            for name, split in samples.items():
                batches = work.ready(data.batches(split, batch_size))
                samples[name] = engine.compute_features(work.features, batches, backend, job.precision, advance)
        record["metrics"]["speed/feature_images_per_second"] = images / span.seconds
    train, validated = samples["train"], _validated(samples)

    def train_batches(epoch: int) -> engine.Batches:
        batches = data.shuffled(train, batch_size, settings.seed, epoch, flip=recipe.flip)
        return batches if job.on_features else work.ready(batches)

    def val_batches() -> engine.Batches:
        batches = data.batches(validated, batch_size)
        return batches if job.on_features else work.ready(batches)

    with terminal.epochs_progress(recipe.epochs, len(train) + len(validated)) as (advance, finish):
        epochs = engine.train(job, train_batches, val_batches, advance)
        while True:
            with _metered(backend, joules):
                figures = next(epochs, None)
            if figures is None:
                break
            finish(figures)
            yield figures
    passed = images * (1 if job.on_features else recipe.epochs)
    for source, spent in joules.items():
        whole = len(spent) == recipe.epochs + 1 + job.on_features  # no reading was missed
        if whole and sum(spent) > 0 and clock.total("features", "train", "validate") > METERED_SECONDS:
            record["tags"]["energy.source"] = source
            record["metrics"]["energy/joules"] = sum(spent)
            record["metrics"]["energy/images_per_joule"] = passed / sum(spent)


@contextmanager
def _metered(backend: backends.Backend, joules: dict[str, list[float]]) -> Iterator[None]:
    """Adds the energy spent inside to `joules`, by its source; nothing where the backend can't tell."""
    before = backend.energy()
    yield
    after = backend.energy()
    if before and after:
        joules.setdefault(before[0], []).append(after[1] - before[1])


def _record(
    settings: config.Settings,
    hardware: Mapping[str, Any],
    inputs: Mapping[str, Any],
    work: Work,
    splits: Splits,
    unused_gpu: str | None,
    before: conditions.Sample,
) -> dict[str, Any]:
    """What is known of the training before it starts (see records.py)."""
    backend, recipe = work.job.backend, settings.work
    accelerator = backend.facts()
    fallback = inputs["fallback"] + (["device"] if unused_gpu else [])
    own = records.tags(settings, inputs, hardware, backend, accelerator, before, fallback)
    trainable, parameters = model.counts(work.net)
    return {
        "id": uuid.uuid4().hex,
        "name": records.run_name(own),
        "experiment": records.experiment(settings, own),
        "started": tracking.now(),
        "ended": None,
        "params": records.params(settings)
        | {"model.parameters": str(parameters), "model.trainable_parameters": str(trainable)},
        "tags": own,
        "datasets": records.datasets(inputs, {name: len(split) for name, split in splits.items()}, settings.seed),
        "epochs": [],
        "metrics": {},
        "warnings": records.warnings(settings, inputs, own, unused_gpu, optim.overrides_schedule(work.job.optimizer)),
        "facts": {
            "model": recipe.model,
            "classes": inputs["data"]["classes"],
            "images": {name: len(split) for name, split in splits.items()},
            "trainable": trainable,
            "parameters": parameters,
            "features_cached": work.job.on_features,
            "channels_last": work.channels_last,
            "compile": work.compile_mode,
            "image_size": recipe.image_size,
        },
        "hardware": {
            "machine": dict(hardware),
            "accelerator": accelerator,
            "torch": backends.torch_facts(),
            "conditions": {"before": before},
        },
    }


def _announce(record: Mapping[str, Any]) -> None:
    facts = record["facts"]
    terminal.say(f"run      {record['name']}")
    terminal.say(
        f"model    {facts['model']}: {facts['trainable']:,} of {facts['parameters']:,} parameters are trained"
        + (", on features computed once" if facts["features_cached"] else "")
    )
    terminal.say("images   " + ", ".join(f"{count:,} {name}" for name, count in facts["images"].items()))
    for warning in record["warnings"]:
        terminal.say(f"note     {warning}")


def _keep(
    net: model.Classifier,
    record: Mapping[str, Any],
    figures: Mapping[str, float],
    settings: config.Settings,
    out: Path,
) -> None:
    mean, std = net.normalization
    facts = model.Checkpoint(
        model=settings.work.model,
        classes=tuple(record["facts"]["classes"]),
        image_size=settings.work.image_size,
        mean=mean,
        std=std,
        epoch=int(figures["epoch"]),
        val_accuracy=figures["val/accuracy"],
        record=record["id"],
    )
    model.save_checkpoint(out / "best.safetensors", net, facts)


def _once(clock: Clock) -> dict[str, float]:
    """The figures that a run has once."""
    return {
        "time/setup_seconds": clock.total("setup"),
        "time/data_seconds": clock.total("decode"),
        "time/total_seconds": clock.total("upload", "features", "train", "validate"),
        "time/checkpoint_seconds": clock.total("checkpoint"),
        "time/logging_seconds": clock.total("log"),
        "time/unaccounted_seconds": clock.unaccounted(),
    }


def _taint(record: dict[str, Any], before: conditions.Sample, after: conditions.Sample) -> None:
    """Says in the run what of the machine's state makes its figures doubtful."""
    figures = [epoch["figures"] for epoch in record["epochs"]]
    # On features an epoch is over before a machine could change its pace.
    paced = [] if record["facts"]["features_cached"] else [each["time/train_seconds"] for each in figures]
    taints = conditions.taints(before, after, paced)
    record["hardware"]["conditions"]["after"] = after
    record["warnings"] += taints.values()
    if taints:
        record["tags"]["taints"] = " ".join(taints)
    if "gpu_power_watts" in before:
        record["metrics"]["energy/idle_watts"] = before["gpu_power_watts"]
    for sentence in taints.values():
        terminal.say(f"note     {sentence}")


def _leave(
    record: dict[str, Any], settings: config.Settings, shown: tuple[NDArray[np.uint8], list[str]], out: Path
) -> None:
    """Writes all that the run's page in MLflow is made from, so that it can be made again."""
    epochs = [epoch["figures"] for epoch in record["epochs"]]
    best = max(epochs, key=lambda figures: figures["val/accuracy"])  # the first of equals
    record["metrics"] |= {"best/epoch": best["epoch"], "best/val_accuracy": best["val/accuracy"]}
    validated = "test split" if settings.work.validation == "test" else "validation split"
    title = record["name"]
    for name, figure in (
        ("samples", plots.samples(*shown, title=title)),
        ("loss", plots.loss(epochs, title=title)),
        ("accuracy", plots.accuracy(epochs, best_epoch=int(best["epoch"]), validation=validated, title=title)),
    ):
        plots.save(figure, out / "plots" / f"{name}.png")
    files.write_json(out / "hardware.json", record["hardware"])
    files.write_text(out / "params.yaml", config.dump(records.effective(settings)))
    files.write_text(out / "curves.csv", _csv(epochs))
    files.write_json(out / "metrics.json", {k: v for k, v in epochs[-1].items() if k != "epoch"} | record["metrics"])


def _csv(epochs: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, epochs[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(epochs)
    return text.getvalue()


if __name__ == "__main__":
    from pipeline import cli

    cli.main(run, __doc__)
