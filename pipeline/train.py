"""Train the chosen recipe. Write its record, curves, pictures and best checkpoint."""

from pipeline import repeats

if __name__ == "__main__":
    repeats.start_stage(__doc__, "train")

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline import children, config, devices, files, terminal
from pipeline.errors import OutOfMemoryError, StageError
from pipeline.models import checkpoints, classifier, weights
from pipeline.profiling import energy, system_info, system_metrics, system_state
from pipeline.profiling.clock import Clock
from pipeline.tracking import pending, pictures, records, training_record
from pipeline.training import loop, measured, setup, state

Record = dict[str, Any]


def run(settings: config.Settings, folder: Path, number: int = 1) -> Record:
    """Train once. Returns the record (see `train`)."""
    return train(settings, folder, number)[0]


def train(settings: config.Settings, folder: Path, number: int = 1) -> tuple[Record, classifier.Classifier]:
    """Train once, from `hardware.json` and `inputs.json` in `folder`. Returns the record, and the model on its device,
    with the weights of the last epoch.

    Writes `folder/train`, or the subfolder of repeat `number` (from 1). Meanwhile the record grows in `pending/`, from
    where MLflow gets it; an interrupted training of the same work is resumed from there.
    """
    watch = children.load_watch() or system_state.LoadWatch()
    recipe = settings.work
    startup = system_info.process_age() - children.waited_seconds()
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
    identity = repeats.training_identity(settings, folder, number) | state.execution_identity(backend)
    entry, owner, saved = _find_unfinished(settings, identity)
    with clock.span("inspect"):
        before = system_state.sample(backend.gpu_uuid(), watch)  # before our own work loads the device
    with clock.span("decode"):
        decoded = setup.decode_splits(settings, inputs["data"])
        splits = setup.hold_out(decoded, settings)
    with clock.span("setup"), backend.memory_errors():
        path = weights.locate(inputs["weights"], recipe)
        classes = len(inputs["data"]["classes"])
        training = setup.TrainingSetup(recipe, settings.seed, classes, path, splits, backend, clock)

    if saved is None:
        with clock.span("inspect"):
            facts = {"machine": machine, "accelerator": backend.facts(), "torch": devices.torch_facts()}
            hardware = facts | {"conditions": {"before": before}}
            images = {name: len(split) for name, split in splits.items()}
            record = training_record.new_record(settings, inputs, hardware, training, images, unused_gpu)
        record["tags"] |= repeats.repeat_tags(settings, folder, number)
        record["name"] = records.run_name(record["tags"])
        record["metrics"]["time/startup_seconds"] = startup
        if entry is not None and owner is not None:
            _replace(entry, owner, record)
            entry = owner = None
    else:
        record = saved["record"]
        record["experiment"] = records.experiment_name(settings, record["tags"])
    out = repeats.clear_outputs(folder, "train", number, settings.repeats)
    training_record.announce(record)
    out_of_memory: str | None = None
    with _journal(entry, owner, record, identity) as entry:
        try:
            _train(training, splits, decoded, settings, record, entry, saved)
            _finish(record, settings, entry, out)
        except OutOfMemoryError as error:
            out_of_memory = str(error)
        if out_of_memory:  # not in the except clause, since the error holds memory that a smaller batch needs
            del training
            raise OutOfMemoryError(_suggest_batch(out_of_memory, settings, splits, classes, backend))
    return record, training.net


def _find_unfinished(
    settings: config.Settings, identity: Mapping[str, Any]
) -> tuple[Path | None, IO[str] | None, state.State | None]:
    """The entry in `pending/` of an interrupted training of the same work, the file that locks it for this process, and
    its state. No state if the training did not come to its first epoch; three times None if there is no entry."""
    if settings.resume == "never":
        return None, None, None
    for entry in pending.unfinished(identity):
        try:
            owner = pending.own(entry)
        except StageError:  # another process has just gone on with it
            continue
        saved = state.load_newest(entry / "state")
        if saved is not None:
            terminal.say(f"resumed  after epoch {len(saved['record']['epochs'])}; -S resume=never starts anew")
            return entry, owner, saved
        if not pending.partial_record(entry)["epochs"]:
            return entry, owner, None
        owner.close()
    for other in reversed([entry for entry in pending.entries() if pending.is_resumable(entry)]):
        if changed := records.changed_keys(pending.read_target(other)["identity"], identity):
            terminal.say(f"note     the training that was interrupted had another {changed}: this one starts anew")
            break
    return None, None, None


def _replace(entry: Path, owner: IO[str], record: Record) -> None:
    """Delete the entry of a training that did not come to its first epoch. The new one becomes the same run, unless its
    params differ, which no run can change."""
    begun = pending.partial_record(entry)
    if begun["params"] == record["params"]:
        record["id"] = begun["id"]
    owner.close()  # Windows deletes no file that is open
    pending.delete(entry)


