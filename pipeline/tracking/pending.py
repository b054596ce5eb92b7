"""The folder of runs that are under way, or that wait until the MLflow store has them. Needs no MLflow.

Each entry is a folder: `target.json` says where in which store the run belongs. A training under way has
`journal.jsonl`, to which it appends a line for each event, and `state/`, from which it can be resumed (see
training/state.py). A stage that ended has its files in `<stage>/`, its record among them. Nothing in `<stage>/` is
partial: the folder gets its name when it is complete.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pipeline import config, files
from pipeline.errors import StageError
from pipeline.tracking import location, records

FOLDER = config.PROJECT / "pending"
"""The folder of all entries."""

JOURNAL, TARGET, OWNER, PUBLISHER, DELIVERED = "journal.jsonl", "target.json", ".owner", ".publisher", "delivered.json"
"""Files of an entry. The process of a training locks OWNER while it lives; a process that delivers locks PUBLISHER.
DELIVERED says what the store has already."""

STAGE_FILES = (
    "record.json", "metrics.json", "best.safetensors", "hardware.json", "params.yaml", "samples.npy",
    "predictions.csv", "plots",
)  # fmt: skip
"""What a stage leaves that MLflow shows."""

Record = Mapping[str, Any]


# --- where a run belongs


def target(experiment: str, marks: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Where a run of this process belongs: the store, its experiment, the run that `mlflow run` created, if any, and
    tags that the run gets besides its own."""
    given = os.environ.get("MLFLOW_RUN_ID") or None
    return {"store": location.public_uri(), "experiment": experiment, "run_id": given, "marks": dict(marks or {})}


# --- writing


def open_training(record: Record, identity: Mapping[str, Any]) -> tuple[Path, IO[str]]:
    """Create the entry of a training that starts. `identity`: all that must be the same when it is resumed.

    Returns the entry and a file that stays locked until it is closed or the process ends.
    """
    entry = _new_entry(record["id"], "train")
    owner = own(entry)
    append(entry, {"event": "start", "record": record})
    # Last: from now on it is an entry, and without an owner it would be that of a training that was killed.
    write_target(entry, record["experiment"], identity)
    return entry, owner


def write_target(entry: Path, experiment: str, identity: Mapping[str, Any]) -> None:
    """Write where the run of a training belongs now, and what must be the same when the training is resumed."""
    files.write_json(entry / TARGET, target(experiment) | {"identity": dict(identity)})


def own(entry: Path) -> IO[str]:
    """Lock the entry for the process of its training. A process that looks at it, or was just killed, may have locked
    it for a moment."""
    return files.lock(entry / OWNER, patience_seconds=2.0)


def append(entry: Path, event: Mapping[str, Any]) -> None:
    """Append an event to the journal, and wait until it is on the disk. A partial line of a crash is cut off first."""
    line = json.dumps(event, allow_nan=False).encode() + b"\n"
    path = entry / JOURNAL
    try:
        with path.open("ab") as journal:
            size = _whole_size(path)
            if journal.tell() != size:
                journal.truncate(size)
                journal.seek(size)
            journal.write(line)
            journal.flush()
            os.fsync(journal.fileno())
    except OSError as error:
        raise files.write_error(path, error) from error


def submit(record: Record, folders: Mapping[str, Path], experiment: str) -> None:
    """Leave what the stages of a training have in `folders` for the store, as a new entry. The training is complete, so
    nothing must resume it any more."""
    entry = _new_entry(record["id"], "stages")
    temporary = entry.with_name(f".{entry.name}")
    _create(temporary)
    files.write_json(temporary / TARGET, target(experiment))
    link_stages(folders, temporary)
    temporary.replace(entry)
    for other in entries():
        if is_resumable(other) and partial_record(other)["id"] == record["id"]:
            delete(other)


def delete(entry: Path) -> None:
    """Delete an entry. Its target goes first: what a crash leaves of the rest is no entry."""
    with suppress(OSError):
        (entry / TARGET).unlink()
    shutil.rmtree(entry, ignore_errors=True)


def link_stages(folders: Mapping[str, Path], entry: Path) -> None:
    """Give `entry` the files of the stages that have a record. Each stage appears whole or not at all."""
    for stage, folder in folders.items():
        if not (folder / "record.json").exists():
            continue
        temporary = entry / f".{stage}"
        shutil.rmtree(temporary, ignore_errors=True)
        _create(temporary)
        for name in STAGE_FILES:
            if (folder / name).is_dir():
                shutil.copytree(folder / name, temporary / name, copy_function=files.link)
            elif (folder / name).exists():
                files.link(folder / name, temporary / name)
        temporary.replace(entry / stage)


def _new_entry(record_id: str, kind: str) -> Path:
    """The path of a new entry. Names sort by time."""
    return FOLDER / f"{time.time_ns()}-{record_id[:8]}-{kind}"


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.write_error(folder, error) from error


