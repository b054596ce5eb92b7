"""Publishes what a training left to MLflow: right after it, or again from DVC's cache or a bundle, by the same code.

Every run also holds the records that it was made from, as `records/<stage>.json`, and their digests as tags. With them
a run can be put into another store (see bundles.py).
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import files, terminal
from pipeline.tracking import descriptions, records, store

CHECKPOINT = "checkpoints/best.safetensors"
"""The artifact that holds a training's best checkpoint."""

RESTORED = {"restored": "from the cache of `dvc repro`; nothing was trained"}
"""Tags of a run that was restored."""

IMPORTED_RUN_TAG = "imported.run_id"
"""Tag of an imported training. The parent run of repeats does not get it."""

Folders = Mapping[str, Path]
"""Where each stage left its files, by stage (`records.stage_folders`)."""


# --- what each stage adds to a run


def publish_training(handle: store.Handle, record: Mapping[str, Any], folder: Path) -> None:
    """Log all but the epochs of a training that left `folder`. A bundle may lack pictures and checkpoint."""
    store.log_metrics(handle, record["metrics"], record["ended"])
    store.set_tags(handle, record["tags"])  # some are known only at the end
    settings = {name: folder / name for name in ("hardware.json", "params.yaml")}
    store.log_artifacts(handle, settings | _pictures(folder))
    if (folder / "best.safetensors").exists():
        publish_checkpoint(handle, folder / "best.safetensors")
    _describe(handle, record, {})
    _log_record(handle, "train", record)


def publish_checkpoint(handle: store.Handle, path: Path) -> None:
    """Log a training's best checkpoint, and the model that it holds."""
    from pipeline.models import checkpoints  # torch takes seconds to import, and most callers have no checkpoint

    net, facts = checkpoints.load(path)
    requirements = [f"{package}=={version(package).split('+')[0]}" for package in ("mlflow", "torch", "numpy")]
    store.log_model(handle, net, facts.image_size, len(facts.classes), requirements)
    store.log_artifacts(handle, {CHECKPOINT: path})


def publish_evaluation(handle: store.Handle, result: Mapping[str, Any], folder: Path) -> None:
    """Log the record `result` of an evaluation that left `folder`."""
    store.log_metrics(handle, result["metrics"], result["ended"])
    store.log_datasets(handle, result["datasets"])
    store.log_artifacts(handle, _pictures(folder))
    store.set_tags(handle, result["tags"])


def publish_sustained(handle: store.Handle, result: Mapping[str, Any], folder: Path) -> None:
    """Log the record `result` of sustained steps, and their courses."""
    store.log_metrics(handle, result["metrics"], result["ended"])
    series = result["series"]
    if isinstance(series, list):  # the course of one step, in bundles before schema 3
        series = {"sustained/images_per_second": series}
    for key, values in series.items():
        store.log_series(handle, key, values, result["ended"])
    store.set_tags(handle, result["tags"])


LATER_STAGES = {"evaluate": publish_evaluation, "sustain": publish_sustained}
"""How the records of the stages after the training are logged."""


def _pictures(folder: Path) -> dict[str, Path]:
    """The pictures that a stage left, by artifact path."""
    return {f"plots/{path.name}": path for path in sorted((folder / "plots").glob("*.png"))}


