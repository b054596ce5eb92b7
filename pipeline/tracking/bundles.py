"""Bundles: zip files that carry runs from one MLflow store to another (docs/bundle.md).

A bundle holds `bundle.json` and, for each run, the files that its stages leave for DVC, so that an imported run is put
into a store in the same way as a cached one.
"""

import getpass
import hashlib
import os
import re
import socket
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline import files, terminal
from pipeline.errors import StageError, UsageError
from pipeline.startup import first_line
from pipeline.tracking import bundle_schema, descriptions, location, pending, publisher, records, store
from pipeline.tracking.bundle_schema import refusal

MANIFEST = "bundle.json"
HARDWARE, PARAMS, CHECKPOINT = "train/hardware.json", "train/params.yaml", "train/best.safetensors"
DIRECTORY_BYTES, CHUNK = 2**22, 2**20
"""The most bytes of a zip's own list of files, and the bytes that are unpacked at a time."""

COMMON_NAMES = frozenset({
    "root", "user", "admin", "administrator", "guest", "ubuntu", "debian", "fedora", "centos", "arch", "pi", "ec2-user",
    "runner", "jovyan", "docker", "localhost", "localdomain", "local", "linux", "windows", "macos", "mac", "apple",
    "intel", "amd", "nvidia", "cpu", "gpu", "cuda", "mps", "xpu", "adam", "max", "ranger", "train", "test", "data",
    "model", "default", "auto",
})  # fmt: skip
"""Names of users and hosts that identify nobody, or that records hold as other words."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A checked run. `results`: the records of later stages; `folder`: its files, as a single training leaves them;
    `run_id`: in the store where it was trained; `schema`: of its bundle."""

    record: Record
    results: Mapping[str, Record]
    folder: Path
    run_id: str
    schema: int = bundle_schema.SCHEMA

    @property
    def stages(self) -> dict[str, Record]:
        """All records by stage."""
        return {"train": self.record, **self.results}

    @property
    def title(self) -> str:
        """The run's name and the start of its id."""
        return f"{self.record['name']} ({self.record['id'][:8]})"

    @property
    def end(self) -> int:
        """When its last stage ended, in milliseconds since 1970."""
        return publisher.end_time(self.record, self.results)


# --- export


