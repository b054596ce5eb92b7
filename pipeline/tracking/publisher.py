"""Brings runs into the MLflow store: while they train, from DVC's cache and from bundles, by the same code.

Every run also holds the records that it was made from, as `records/<stage>.json`, and their digests as tags. With them
a run can be put into another store (see bundles.py).
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import files, terminal
from pipeline.errors import StageError
from pipeline.startup import first_line
from pipeline.tracking import descriptions, location, pending, pictures, records, store
from pipeline.tracking.records import Record

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
    store.log_artifacts(handle, {name: folder / name for name in ("hardware.json", "params.yaml")})
    _log_pictures(handle, pictures.draw_training, record, folder)


def publish_checkpoint(handle: store.Handle, path: Path) -> None:
    """Log a training's best checkpoint, and the model that it holds."""
    from pipeline.tracking.model_logging import checkpoints  # takes seconds, and most callers have no checkpoint

    net, facts = checkpoints.load(path)
    requirements = [f"{package}=={version(package).split('+')[0]}" for package in ("mlflow", "torch", "numpy")]
    try:
        store.log_model(handle, net, facts.image_size, len(facts.classes), requirements)
    except StageError:
        raise
    except Exception as error:  # torch.export refuses some models, by errors of all kinds
        reason = first_line(error)
        terminal.say(f"note     {facts.model} can't be logged as a model of MLflow ({reason}); its checkpoint is")
    store.log_artifacts(handle, {CHECKPOINT: path})


def publish_evaluation(handle: store.Handle, record: Record, result: Record, folder: Path) -> Record:
    """Log the record `result` of an evaluation that left `folder`. Returns it as it was logged."""
    store.log_metrics(handle, result["metrics"], result["ended"])
    store.log_datasets(handle, result["datasets"])
    _log_pictures(handle, pictures.draw_evaluation, record, folder)
    store.set_tags(handle, result["tags"])
    return result


def publish_sustained(handle: store.Handle, record: Record, result: Record, folder: Path) -> Record:
    """Log the record `result` of sustained steps, and their speeds over time. Returns it with the number of attempts,
    which only the store knows."""
    if "sustained.started" in result["tags"] and "sustained.attempts" not in result["tags"]:
        attempts = _count_attempts(store.run_tags(handle), result["tags"]["sustained.started"])
        result = {**result, "tags": {**result["tags"], "sustained.attempts": str(attempts)}}
    store.log_metrics(handle, result["metrics"], result["ended"])
    series = result["series"]
    if isinstance(series, list):  # the course of one step, in bundles before schema 3
        series = {"sustained/images_per_second": series}
    for key, values in series.items():
        store.log_series(handle, key, values, result["ended"])
    store.set_tags(handle, result["tags"])
    return result


def _count_attempts(tags: Mapping[str, str], started: str) -> int:
    """How often the sustained steps of the run with these tags were measured, with the attempt that `started` now. A
    last attempt that was disturbed does not count."""
    attempts = tags.get("sustained.attempts", "")  # a bundle may bring any text
    counted = int(attempts) if attempts.isdecimal() else int("sustained.started" in tags)
    if tags.get("sustained.started") == started:  # delivered before, at least in part
        return max(counted, 1)
    return counted - ("sustained.taints" in tags) + 1


LATER_STAGES = {"evaluate": publish_evaluation, "sustain": publish_sustained}
"""How the records of the stages after the training are logged."""


def _log_pictures(
    handle: store.Handle, draw: Callable[[Record, Path, Path], None], record: Record, folder: Path
) -> None:
    """Log the pictures that a bundle brought into `folder`; without any, those that `draw` makes."""
    with tempfile.TemporaryDirectory() as scratch:
        drawn = folder / "plots"
        if not drawn.exists():
            drawn = Path(scratch)
            draw(record, folder, drawn)
        store.log_artifacts(handle, {f"plots/{path.name}": path for path in sorted(drawn.glob("*.png"))})


