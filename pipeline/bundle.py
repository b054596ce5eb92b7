"""One small file that carries runs from one MLflow store to another: `export [--out FILE]`, `import FILE...`.

A bundle is a zip of `bundle.json` and, for each run, of the files that `train`, `evaluate` and `sustain` leave for
DVC, so that an imported run is put into the store as a cached one is: see docs/bundle.md.
"""

import getpass
import hashlib
import os
import platform
import re
import shutil
import socket
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline import cli, config, files, terminal
from pipeline.errors import StageError, UsageError
from pipeline.tracking import bundle_schema, publisher, records, store

FORMAT, SCHEMA = "trainmark-bundle", 3
"""What `bundle.json` says it is. SCHEMA is raised when a bundle, or a record in it, changes its structure."""

OUT = config.ROOT / "reports" / "bundle.zip"
"""Where a bundle goes that is given no name."""

MANIFEST = "bundle.json"
CHECKPOINT = "train/best.safetensors"
REQUIRED = RECORD, HARDWARE, PARAMS = "train/record.json", "train/hardware.json", "train/params.yaml"
EVALUATED = frozenset({"confusion_matrix.png"})
"""The pictures that `evaluate` draws; all others are of `train`."""

MIB = 2**20
LIMITS = {
    r"(train|evaluate|sustain)/record\.json": 8 * MIB,
    re.escape(HARDWARE): MIB,
    re.escape(PARAMS): MIB // 4,
    # not what Windows takes for a device; in small letters, so that no two names are one on any system
    r"(train|evaluate)/plots/(?!(con|prn|aux|nul|com\d|lpt\d)\.)[a-z0-9_]{1,50}\.png": 4 * MIB,
    re.escape(CHECKPOINT): 1024 * MIB,
}
"""The files that a run may have, and the most bytes of each."""

MANIFEST_BYTES, DIRECTORY_BYTES, TOTAL_BYTES = 4 * MIB, 4 * MIB, 2048 * MIB
"""The most bytes of bundle.json, of the zip's own list of files, and of all files unpacked."""

RUNS = 1000
PNG = b"\x89PNG\r\n\x1a\n"
CHUNK = MIB

COMMON = frozenset({
    "root", "user", "admin", "administrator", "guest", "ubuntu", "debian", "fedora", "centos", "arch", "pi", "ec2-user",
    "runner", "jovyan", "docker", "localhost", "localdomain", "local", "linux", "windows", "macos", "mac", "apple",
    "intel", "amd", "nvidia", "cpu", "gpu", "cuda", "mps", "xpu", "adam", "max", "ranger", "train", "test", "data",
    "model", "default", "auto",
})  # fmt: skip
"""Names of users and hosts that tell nothing of anybody, or that stand in records for another reason."""


@dataclass(frozen=True)
class Run:
    """A run that was found right, its files in `folder` as a single training leaves them, whichever repeat it is."""

    record: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Any]]
    """The records of later stages, by stage."""
    run_id: str
    """Of the run in the store where it was trained."""
    folder: Path
    schema: int
    """Of the bundle that it is from."""

    @property
    def stages(self) -> dict[str, Mapping[str, Any]]:
        """All its records, by stage."""
        return {"train": self.record, **self.results}

    @property
    def folders(self) -> publisher.Folders:
        """Where its files are, by stage."""
        return records.stage_folders(self.folder)

    @property
    def shown(self) -> str:
        """The run as it is named in a line."""
        return f"{self.record['name']} ({self.record['id'][:8]})"

    @property
    def checkpoint(self) -> Path | None:
        """Its checkpoint, where it has one."""
        return self.folder / CHECKPOINT if (self.folder / CHECKPOINT).exists() else None


# --- export


