"""Puts what a training left into MLflow: right after it, or again from DVC's cache or a bundle, by the same code.

Every run also holds the records it was made from, as `records/<stage>.json`, and their digests as tags: with them a
run can be put into another store (`bundle.py`).
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import files, terminal
from pipeline.tracking import records, store

CHECKPOINT = "checkpoints/best.safetensors"
"""The artifact that holds a training's best checkpoint."""

RESTORED = {"restored": "from the cache of `dvc repro`; nothing was trained"}
"""What marks a run that was put back."""

IMPORTED_RUN_TAG = "imported.run_id"
"""What marks the run of a training alone, and not the one above it and its repeats."""

Folders = Mapping[str, Path]
"""Where the files of a training and of its later stages are, by stage (`records.stage_folders`)."""


def publish_training(handle: store.Handle, record: Mapping[str, Any], folder: Path) -> None:
    """Logs all but the epochs of a training that left `folder`: figures, record, and pictures, checkpoint and model
    where they are there (a bundle may hold none)."""
    store.log_metrics(handle, record["metrics"], record["ended"])
    store.set_tags(handle, record["tags"])  # some are known at the end alone
    told = {"hardware.json": folder / "hardware.json", "params.yaml": folder / "params.yaml"}
    store.log_artifacts(handle, told | _pictures(folder))
    if (folder / "best.safetensors").exists():
        publish_checkpoint(handle, folder / "best.safetensors")
    _describe(handle, record, {})
    _log_record(handle, "train", record)


def publish_checkpoint(handle: store.Handle, path: Path) -> None:
    """Logs a training's best checkpoint, and the model that it holds."""
    from pipeline.models import checkpoints  # torch takes seconds to import, and only what is missing needs it

    net, facts = checkpoints.load(path)
    requirements = [f"{package}=={version(package).split('+')[0]}" for package in ("mlflow", "torch", "numpy")]
    store.log_model(handle, net, facts.image_size, len(facts.classes), requirements)
    store.log_artifacts(handle, {CHECKPOINT: path})


def publish_evaluation(handle: store.Handle, result: Mapping[str, Any], folder: Path) -> None:
    """Logs the evaluation `result` of a training, which left `folder`."""
    store.log_metrics(handle, result["metrics"], result["ended"])
    store.log_datasets(handle, result["datasets"])
    store.log_artifacts(handle, _pictures(folder))
    store.set_tags(handle, result["tags"])


def publish_sustained(handle: store.Handle, result: Mapping[str, Any], folder: Path) -> None:
    """Logs what `sustain` measured beside a training, and the courses of its steps."""
    store.log_metrics(handle, result["metrics"], result["ended"])
    series = result["series"]
    if isinstance(series, list):  # of one step: records of bundles before schema 3
        series = {"sustained/images_per_second": series}
    for key, values in series.items():
        store.log_series(handle, key, values, result["ended"])
    store.set_tags(handle, result["tags"])


LATER_STAGES = {"evaluate": publish_evaluation, "sustain": publish_sustained}
"""What later stages add to a training's run: by the stage's folder, how its record is logged."""


def record_file(stage: str) -> str:
    """The artifact that holds the record of a stage."""
    return f"records/{stage}.json"


def digest_tag(stage: str) -> str:
    """The tag that holds the digest of a stage's record. One that is there says that all of the stage is."""
    return "record.sha256" if stage == "train" else f"record.{stage}.sha256"


def digest(record: Mapping[str, Any]) -> str:
    """The SHA-256 of a record, however its JSON is laid out."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def stage_records(record: Mapping[str, Any], folders: Folders) -> dict[str, Any]:
    """The records that later stages left for this training, by stage; one without a figure or a warning says
    nothing of it."""
    there = {stage: folders[stage] / "record.json" for stage in LATER_STAGES}
    found = {stage: files.read_json(path) for stage, path in there.items() if path.exists()}
    return {
        stage: result
        for stage, result in found.items()
        if result["id"] == record["id"] and (result["metrics"] or result.get("warnings"))
    }


def end_time(record: Mapping[str, Any], found: Mapping[str, Any]) -> int:
    """When the last stage of a run ended, in milliseconds since 1970."""
    return max(int(each["ended"]) for each in (record, *found.values()))


def count_attempts(record: Mapping[str, Any], experiment: str) -> int:
    """How often the score of a training's run was measured in this store, less a last time that was disturbed."""
    handle = store.find_run(record["id"], experiment)
    tags = store.run_tags(handle) if handle else {}
    return int(tags.get("sustained.attempts", "sustained.started" in tags)) - ("sustained.taints" in tags)


def publish_stage(
    stage: str, record: Mapping[str, Any], result: Mapping[str, Any], experiment: str, folders: Folders
) -> None:
    """Adds `result`, which `stage` just left in its folder, to the training's run; one that is missing from this store
    is made anew, whole."""
    handle = store.find_run(record["id"], experiment)
    if handle is None:
        restore_run(record, experiment, folders)
    elif store.is_deleted(handle):
        terminal.say(f"note     the run was deleted in this store: what `{stage}` found is not put there")
    else:
        add_stages(handle, record, [stage], stage_records(record, folders) | {stage: result}, folders)


def add_stages(
    handle: store.Handle,
    record: Mapping[str, Any],
    stages: Sequence[str],
    found: Mapping[str, Any],
    folders: Folders,
    best: Path | None = None,
) -> None:
    """Adds to a training's run what `stages` left in their folders, and a checkpoint that it lacks. `found`: the
    records of these stages and of those that the run holds already."""
    store.resume_run(handle)
    with store.end_on_failure(handle):
        if best is not None:
            publish_checkpoint(handle, best)
        for stage in stages:
            LATER_STAGES[stage](handle, found[stage], folders[stage])
        _describe(handle, record, found)
        store.end_run(handle, "FINISHED", end_time(record, found))
        for stage in stages:  # last: what was added by half is added again
            _log_record(handle, stage, found[stage])


