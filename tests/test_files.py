"""Files are whole or absent, and say what went wrong in one line."""

import errno
import json
import os
import stat

import pytest

from pipeline import files
from pipeline.errors import StageError, UsageError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fails(call, *args):
    """The one line that `call` fails with, status 1."""
    with pytest.raises(StageError) as caught:
        call(*args)
    assert not isinstance(caught.value, UsageError)
    assert caught.value.status == 1
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_written_into_new_folders_for_all_to_read(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    files.write_text(path, "猫\n")
    assert path.read_bytes() == b"\xe7\x8c\xab\n"
    assert names(path.parent) == ["c.txt"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with files.written_aside(path) as aside:
        assert (aside.parent, aside.suffix) == (tmp_path, ".json")  # one disk: a rename, not a copy
        assert aside.name.startswith(".a.json.")
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), StageError("other")], ids=repr)
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, files.written_aside(path) as aside:
        aside.write_text("half")
        raise error
    assert caught.value is error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_an_error_leaves_no_file_where_none_was(tmp_path):
    with pytest.raises(ZeroDivisionError), files.written_aside(tmp_path / "a.json") as aside:
        aside.write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_synced_before_it_takes_the_name(tmp_path, monkeypatch):
    path, sizes = tmp_path / "a.txt", []

    def fsync(descriptor):
        assert not path.exists()
        sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_text(path, "12345")
    assert sizes == [5]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path, monkeypatch, code):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fsync(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    assert fails(files.write_json, path, {}) == ("no disk space left to write a.json: free some and run it again")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_disk_that_is_full_at_once(tmp_path, monkeypatch):
    def mkstemp(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.tempfile, "mkstemp", mkstemp)
    assert fails(files.write_text, tmp_path / "a.txt", "").startswith("no disk space left to write a.txt")


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "a").write_text("")
    assert fails(files.write_text, tmp_path / "a" / "b.txt", "").startswith(f"can't write {tmp_path / 'a' / 'b.txt'}: ")


def test_a_folder_where_the_file_should_be(tmp_path):
    (tmp_path / "a.txt").mkdir()
    assert fails(files.write_text, tmp_path / "a.txt", "").startswith(f"can't write {tmp_path / 'a.txt'}: ")
    assert names(tmp_path) == ["a.txt"]


def test_json_there_and_back(tmp_path):
    path = tmp_path / "a.json"
    value = {"b": [1, 2.5, None, True], "a": {"猫": "🐈", "lr": 1e-5}}
    files.write_json(path, value)
    found = files.read_json(path)
    assert found == value
    assert list(found) == ["b", "a"]
    text = path.read_text(encoding="utf-8")
    assert "猫" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), float("-inf")])
def test_json_has_no_such_figures(tmp_path, figure):
    path = tmp_path / "a.json"
    files.write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"loss": figure})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert names(tmp_path) == ["a.json"]


def test_missing_json_names_what_to_run(tmp_path):
    path = tmp_path / "inputs.json"
    assert fails(files.read_json, path) == f"{path} is missing: run the stage that makes it (`dvc repro`)"


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b'{"a": "\xff"}', b"\x00" * 20])
def test_damaged_json_says_so(tmp_path, content):
    path = tmp_path / "inputs.json"
    path.write_bytes(content)
    line = fails(files.read_json, path)
    assert line.startswith(f"{path} can't be read (")
    assert line.endswith("): delete it and run `dvc repro` again")


def test_a_folder_is_no_json(tmp_path):
    assert fails(files.read_json, tmp_path).startswith(f"{tmp_path} can't be read (")
