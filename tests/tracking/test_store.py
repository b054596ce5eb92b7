"""The store: where it is, whole runs in it, one line when it fails."""

import os
import socket
import sqlite3
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from stores import AT, DATASET, QUIET, client, fresh_store, own_store, record_of, runs  # noqa: F401 (own_store: each test has its own)

from pipeline.errors import StageError, UsageError
from pipeline.tracking import store, views


def run_of(handle):
    return client().get_run(handle.run_id)


def line(error, call, *args):
    with pytest.raises(error) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- where the store is


@pytest.mark.parametrize("value", [None, ""])
def test_the_store_is_beside_params_yaml(monkeypatch, tmp_path, value):
    monkeypatch.setattr(store, "ROOT", tmp_path / "clone")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if value is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    assert store.store_uri() == f"sqlite:///{(tmp_path / 'clone' / 'mlflow.db').as_posix()}"
    assert store.shown_uri() == "sqlite:///mlflow.db"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sqlite:///mine/other.db", "sqlite:///{root}/mine/other.db"),
        ("sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        ("http://server:5000", "http://server:5000"),
        ("https://server/mlflow/", "https://server/mlflow/"),
        ("postgresql://user@server/db", "postgresql://user@server/db"),
    ],
)
def test_only_a_relative_sqlite_store_is_resolved(monkeypatch, tmp_path, given, expected):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert store.store_uri() == expected.format(root=tmp_path.as_posix())
    assert store.shown_uri() == given