def export_runs(
    out: Path, *, experiment: str | None = None, with_models: bool = False, with_pictures: bool = True
) -> None:
    """Write all finished runs of the current store, or of one experiment, to the bundle `out`, whole or not at all.

    Raises StageError if there is no run, or if one names this machine, its user or their home folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        runs = _fetch_runs(Path(scratch), experiment, with_models, with_pictures)
        if not runs:
            place = location.shown_uri() + (f', experiment "{experiment}"' if experiment is not None else "")
            raise StageError(f"no finished run to export in {place}: make run")
        private = _private_patterns()
        for run in runs:
            for file, what, text in find_texts(run, private):
                problem = f"{file} holds {what} of this machine ({text})"
                raise StageError(f"{run.title}: {problem}: nothing was exported; delete that run first")
        _write_archive(out, runs)
    for run in runs:
        terminal.say(f"exported {run.title}")
    terminal.say(f"bundle   {out}: {len(runs)} run{'s' * (len(runs) != 1)}, {out.stat().st_size / 2**20:.2f} MiB")


def _write_archive(out: Path, runs: Sequence[Run]) -> None:
    entries = []
    with files.atomic_write(out) as aside, zipfile.ZipFile(aside, "w") as archive:
        for run in runs:
            listing = {}
            for path in sorted(path for path in run.folder.rglob("*") if path.is_file()):
                name, data = path.relative_to(run.folder).as_posix(), path.read_bytes()
                listing[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
                # ZipInfo dates a file 1980: the local time would tell the time zone.
                compression = zipfile.ZIP_STORED if name == CHECKPOINT else zipfile.ZIP_DEFLATED
                archive.writestr(zipfile.ZipInfo(f"runs/{run.record['id']}/{name}"), data, compression)
            times = {"start": run.record["started"], "end": run.end}
            entries.append({"record": run.record["id"], "run_id": run.run_id, **times, "files": listing})
        head = {"format": "trainmark-bundle", "schema": bundle_schema.SCHEMA, "created": records.now()}
        manifest = head | {"runs": entries}
        bundle_schema.validate(bundle_schema.Manifest, manifest, out.name)
        archive.writestr(zipfile.ZipInfo(MANIFEST), files.json_text(manifest), zipfile.ZIP_DEFLATED)


def _fetch_runs(scratch: Path, experiment: str | None, with_models: bool, with_pictures: bool) -> list[Run]:
    """Download every finished training of the store, or of one experiment, and print which are left out."""
    rows = [row for row in store.finished_runs(experiment) if store.RECORD_TAG in row["tags"]]
    # A training may be in several experiments: the run with the most stages is exported, of equal ones the live one.
    rows.sort(key=lambda row: (sum(tag.endswith(".sha256") for tag in row["tags"]), "restored" not in row["tags"]))
    runs = []
    for row in {row["tags"][store.RECORD_TAG]: row for row in rows}.values():
        folder = scratch / row["run_id"]
        _fetch_artifacts(row["run_id"], folder, with_models, with_pictures)
        try:
            run_id = row["tags"].get(publisher.IMPORTED_RUN_TAG, row["run_id"])
            runs.append(load_run(folder, f"{row['name']} ({row['run_id'][:8]})", run_id))
        except UsageError as error:
            terminal.say(f"left out {error}")
    return runs


def _fetch_artifacts(run_id: str, folder: Path, with_models: bool, with_pictures: bool) -> None:
    """Download a run's artifacts to where its stages left them in `folder`."""
    places = {"hardware.json": HARDWARE, "params.yaml": PARAMS}
    places |= {publisher.record_file(stage): f"{stage}/record.json" for stage in bundle_schema.STAGES}
    if with_models:
        places[publisher.CHECKPOINT] = CHECKPOINT
    artifacts = [path for part in ("", "records", "checkpoints") for path in store.list_artifacts(run_id, part)]
    for path in store.list_artifacts(run_id, "plots") if with_pictures else []:
        places[path] = f"{'evaluate' if path.endswith('/confusion_matrix.png') else 'train'}/{path}"
        artifacts.append(path)
    for path in artifacts:
        if re.fullmatch(bundle_schema.FILE_NAME, place := places.get(path, "")):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            store.download_artifact(run_id, path, folder.parent).replace(folder / place)


def find_texts(run: Run, patterns: Mapping[str, re.Pattern[str]]) -> Iterator[tuple[str, str, str]]:
    """Every text of a run that matches a pattern: its file, the pattern's key, and the match with its context."""
    trees: dict[str, Any] = {f"{stage}/record.json": record for stage, record in run.stages.items()}
    trees[PARAMS] = (run.folder / PARAMS).read_text(encoding="utf-8", errors="replace").splitlines()
    for file, tree in trees.items():
        for text in bundle_schema.texts(tree):
            for what, pattern in patterns.items():
                if match := pattern.search(text):
                    context = text[max(0, match.start() - 20) : match.end() + 20]
                    yield file, what, bundle_schema.shorten(ascii(context))


def _private_patterns() -> dict[str, re.Pattern[str]]:
    """What names this machine, its user and their home, by what it is: whole words of three letters or more."""
    host = socket.gethostname()
    names = {"the host name": {host, host.split(".")[0]}, "the user name": set(), "the home folder": set()}
    with suppress(KeyError, OSError, ImportError):  # an account without a name
        names["the user name"].add(getpass.getuser())
    with suppress(RuntimeError):  # or without a home
        names["the home folder"].add(str(Path.home()))
    patterns = {}
    for what, words in names.items():
        telling = [re.escape(word) for word in words if len(word) > 2 and word.lower() not in COMMON_NAMES]
        if telling:
            patterns[what] = re.compile(rf"(?<![^\W_])({'|'.join(telling)})(?![^\W_])", re.IGNORECASE)
    return patterns


