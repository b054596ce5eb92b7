"""Trains the chosen recipe's model, and leaves its record, curves, pictures and best checkpoint."""

from pipeline import repeats

if __name__ == "__main__":
    repeats.start_stage(__doc__, "train")

import csv
import dataclasses
import io
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import config, devices, files, terminal
from pipeline.data import batching
from pipeline.errors import OutOfMemoryError, StageError
from pipeline.models import checkpoints, classifier, weights
from pipeline.profiling import energy, roofline, system_info, system_state
from pipeline.profiling.clock import Clock
from pipeline.tracking import publisher, records, store
from pipeline.training import loop, optimizers, setup

METERED_SECONDS = 1.0
"""Less than this is not metered: NVML's energy counter moves ten to fifty times a second."""

CEILINGS_AGAIN = 2
"""How often ceilings are measured again before a clock is doubted: a machine's speed may change within seconds."""

Shown = tuple[NDArray[np.uint8], list[str]]
"""Images (6, H, W, 3) as they were decoded, and the names of their classes."""


class Measured(NamedTuple):
    """What is measured before the training: bytes of memory that a step was seen to take, the machine's
    ceilings, and the operations that an image takes."""

    working: float
    ceilings: roofline.Peaks
    flops: float | None


def run(settings: config.Settings, folder: Path, number: int = 1, earlier: float = 0.0) -> dict[str, Any]:
    """Trains once, as a run in MLflow, from `hardware.json` and `inputs.json` in `folder`; leaves `folder/train`, as
    the repeat `number` (from 1) its part of it. Returns the record. `earlier`: seconds that this process spent on
    other stages before."""
    recipe = settings.work
    startup = system_info.process_age() - earlier
    store.store_uri()  # refuses a store that would be lost, before any work
    _check(recipe)
    energy.check(settings.energy.source)
    backend = setup.device_for(settings.device, recipe)
    clock = Clock(backend.synchronize)
    hardware = files.read_json(folder / "hardware.json")
    inputs = records.load_inputs(settings, folder)
    unused = devices.unused_gpu() if settings.device == "auto" else None
    if unused:
        terminal.shout("DEMO: this trains on the CPU beside a GPU, and its figures say nothing of that GPU", unused)
    settings = dataclasses.replace(settings, seed=settings.seed + number - 1)
    with clock.span("inspect"):
        before = system_state.sample(backend.gpu_uuid())  # nothing of ours has run on the device yet
    with clock.span("decode"):
        decoded = setup.decoded(settings, inputs["data"])
        splits = setup.drawn(decoded, settings)
    with clock.span("setup"), backend.memory_errors():
        path = weights.locate(inputs["weights"], recipe)
        classes = inputs["data"]["classes"]
        work = setup.build(recipe, settings.seed, len(classes), path, splits, backend, clock)

    out = repeats.clear_outputs(folder, "train", number, settings.repeats)
    with clock.span("inspect"):
        record = _record(settings, hardware, inputs, work, splits, unused, before)
    record["tags"] |= repeats.repeat_tags(settings, folder, number)
    record["name"] = records.run_name(record["tags"])
    _announce(record)
    record["metrics"]["time/startup_seconds"] = startup
    full: str | None = None
    try:
        _train(work, splits, _shown(decoded["train"], settings.seed, classes), settings, record, earlier, out)
    except OutOfMemoryError as error:
        full = str(error)
    if full:  # not in the except clause: what the error holds is in the way of every smaller batch
        del work
        raise StageError(_advice(full, settings, splits, len(classes), backend))
    return record