def export(out: Path, with_models: bool = False, experiment: str | None = None, *, pictures: bool = True) -> None:
    """Writes all finished runs of the current store, or of one experiment in it, to the bundle `out`, whole or not at
    all; with their pictures or without.

    Raises StageError where there is none, or where one names this machine, its user or their home folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        found = _fetched(Path(scratch), with_models, experiment, pictures=pictures)
        if not found:
            place = store.shown_uri() + (f', experiment "{experiment}"' if experiment is not None else "")
            raise StageError(f"no finished run to export in {place}: make run")
        private = _private()
        for run in found:
            _refuse_private(run, private)
        manifest = _manifest(found)
        _vet_manifest(manifest, out.name)
        with files.written_aside(out) as aside, zipfile.ZipFile(aside, "w") as archive:
            archive.writestr(zipfile.ZipInfo(MANIFEST), files.json_text(manifest), zipfile.ZIP_DEFLATED)
            for run, entry in zip(found, manifest["runs"], strict=True):
                for name in entry["files"]:
                    info = zipfile.ZipInfo(f"runs/{entry['record']}/{name}")
                    info.compress_type = zipfile.ZIP_STORED if name == CHECKPOINT else zipfile.ZIP_DEFLATED
                    with (run.folder / name).open("rb") as source, archive.open(info, "w") as target:
                        shutil.copyfileobj(source, target, CHUNK)
    for run in found:
        terminal.say(f"exported {run.shown}")
    terminal.say(f"bundle   {out}: {len(found)} run{'s' * (len(found) != 1)}, {out.stat().st_size / MIB:.2f} MiB")


def _fetched(scratch: Path, with_models: bool, experiment: str | None, *, pictures: bool) -> list[Run]:
    """Every finished run of the store, or of one experiment in it, with what it was made from, the newest first; says
    which are left out."""
    trainings: dict[str, dict[str, Any]] = {}
    for row in store.finished_runs(experiment):
        tags = row["tags"]
        if publisher.digest_tag("train") not in tags or store.RECORD_TAG not in tags:
            terminal.say(f"left out {row['name']} ({row['run_id'][:8]}): it does not hold what it was made from")
            continue
        # A training may stand in several experiments: the run that later stages added most to, else the live one.
        known = trainings.setdefault(tags[store.RECORD_TAG], row)
        if _fullness(tags) > _fullness(known["tags"]):
            trainings[tags[store.RECORD_TAG]] = row
    found = []
    for index, row in enumerate(trainings.values()):
        folder = scratch / str(index)
        _fetch(row, folder, scratch, with_models, pictures=pictures)
        try:
            record, results = vetted(folder, f"{row['name']} ({row['run_id'][:8]})")
        except UsageError as error:
            terminal.say(f"left out {error}")
            continue
        found.append(Run(record, results, row["tags"].get(publisher.IMPORTED_RUN_TAG, row["run_id"]), folder, SCHEMA))
    return found


def _fullness(tags: Mapping[str, str]) -> tuple[int, bool]:
    return sum(publisher.digest_tag(stage) in tags for stage in publisher.LATER_STAGES), "restored" not in tags


def _fetch(row: Mapping[str, Any], folder: Path, scratch: Path, with_models: bool, *, pictures: bool) -> None:
    """Puts a run's artifacts into `folder`, as the stages left them."""
    run_id, tags = row["run_id"], row["tags"]
    wanted = {"hardware.json": HARDWARE, "params.yaml": PARAMS}
    for stage in bundle_schema.STAGES:
        if publisher.digest_tag(stage) in tags:
            wanted[publisher.record_file(stage)] = f"{stage}/record.json"
    if with_models:
        wanted[publisher.CHECKPOINT] = CHECKPOINT
    parts = ["", "records", "checkpoints"] + ["plots"] * pictures
    there = [path for part in parts for path in store.list_artifacts(run_id, part)]
    for path in there:
        part, _, name = path.rpartition("/")
        if part == "plots" and _limit(drawn := f"{'evaluate' if name in EVALUATED else 'train'}/plots/{name}"):
            wanted[path] = drawn
    for path in wanted.keys() & set(there):
        (folder / wanted[path]).parent.mkdir(parents=True, exist_ok=True)
        store.download_artifact(run_id, path, scratch).replace(folder / wanted[path])