def add_missing_stages(record: Mapping[str, Any], experiment: str, folders: Folders) -> bool:
    """Adds to a training's run what later stages left and the run lacks; whether there was any. A run that is not
    there, or was deleted, is left alone."""
    handle = store.find_run(record["id"], experiment)
    if handle is None or store.is_deleted(handle):
        return False
    found, tags = stage_records(record, folders), store.run_tags(handle)
    stages = [stage for stage in found if digest_tag(stage) not in tags]
    if stages:
        add_stages(handle, record, stages, found, folders)
    return bool(stages)


def parent_run(record: Mapping[str, Any], experiment: str) -> tuple[store.Handle, bool]:
    """The run above the repeat of `record`, and whether it was made, since it was not there."""
    parent, _ = store.find_repeats(record["tags"][store.REPEATS_TAG], experiment)
    if parent is not None:
        return parent, False
    return store.start_run(records.parent_fields(record) | {"experiment": experiment}), True


def restore_run(
    record: Mapping[str, Any], experiment: str, folders: Folders, marks: Mapping[str, str] = RESTORED
) -> list[store.Handle]:
    """Makes the run of a cached or imported training, and of what later stages found, anew, whole and with the tags
    `marks`; the one above it, too, where it is a repeat and that is missing. The runs that were made, its own last."""
    made: list[store.Handle] = []
    with store.discard_on_failure(made):
        parent = None
        if store.REPEATS_TAG in record["tags"]:
            parent, is_new = parent_run(record, experiment)
            if is_new:
                made.append(parent)
                store.set_tags(parent, {key: text for key, text in marks.items() if key != IMPORTED_RUN_TAG})
                store.schedule_run(parent)
        handle = store.start_run(dict(record) | {"experiment": experiment}, parent)
        made.append(handle)
        with store.end_on_failure(handle):
            store.set_tags(handle, marks)
            for epoch in record["epochs"]:
                store.log_epoch(handle, epoch)
            publish_training(handle, record, folders["train"])
            found = stage_records(record, folders)
            for stage, result in found.items():
                LATER_STAGES[stage](handle, result, folders[stage])
                _log_record(handle, stage, result)
            _describe(handle, record, found)
            store.mark_run(handle, record)  # last: a run made by half is not taken for the training's
            store.end_run(handle, "FINISHED", end_time(record, found))
    return made


def update_parent(record: Mapping[str, Any], experiment: str) -> None:
    """Brings the run above a repeat up to date with all the repeats that this store holds. Doing it again adds nothing.

    It gets figures, and is finished, when all planned ones are there, and then stays so; one that was deleted is left
    alone. A single training has none.
    """
    own = record["tags"]
    if store.REPEATS_TAG not in own:
        return
    parent, there = store.find_repeats(own[store.REPEATS_TAG], experiment)
    if parent is None or store.is_deleted(parent):
        return
    planned = int(own["repeats"])
    if len(there) < planned:
        if not store.is_finished(parent):
            note = f"{len(there)} of {planned} repeats are here"
            store.set_tags(parent, {"mlflow.note.content": note})
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows = [there[number] for number in sorted(there)]
        repeats = [records_in_store(row["run_id"], row["tags"], Path(scratch), {}) for row in rows]
    trainings = [each["train"] for each in repeats]
    by_epoch = records.median_epochs(trainings)
    for epoch in by_epoch:
        store.log_epoch(parent, epoch)
    figures = records.summarise_metrics([records.final_metrics(each) for each in trainings])
    once = {key: value for key, value in figures.items() if key not in by_epoch[-1]["figures"]}
    store.log_metrics(parent, once, max(each["ended"] for each in trainings))
    for stage in LATER_STAGES:
        later = [each[stage] for each in repeats if stage in each]
        if len(later) == planned:
            figures = records.summarise_metrics([each["metrics"] for each in later])
            store.log_metrics(parent, figures, max(each["ended"] for each in later))
    tags = [{key: text for stage in each.values() for key, text in stage["tags"].items()} for each in repeats]
    store.set_tags(parent, records.shared_tags(tags))
    store.set_tags(parent, {"mlflow.note.content": records.describe_parent(repeats)})
    store.end_run(parent, "FINISHED", max(end_time(each["train"], each) for each in repeats))


def records_in_store(
    run_id: str, tags: Mapping[str, str], scratch: Path, known: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The records that a run of this store with these tags holds, by stage; those that are `known` are not fetched."""
    found: dict[str, Mapping[str, Any]] = {}
    for stage in records.STAGES:
        there, own = tags.get(digest_tag(stage)), known.get(stage)
        if there is not None and own is not None and there == digest(own):
            found[stage] = own
        elif there is not None:
            found[stage] = files.read_json(store.download_artifact(run_id, record_file(stage), scratch))
    return found


def _pictures(folder: Path) -> dict[str, Path]:
    """The pictures that a stage left, by the artifact that holds them; none where a bundle came without."""
    return {f"plots/{path.name}": path for path in sorted((folder / "plots").glob("*.png"))}


def _log_record(handle: store.Handle, stage: str, record: Mapping[str, Any]) -> None:
    """Logs the record of a stage itself, then its digest."""
    store.log_text(handle, record_file(stage), files.json_text(record))
    store.set_tags(handle, {digest_tag(stage): digest(record)})


def _describe(handle: store.Handle, record: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    store.set_tags(handle, {"mlflow.note.content": records.describe_run(record, found)})