def _train(
    work: setup.TrainingSetup,
    splits: setup.Splits,
    shown: Shown,
    settings: config.Settings,
    record: dict[str, Any],
    earlier: float,
    out: Path,
) -> None:
    """Trains, as the run of `record`, which it completes; leaves `out`. `earlier`: seconds that other stages took in
    this process before."""
    clock, backend = work.job.clock, work.job.backend
    with clock.span("log"):
        handle = store.start_run(record, _above(record))
    with store.end_on_failure(handle):
        with clock.span("log"):
            store.mark_run(handle, record)
        with store.SystemMetrics(handle.run_id) as system, backend.memory_errors():
            measured = _measured(work, splits)
            best, target = 0.0, settings.work.target_accuracy
            for figures in _epochs(work, splits, settings, record, measured):
                reached = target is not None and figures["val/accuracy"] >= target
                if reached and "time/to_target_seconds" not in record["metrics"]:
                    record["metrics"]["time/to_target_seconds"] = clock.total(*setup.TOTAL)
                if figures["val/accuracy"] > best or figures["epoch"] == 1:  # the first of equals stays
                    best = figures["val/accuracy"]
                    with clock.span("checkpoint"):
                        _keep(work.net, record, figures, settings, out)
                with clock.span("log"):
                    record["epochs"].append({"at": store.now(), "figures": figures, "system": system.take()})
                    store.log_epoch(handle, record["epochs"][-1])
        record["ended"] = store.now()
        record["metrics"] |= _times(clock) | work.job.times.percentiles()
        before = record["hardware"]["conditions"]["before"]
        _taint(record, before, system_state.sample(backend.gpu_uuid()))
        _draw(record, settings, shown, out)
        record["metrics"]["time/process_seconds"] = system_info.process_age() - earlier
        _leave(record, settings, out)
        publisher.publish_training(handle, record, out)
        # Last: without it, a training that could not be logged whole is taken for none.
        files.write_json(out / "record.json", record)
        store.end_run(handle, "FINISHED", record["ended"])


def _above(record: Mapping[str, Any]) -> store.Handle | None:
    """The run above the repeats, on which work goes on; None for a single training."""
    if store.REPEATS_TAG not in record["tags"]:
        return None
    parent, is_new = publisher.parent_run(record, record["experiment"])
    if not is_new and not store.is_deleted(parent):
        store.resume_run(parent)
    return parent


def _check(recipe: config.Recipe) -> None:
    """Refuses what can be refused before data is touched."""
    classifier.check_name(recipe.model)
    chosen = recipe.resolved()
    optimizers.check(
        recipe.optimizer,
        recipe.scheduler,
        optimizer_options=chosen["optimizer_options"],
        scheduler_options=chosen["scheduler_options"],
        lr=recipe.lr,
        epochs=recipe.epochs,
        per_batch=recipe.scheduler_step == "batch",
        warmup_epochs=recipe.warmup_epochs,
    )


def _shown(images: batching.Split, seed: int, classes: Sequence[str]) -> Shown:
    """Six of the images with their class names, as the seed draws them."""
    chosen = np.random.default_rng(seed).permutation(len(images))[:6]
    return images.inputs.numpy()[chosen], [classes[label] for label in images.labels.numpy()[chosen]]


def _measured(work: setup.TrainingSetup, splits: setup.Splits) -> Measured:
    """Warms up, and takes the machine's measure."""
    clock = work.job.clock
    with clock.span("setup"):
        working = setup.warm_up(work, splits)
    with clock.span("ceilings"):
        flops = setup.flops_per_image(work)
        return Measured(working, setup.measure_peaks(work, splits), flops)


def _epochs(
    work: setup.TrainingSetup,
    splits: setup.Splits,
    settings: config.Settings,
    record: dict[str, Any],
    measured: Measured,
) -> Iterator[dict[str, float]]:
    """Begins anew, moves the images to the device, computes a frozen backbone's features where that is done once, and
    trains."""
    recipe, job, clock, seed = work.recipe, work.job, work.job.clock, settings.seed
    backend = job.backend
    with clock.span("setup"):
        setup.restart(work, seed)
    if backend.capture_error:
        record["warnings"].append(f"launched piece by piece, since it can't be recorded: {backend.capture_error}")
    joules: dict[str, list[float]] = {}
    chosen = settings.energy.source
    with energy.source(chosen, backend.energy) as reading:
        with clock.span("upload"):
            samples, placement = setup.place(work, splits, measured.working, settings.data.device_gib)
        record["tags"]["data.placement"] = placement
        terminal.say(f"images   trained from {'the device' if placement == 'device' else 'host memory'}")
        images = sum(map(len, samples.values()))
        if job.on_features:
            with (
                terminal.progress("features", images) as advance,
                _metered(reading, joules),
                clock.span("features") as span,
            ):
                for name, split in samples.items():
                    samples[name] = setup.features(work, split, advance)
            record["metrics"]["speed/feature_images_per_second"] = images / span.seconds
        train, validated = samples["train"], setup.val_split(samples)

        def train_batches(epoch: int) -> loop.Batches:
            return setup.shuffled(work, train, seed, epoch)

        def val_batches() -> loop.Batches:
            return batching.batches(validated, recipe.batch_size, backend)

        with terminal.epochs_progress(recipe.epochs, len(train) + len(validated)) as (advance, finish):
            epochs = loop.train(job, train_batches, val_batches, advance)
            while True:
                with _metered(reading, joules):
                    figures = next(epochs, None)
                if figures is None:
                    break
                finish(figures)
                yield figures
    _account(record, joules, chosen, images * (1 if job.on_features else recipe.epochs), clock)
    _judge(record, work, splits, measured)