# --- reading


def read_bundle(path: Path, folder: Path) -> list[Run]:
    """The runs of the bundle at `path`, unpacked below `folder` and checked. Nothing in a bundle is executed.

    Raises UsageError, one line that begins with the file's name, if the bundle is wrong; StageError if it can't be
    unpacked here.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    try:
        with path.open("rb") as file:
            _check_directory(file, path.name)
            with zipfile.ZipFile(file) as archive:
                return _read_archive(archive, folder, path.name)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        message = first_line(error)
        raise refusal(path.name, f"it is damaged, or no bundle: {message}") from None


def _check_directory(file: BinaryIO, where: str) -> None:
    """Check the size of the zip's list of files before all of it is read. ZIP64 would keep it elsewhere."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 42))
    end = file.read()
    if end[-22:-18] != b"PK\x05\x06" or end[-2:] != b"\0\0":
        raise refusal(where, "it is truncated, or no bundle")
    if end[:4] == b"PK\x06\x07" or int.from_bytes(end[-10:-6], "little") > DIRECTORY_BYTES:
        raise refusal(where, "it holds more files than a bundle may")


def _read_archive(archive: zipfile.ZipFile, folder: Path, where: str) -> list[Run]:
    manifest = _read_manifest(archive, folder / MANIFEST, f"{where}: {MANIFEST}")
    names = sorted(info.orig_filename for info in archive.infolist())
    listed = {MANIFEST} | {f"runs/{entry.record}/{name}" for entry in manifest.runs for name in entry.files}
    if names != sorted(listed):
        odd = min(listed ^ set(names), default="a name twice")
        raise refusal(where, f"{MANIFEST} does not list what the zip holds: {bundle_schema.shorten(ascii(odd))}")
    runs = []
    for entry in manifest.runs:
        place = f"runs/{entry.record}"
        for name, file in entry.files.items():
            digest = _unpack(archive, f"{place}/{name}", folder / place / name, file.bytes, where)
            if digest != file.sha256:
                raise refusal(where, f"{place}/{name}: it was altered: {MANIFEST} lists another SHA-256")
        run = load_run(folder / place, f"{where}: {place}", entry.run_id, manifest.version)
        if (run.record["id"], run.record["started"], run.end) != (entry.record, entry.start, entry.end):
            raise refusal(where, f"{place}: {MANIFEST} lists another record, start or end")
        runs.append(run)
    return runs


def _read_manifest(archive: zipfile.ZipFile, path: Path, where: str) -> bundle_schema.Manifest:
    """The manifest. A newer schema is refused before anything else is checked."""
    if MANIFEST not in archive.namelist():
        raise refusal(where, "it is missing: this is no bundle of Trainmark")
    _unpack(archive, MANIFEST, path, bundle_schema.JSON_BYTES, where)
    tree = bundle_schema.parse(path.read_bytes(), where)
    version = tree.get("schema") if isinstance(tree, dict) else None
    if isinstance(version, int) and version > bundle_schema.SCHEMA:
        raise refusal(where, f"schema: {version} is of a newer Trainmark: update this one")
    return bundle_schema.validate(bundle_schema.Manifest, tree, where)