def _limit(name: str) -> int:
    """The most bytes that a file of a run may have; 0 for a name that it does not have."""
    return next((most for pattern, most in LIMITS.items() if re.fullmatch(pattern, name)), 0)


def _manifest(found: Sequence[Run]) -> dict[str, Any]:
    runs = []
    for run in found:
        paths = sorted(path for path in run.folder.rglob("*") if path.is_file())
        runs.append(
            {
                "record": run.record["id"],
                "run_id": run.run_id,
                "start": run.record["started"],
                "end": publisher.end_time(run.record, run.results),
                "files": {
                    path.relative_to(run.folder).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size}
                    for path in paths
                },
            }
        )
    return {"format": FORMAT, "schema": SCHEMA, "created": store.now(), "runs": runs}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_private(run: Run, private: Mapping[str, re.Pattern[str]]) -> None:
    for file, what, around in matches(run, private):
        raise StageError(
            f"{run.shown}: {file} holds {what} of this machine ({around}): nothing was exported; delete that run first"
        )


def matches(run: Run, patterns: Mapping[str, re.Pattern[str]]) -> Iterator[tuple[str, str, str]]:
    """Where texts of a run match one of `patterns`: the file, the pattern's key, and the match with what is around."""
    for path in sorted([*run.folder.rglob("*.json"), *run.folder.rglob("*.yaml")]):
        file = path.relative_to(run.folder).as_posix()
        data = path.read_bytes()
        for text in _texts(bundle_schema.parse(data, file)) if path.suffix == ".json" else data.decode().splitlines():
            for what, pattern in patterns.items():
                if found := pattern.search(text):
                    yield file, what, bundle_schema.shown(text[max(0, found.start() - 20) : found.end() + 20])


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _private() -> dict[str, re.Pattern[str]]:
    """What may not leave this machine, by what it is: as whole words, whatever their case, of three letters or more."""
    hosts = {name for host in (socket.gethostname(), platform.node()) for name in (host, host.split(".")[0])}
    users, homes = set(), set()
    with suppress(KeyError, OSError, ImportError):  # an account without a name
        users.add(getpass.getuser())
    with suppress(RuntimeError):  # nor a home
        homes.add(str(Path.home()))
    words = {"the host name": hosts, "the user name": users, "the home folder": homes}
    patterns = {}
    for what, names in words.items():
        telling = [re.escape(name) for name in sorted(names) if len(name) > 2 and name.lower() not in COMMON]
        if telling:
            patterns[what] = re.compile(rf"(?<![^\W_])({'|'.join(telling)})(?![^\W_])", re.IGNORECASE)
    return patterns


# --- reading


def read(path: Path, folder: Path) -> list[Run]:
    """The runs of the bundle at `path`, unpacked below `folder`, each checked to the last figure.

    Raises UsageError, one line that begins with the file's name, for all that is wrong with the bundle; StageError
    where it can't be unpacked here.
    """
    where = path.name
    try:
        if not path.is_file():
            raise UsageError(f"{path}: there is no such file")
        with path.open("rb") as file:
            _check_end(file, where)
            with zipfile.ZipFile(file) as archive:
                return _read(archive, folder, where)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, RuntimeError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        reason = ((said or "").strip() or type(error).__name__).splitlines()[0]
        raise bundle_schema.refusal(where, f"it is damaged, or no bundle: {reason}") from None