def _account(
    record: dict[str, Any], joules: Mapping[str, Sequence[float]], chosen: str, images: int, clock: Clock
) -> None:
    """Puts what `images` took in energy, by the source `chosen`, into the record; says so where that can't be told."""
    whole = len(record["epochs"]) + 1 + record["facts"]["features_cached"]  # spans, if no reading was missed
    for source, spent in joules.items():
        if len(spent) == whole and sum(spent) > 0 and clock.total("features", "train", "validate") > METERED_SECONDS:
            record["tags"]["energy.source"] = source
            record["metrics"]["energy/joules"] = sum(spent)
            record["metrics"]["energy/images_per_joule"] = images / sum(spent)
    if "energy.source" not in record["tags"]:
        counted = joules or chosen != "auto"
        why = "too short, or a reading was missed" if counted else "this machine has no counter that may be read"
        terminal.say(f"energy   not measured: {why}")


def _judge(record: dict[str, Any], work: setup.TrainingSetup, splits: setup.Splits, measured: Measured) -> None:
    """Holds the speed against the machine's own ceilings, and taints the record where it is impossibly far above
    them."""
    clock, backend = work.job.clock, work.job.backend
    limits, flops = measured.ceilings, measured.flops
    seconds = clock.total("features" if work.job.on_features else "train")
    speed = record["metrics"].get("speed/feature_images_per_second")
    if speed is None:
        speed = len(splits["train"]) * work.recipe.epochs / seconds
    # By the ceilings, too: a clock that does not wait for the device makes any training short.
    expected = speed * seconds / limits.images_per_second
    if max(seconds, expected) < roofline.STEP_SECONDS:
        record["metrics"] |= roofline.peak_metrics(limits)
        record["facts"]["verdict"] = f"not judged: {seconds:.2f} s are too short to be held against its ceilings"
        terminal.say(f"machine  {record['facts']['verdict']}")
        return
    figures = roofline.efficiency_metrics(speed, limits, flops)
    for _ in range(CEILINGS_AGAIN):
        if not roofline.implausible_reason(figures, limits):
            break
        # Other load may have held the machine down while it was measured.
        with suppress(OutOfMemoryError), clock.span("ceilings"), backend.memory_errors():
            limits = roofline.combine([limits, setup.measure_peaks(work, splits)])
        figures = roofline.efficiency_metrics(speed, limits, flops)
    doubt = roofline.implausible_reason(figures, limits)
    if doubt:
        record["tags"]["taints"] = "clock"
        record["warnings"].append(doubt)
        terminal.say(f"note     {doubt}")
    record["metrics"] |= figures
    record["facts"]["verdict"] = roofline.describe(figures, limits)
    terminal.say(f"machine  {record['facts']['verdict']}")


def _advice(
    reason: str, settings: config.Settings, splits: setup.Splits, classes: int, backend: devices.Backend
) -> str:
    """What to do about a batch that is too large: the largest power of two that fits."""
    tried = settings.work.batch_size
    backend.release_memory()
    if tried == 1:
        return reason
    plain = dataclasses.replace(settings.work, weights="random", graph=False, compile="off")
    with backend.memory_errors():
        work = setup.build(plain, settings.seed, classes, None, splits, backend, Clock(backend.synchronize))
    largest = setup.largest_batch(work, tuple(splits["train"].inputs.shape[1:]), below=tried)
    if not largest:
        return reason
    return f"batch_size: {tried} is too much for the memory of {backend.kind}: the largest that fits is {largest}"


@contextmanager
def _metered(reading: energy.Reading, joules: dict[str, list[float]]) -> Iterator[None]:
    """Adds the energy spent inside to `joules`, by its source; nothing where that can't tell."""
    before = reading()
    yield
    after = reading()
    if before and after:
        joules.setdefault(before[0], []).append(after[1] - before[1])