def _unpack(archive: zipfile.ZipFile, name: str, target: Path, limit: int, where: str) -> str:
    """Write a file of the zip to `target` and return its SHA-256. Refuses links, packings that unpack more than they
    are asked for, and more than `limit` bytes, whatever the zip says of its size."""
    info = archive.getinfo(name)
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise refusal(where, f"{name}: it is no plain file")
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise refusal(where, f"{name}: it is encrypted, or packed in a way that bundles are not")
    digest = hashlib.sha256()
    with archive.open(info) as source:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as copy:
                while chunk := source.read(CHUNK):
                    limit -= len(chunk)
                    if limit < 0:
                        raise refusal(where, f"{name}: it has more bytes than it may have")
                    digest.update(chunk)
                    copy.write(chunk)
        except OSError as error:
            raise files.write_error(target, error) from error
    return digest.hexdigest()


def load_run(folder: Path, where: str, run_id: str, schema: int = bundle_schema.SCHEMA) -> Run:
    """The run whose files are in `folder`. Raises UsageError if they are not as its stages leave them."""
    stages = {}
    for stage, model in bundle_schema.STAGES.items():
        path, place = folder / stage / "record.json", f"{where}: {stage}/record.json"
        if path.exists():
            stages[stage] = bundle_schema.parse(path.read_bytes(), place)
            bundle_schema.validate(model, stages[stage], place)
    for name in ("train/record.json", HARDWARE, PARAMS):
        if not (folder / name).exists():
            raise refusal(where, f"{name} is missing")
    record = stages.pop("train")
    run = Run(record, stages, folder, run_id, schema)
    if any(result["id"] != record["id"] for result in stages.values()):
        raise refusal(where, "a stage is of another training")
    if any(stage["ended"] < record["started"] for stage in run.stages.values()):
        raise refusal(where, "a stage ended before the training started")
    if bundle_schema.parse((folder / HARDWARE).read_bytes(), f"{where}: {HARDWARE}") != record["hardware"]:
        raise refusal(where, f"{HARDWARE} is not the record's hardware")
    for picture in folder.glob("*/plots/*.png"):
        with picture.open("rb") as file:
            if file.read(8) != b"\x89PNG\r\n\x1a\n":
                raise refusal(where, f"{picture.name} is no PNG picture")
    try:
        if len(descriptions.describe_run(record, stages)) > descriptions.MAX_LENGTH:
            raise refusal(where, f"its description has more than {descriptions.MAX_LENGTH:,} characters")
    except KeyError as error:
        raise refusal(where, f"{error} is missing") from None
    if (folder / CHECKPOINT).exists():
        _check_checkpoint(folder / CHECKPOINT, record, where)
    return run


def _check_checkpoint(path: Path, record: Record, where: str) -> None:
    from pipeline.models import checkpoints  # torch takes seconds to import, and most bundles hold no model

    try:
        _, facts = checkpoints.load(path)
    except (StageError, ValueError, TypeError, RuntimeError) as error:
        raise refusal(where, str(error).splitlines()[0]) from None
    stated = {"record": record["id"], **{key: record["facts"][key] for key in ("model", "classes", "image_size")}}
    if stated != {key: getattr(facts, key) for key in stated} | {"classes": list(facts.classes)}:
        raise refusal(where, f"{path.name} is the checkpoint of another training")


# --- import


def import_runs(paths: Sequence[Path]) -> None:
    """Put the runs of bundles into the current store: those that it lacks, and stages that it lacks or has from an
    earlier time. A folder means the zips in it.

    Everything is checked before anything is written. An import that fails half-way is completed by the same command: a
    run that is not whole is not FINISHED, so nothing compares or exports it. Raises UsageError for a bundle that is
    wrong, or that holds a run which the store has with another content.
    """
    if os.environ.get("MLFLOW_RUN_ID"):
        raise UsageError("MLFLOW_RUN_ID is set: runs can't be imported into another run; unset it")
    with tempfile.TemporaryDirectory() as scratch:
        named_runs = [
            (path.name, run)
            for number, path in enumerate(_list_bundles(paths))
            for run in read_bundle(path, Path(scratch) / str(number))
        ]
        _check_conflicts(named_runs, Path(scratch))
        for run in sorted((run for _, run in named_runs), key=lambda run: records.repeat_number(run.record)):
            _put_run(run, Path(scratch))