def _describe(handle: store.Handle, record: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    store.set_tags(handle, {"mlflow.note.content": descriptions.describe_run(record, results)})


def _log_record(handle: store.Handle, stage: str, record: Mapping[str, Any]) -> None:
    """Log the record of a stage, then its digest."""
    store.log_text(handle, record_file(stage), files.json_text(record))
    store.set_tags(handle, {digest_tag(stage): digest(record)})


# --- records


def record_file(stage: str) -> str:
    """The artifact that holds the record of a stage."""
    return f"records/{stage}.json"


def digest_tag(stage: str) -> str:
    """The tag that holds the digest of a stage's record. A run with the tag has all that the stage left."""
    return "record.sha256" if stage == "train" else f"record.{stage}.sha256"


def digest(record: Mapping[str, Any]) -> str:
    """The SHA-256 of a record, whatever the layout of its JSON."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def stage_records(record: Mapping[str, Any], folders: Folders) -> dict[str, Any]:
    """The records that later stages left for this training, by stage, without those that have neither a metric nor a
    warning."""
    paths = {stage: folders[stage] / "record.json" for stage in LATER_STAGES}
    results = {stage: files.read_json(path) for stage, path in paths.items() if path.exists()}
    return {
        stage: result
        for stage, result in results.items()
        if result["id"] == record["id"] and (result["metrics"] or result.get("warnings"))
    }


def records_in_store(
    run_id: str, tags: Mapping[str, str], scratch: Path, known: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The records that the run with these tags holds, by stage. Those that are `known` are not fetched."""
    results: dict[str, Mapping[str, Any]] = {}
    for stage in records.STAGES:
        expected = tags.get(digest_tag(stage))
        if expected is None:
            continue
        if stage in known and digest(known[stage]) == expected:
            results[stage] = known[stage]
        else:
            results[stage] = files.read_json(store.download_artifact(run_id, record_file(stage), scratch))
    return results


def end_time(record: Mapping[str, Any], results: Mapping[str, Any]) -> int:
    """When the last stage of a run ended, in milliseconds since 1970."""
    return max(int(result["ended"]) for result in (record, *results.values()))


def count_attempts(record: Mapping[str, Any], experiment: str) -> int:
    """How often the sustained steps of a run were measured in this store. A last attempt that was disturbed does not
    count."""
    handle = store.find_run(record["id"], experiment)
    tags = store.run_tags(handle) if handle else {}
    attempts = tags.get("sustained.attempts", "")  # a bundle may bring any text
    counted = int(attempts) if attempts.isdecimal() else int("sustained.started" in tags)
    return counted - ("sustained.taints" in tags)


# --- runs


def publish_stage(
    stage: str, record: Mapping[str, Any], result: Mapping[str, Any], experiment: str, folders: Folders
) -> None:
    """Add `result`, which `stage` just left in its folder, to the training's run. Restore a run that is missing."""
    handle = store.find_run(record["id"], experiment)
    if handle is None:
        restore_run(record, experiment, folders)
    elif store.is_deleted(handle):
        terminal.say(f"note     the run was deleted in this store: the result of `{stage}` is not added")
    else:
        add_stages(handle, record, [stage], stage_records(record, folders) | {stage: result}, folders)


def add_stages(
    handle: store.Handle,
    record: Mapping[str, Any],
    stages: Sequence[str],
    results: Mapping[str, Any],
    folders: Folders,
    best: Path | None = None,
) -> None:
    """Add to a training's run what `stages` left in their folders, and a checkpoint that it lacks. `results`: the
    records of these stages and of those that the run has already."""
    store.set_status(handle, "RUNNING")
    with store.end_on_failure(handle):
        if best is not None:
            publish_checkpoint(handle, best)
        for stage in stages:
            LATER_STAGES[stage](handle, results[stage], folders[stage])
        _describe(handle, record, results)
        store.end_run(handle, "FINISHED", end_time(record, results))
        for stage in stages:  # last, so that a stage added only in part is added again
            _log_record(handle, stage, results[stage])


def add_missing_stages(record: Mapping[str, Any], experiment: str, folders: Folders) -> bool:
    """Add to a training's run what later stages left and it lacks. Returns whether it lacked any. Does nothing if the
    run is missing or deleted."""
    handle = store.find_run(record["id"], experiment)
    if handle is None or store.is_deleted(handle):
        return False
    results, tags = stage_records(record, folders), store.run_tags(handle)
    stages = [stage for stage in results if digest_tag(stage) not in tags]
    if stages:
        add_stages(handle, record, stages, results, folders)
    return bool(stages)


def restore_run(
    record: Mapping[str, Any], experiment: str, folders: Folders, tags: Mapping[str, str] = RESTORED
) -> list[store.Handle]:
    """Create the run of a cached or imported training, with all its stages and with `tags`, and the parent run of a
    repeat if that is missing. Returns the runs that it created, the training's last."""
    created: list[store.Handle] = []
    with store.discard_on_failure(created):
        parent = None
        if store.REPEATS_TAG in record["tags"]:
            parent, is_new = parent_run(record, experiment)
            if is_new:
                created.append(parent)
                store.set_tags(parent, {key: value for key, value in tags.items() if key != IMPORTED_RUN_TAG})
                store.set_status(parent, "SCHEDULED")
        handle = store.start_run(dict(record) | {"experiment": experiment}, parent)
        created.append(handle)
        with store.end_on_failure(handle):
            store.set_tags(handle, tags)
            for epoch in record["epochs"]:
                store.log_epoch(handle, epoch)
            publish_training(handle, record, folders["train"])
            # The training is whole from here on. Marked only now, a part of it is never taken for the training's run;
            # marked before it is FINISHED, it never counts as another run. A stage that is missing is added next time.
            store.mark_run(handle, record)
            results = stage_records(record, folders)
            add_stages(handle, record, list(results), results, folders)
    return created


# --- the parent run of repeats


def parent_run(record: Mapping[str, Any], experiment: str) -> tuple[store.Handle, bool]:
    """The parent run of a repeat, and whether it was created because it was missing."""
    parent, _ = store.find_repeats(record["tags"][store.REPEATS_TAG], experiment)
    if parent is not None:
        return parent, False
    return store.start_run(records.parent_fields(record) | {"experiment": experiment}), True


def update_parent(record: Mapping[str, Any], experiment: str) -> None:
    """Bring the parent run of a repeat up to date with the repeats in this store. Does nothing for a single training,
    or if the parent run was deleted.

    Once all planned repeats are there it gets their metrics and is finished, and stays so.
    """
    if store.REPEATS_TAG not in record["tags"]:
        return
    parent, rows = store.find_repeats(record["tags"][store.REPEATS_TAG], experiment)
    if parent is None or store.is_deleted(parent):
        return
    planned = int(record["tags"]["repeats"])
    if len(rows) >= planned:
        _publish_parent(parent, [rows[number] for number in sorted(rows)])
    elif not store.is_finished(parent):
        store.set_tags(parent, {"mlflow.note.content": f"{len(rows)} of {planned} repeats are here"})


def _publish_parent(parent: store.Handle, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log the summary of the repeats whose runs are `rows`, with the pictures and the settings of the first."""
    with tempfile.TemporaryDirectory() as scratch:
        repeats = [records_in_store(row["run_id"], row["tags"], Path(scratch), {}) for row in rows]
        first = rows[0]["run_id"]
        shown = [*store.list_artifacts(first, "plots"), *store.list_artifacts(first, "")]
        names = [name for name in shown if name.endswith(".png") or name == "params.yaml"]
        store.log_artifacts(parent, {name: store.download_artifact(first, name, Path(scratch)) for name in names})
    trainings = [repeat["train"] for repeat in repeats]
    epochs = records.median_epochs(trainings)
    for epoch in epochs:
        store.log_epoch(parent, epoch)
    metrics = records.summarise_metrics([records.final_metrics(training) for training in trainings])
    once = {key: value for key, value in metrics.items() if key not in epochs[-1]["figures"]}
    store.log_metrics(parent, once, max(training["ended"] for training in trainings))
    for stage in LATER_STAGES:
        results = [repeat[stage] for repeat in repeats if stage in repeat]
        if len(results) == len(repeats):
            metrics = records.summarise_metrics([result["metrics"] for result in results])
            store.log_metrics(parent, metrics, max(result["ended"] for result in results))
    tags = [{key: value for result in repeat.values() for key, value in result["tags"].items()} for repeat in repeats]
    store.set_tags(parent, records.shared_tags(tags))
    store.set_tags(parent, {"mlflow.note.content": descriptions.describe_parent(repeats)})
    store.end_run(parent, "FINISHED", max(end_time(repeat["train"], repeat) for repeat in repeats))