def _record(
    settings: config.Settings,
    hardware: Mapping[str, Any],
    inputs: Mapping[str, Any],
    work: setup.TrainingSetup,
    splits: setup.Splits,
    unused_gpu: str | None,
    before: system_state.SystemState,
) -> dict[str, Any]:
    """What is known of the training before it starts (see records.py)."""
    backend, recipe = work.job.backend, settings.work
    accelerator = backend.facts()
    fallback = inputs["fallback"] + (["device"] if unused_gpu else [])
    threads = {"threads": devices.torch_facts()["threads"]}
    own = records.run_tags(settings, inputs, hardware, backend, accelerator | threads, before, fallback)
    trainable, parameters = classifier.count_parameters(work.net)
    return {
        "id": uuid.uuid4().hex,
        "name": records.run_name(own),
        "experiment": records.experiment_name(settings, own),
        "started": store.now(),
        "ended": None,
        "params": records.run_params(settings)
        | {"model.parameters": str(parameters), "model.trainable_parameters": str(trainable)},
        "tags": own,
        "datasets": records.dataset_inputs(inputs, {name: len(split) for name, split in splits.items()}, settings.seed),
        "epochs": [],
        "metrics": {},
        "warnings": records.run_warnings(
            settings, inputs, own, unused_gpu, optimizers.overrides_schedule(work.job.optimizer)
        ),
        "facts": {
            "model": recipe.model,
            "classes": inputs["data"]["classes"],
            "images": {name: len(split) for name, split in splits.items()},
            "trainable": trainable,
            "parameters": parameters,
            "weights_digest": inputs["weights"]["digest"],
            "features_cached": work.job.on_features,
            "channels_last": work.channels_last,
            "compile": work.compile_mode,
            "recorded": work.recorded,
            "image_size": recipe.image_size,
        },
        "hardware": {
            "machine": dict(hardware),
            "accelerator": accelerator,
            "torch": devices.torch_facts(),
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
    net: classifier.Classifier,
    record: Mapping[str, Any],
    figures: Mapping[str, float],
    settings: config.Settings,
    out: Path,
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


def _times(clock: Clock) -> dict[str, float]:
    """What a training took; what it did not do itself is left out."""
    spans = {
        "time/setup_seconds": ["setup"],
        "time/data_seconds": ["decode"],
        "time/total_seconds": setup.TOTAL,
        "time/ceilings_seconds": ["ceilings"],
        "time/inspect_seconds": ["inspect"],
        "time/checkpoint_seconds": ["checkpoint"],
        "time/logging_seconds": ["log"],
    }
    taken = {key: clock.total(*names) for key, names in spans.items() if not clock.seconds.keys().isdisjoint(names)}
    return taken | {"time/unaccounted_seconds": clock.unaccounted()}


def _taint(record: dict[str, Any], before: system_state.SystemState, after: system_state.SystemState) -> None:
    """Says in the run what disturbed it from outside, and how the machine itself behaved under the load."""
    figures = [epoch["figures"] for epoch in record["epochs"]]
    # On features an epoch is over before a machine could change its pace.
    paced = [] if record["facts"]["features_cached"] else [each["time/train_seconds"] for each in figures]
    record["hardware"]["conditions"]["after"] = after
    for tag, said in (
        ("taints", system_state.taints(before, after)),
        ("behavior", system_state.behavior(before, after, paced)),
    ):
        record["warnings"] += said.values()
        if said:
            record["tags"][tag] = " ".join([*record["tags"].get(tag, "").split(), *said])
        for sentence in said.values():
            terminal.say(f"note     {sentence}")
    if "gpu_power_watts" in before:
        record["metrics"]["energy/idle_watts"] = before["gpu_power_watts"]


def _draw(record: dict[str, Any], settings: config.Settings, shown: Shown, out: Path) -> None:
    """Draws the pictures of the run's page in MLflow."""
    from pipeline import plots  # matplotlib takes a third of a second: not before there is something to draw

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


def _leave(record: Mapping[str, Any], settings: config.Settings, out: Path) -> None:
    """Writes all else that the run's page is made from, so that it can be made again."""
    files.write_json(out / "hardware.json", record["hardware"])
    files.write_text(out / "params.yaml", config.dump(records.effective_settings(settings)))
    files.write_text(out / "curves.csv", _csv([epoch["figures"] for epoch in record["epochs"]]))
    files.write_json(out / "metrics.json", records.final_metrics(record))


def _csv(epochs: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, epochs[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(epochs)
    return text.getvalue()


if __name__ == "__main__":
    repeats.run_stage("train", run, __doc__)