def _list_bundles(paths: Sequence[Path]) -> list[Path]:
    bundles: list[Path] = []
    for path in paths:
        if path.is_dir() and not any(path.glob("*.zip")):
            raise UsageError(f"{path}: there is no .zip file in this folder")
        bundles += sorted(path.glob("*.zip")) if path.is_dir() else [path]
    return bundles


def _check_conflicts(named_runs: Sequence[tuple[str, Run]], scratch: Path) -> None:
    """Refuse runs that differ from what the store holds, or from each other."""
    known: dict[str, dict[str, Record]] = {}
    siblings: dict[str, dict[str, Mapping[str, str]]] = {}
    for file, run in named_runs:
        where, record = f"{file}: {run.title}", run.record
        if record["id"] not in known:
            known[record["id"]] = _stored_records(run, scratch)
        for stage in _new_stages(run, known[record["id"]], where):
            known[record["id"]][stage] = run.stages[stage]
        _check_repeat(run, siblings, where)


def _check_repeat(run: Run, siblings: dict[str, dict[str, Mapping[str, str]]], where: str) -> None:
    """Refuse a repeat whose number is taken or whose set is planned differently. `siblings`: by set and record, the
    tags of the repeats in the store and in the bundles so far, to which `run` is added."""
    tags = run.record["tags"]
    if store.REPEATS_TAG not in tags:
        return
    repeats_id = tags[store.REPEATS_TAG]
    if repeats_id not in siblings:
        _, rows = store.find_repeats(repeats_id, run.record["experiment"])
        siblings[repeats_id] = {row["tags"][store.RECORD_TAG]: row["tags"] for row in rows.values()}
    for record_id, other in siblings[repeats_id].items():
        if record_id != run.record["id"] and other["repeat"] == tags["repeat"]:
            raise refusal(where, f"repeat: {tags['repeat']} is another run already ({record_id[:8]})")
        if other["repeats"] != tags["repeats"]:
            raise refusal(where, f"repeats: {tags['repeats']}, but another run of the set says {other['repeats']}")
    siblings[repeats_id][run.record["id"]] = tags


def _stored_records(run: Run, scratch: Path) -> dict[str, Record]:
    """The records that the store holds of the run, by stage; none if the run is missing or deleted."""
    handle = store.find_run(run.record["id"], run.record["experiment"])
    if handle is None or store.is_deleted(handle):
        return {}
    return publisher.records_in_store(handle.run_id, store.run_tags(handle), scratch, run.stages)


def _new_stages(run: Run, known: Mapping[str, Record], where: str) -> list[str]:
    """The stages of `run` that `known` lacks or has from an earlier time."""
    stages = []
    for stage, record in run.stages.items():
        other = known.get(stage)
        if other is None or (other["ended"] < record["ended"] and stage != "train"):
            stages.append(stage)
        elif other != record and (stage == "train" or other["ended"] == record["ended"]):
            raise refusal(where, f"its {stage} record differs from that of the same run which is there")
    return stages


def _put_run(run: Run, scratch: Path) -> None:
    """Add a run to the store, or what the store lacks of it."""
    record, folders = run.record, records.stage_folders(run.folder)
    stored = _stored_records(run, scratch)
    marks = {"imported": f"from a bundle of schema {run.schema}", publisher.IMPORTED_RUN_TAG: run.run_id}
    target = pending.target(record["experiment"], {} if "train" in stored else marks)
    stages = _new_stages(run, stored, run.title)
    if publisher.put_run(record, folders, target, stored, stages) is None:
        terminal.say(f"left out {run.title}: it was deleted in this store")
    elif "train" in stages:
        terminal.say(f"imported {run.title} into {record['experiment']}")
    elif stages:
        terminal.say(f"added    {', '.join(stages)} to {run.title}")
    else:
        terminal.say(f"there    {run.title} is in this store already")