@pytest.mark.parametrize("given", ["", "sqlite:///mlflow.db"])
def test_a_store_in_a_temporary_experiment_is_refused(monkeypatch, tmp_path, given):
    monkeypatch.setattr(store, "ROOT", tmp_path / ".dvc" / "tmp" / "exps" / "tmpx1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert line(UsageError, store.store_uri).startswith("MLFLOW_TRACKING_URI: sqlite:///mlflow.db would be lost")
    for lasting in ("sqlite:////home/me/mlflow.db", "http://server:5000"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", lasting)
        assert store.store_uri() == lasting


@pytest.mark.parametrize("value", [None, ""])
def test_artifacts_of_the_own_store_are_beside_it(monkeypatch, tmp_path, own_store, value):
    clone = tmp_path / "clone"
    clone.mkdir()
    own_store.rename(clone / "mlflow.db")
    monkeypatch.setattr(store, "ROOT", clone)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if value is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    handle = store.start_run(record_of())
    (tmp_path / "notes.txt").write_text("kept")
    store.log_artifacts(handle, {"papers/notes.txt": tmp_path / "notes.txt"})
    (kept,) = clone.rglob("notes.txt")
    assert kept.relative_to(clone).parts[0] == "mlartifacts"
    assert kept.parent.name == "papers" and kept.read_text() == "kept"


def test_link_is_to_the_store_that_is_a_server(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000/")
    assert store.run_table_link("7") == views.run_table_link("http://server:5000", "7")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////srv/mlflow.db")
    assert store.run_table_link("7") == views.run_table_link("http://127.0.0.1:5000", "7")
    assert store.run_table_link("7", "http://127.0.0.1:5003") == views.run_table_link("http://127.0.0.1:5003", "7")


def test_a_link_to_a_run_holds_no_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://jane:secret@server:5000/mlflow/")
    assert store.run_link("7", "abc") == views.run_link("https://server:5000/mlflow", "7", "abc")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////srv/mlflow.db")
    assert store.run_link("7", "abc") == views.run_link("http://127.0.0.1:5000", "7", "abc")


# --- a run


def test_start_makes_a_run_with_params_tags_and_datasets():
    record = record_of(tags={"workload": "w1", "hardware.cores": 2})
    handle = store.start_run(record)
    run = run_of(handle)
    assert (run.info.run_name, run.info.status, run.info.start_time) == (record["name"], "RUNNING", AT)
    assert run.info.experiment_id == handle.experiment_id
    assert run.data.params == record["params"]
    assert run.data.tags["workload"] == "w1" and run.data.tags["hardware.cores"] == "2"
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("folder-train", "0" * 32)
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]


def described(experiment_id, report_id=None):
    """Whether the experiment has its description and views, with a link to the report and the tags of the runs here."""
    tags = client().get_experiment(experiment_id).tags
    return views.experiment_tags(experiment_id, report_id, record_of()["tags"]).items() <= tags.items()


def test_an_experiment_is_created_once_and_described_whoever_created_it():
    first, second = store.start_run(record_of()), store.start_run(record_of())
    assert first.experiment_id == second.experiment_id and first.run_id != second.run_id
    assert described(first.experiment_id)
    other = client().create_experiment("other")
    assert store.start_run(record_of(experiment="other")).experiment_id == other and described(other)


@pytest.fixture
def batches(monkeypatch):
    """How many metrics, params and tags each call held; a server takes 1000, 100 and 100, and 1000 in all."""
    sizes = []
    whole = MlflowClient.log_batch

    def counted(self, run_id, metrics=(), params=(), tags=(), **options):
        sizes.append((len(metrics), len(params), len(tags)))
        return whole(self, run_id, metrics, params, tags, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    return sizes


def test_more_params_than_one_call_takes(batches):
    params = {f"train.optimizer_options.option{index:03}": str(index) for index in range(250)}
    assert run_of(store.start_run(record_of(params=params))).data.params == params
    assert batches == [(0, 100, 0), (0, 100, 0), (0, 50, 0), (0, 0, 2)]


def test_more_metrics_than_one_call_takes(batches):
    handle = store.start_run(record_of())
    figures = {f"figure{index}": index / 4 for index in range(1001)}
    store.log_metrics(handle, figures, AT)
    assert run_of(handle).data.metrics == figures
    assert batches[-2:] == [(1000, 0, 0), (1, 0, 0)]


def test_an_epoch_is_logged_under_its_number_and_a_sample_under_its_own():
    handle = store.start_run(record_of())
    samples = [{"figures": {"system/cpu": 7.5}, "at": AT + step, "step": step} for step in (4, 5)]
    figures = {"epoch": 3, "train/loss": 0.25, "train/lr": 1}
    store.log_epoch(handle, {"at": AT + 9, "figures": figures, "system": samples})
    found = {
        key: [(m.value, m.step, m.timestamp) for m in client().get_metric_history(handle.run_id, key)]
        for key in run_of(handle).data.metrics
    }
    assert found == {
        "train/loss": [(0.25, 3, AT + 9)],
        "train/lr": [(1.0, 3, AT + 9)],
        "system/cpu": [(7.5, 4, AT + 4), (7.5, 5, AT + 5)],
    }


def test_a_series_is_logged_by_steps_counted_from_one(batches):
    handle = store.start_run(record_of())
    store.log_series(handle, "sustained/images_per_second", [7.5, 8, 7.25], AT)
    course = client().get_metric_history(handle.run_id, "sustained/images_per_second")
    assert [(m.value, m.step, m.timestamp) for m in course] == [(7.5, 1, AT), (8.0, 2, AT), (7.25, 3, AT)]
    del batches[:]
    store.log_series(handle, "long", [index / 4 for index in range(1001)], AT)
    assert batches == [(1000, 0, 0), (1, 0, 0)]
    assert [m.step for m in client().get_metric_history(handle.run_id, "long")] == list(range(1, 1002))
    store.log_series(handle, "nothing", [], AT)
    assert len(batches) == 2 and "nothing" not in run_of(handle).data.metrics


def test_tags_are_set_and_those_that_are_none_taken_away():
    handle = store.start_run(record_of())
    store.set_tags(handle, {"label": "desk", "restored": "yes"})
    store.set_tags(handle, {"label": None, "never": None, "count": 3})
    own = run_of(handle).data.tags
    assert "label" not in own and "never" not in own
    assert (own["restored"], own["count"]) == ("yes", "3")


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_as_it_ended_and_can_go_on(status):
    handle = store.start_run(record_of())
    store.end_run(handle, status, AT + 5)
    assert (run_of(handle).info.status, run_of(handle).info.end_time) == (status, AT + 5)
    store.set_status(handle, "RUNNING")
    assert run_of(handle).info.status == "RUNNING"


def test_files_keep_their_names_and_folders(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    handle = store.start_run(record_of())
    store.log_artifacts(handle, {"a.txt": tmp_path / "a.txt", "plots/b.txt": tmp_path / "b.txt"})
    listed = [each.path for path in ("", "plots") for each in client().list_artifacts(handle.run_id, path)]
    assert listed == ["a.txt", "plots", "plots/b.txt"]


def test_a_text_takes_the_place_of_one_that_was_there(tmp_path):
    handle = store.start_run(record_of())
    for text in ("first", "größer"):
        store.log_text(handle, "records/a.json", text)
    assert store.list_artifacts(handle.run_id, "records") == ["records/a.json"]
    assert store.list_artifacts(handle.run_id, "nothing") == []
    found = store.download_artifact(handle.run_id, "records/a.json", tmp_path)
    assert tmp_path in found.parents and found.read_text(encoding="utf-8") == "größer"


def test_a_run_that_is_discarded_is_deleted_and_no_record_s():
    handle = store.start_run(record_of())
    store.mark_run(handle, record_of())
    store.discard_run(handle)
    assert store.is_deleted(handle) and store.find_run("a1b2", "trainmark") is None
    assert store.RECORD_TAG not in store.run_tags(handle)


@pytest.mark.parametrize("error", [StageError("full"), KeyboardInterrupt()])
def test_what_fails_discards_the_runs_there_are_by_then(monkeypatch, error):
    made = []
    with pytest.raises(type(error)), store.discard_on_failure(made):
        made += [store.start_run(record_of()), store.start_run(record_of())]
        raise error
    assert all(map(store.is_deleted, made))
    with store.discard_on_failure(made):
        made = [store.start_run(record_of())]
    assert not store.is_deleted(made[0])


# --- under `mlflow run`


@pytest.fixture
def given(monkeypatch):
    """The run that `mlflow run` made, in an experiment of its own, with the parameters it was called with."""
    run = client().create_run(client().create_experiment("by hand"))
    for key in ("lr", "epochs"):
        client().log_param(run.info.run_id, key, "7")
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", run.info.experiment_id)
    return run.info


def test_the_given_run_is_filled_in_its_own_experiment(given):
    handle = store.start_run(record_of())
    assert (handle.run_id, handle.experiment_id) == (given.run_id, given.experiment_id)
    (run,) = runs()
    assert run.info.run_name == record_of()["name"]
    assert run.data.params == {"lr": "7", "epochs": "7"} | record_of()["params"]
    assert run.data.tags["workload"] == "w1"
    assert client().get_experiment_by_name("trainmark") is None
    assert described(given.experiment_id)


def test_under_mlflow_run_a_run_is_found_in_the_experiment_of_the_one_given(given):
    assert store.find_run("a1b2", "trainmark") is None
    store.mark_run(store.start_run(record_of()), record_of())
    handle = store.find_run("a1b2", "trainmark")
    assert (handle.run_id, handle.experiment_id) == (given.run_id, given.experiment_id)


@QUIET
def test_a_model_is_logged_to_the_given_run(given):
    handle = store.start_run(record_of())
    before = dict(os.environ)
    store.log_model(handle, Mean(), 8, 3, ["torch"])
    assert dict(os.environ) == before
    (run,) = runs()
    assert run.info.status == "RUNNING" and len(run.outputs.model_outputs) == 1


# --- repeats

REPEATS_ID = "a" * 32


def parent_of(**changes):
    own = record_of()["tags"] | {"repeats.id": REPEATS_ID, "repeats": "2"}
    return store.start_run(record_of(name="both", tags=own, datasets=[], **changes))


def repeat_of(parent, number, status="FINISHED"):
    own = record_of()["tags"] | {"repeats.id": REPEATS_ID, "repeats": "2", "repeat": str(number)}
    handle = store.start_run(record_of(name=f"repeat {number}", tags=own), parent)
    if status:
        store.end_run(handle, status)
    return handle


def test_a_repeat_stands_below_another_run_in_its_experiment():
    parent = parent_of(experiment="elsewhere")
    run = run_of(repeat_of(parent, 1))
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id and run.info.start_time == AT
    assert run.info.experiment_id == parent.experiment_id
    assert client().get_experiment_by_name("trainmark") is None


def test_under_mlflow_run_the_run_given_is_the_one_above_the_repeats(given):
    parent = parent_of()
    child = repeat_of(parent, 1)
    assert parent.run_id == given.run_id != child.run_id
    assert run_of(child).info.experiment_id == given.experiment_id
    found, there = store.find_repeats(REPEATS_ID, "trainmark")
    assert found.run_id == given.run_id and [row["run_id"] for row in there.values()] == [child.run_id]


def test_repeats_are_found_with_the_run_above_them_wherever_it_is(monkeypatch):
    assert store.find_repeats(REPEATS_ID, "trainmark") == (None, {})
    parent = parent_of()
    children = [repeat_of(parent, number) for number in (2, 1)]
    repeat_of(parent, 3, status="FAILED")
    client().delete_run(repeat_of(parent, 4).run_id)
    store.start_run(record_of(tags={"repeats.id": "b" * 32}))
    whole = MlflowClient.search_runs
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *a, **k: whole(*a, **k | {"max_results": 2}))
    found, there = store.find_repeats(REPEATS_ID, "trainmark")
    assert found.run_id == parent.run_id
    assert {number: row["run_id"] for number, row in there.items()} == {2: children[0].run_id, 1: children[1].run_id}
    assert store.find_repeats(REPEATS_ID, "another") == (None, {})


def test_a_deleted_run_above_repeats_is_found_unless_it_was_discarded():
    parent = parent_of()
    client().delete_run(parent.run_id)
    assert store.find_repeats(REPEATS_ID, "trainmark")[0].run_id == parent.run_id
    client().restore_run(parent.run_id)
    store.discard_run(parent)
    assert store.find_repeats(REPEATS_ID, "trainmark") == (None, {})


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED", None])
def test_every_finished_repeat_counts_whatever_became_of_the_run_above_and_that_never(status):
    finished("alone", started=AT - 1)
    parent = parent_of()
    repeat_of(parent, 1)
    repeat_of(parent, 2, status="FAILED")
    if status:
        store.end_run(parent, status)
    assert [run["name"] for run in store.finished_runs()] == ["repeat 1", "alone"]
    client().delete_run(parent.run_id)
    assert [run["name"] for run in store.finished_runs()] == ["repeat 1", "alone"]


def test_what_still_runs_of_repeats_is_ended_and_nothing_else():
    parent = parent_of(experiment="elsewhere")
    done, failed = repeat_of(parent, 1), repeat_of(parent, 2, status="FAILED")
    cut_off, logged = repeat_of(parent, 3, status=None), repeat_of(parent, 4, status=None)
    store.mark_run(logged, record_of(id="c" * 32))
    other = store.start_run(record_of(tags={"repeats.id": "b" * 32}))
    store.end_repeats(REPEATS_ID, "KILLED", ["c" * 32])
    status = [run_of(each).info.status for each in (parent, done, failed, cut_off, logged, other)]
    assert status == ["KILLED", "FINISHED", "FAILED", "KILLED", "FINISHED", "RUNNING"]


def test_a_given_run_says_where_the_repeats_stand_that_go_on(given, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delenv("MLFLOW_RUN_ID")
        parent = parent_of(experiment=client().get_experiment(given.experiment_id).name)
        store.refer_given_run(REPEATS_ID)
    assert "mlflow.note.content" not in client().get_run(given.run_id).data.tags
    store.refer_given_run(REPEATS_ID)
    assert parent.run_id in client().get_run(given.run_id).data.tags["mlflow.note.content"]
    assert "mlflow.note.content" not in run_of(parent).data.tags


def test_the_given_run_that_is_above_the_repeats_refers_to_none(given):
    parent = parent_of()
    store.refer_given_run(REPEATS_ID)
    assert parent.run_id == given.run_id and "mlflow.note.content" not in run_of(parent).data.tags


def test_a_single_training_may_stand_below_a_run_of_somebody_elses():
    outer = client().create_run(client().create_experiment("by hand")).info
    finished("inside", tags=record_of()["tags"] | {"mlflow.parentRunId": outer.run_id})
    assert [run["name"] for run in store.finished_runs()] == ["inside"]


def test_a_run_that_waits_for_others_is_neither_running_nor_finished():
    handle = store.start_run(record_of())
    store.set_status(handle, "SCHEDULED")
    assert run_of(handle).info.status == "SCHEDULED" and not store.is_finished(handle)
    store.end_run(handle, "FINISHED")
    assert store.is_finished(handle)


# --- finding


def test_a_run_is_found_once_it_is_marked():
    handle, other = store.start_run(record_of()), store.start_run(record_of(id="c3d4"))
    assert store.find_run("a1b2", "trainmark") is None
    store.mark_run(handle, record_of())
    store.mark_run(other, record_of(id="c3d4"))
    for record_id, expected in (("a1b2", handle), ("c3d4", other)):
        found = store.find_run(record_id, "trainmark")
        assert (found.run_id, found.experiment_id) == (expected.run_id, expected.experiment_id)
    assert store.find_run("e5f6", "trainmark") is None


def test_a_run_of_another_experiment_is_not_found():
    store.mark_run(store.start_run(record_of(experiment="trainmark-demo")), record_of())
    assert store.find_run("a1b2", "trainmark") is None
    store.start_run(record_of())
    assert store.find_run("a1b2", "trainmark") is None
    assert store.find_run("a1b2", "trainmark-demo") is not None


def test_a_deleted_run_is_found_and_said_to_be_deleted():
    handle = store.start_run(record_of())
    store.mark_run(handle, record_of())
    assert not store.is_deleted(handle)
    client().delete_run(handle.run_id)
    assert store.find_run("a1b2", "trainmark").run_id == handle.run_id
    assert store.is_deleted(handle)


def test_a_deleted_experiment_is_refused():
    client().delete_experiment(store.start_run(record_of()).experiment_id)
    said = line(StageError, store.start_run, record_of())
    assert said.startswith('tracking.experiment: "trainmark" is deleted in this store')
    assert len(runs()) == 1


def finished(name, status="FINISHED", **changes):
    handle = store.start_run(record_of(name=name, **changes))
    store.log_metrics(handle, {"test/accuracy": 0.5}, AT)
    if status:
        store.end_run(handle, status)
    return handle


def test_finished_runs_are_whole_and_newest_first():
    older = finished("older", started=AT)
    newer = finished("newer", started=AT + 1000, experiment="trainmark-demo")
    found = store.finished_runs()
    assert [run["run_id"] for run in found] == [newer.run_id, older.run_id]
    assert found[1]["name"] == "older"
    assert [(run["started"], run["experiment_id"]) for run in found] == [
        (AT + 1000, newer.experiment_id), (AT, older.experiment_id)
    ]  # fmt: skip
    assert found[1]["metrics"] == {"test/accuracy": 0.5}
    assert found[1]["params"] == record_of()["params"]
    assert record_of()["tags"].items() <= found[1]["tags"].items()


def test_finished_runs_are_trainings_that_came_to_their_end():
    finished("done")
    for status in ("FAILED", "KILLED", None):
        finished("not done", status)
    finished("of something else", tags={"recipe": "x"})
    client().delete_run(finished("deleted").run_id)
    client().delete_experiment(finished("with its experiment", experiment="other").experiment_id)
    assert [run["name"] for run in store.finished_runs()] == ["done"]


def test_a_store_without_runs_has_none_finished():
    assert store.finished_runs() == []


def test_finished_runs_are_more_than_one_page(monkeypatch):
    for index in range(5):
        finished(str(index), started=AT + index)
    whole = MlflowClient.search_runs
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *a, **k: whole(*a, **k | {"max_results": 2}))
    assert [run["name"] for run in store.finished_runs()] == ["4", "3", "2", "1", "0"]


def test_a_history_is_in_the_order_of_its_steps():
    handle = store.start_run(record_of())
    for step, value in ((2, 0.2), (1, 0.1), (3, 0.3)):
        store.log_metrics(handle, {"val/accuracy": value}, AT - step, step)
    found = store.history(handle.run_id, ["val/accuracy", "val/loss"])
    assert found == {"val/accuracy": [0.1, 0.2, 0.3], "val/loss": []}


def test_looking_into_a_store_creates_neither_it_nor_an_experiment(tmp_path, monkeypatch):
    before = len(client().search_experiments())
    assert store.comparison_run("unknown") is None
    assert len(client().search_experiments()) == before
    missing = tmp_path / "missing.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{missing.as_posix()}")
    assert store.finished_runs() == []
    assert store.comparison_run("trainmark") is store.experiment_to_show("trainmark") is None
    assert not missing.exists()


def test_the_comparison_is_one_run_that_is_no_training():
    assert store.comparison_run("trainmark") is None
    for name in ("trainmark", "another"):
        client().create_experiment(name)
    first = store.comparison_run("trainmark")
    assert store.comparison_run("trainmark").run_id == first.run_id
    run = run_of(first)
    assert run.info.run_name == "comparison" and run.data.tags[store.COMPARISON_TAG] == "true"
    store.end_run(first, "FINISHED")
    assert store.finished_runs() == []
    assert store.comparison_run("another").run_id != first.run_id


def test_the_experiment_links_to_its_comparison_until_that_is_deleted():
    experiment_id = store.start_run(record_of()).experiment_id
    handle = store.comparison_run("trainmark")
    assert described(experiment_id, handle.run_id)
    client().delete_run(handle.run_id)
    assert store.comparison_run("trainmark") is None
    assert len(runs()) == 2 and described(experiment_id)


def test_the_experiment_to_show_is_the_one_with_runs():
    assert store.experiment_to_show("trainmark") is None
    real = client().create_experiment("trainmark")
    assert store.experiment_to_show("trainmark") == real
    demo = store.start_run(record_of(experiment="trainmark-demo")).experiment_id
    assert store.experiment_to_show("trainmark") == demo
    assert store.start_run(record_of()).experiment_id == real
    assert store.experiment_to_show("trainmark") == real


def test_a_deleted_experiment_is_not_shown():
    client().delete_experiment(store.start_run(record_of()).experiment_id)
    assert store.experiment_to_show("trainmark") is None
    demo = client().create_experiment("trainmark-demo")
    assert store.experiment_to_show("trainmark") == demo


# --- the model


class Mean(torch.nn.Module):
    """Of each image's three channels."""

    def forward(self, images):
        return images.mean((2, 3))


@QUIET
def test_a_model_is_logged_and_the_environment_left_as_it_was(monkeypatch):
    monkeypatch.setenv("MLFLOW_DEFAULT_PREDICTION_DEVICE", "cuda")
    handle = store.start_run(record_of())
    before = dict(os.environ)
    store.log_model(handle, Mean(), 8, 3, ["torch", "numpy"])
    assert dict(os.environ) == before
    run = run_of(handle)
    assert run.info.status == "RUNNING" and mlflow.active_run() is None
    (model,) = run.outputs.model_outputs
    monkeypatch.setenv("MLFLOW_DEFAULT_PREDICTION_DEVICE", "cpu")
    loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    images = np.random.default_rng(0).random((5, 3, 8, 8), dtype=np.float32)
    assert np.allclose(loaded.predict(images), images.mean((2, 3)), atol=1e-6)
    schema = loaded.metadata.signature.inputs.inputs[0]
    assert (schema.type, schema.shape) == (np.dtype("float32"), (-1, 3, 8, 8))


def test_a_model_that_cannot_be_logged_leaves_the_environment_as_it_was(monkeypatch):
    def broken(*args, **kwargs):
        assert os.environ["MLFLOW_DEFAULT_PREDICTION_DEVICE"] == "cpu"
        raise OSError("disk full\nand more")

    monkeypatch.setattr(mlflow.pytorch, "log_model", broken)
    handle = store.start_run(record_of())
    before = dict(os.environ)
    assert line(StageError, store.log_model, handle, Mean(), 8, 3, []).endswith(" can't be used: disk full")
    assert dict(os.environ) == before
    assert mlflow.active_run() is None


# --- what the machine does meanwhile


def test_system_metrics_are_sampled_and_the_store_left_alone(own_store):
    handle = store.start_run(record_of())
    system = store.SystemMetrics(handle.run_id, interval_seconds=0.0)
    before = own_store.read_bytes()
    samples = []
    with pytest.raises(ZeroDivisionError), system:
        while len(samples) < 3:
            samples += system.take()
        raise ZeroDivisionError
    assert not system._thread.is_alive()
    assert own_store.read_bytes() == before
    assert [sample["step"] for sample in samples] == list(range(len(samples)))
    assert "system/cpu_utilization_percentage" in samples[0]["figures"]
    assert {type(value) for sample in samples for value in sample["figures"].values()} == {float}
    assert [sample["at"] for sample in samples] == sorted(sample["at"] for sample in samples)


# --- a store that fails


def everything(handle):
    """What is asked of a store, each as a call without arguments."""
    return [
        lambda: store.start_run(record_of()),
        lambda: store.mark_run(handle, record_of()),
        lambda: store.find_run("a1b2", "trainmark"),
        lambda: store.log_metrics(handle, {"train/loss": 1.0}, AT),
        lambda: store.log_datasets(handle, [DATASET]),
        lambda: store.set_tags(handle, {"label": None}),
        lambda: store.is_deleted(handle),
        lambda: store.set_status(handle, "RUNNING"),
        lambda: store.end_run(handle, "FINISHED"),
        lambda: store.run_tags(handle),
        lambda: store.log_text(handle, "a.txt", "a"),
        lambda: store.list_artifacts(handle.run_id, ""),
        lambda: store.download_artifact(handle.run_id, "a.txt", Path()),
        lambda: store.discard_run(handle),
        store.finished_runs,
        lambda: store.comparison_run("trainmark"),
        lambda: store.experiment_to_show("trainmark"),
    ]


def test_a_file_that_is_no_store_is_named(monkeypatch, tmp_path):
    (tmp_path / "broken.db").write_bytes(b"This is no database. " * 400)
    uri = f"sqlite:///{(tmp_path / 'broken.db').as_posix()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for call in (store.finished_runs, lambda: store.start_run(record_of())):
        said = line(StageError, call)
        assert said.startswith(f"the MLflow store {uri} can't be used: ") and "not a database" in said


def test_a_store_that_breaks_meanwhile_is_named(own_store, caplog):
    handle = store.start_run(record_of())
    with sqlite3.connect(own_store) as rows:
        rows.execute("drop table runs")
    for call in everything(handle)[:-1]:
        said = line(StageError, call)
        assert said.startswith(f"the MLflow store sqlite:///{own_store.as_posix()} can't be used: ")
        assert "no such table: runs" in said
    assert caplog.text == ""  # MLflow would print a traceback beside it


def test_a_server_that_is_not_there_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    handle = store.Handle("0" * 32, "1")
    for call in everything(handle):
        assert line(StageError, call).startswith(f"the MLflow store http://127.0.0.1:{port} can't be used: ")


def test_a_run_that_is_not_in_the_store_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    for call in (lambda: store.start_run(record_of()), lambda: store.find_run("a1b2", "trainmark")):
        assert "0" * 32 in line(StageError, call)


def test_a_missing_artifact_is_named(tmp_path):
    handle = store.start_run(record_of())
    assert "gone.json" in line(StageError, store.log_artifacts, handle, {"gone.json": tmp_path / "gone.json"})
