"""The folder of runs under way: whole or not at all, and what of it waits or can be resumed."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest
from bundle_files import as_bytes, evaluation, open_entry, run_files, training, whole_run, write
from conftest import fails

from pipeline import config, files
from pipeline.errors import StageError
from pipeline.tracking import pending, records

RECORD = training()


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def entry():
    """The entry of a training that was interrupted after two epochs, with a state."""
    folder, owner = open_entry(RECORD, identity={"seed": 7})
    owner.close()
    (folder / "state").mkdir()
    (folder / "state" / "000002-0.pt").touch()
    return folder


# --- the journal


def test_the_record_grows_with_the_journal(entry):
    again = RECORD["epochs"][1] | {"at": RECORD["epochs"][1]["at"] + 5000}
    pending.append(entry, {"event": "resume", "at": 1, "tags": {"resumed": "1"}})
    pending.append(entry, {"event": "epoch", "epoch": again})
    record = pending.partial_record(entry)
    assert record["epochs"] == [RECORD["epochs"][0], again]
    assert record["tags"].keys() == RECORD["tags"].keys() - records.LATE_TAGS | {"resumed"}
    assert (record["id"], record["params"], record["metrics"]) == (RECORD["id"], RECORD["params"], {})


@pytest.mark.parametrize("partial", [b'{"event": "epo', b"\xff\xfe", b""])
def test_a_partial_last_line_is_ignored_and_cut(entry, partial):
    path = entry / pending.JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole + partial)
    assert len(pending.journal(entry)) == 3 and len(pending.partial_record(entry)["epochs"]) == 2
    pending.append(entry, {"event": "end", "status": "KILLED", "at": 1, "final": False})
    assert path.read_bytes().startswith(whole) and pending.journal(entry)[3]["event"] == "end"
    assert len(path.read_bytes().splitlines()) == 4


def test_a_line_is_on_the_disk_before_the_training_goes_on(entry, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    pending.append(entry, {"event": "resume", "at": 1, "tags": {}})
    assert synced == [(entry / pending.JOURNAL).stat().st_size]

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "journal.jsonl" in fails(StageError, pending.append, entry, {})
    with pytest.raises(ValueError, match="JSON"):
        pending.append(entry, {"loss": float("nan")})


# --- stages


def test_a_stage_is_in_an_entry_whole_or_not_at_all(entry, tmp_path, monkeypatch):
    folder = write(tmp_path / "outputs", whole_run() | {"train/curves.csv": b"not MLflow's"}) / "train"
    linked, link = [], files.link

    def crash(source, target):
        linked.append(source)
        if len(linked) == 3:
            raise KeyboardInterrupt
        link(source, target)

    monkeypatch.setattr(files, "link", crash)
    with pytest.raises(KeyboardInterrupt):
        pending.link_stages({"train": folder}, entry)
    assert not (entry / "train").exists() and pending.is_training(entry) and pending.progress(entry)["stages"] == []
    pending.link_stages({"train": folder}, entry)
    assert names(entry / "train") == sorted(set(names(folder)) - {"curves.csv"})
    assert not pending.is_training(entry) and not pending.is_resumable(entry)


def test_what_stages_left_waits_although_their_outputs_are_deleted(tmp_path):
    contents = run_files(RECORD, evaluation(RECORD))
    folders = records.stage_folders(write(tmp_path / "outputs", contents))
    folders["sustain"].mkdir()  # no record yet
    pending.submit(RECORD, folders, "mine")
    (entry,) = pending.entries()
    assert (entry / "train" / "record.json").samefile(folders["train"] / "record.json")  # which takes no space
    files.write_json(folders["train"] / "record.json", {})
    shutil.rmtree(folders["evaluate"])
    assert pending.progress(entry) == {"events": 0, "stages": ["evaluate", "train"], "owned": False}
    assert (entry / "train" / "record.json").read_bytes() == as_bytes(RECORD)
    assert pending.read_target(entry)["experiment"] == "mine"


# --- what waits, and what can be resumed


def test_entries_are_in_order_of_time_and_nothing_half_made_is_one(entry, pending_folder):
    for name in ("notes", ".1-new-train", "123-half"):
        (pending_folder / name).mkdir()
    pending.submit(training(2), {}, "mine")
    first, second = pending.entries()
    assert first == entry and second.name.endswith("-stages")


def test_a_new_training_is_an_entry_only_when_its_process_owns_it(monkeypatch):
    seen, write_json = [], files.write_json

    def look_before(path, value):
        seen.append((pending.entries(), pending.is_owned(path.parent)))
        write_json(path, value)

    monkeypatch.setattr(files, "write_json", look_before)
    created, owner = pending.open_training(RECORD, {})
    with owner:
        assert seen == [([], True)] and pending.entries() == [created]


def test_an_entry_waits_until_the_store_has_all_of_it(entry):
    for step in ("new", "epoch", "stage"):
        if step == "epoch":
            pending.append(entry, {"event": "epoch", "epoch": RECORD["epochs"][0]})
        elif step == "stage":
            files.write_json(entry / "train" / "record.json", RECORD)
        assert pending.waiting() == [entry]
        files.write_json(entry / pending.DELIVERED, pending.progress(entry))
        assert pending.waiting() == []
    (entry / pending.DELIVERED).write_text("{")
    assert pending.waiting() == [entry]


OWN = """
import sys; from pathlib import Path; from pipeline.tracking import pending
owner = pending.own(Path(sys.argv[1])); print("locked", flush=True); sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_training_that_lives_is_not_resumed_and_one_that_was_killed_is(entry):
    assert list(pending.unfinished({"seed": 7})) == [entry] and list(pending.unfinished({"seed": 8})) == []
    command = [sys.executable, "-c", OWN, str(entry)]
    with subprocess.Popen(command, cwd=config.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert pending.is_owned(entry) and pending.is_owned(entry)  # to look does not lock
        assert list(pending.unfinished({"seed": 7})) == []
        process.send_signal(signal.SIGKILL)
    assert not pending.is_owned(entry) and list(pending.unfinished({"seed": 7})) == [entry]


@pytest.mark.parametrize("change", ["no state", "final", "complete"])
def test_what_would_end_the_same_way_or_has_ended_well_is_not_resumed(entry, change):
    if change == "no state":
        shutil.rmtree(entry / "state")
    elif change == "final":  # NaN, or too large a batch
        pending.append(entry, {"event": "end", "status": "FAILED", "at": 1, "final": True})
    else:
        files.write_json(entry / "train" / "record.json", RECORD)
    assert list(pending.unfinished({"seed": 7})) == []


def test_the_newest_of_equal_trainings_is_resumed(entry):
    newer, owner = open_entry(training(2), identity={"seed": 7})
    owner.close()
    shutil.copytree(entry / "state", newer / "state")
    assert list(pending.unfinished({"seed": 7})) == [newer, entry]


def test_where_a_run_belongs_is_decided_when_it_starts(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////srv/mlflow.db")
    for run_id in ("", "a" * 32):
        monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
        assert pending.target("mine", {"restored": "yes"}) == {
            "store": "sqlite:////srv/mlflow.db", "experiment": "mine", "run_id": run_id or None,
            "marks": {"restored": "yes"},
        }  # fmt: skip