def _check_end(file: BinaryIO, where: str) -> None:
    """Looks at the end of the zip, before all of its list of files is read. ZIP64 would put that elsewhere."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 42))
    end = file.read()
    if end[-22:-18] != b"PK\x05\x06" or end[-2:] != b"\0\0":
        raise bundle_schema.refusal(where, "it is truncated, or no bundle")
    if end[:4] == b"PK\x06\x07" or int.from_bytes(end[-10:-6], "little") > DIRECTORY_BYTES:
        raise bundle_schema.refusal(where, "it holds more files than a bundle may")


def _read(archive: zipfile.ZipFile, folder: Path, where: str) -> list[Run]:
    manifest = _read_manifest(archive, where)
    entries = _entries(archive, where)
    listed = {
        f"runs/{run['record']}/{name}": (run["record"], name, facts)
        for run in manifest["runs"]
        for name, facts in run["files"].items()
    }
    for name in [*entries, *listed]:
        if (name in entries) != (name in listed):
            lacks = MANIFEST if name in entries else "the zip"
            raise bundle_schema.refusal(where, f"{name}: it is missing from {lacks}")
    for entry, (record_id, name, facts) in listed.items():
        target = folder / record_id / name
        digest = hashlib.sha256()
        written = 0
        for chunk in _chunks(archive, entries[entry], facts["bytes"], f"{where}: {entry}"):
            digest.update(chunk)
            written += len(chunk)
            _append(target, chunk)
        if written != facts["bytes"] or digest.hexdigest() != facts["sha256"]:
            raise bundle_schema.refusal(where, f"{entry}: it was altered: its digest is not the one in {MANIFEST}")
    runs = []
    for listing in manifest["runs"]:
        own = folder / listing["record"]
        within = f"{where}: runs/{listing['record']}"
        record, results = vetted(own, within)
        said = {"record": record["id"], "start": record["started"], "end": publisher.end_time(record, results)}
        for key, value in said.items():
            if listing[key] != value:
                raise bundle_schema.refusal(within, f"{key}: {MANIFEST} says {listing[key]}, the record {value}")
        runs.append(Run(record, results, listing["run_id"], own, manifest["schema"]))
    return runs


def _read_manifest(archive: zipfile.ZipFile, where: str) -> dict[str, Any]:
    """Before any other file is looked at: a newer schema may have others."""
    info = next((info for info in archive.infolist() if info.orig_filename == MANIFEST), None)
    if info is None:
        raise bundle_schema.refusal(where, f"it is no bundle of Trainmark: {MANIFEST} is missing")
    place = f"{where}: {MANIFEST}"
    _vet_entry(info, place)
    manifest: dict[str, Any] = bundle_schema.parse(b"".join(_chunks(archive, info, MANIFEST_BYTES, place)), place)
    _vet_manifest(manifest, place)
    return manifest


def _entries(archive: zipfile.ZipFile, where: str) -> dict[str, zipfile.ZipInfo]:
    """The files of runs in the zip, by name: no others, and each once."""
    found: dict[str, zipfile.ZipInfo] = {}
    ours = rf"{re.escape(MANIFEST)}|runs/{bundle_schema.RECORD_ID}/({'|'.join(LIMITS)})"
    for info in archive.infolist():
        name = info.orig_filename
        if not re.fullmatch(ours, name) or name != info.filename:
            raise bundle_schema.refusal(where, f"{bundle_schema.shown(name)} is no name of a file in a bundle")
        if name in found:
            raise bundle_schema.refusal(where, f"{name}: it is there twice")
        _vet_entry(info, f"{where}: {name}")
        found[name] = info
    del found[MANIFEST]
    return found


def _vet_entry(info: zipfile.ZipInfo, where: str) -> None:
    """Refuses what is no plain file, or packed in another way than stored and deflated: of those alone does `zipfile`
    unpack no more than it is asked for."""
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise bundle_schema.refusal(where, "it is no plain file")
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise bundle_schema.refusal(where, "it is encrypted, or packed in a way that bundles are not")


def _chunks(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int, where: str) -> Iterator[bytes]:
    """What a file holds, at most `most` bytes of it, whatever the zip says of its size."""
    left = most
    with archive.open(info) as source:
        while chunk := source.read(CHUNK):
            left -= len(chunk)
            if left < 0:
                raise bundle_schema.refusal(where, f"it has more than the {most:,} bytes that it may have")
            yield chunk


def _append(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(data)
    except OSError as error:
        raise files.cannot_write(path, error) from error


def _vet_manifest(value: Any, where: str) -> None:
    """Refuses (UsageError) what is no manifest of this schema, lists what no run has, or too much."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise bundle_schema.refusal(where, f'it is no bundle of Trainmark: its format is not "{FORMAT}"')
    schema = bundle_schema.whole(value.get("schema"), f"{where}: schema", 1)
    if schema > SCHEMA:
        raise bundle_schema.refusal(
            where, f"it was made by a newer Trainmark (schema {schema}; this one reads up to {SCHEMA}): update this one"
        )
    # What older schemas have is allowed still (see docs/bundle.md). Where a schema changes what there was before,
    # `_read` unpacks the older one's files and turns them into the newer one's before they are looked at.
    bundle_schema.members(value, where, ("format", "schema", "created", "runs"))
    bundle_schema.moment(value["created"], f"{where}: created")
    seen: set[str] = set()
    total = 0
    for place, run in bundle_schema.items(value["runs"], f"{where}: runs", RUNS, 1):
        bundle_schema.members(run, place, ("record", "run_id", "start", "end", "files"))
        bundle_schema.matching(run["record"], f"{place}: record", bundle_schema.RECORD_ID)
        bundle_schema.matching(run["run_id"], f"{place}: run_id", bundle_schema.RUN_ID)
        bundle_schema.moment(run["end"], f"{place}: end", bundle_schema.moment(run["start"], f"{place}: start"))
        if run["record"] in seen:
            raise bundle_schema.refusal(place, f"{run['record']} is there twice")
        seen.add(run["record"])
        names = bundle_schema.members(run["files"], f"{place}: files", REQUIRED, None)
        for name, facts in names.items():
            most = _limit(name)
            if not most:
                raise bundle_schema.refusal(place, f"{bundle_schema.shown(name)} is no file of a run")
            bundle_schema.members(facts, f"{place}: {name}", ("sha256", "bytes"))
            bundle_schema.matching(facts["sha256"], f"{place}: {name}: sha256", r"[0-9a-f]{64}")
            total += bundle_schema.whole(facts["bytes"], f"{place}: {name}: bytes", 1, most)
    if total > TOTAL_BYTES:
        raise bundle_schema.refusal(where, f"its files have {total:,} bytes, of at most {TOTAL_BYTES:,}")


