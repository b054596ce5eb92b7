"""Damaged files: no command hangs, ends in a traceback or leaves something partial."""

import hashlib
import json
import shutil

import bundle_files as made
import pytest
from damage import mutated, mutated_lines, trying
from hypothesis import given
from stores import own_store, runs  # noqa: F401 (own_store: each test has its own)

from pipeline import children, config, files, publish, repeats
from pipeline.errors import StageError, UsageError
from pipeline.tracking import pending
from pipeline.training import state

MORE = pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])


@pytest.mark.parametrize("count", [100, MORE])
def test_a_damaged_state_is_passed_over(tmp_path, capsys, count):
    import torch

    content = {"record": json.dumps({"epochs": [1, 2]}), "net": {"w": torch.zeros(3)}, "seconds": {"train": 1.0}}
    torch.save(content, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    older = f"000001-{hashlib.sha256(whole).hexdigest()[:16]}.pt"

    def check(data):
        folder = tmp_path / "state"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / older).write_bytes(whole)
        (folder / f"000002-{hashlib.sha256(data).hexdigest()[:16]}.pt").write_bytes(data)  # its digest is right
        assert state.load_newest(folder).keys() == content.keys()

    trying(count)(given(mutated(whole))(check))()


@pytest.mark.parametrize("count", [20, MORE])
@pytest.mark.parametrize("name", ["target.json", "journal.jsonl", "delivered.json", "train/record.json"])
def test_a_damaged_entry_delays_no_other_and_is_named(tmp_path, monkeypatch, capsys, name, count):
    contents = made.whole_run(1)
    entry, owner = made.open_entry(made.training(1))
    if name == "train/record.json":
        pending.link_stages({"train": made.write(tmp_path / "one", contents) / "train"}, entry)
    owner.close()
    files.write_json(entry / "delivered.json", {"events": 1, "stages": [], "owned": True})
    whole = tmp_path / "whole"
    entry.replace(whole)
    lines = b"".join(json.dumps(json.loads(line)).encode() + b"\n" for line in one_line_each(whole / name))
    delivered = []
    monkeypatch.setattr("pipeline.tracking.publisher.put_run", lambda record, *_: delivered.append(record["params"]))
    monkeypatch.setattr(children, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(children.time, "sleep", lambda _: None)
    monkeypatch.setattr("pipeline.tracking.publisher.start", fake_start)
    monkeypatch.setattr(
        "pipeline.tracking.store.log_epochs", lambda handle, epochs: [epoch["figures"].items() for epoch in epochs]
    )
    monkeypatch.setattr("pipeline.tracking.store.end_run", lambda handle, status, at: int(at))

    def check(data):
        shutil.rmtree(pending.FOLDER, ignore_errors=True)
        shutil.copytree(whole, pending.FOLDER / "1-damaged")
        (pending.FOLDER / "1-damaged" / name).write_bytes(data)
        made.finish_entry(
            *made.open_entry(made.training(2)), tmp_path / "two", {k: made.whole_run(2)[k] for k in FILES}
        )
        delivered.clear()
        list(pending.unfinished({"a": 1}))
        children._deliver_rest()
        children.tell_waiting()
        assert made.training(2)["params"] in delivered
        try:
            publish.run(None, tmp_path)
        except StageError as error:
            assert str(error).isprintable() and len(str(error)) < 500
        except SystemExit as error:
            assert error.code == 1

    trying(count)(given(mutated_lines(lines))(check))()


FILES = (made.TRAIN, "train/hardware.json", "train/params.yaml")


def one_line_each(path):
    return path.read_bytes().splitlines() if path.suffix == ".jsonl" else [path.read_bytes()]


def fake_start(record, target, handle=None):
    """Reads what the store would."""
    made_of = [record["name"] + record["experiment"], int(record["started"]), *record["params"].items()]
    return made_of and [*record["tags"].items(), *target["marks"].items(), *record["datasets"]]


@pytest.mark.parametrize("count", [50, MORE])
def test_a_damaged_plan_is_none(tmp_path, count):
    order = [{"repeat": 1, "start": 1, "end": 2, "status": 0}]
    plan = repeats.Plan("a" * 32, 2, [0, 1], 0.0, {"a": 1}, order)
    plan.write(tmp_path / "set.json")
    lines = json.dumps(json.loads((tmp_path / "set.json").read_text())).encode() + b"\n"

    def check(data):
        (tmp_path / "set.json").write_bytes(data)
        read = repeats.Plan.read(tmp_path / "set.json")
        if read is not None:
            read.last_end()
            assert len(read.seeds) == read.repeats

    trying(count)(given(mutated_lines(lines))(check))()


@pytest.mark.parametrize("count", [100, MORE])
def test_damaged_settings_are_refused(tmp_path, count):
    whole = (config.ROOT / "params.yaml").read_bytes()

    def check(data):
        (tmp_path / "params.yaml").write_bytes(data)
        try:
            config.load(["recipe=blog"], tmp_path / "params.yaml")
        except UsageError as error:
            assert len(str(error)) < 2000

    trying(count)(given(mutated(whole))(check))()