def _describe(handle: store.Handle, record: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    store.set_tags(handle, {"mlflow.note.content": descriptions.describe_run(record, results)})


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


# --- runs


def put_run(
    record: Record,
    folders: Folders,
    target: Mapping[str, Any],
    stored: Mapping[str, Record] | None = None,
    stages: Collection[str] = records.STAGES,
) -> store.Handle | None:
    """Bring a training with all its stages into the store: create its run, or add what the run lacks of `stages`.
    Calling it again after a failure goes on. Returns the run; None if it was deleted in this store.

    `target`: see `pending.target`. `stored`: records of stages that the store has and `folders` lack.
    """
    handle = store.find_run(record["id"], target["experiment"], target["run_id"])
    if handle is not None and store.is_deleted(handle):
        return None
    tags = store.run_tags(handle) if handle else {}
    results = {"train": record, **stage_records(record, folders)}
    digests = {stage: digest(result) for stage, result in results.items()}
    added = [stage for stage in results if stage in stages and tags.get(digest_tag(stage)) != digests[stage]]
    best = folders["train"] / "best.safetensors"
    lacks_model = best.exists() and (handle is None or not store.list_artifacts(handle.run_id, "checkpoints"))
    if handle is not None and not added and not lacks_model:
        update_parent(record, target)  # unless it is finished: an earlier attempt may have failed there
        return handle
    if handle is None or "train" in added:
        handle = start(record, target, handle)
        store.log_epochs(handle, record["epochs"])
    store.set_status(handle, "RUNNING")
    if lacks_model:
        publish_checkpoint(handle, best)
    if "train" in added:
        publish_training(handle, record, folders["train"])
    for stage in added:
        if stage != "train":
            results[stage] = LATER_STAGES[stage](handle, record, results[stage], folders[stage])
    later = dict(stored or {}) | {stage: result for stage, result in results.items() if stage != "train"}
    _describe(handle, record, later)
    store.end_run(handle, "FINISHED", end_time(record, later))
    for stage in added:
        store.log_text(handle, record_file(stage), files.json_text(results[stage]))
    update_parent(record, target, {stage: results[stage] for stage in added})
    # The digests come last, so that a stage of which only a part was added is added again.
    store.set_tags(handle, {digest_tag(stage): digests[stage] for stage in added})
    return handle


def start(record: Record, target: Mapping[str, Any], handle: store.Handle | None = None) -> store.Handle:
    """Create the run of a training, unless it is there as `handle`, and the parent run of a repeat; log what they begin
    with."""
    experiment = {"experiment": target["experiment"]}
    if handle is None:
        parent = None
        if store.REPEATS_TAG in record["tags"]:
            parent, _ = store.find_repeats(record["tags"][store.REPEATS_TAG], target["experiment"], target["run_id"])
            fields = records.parent_fields(record) | experiment
            if parent is None:
                parent = store.start_run(fields, target["run_id"])
            if "workload" not in store.run_tags(parent):  # it is new, or an earlier attempt failed here
                marks = {key: tag for key, tag in target["marks"].items() if key != IMPORTED_RUN_TAG}
                store.describe_start(parent, fields | {"tags": fields["tags"] | marks})
            store.refer_to(target["run_id"], parent)
        handle = store.start_run(dict(record) | experiment, target["run_id"], parent)
    else:
        store.refer_to(target["run_id"], handle)
    store.describe_start(handle, record)
    store.set_tags(handle, target["marks"])
    return handle


# --- runs that are under way, or wait


def deliver(entry: Path, epochs: dict[Path, int], *, complete: bool = True) -> bool:
    """Bring what an entry of pending.py holds into the store, and delete the entry when nothing else comes.

    `epochs` counts the epochs delivered, by entry. Without `complete`, only a training's epochs are delivered, which
    takes little work, unless it disturbs no measurement. Returns whether the store has all that the entry holds by now.
    Raises StageError.
    """
    try:
        lock = files.lock(entry / pending.PUBLISHER)
    except StageError:  # another process delivers it
        return False
    with lock:
        if not (entry / pending.TARGET).exists():  # another process has just delivered and deleted it
            pending.delete(entry)
            return True
        target = pending.read_target(entry)
        if target["store"] != location.public_uri():
            return False
        present = pending.progress(entry)
        if present == pending.delivered(entry):
            return True
        if pending.is_training(entry):
            _deliver_epochs(entry, target, epochs)
        elif complete or pending.may_work_beside(entry):
            record = files.read_json(entry / "train" / "record.json")
            if put_run(record, pending.stage_folders(entry), target) is None:
                terminal.say(f"note     {record['name']} was deleted in this store: nothing is added to it")
        else:
            return False
        if present["owned"] or pending.is_resumable(entry) or pending.is_owned(entry):  # resumed just now
            files.write_json(entry / pending.DELIVERED, present)
            return True
        epochs.pop(entry, None)
        pending.delete(entry)
    pending.delete(entry)  # again: Windows deletes no file that is open, as the lock was
    return True


def _deliver_epochs(entry: Path, target: Mapping[str, Any], epochs: dict[Path, int]) -> None:
    """Bring the journal of a training into the store. If its process ended, the run ends as FAILED or KILLED."""
    record, events = pending.partial_record(entry), pending.journal(entry)
    handle = store.find_run(record["id"], target["experiment"], target["run_id"])
    if handle is not None and store.is_deleted(handle):
        return
    if entry not in epochs or handle is None:
        handle = start(record, target, handle)
        _set_parent_status(record, target, "RUNNING")
        epochs[entry] = 0
    store.log_epochs(handle, record["epochs"][epochs[entry] :])
    epochs[entry] = len(record["epochs"])
    if not pending.is_owned(entry):
        status = events[-1].get("status", "KILLED")
        at = [record["started"], *(epoch["at"] for epoch in record["epochs"]), *(e["at"] for e in events if "at" in e)]
        store.end_run(handle, status, max(at))
        _set_parent_status(record, target, status)


def _set_parent_status(record: Record, target: Mapping[str, Any], status: str) -> None:
    if store.REPEATS_TAG in record["tags"]:
        parent, _ = store.find_repeats(record["tags"][store.REPEATS_TAG], target["experiment"], target["run_id"])
        if parent is not None and not store.is_deleted(parent):
            store.set_status(parent, status)


def deliver_all(epochs: dict[Path, int] | None = None, *, complete: bool = True) -> None:
    """Deliver every entry, as `deliver` does. Raises StageError after the last one if one could not be delivered."""
    epochs = {} if epochs is None else epochs
    error = next((pending.damage(entry / pending.TARGET) for entry in pending.damaged()), None)
    for entry in pending.entries():
        try:
            deliver(entry, epochs, complete=complete)
        except StageError as caught:
            error = caught
        except (LookupError, TypeError, ValueError, AttributeError):  # a file of it holds something else
            error = pending.damage(entry)
        except Exception as caught:  # torch may refuse to export a model: other runs must not wait for it
            reason = first_line(caught)
            message = f"{pending.FOLDER.name}/{entry.name} can't be delivered: {reason}"
            error = StageError(location.hide_secrets(message))
    if error is not None:
        raise error


# --- the parent run of repeats


def update_parent(record: Record, target: Mapping[str, Any], added: Mapping[str, Record] | None = None) -> None:
    """Bring the parent run of a repeat up to date with the repeats in this store, and with the records `added` to this
    one, by stage. Does nothing for a single training, or if the parent run was deleted.

    Once all planned repeats are there it gets their metrics and is finished, and stays so. Without `added` a finished
    one is left alone.
    """
    if store.REPEATS_TAG not in record["tags"]:
        return
    parent, rows = store.find_repeats(record["tags"][store.REPEATS_TAG], target["experiment"], target["run_id"])
    if parent is None or store.is_deleted(parent):
        return
    this, planned = records.repeat_number(record), int(record["tags"]["repeats"])
    whole = [row for number, row in sorted(rows.items()) if number == this or digest_tag("train") in row["tags"]]
    finished = store.is_finished(parent)
    if len(whole) >= planned and (added or not finished):
        _publish_parent(parent, whole, record["id"], added or {})
    elif not finished:
        store.set_tags(parent, {"mlflow.note.content": f"{len(whole)} of {planned} repeats are here"})
        store.set_status(parent, "SCHEDULED")  # nothing may come any more, so it must not be RUNNING


def _publish_parent(
    parent: store.Handle, rows: Sequence[Mapping[str, Any]], record_id: str, added: Mapping[str, Record]
) -> None:
    """Log the summary of the repeats whose runs are `rows`, with the pictures and the settings of the first. `added`:
    records of the training `record_id` that are not marked as whole in the store yet, by stage."""
    with tempfile.TemporaryDirectory() as scratch:
        repeats = [records_in_store(row["run_id"], row["tags"], Path(scratch), {}) for row in rows]
        for row, repeat in zip(rows, repeats, strict=True):
            if row["tags"][store.RECORD_TAG] == record_id:
                repeat.update(added)
        first = rows[0]["run_id"]
        shown = [*store.list_artifacts(first, "plots"), *store.list_artifacts(first, "")]
        names = [name for name in shown if name.endswith(".png") or name == "params.yaml"]
        store.log_artifacts(parent, {name: store.download_artifact(first, name, Path(scratch)) for name in names})
    trainings = [repeat["train"] for repeat in repeats]
    epochs = records.median_epochs(trainings)
    store.log_epochs(parent, epochs)
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