def vetted(folder: Path, where: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The record of the run whose files are in `folder`, and those of its later stages, all checked.

    Raises UsageError where one is not as the stages leave it.
    """
    for name in REQUIRED:
        if not (folder / name).exists():
            raise bundle_schema.refusal(f"{where}/{name}", "it is missing")
    found = {}
    values = 0
    for stage, vet in bundle_schema.STAGES.items():
        if (folder / stage / "record.json").exists():
            place = f"{where}/{stage}/record.json"
            found[stage] = bundle_schema.parse((folder / stage / "record.json").read_bytes(), place)
            values += vet(found[stage], place)
    bundle_schema.few(values, where)
    record, results = found.pop("train"), found
    for stage, result in results.items():
        if result["id"] != record["id"] or result["ended"] < record["started"]:
            raise bundle_schema.refusal(f"{where}/{stage}/record.json", "it is of another training, or of before it")
    if bundle_schema.parse((folder / HARDWARE).read_bytes(), f"{where}/{HARDWARE}") != record["hardware"]:
        raise bundle_schema.refusal(f"{where}/{HARDWARE}", "it is not what the record says of the hardware")
    _vet_text((folder / PARAMS).read_bytes(), f"{where}/{PARAMS}")
    for stage in ("train", "evaluate"):
        pictures = sorted((folder / stage / "plots").glob("*"))
        if pictures and not (folder / stage / "record.json").exists():
            raise bundle_schema.refusal(f"{where}/{stage}/plots", "a stage without a record has no pictures")
        for picture in pictures:
            with picture.open("rb") as file:
                if file.read(len(PNG)) != PNG:
                    raise bundle_schema.refusal(f"{where}/{stage}/plots/{picture.name}", "it is no PNG picture")
    if (folder / CHECKPOINT).exists():
        _vet_checkpoint(folder / CHECKPOINT, record, f"{where}/{CHECKPOINT}")
    if len(records.describe_run(record, results)) > records.DESCRIPTION_LENGTH:
        raise bundle_schema.refusal(where, f"its description has more than {records.DESCRIPTION_LENGTH:,} characters")
    return record, results


def _vet_text(data: bytes, where: str) -> None:
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError:
        raise bundle_schema.refusal(where, "it is no text in UTF-8") from None
    if any(bundle_schema.CONTROL.search(line) for line in lines):
        raise bundle_schema.refusal(where, "it holds control characters")


def _vet_checkpoint(path: Path, record: Mapping[str, Any], where: str) -> None:
    """What a checkpoint says of itself is what its record says. Its tensors are looked at when it is loaded."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            said = (file.metadata() or {}).get("trainmark", "")
    except (OSError, safetensors.SafetensorError):
        raise bundle_schema.refusal(where, "it is no .safetensors file") from None
    facts = bundle_schema.parse(said.encode(), where)
    bundle_schema.members(
        facts, where, ("model", "classes", "image_size", "mean", "std", "epoch", "val_accuracy", "record")
    )
    same = {key: record["facts"][key] for key in ("model", "classes", "image_size")} | {"record": record["id"]}
    for key, value in same.items():
        if facts[key] != value:
            raise bundle_schema.refusal(where, f"{key}: it is a checkpoint of another training")
    for key, low in (("mean", -bundle_schema.LARGEST), ("std", 1e-6)):
        for place, number in bundle_schema.items(facts[key], f"{where}: {key}", 3, 3):
            bundle_schema.number(number, place, low)
    bundle_schema.whole(facts["epoch"], f"{where}: epoch", 1)
    bundle_schema.number(facts["val_accuracy"], f"{where}: val_accuracy", 0, 1)


# --- import


def import_runs(paths: Sequence[Path]) -> None:
    """Puts the runs of bundles into the current store, those that it lacks; a later stage's record also into a run
    that lacks it, or has one of an earlier time. The order of bundles is of no matter.

    Nothing is written before everything was checked. Runs that were made before one fails (a full disk, a server that
    is away) are deleted again; where that fails too, they are whole, and a repeated import goes on from there. Raises
    UsageError for a bundle that is wrong, or holds a run that the store has with another content.
    """
    if os.environ.get("MLFLOW_RUN_ID"):
        raise UsageError("MLFLOW_RUN_ID is set: runs can't be imported into another run; unset it")
    with tempfile.TemporaryDirectory() as scratch:
        found = [
            (path.name, run)
            for index, path in enumerate(paths)
            for run in read(path, Path(scratch) / "bundles" / str(index))
        ]
        fetched = Path(scratch) / "store"
        fetched.mkdir()
        _refuse_conflicts(found, fetched)
        made: list[store.Handle] = []
        try:
            with store.discard_on_failure(made):
                found.sort(
                    key=lambda each: records.repeat_number(each[1].record)
                )  # the run above begins with the first
                for _, run in found:
                    _put(run, fetched, made)
                for run in {run.record["tags"].get(store.REPEATS_TAG): run for _, run in found}.values():
                    publisher.update_parent(run.record, run.record["experiment"])
        except BaseException:
            if made:
                terminal.say("note     what was imported above is deleted again")
            raise


def _refuse_conflicts(found: Sequence[tuple[str, Run]], scratch: Path) -> None:
    seen: dict[str, dict[str, Mapping[str, Any]]] = {}
    siblings: dict[str, dict[str, Mapping[str, str]]] = {}
    for where, run in found:
        earlier = seen.setdefault(run.record["id"], {})
        for stage in _newer(run, earlier, f"{where}: {run.shown}"):
            earlier[stage] = run.stages[stage]
        handle = store.find_run(run.record["id"], run.record["experiment"])
        if handle is not None and not store.is_deleted(handle):
            _newer(
                run,
                publisher.records_in_store(handle.run_id, store.run_tags(handle), scratch, run.stages),
                f"{where}: {run.shown}",
            )
        _refuse_another(run, siblings, f"{where}: {run.shown}")
        if run.checkpoint:
            from pipeline.models import checkpoints  # torch takes seconds to import, and most bundles hold no model

            try:
                checkpoints.load(run.checkpoint)
            except StageError as error:
                raise bundle_schema.refusal(f"{where}: {run.shown}", str(error)) from None


def _refuse_another(run: Run, siblings: dict[str, dict[str, Mapping[str, str]]], where: str) -> None:
    """Refuses a repeat that can't stand beside those of the same training in the store and in `siblings`, to which it
    is added: their tags by the ids of their records, by what they share."""
    own = run.record["tags"]
    shared = own.get(store.REPEATS_TAG)
    if shared is None:
        return
    if shared not in siblings:
        _, there = store.find_repeats(shared, run.record["experiment"])
        siblings[shared] = {row["tags"][store.RECORD_TAG]: row["tags"] for row in there.values()}
    for record_id, tags in siblings[shared].items():
        if record_id != run.record["id"] and tags["repeat"] == own["repeat"]:
            raise bundle_schema.refusal(
                where, f"repeat: {own['repeat']} is another run that is there ({record_id[:8]})"
            )
        if tags["repeats"] != own["repeats"]:
            raise bundle_schema.refusal(
                where, f"repeats: {own['repeats']}, where one that is there says {tags['repeats']}"
            )
    siblings[shared][run.record["id"]] = own


def _newer(run: Run, held: Mapping[str, Mapping[str, Any]], where: str) -> list[str]:
    """The stages of `run` that are not among `held`, or there from an earlier time."""
    newer = []
    for stage, record in run.stages.items():
        have = held.get(stage)
        if have is not None and publisher.digest(have) == publisher.digest(record):
            continue
        if have is not None and (stage == "train" or have["ended"] == record["ended"]):
            raise bundle_schema.refusal(
                where, f"its {stage} record is another than that of the same run which is there"
            )
        if have is None or have["ended"] < record["ended"]:
            newer.append(stage)
    return newer


def _put(run: Run, scratch: Path, made: list[store.Handle]) -> None:
    record, experiment = run.record, run.record["experiment"]
    handle = store.find_run(record["id"], experiment)
    if handle is None:
        marks = {"imported": f"from a bundle of schema {run.schema}", publisher.IMPORTED_RUN_TAG: run.run_id}
        made += publisher.restore_run(record, experiment, run.folders, marks)
        terminal.say(f"imported {run.shown} into {experiment}")
        return
    if store.is_deleted(handle):
        terminal.say(f"left out {run.shown}: it was deleted in this store")
        return
    held = publisher.records_in_store(handle.run_id, store.run_tags(handle), scratch, run.stages)
    whole = "train" in held  # else it is under way, or failed
    stages = _newer(run, held, run.shown) if whole else []
    best = run.checkpoint if whole and not store.list_artifacts(handle.run_id, "checkpoints") else None
    if stages or best:
        later = {stage: held[stage] for stage in held if stage != "train"}
        later |= {stage: run.results[stage] for stage in stages}
        publisher.add_stages(handle, record, stages, later, run.folders, best)
        terminal.say(f"added    {', '.join(stages) or 'model'} to {run.shown}")
    else:
        terminal.say(f"there    {run.shown} is in this store already")


# --- the command line


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `export` or `import`."""
    parser = cli.Parser(prog="python -m pipeline.bundle", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    exported = commands.add_parser("export", help="write all finished runs of the store to one file")
    exported.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="(default: reports/bundle.zip)")
    exported.add_argument("--experiment", metavar="NAME", help="of this experiment alone")
    exported.add_argument("--with-models", action="store_true", help="checkpoints, too: some 45 MB a run")
    exported.add_argument("--without-pictures", action="store_true", help="some 10 KB a run, not 300")
    imported = commands.add_parser("import", help="put the runs of bundles into the store")
    imported.add_argument("files", type=Path, nargs="+", metavar="FILE")
    options = parser.parse_args(arguments)
    if options.command == "export":
        export(options.out, options.with_models, options.experiment, pictures=not options.without_pictures)
    else:
        import_runs(options.files)


if __name__ == "__main__":
    with cli.ending("python -m pipeline.bundle"):
        main()
