"""Files are complete or absent, and errors say what went wrong in one line."""

import errno
import json
import os
import stat
import sys

import pytest
from conftest import fails

from pipeline import files
from pipeline.errors import StageError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_written_into_new_folders_for_all_to_read(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    files.write_text(path, "猫\n")
    assert path.read_bytes() == b"\xe7\x8c\xab\n"
    assert names(path.parent) == ["c.txt"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with files.atomic_write(path) as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".json")  # one disk: a rename, not a copy
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("before", [["a.json"], []])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), StageError("other")], ids=repr)
def test_an_error_keeps_the_old_file_and_leaves_no_other(tmp_path, error, before):
    for name in before:
        (tmp_path / name).write_text("old")
    with pytest.raises(type(error)) as caught, files.atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value is error
    assert names(tmp_path) == before and all((tmp_path / name).read_text() == "old" for name in before)


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after_that(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.txt", []

    def fsync(descriptor):
        status = os.fstat(descriptor)
        is_file = stat.S_ISREG(status.st_mode)
        synced.append(("file", status.st_size, path.exists()) if is_file else ("folder", path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_text(path, "12345")
    assert synced[0] == ("file", 5, False)
    assert synced[1:] == ([] if sys.platform == "win32" else [("folder", True)])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["os.fsync", "tempfile.mkstemp"])
def test_a_full_disk_is_reported_and_keeps_the_old_file(tmp_path, monkeypatch, code, call):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(call, full)
    line = fails(StageError, files.write_json, path, {})
    assert "disk space" in line and "a.json" in line
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_json_there_and_back(tmp_path):
    path = tmp_path / "a.json"
    value = {"b": [1, 2.5, None, True], "a": {"猫": "🐈", "lr": 1e-5}}
    files.write_json(path, value)
    assert files.read_json(path) == value and list(files.read_json(path)) == ["b", "a"]
    assert "猫" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), float("-inf")])
def test_json_refuses_nan_and_infinity(tmp_path, figure):
    path = tmp_path / "a.json"
    files.write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"loss": figure})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b'{"a": "\xff"}', b"\x00" * 20])
def test_missing_or_damaged_json_says_what_to_run(tmp_path, content):
    path = tmp_path / "inputs.json"
    if content is not None:
        path.write_bytes(content)
    line = fails(StageError, files.read_json, path)
    assert str(path) in line and "dvc repro" in line
    assert str(tmp_path) in fails(StageError, files.read_json, tmp_path)  # a folder