# --- reading


def entries() -> list[Path]:
    """All entries whose target can be read, oldest first."""
    return [entry for entry in _folders() if _has_target(entry)]


def damaged() -> list[Path]:
    """The entries whose target can't be read. They are left as they are."""
    return [entry for entry in _folders() if not _has_target(entry) and (entry / TARGET).exists()]


def _folders() -> list[Path]:
    return sorted(path.parent for path in FOLDER.glob(f"[0-9]*/{TARGET}"))


def _has_target(entry: Path) -> bool:
    try:
        value = files.read_json(entry / TARGET)
    except StageError:
        return False
    kinds = {"store": str, "experiment": str, "run_id": str | None, "marks": dict}
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items())


def read_target(entry: Path) -> dict[str, Any]:
    """Where the entry's run belongs. Raises StageError if the file is missing."""
    value: dict[str, Any] = files.read_json(entry / TARGET)
    return value


def journal(entry: Path) -> list[dict[str, Any]]:
    """The journal's events. A partial last line, which a crash leaves, does not count."""
    try:
        text = (entry / JOURNAL).read_bytes()
    except OSError:
        return []
    lines = text[: text.rfind(b"\n") + 1].decode(errors="replace").splitlines()
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            break
        events.append(event)
    return events


def partial_record(entry: Path) -> dict[str, Any]:
    """The record of a training under way: its beginning, the epochs so far, each once, and the tags of resuming. Raises
    StageError if the journal is damaged."""
    events = journal(entry)
    epochs: dict[int, Any] = {}
    try:
        record: dict[str, Any] = events[0]["record"]
        _ = record["id"], record["params"], record["tags"]["backend"]  # they are read elsewhere
        for event in events:
            if event["event"] == "epoch":
                epochs[event["epoch"]["figures"]["epoch"]] = event["epoch"]
            elif event["event"] == "resume":
                record["tags"] |= event["tags"]
        return record | {"epochs": [epochs[number] for number in sorted(epochs)]}
    except (LookupError, TypeError) as error:
        raise damage(entry / JOURNAL) from error


def damage(path: Path) -> StageError:
    """The error to raise if an entry, or a file in it, holds something else than what was written."""
    return StageError(f"{path} is damaged: delete {FOLDER.name}/{path.relative_to(FOLDER).parts[0]}")


def is_owned(entry: Path) -> bool:
    """Whether the process of the entry's training lives."""
    return files.is_locked(entry / OWNER)


def may_work_beside(entry: Path) -> bool:
    """Whether other processes may work while an entry's process measures: its device shares neither memory nor cores
    with them."""
    record = entry / "train" / "record.json"
    tags = files.read_json(record)["tags"] if record.exists() else partial_record(entry)["tags"]
    return tags["backend"] not in ("cpu", "mps")


def is_training(entry: Path) -> bool:
    """Whether the entry is of a training that has not ended well."""
    return (entry / JOURNAL).exists() and not (entry / "train" / "record.json").exists()


def is_resumable(entry: Path) -> bool:
    """Whether the same command goes on with the training of an entry: it was interrupted, before its first epoch or
    with a state, and no process goes on with it."""
    if not is_training(entry) or is_owned(entry) or any(event.get("final") for event in journal(entry)):
        return False
    try:
        begun = partial_record(entry)["epochs"]
    except StageError:
        return False
    return not begun or any((entry / "state").glob("*.pt"))


def is_busy(entry: Path) -> bool:
    """Whether another process works at an entry: it trains, or brings the entry into the store."""
    return is_owned(entry) or files.is_locked(entry / PUBLISHER)


def waiting() -> list[Path]:
    """The entries that hold something the store has not got."""
    return [entry for entry in entries() if progress(entry) != delivered(entry)]


def progress(entry: Path) -> dict[str, Any]:
    """What an entry holds by now, to be compared with what was delivered of it."""
    events = journal(entry)
    stages = sorted(path.parent.name for path in entry.glob("[!.]*/record.json"))
    return {"events": len(events), "stages": stages, "owned": is_owned(entry)}


def delivered(entry: Path) -> dict[str, Any] | None:
    """What `progress` was when the store last had all of the entry; None if it never had."""
    try:
        value: dict[str, Any] = json.loads((entry / DELIVERED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value


def unfinished(identity: Mapping[str, Any]) -> Iterator[Path]:
    """The entries of interrupted trainings that can be resumed and agree with all of `identity`, newest first."""
    for entry in reversed(entries()):
        if is_resumable(entry) and identity.items() <= (read_target(entry).get("identity") or {}).items():
            yield entry


def stage_folders(entry: Path) -> dict[str, Path]:
    """The folder of each stage in an entry, by stage."""
    return {stage: entry / stage for stage in records.STAGES}


def _whole_size(path: Path) -> int:
    """The bytes of the journal's whole lines."""
    return path.read_bytes().rfind(b"\n") + 1