@contextmanager
def _journal(entry: Path | None, owner: IO[str] | None, record: Record, identity: Mapping[str, Any]) -> Iterator[Path]:
    """Open the entry of the training, a new one unless it is resumed, and write into it how the training failed."""
    if entry is None or owner is None:
        entry, owner = pending.open_training(record, identity)
    else:
        times = 1 + sum(event["event"] == "resume" for event in pending.journal(entry))
        record["tags"]["resumed"] = str(times)
        pending.write_target(entry, record["experiment"], identity)  # the store may be another one now
        pending.append(entry, {"event": "resume", "at": records.now(), "tags": {"resumed": str(times)}})
    with owner:
        try:
            yield entry
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            would_repeat = (loop.NonFiniteLossError, OutOfMemoryError) if record["epochs"] else Exception
            final = isinstance(error, would_repeat)
            if not (entry / "train").exists():
                with suppress(StageError):  # a full disk must not hide the first error
                    pending.append(entry, {"event": "end", "status": status, "at": records.now(), "final": final})
            raise


def _train(
    training: setup.TrainingSetup,
    splits: setup.Splits,
    decoded: setup.Splits,
    settings: config.Settings,
    record: Record,
    entry: Path,
    saved: state.State | None,
) -> None:
    """Train, and write each epoch with the state after it into `entry`. Completes the record."""
    clock, backend = training.loop.clock, training.loop.backend
    samples = sum(len(epoch["system"]) for epoch in record["epochs"])  # before the training was interrupted
    with system_metrics.sampled(first_step=samples) as system_samples, backend.memory_errors():
        limits = measured.measure_limits(training, splits)
        best = max((epoch["figures"]["val/accuracy"] for epoch in record["epochs"]), default=None)
        saves_state = settings.resume == "auto"
        for figures in measured.train(training, splits, settings, record, limits, saved):
            _note_target(record, settings, figures, clock)
            if best is None or figures["val/accuracy"] > best:  # of equal epochs, the first is best
                best = figures["val/accuracy"]
                with clock.span("checkpoint"):
                    _save_checkpoint(training.net, record, figures, settings, entry)
            with clock.span("log"):
                epoch = {"at": records.now(), "figures": figures, "system": system_samples()}
                record["epochs"].append(epoch)
                if saves_state:
                    saves_state = state.save(entry / "state", training, record)
                pending.append(entry, {"event": "epoch", "epoch": epoch})
    record["ended"] = records.now()
    record["metrics"] |= training_record.span_metrics(clock, setup.TOTAL_SPANS) | training.loop.times.percentiles()
    training_record.add_conditions(record, system_state.sample(backend.gpu_uuid()))
    training_record.add_best_epoch(record)
    images = decoded["train"]
    chosen = np.random.default_rng(settings.seed).permutation(len(images))[:6]
    record["facts"]["samples"] = [record["facts"]["classes"][label] for label in images.labels.numpy()[chosen]]
    with files.atomic_write(entry / pictures.SAMPLES) as temporary:
        np.save(temporary, images.inputs.numpy()[chosen], allow_pickle=False)
    if "resumed" not in record["tags"]:
        record["metrics"]["time/process_seconds"] = system_info.process_age() - children.waited_seconds()


def _finish(record: Record, settings: config.Settings, entry: Path, out: Path) -> None:
    """Write the files of a complete training into `out`, and leave them for the store in `entry`."""
    training_record.write_files(record, settings, out)
    files.link(entry / pictures.SAMPLES, out / pictures.SAMPLES)
    epoch = int(record["metrics"]["best/epoch"])
    with files.atomic_write(out / "best.safetensors") as temporary:
        shutil.copyfile(_checkpoint_path(entry, epoch), temporary)
    files.write_json(out / "record.json", record)  # last: a training without it is not complete
    pending.link_stages({"train": out}, entry)
    shutil.rmtree(entry / "state", ignore_errors=True)


def _note_target(record: Record, settings: config.Settings, figures: dict[str, float], clock: Clock) -> None:
    """Record the time of the first epoch that reaches the target accuracy."""
    target = settings.work.target_accuracy
    if target is not None and figures["val/accuracy"] >= target:
        record["metrics"].setdefault("time/to_target_seconds", clock.total(*setup.TOTAL_SPANS))


def _checkpoint_path(entry: Path, epoch: int) -> Path:
    return entry / "state" / f"best-{epoch:06}.safetensors"


def _save_checkpoint(
    net: classifier.Classifier, record: Record, figures: dict[str, float], settings: config.Settings, entry: Path
) -> None:
    """Save the best model so far. The one before stays until the state of this epoch is written."""
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
    checkpoints.save(_checkpoint_path(entry, facts.epoch), net, facts)
    for older in sorted((entry / "state").glob("best-*.safetensors"))[: -state.KEEP - 1]:  # this one has no state yet
        older.unlink()


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
    repeats.run_stage(run, __doc__)
