"""The store: where it is, whole runs in it, and the one line with which it fails."""

import os
import socket
import sqlite3
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import fails
from mlflow import MlflowClient
from stores import AT, DATASET, QUIET, client, own_store, record_of, runs  # noqa: F401 (own_store: each has its own)

from pipeline.errors import StageError, UsageError
from pipeline.tracking import store, views

REPEATS_ID = "a" * 32


def run_of(handle):
    return client().get_run(handle.run_id)


def status_of(handle):
    return run_of(handle).info.status


def finished(name, status="FINISHED", **changes):
    handle = store.start_run(record_of(name=name, **changes))
    store.log_metrics(handle, {"test/accuracy": 0.5}, AT)
    if status:
        store.end_run(handle, status)
    return handle


def finished_names():
    return [run["name"] for run in store.finished_runs()]


@pytest.fixture
def pages(monkeypatch):
    """The store answers a search with two runs at a time."""
    search = MlflowClient.search_runs
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *a, **k: search(*a, **k | {"max_results": 2}))


# --- where the store is


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "sqlite:///{root}/mlflow.db"),
        ("", "sqlite:///{root}/mlflow.db"),
        ("sqlite:///mine/other.db", "sqlite:///{root}/mine/other.db"),
        ("sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        ("https://server/mlflow/", "https://server/mlflow/"),
        ("postgresql://user@server/db", "postgresql://user@server/db"),
    ],
)
def test_only_a_relative_sqlite_store_is_resolved(monkeypatch, tmp_path, given, expected):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if given is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert store.store_uri() == expected.format(root=tmp_path.as_posix())
    assert store.shown_uri() == (given or "sqlite:///mlflow.db")


@pytest.mark.parametrize("given", ["", "sqlite:///mlflow.db"])
def test_a_store_in_a_temporary_experiment_is_refused(monkeypatch, tmp_path, given):
    monkeypatch.setattr(store, "ROOT", tmp_path / ".dvc" / "tmp" / "exps" / "tmpx1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert fails(UsageError, store.store_uri).startswith("MLFLOW_TRACKING_URI: sqlite:///mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert store.store_uri() == "http://server:5000"


def test_artifacts_of_the_projects_own_store_are_beside_it(monkeypatch, tmp_path, own_store):
    clone = tmp_path / "clone"
    clone.mkdir()
    own_store.rename(clone / "mlflow.db")
    monkeypatch.setattr(store, "ROOT", clone)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (tmp_path / "notes.txt").write_text("kept")
    store.log_artifacts(store.start_run(record_of()), {"papers/notes.txt": tmp_path / "notes.txt"})
    (artifact,) = clone.rglob("notes.txt")
    assert artifact.relative_to(clone).parts[0] == "mlartifacts" and artifact.parent.name == "papers"


def test_links_are_to_the_server_without_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://jane:secret@server:5000/mlflow/")
    assert store.run_link("7", "abc") == views.run_link("https://server:5000/mlflow", "7", "abc")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////srv/mlflow.db")
    assert store.run_link("7", "abc") == views.run_link("http://127.0.0.1:5000", "7", "abc")
    for link in ("run_table_link", "charts_link"):
        assert getattr(store, link)("7") == getattr(views, link)("http://127.0.0.1:5000", "7")
        assert getattr(store, link)("7", "http://h:5003") == getattr(views, link)("http://h:5003", "7")


# --- a run


def test_a_run_starts_with_params_tags_and_datasets():
    handle = store.start_run(record_of(tags={"workload": "w1", "hardware.cores": 2}))
    run = run_of(handle)
    assert (run.info.run_name, run.info.status, run.info.start_time) == (record_of()["name"], "RUNNING", AT)
    assert run.data.params == record_of()["params"]
    assert {"workload": "w1", "hardware.cores": "2"}.items() <= run.data.tags.items()
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("folder-train", "0" * 32)
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]


def test_more_params_and_metrics_than_one_call_takes():
    """MLflow takes 100 params and 1000 metrics."""
    params = {f"train.optimizer_options.option{index:03}": str(index) for index in range(250)}
    handle = store.start_run(record_of(params=params))
    metrics = {f"figure{index}": index / 4 for index in range(1001)}
    store.log_metrics(handle, metrics, AT)
    assert (run_of(handle).data.params, run_of(handle).data.metrics) == (params, metrics)


def test_metrics_are_logged_under_their_steps():
    handle = store.start_run(record_of())
    samples = [{"figures": {"system/cpu": 7.5}, "at": AT + step, "step": step} for step in (4, 5)]
    store.log_epoch(handle, {"at": AT + 9, "figures": {"epoch": 3, "train/loss": 0.25}, "system": samples})
    store.log_series(handle, "course", [7.5, 8], AT)
    store.log_series(handle, "nothing", [], AT)
    assert {
        key: [(m.value, m.step, m.timestamp) for m in client().get_metric_history(handle.run_id, key)]
        for key in run_of(handle).data.metrics
    } == {
        "train/loss": [(0.25, 3, AT + 9)],
        "system/cpu": [(7.5, 4, AT + 4), (7.5, 5, AT + 5)],
        "course": [(7.5, 1, AT), (8.0, 2, AT)],
    }


@pytest.mark.parametrize(("error", "status"), [(StageError("full"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_failure_ends_the_run_and_discards_what_was_created(error, status):
    ended, created = store.start_run(record_of()), []
    with pytest.raises(type(error)), store.discard_on_failure(created), store.end_on_failure(ended):
        created += [store.start_run(record_of()) for _ in range(2)]
        store.mark_run(created[0], record_of())
        raise error
    assert status_of(ended) == status and not store.is_deleted(ended)
    assert all(map(store.is_deleted, created))
    assert store.find_run("a1b2", "trainmark") is None


# --- experiments


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


def test_a_deleted_experiment_is_refused_and_not_shown():
    client().delete_experiment(store.start_run(record_of()).experiment_id)
    assert fails(StageError, store.start_run, record_of()).startswith("tracking.experiment:")
    assert len(runs()) == 1 and store.experiment_to_show("trainmark") is None


def test_the_experiment_to_show_is_the_one_with_runs():
    assert store.experiment_to_show("trainmark") is None
    real = client().create_experiment("trainmark")
    assert store.experiment_to_show("trainmark") == real
    demo = store.start_run(record_of(experiment="trainmark-demo")).experiment_id
    assert store.experiment_to_show("trainmark") == demo
    store.start_run(record_of())
    assert store.experiment_to_show("trainmark") == real


def test_the_comparison_is_one_run_an_experiment_and_the_experiment_links_to_it_until_it_is_deleted():
    experiment_id = finished("a training").experiment_id
    handle = store.comparison_run("trainmark")
    assert store.comparison_run("trainmark") == handle and run_of(handle).info.run_name == "comparison"
    store.end_run(handle, "FINISHED")
    assert finished_names() == ["a training"] and described(experiment_id, handle.run_id)
    client().delete_run(handle.run_id)
    assert store.comparison_run("trainmark") is None
    assert len(runs()) == 2 and described(experiment_id)


def test_looking_into_a_store_creates_neither_it_nor_an_experiment(tmp_path, monkeypatch):
    before = len(client().search_experiments())
    assert store.finished_runs() == [] and store.comparison_run("unknown") is None
    assert len(client().search_experiments()) == before
    missing = tmp_path / "missing.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{missing.as_posix()}")
    assert store.finished_runs() == []
    assert store.comparison_run("trainmark") is store.experiment_to_show("trainmark") is None
    assert not missing.exists()


# --- under `mlflow run`


@pytest.fixture
def given(monkeypatch):
    """The run that `mlflow run` created, in an experiment of its own, with the parameters it was called with."""
    run = client().create_run(client().create_experiment("by hand"))
    client().log_param(run.info.run_id, "lr", "7")
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", run.info.experiment_id)
    return store.Handle(run.info.run_id, run.info.experiment_id)


def test_the_given_run_is_filled_and_found_in_its_own_experiment(given):
    assert store.start_run(record_of()) == given
    (run,) = runs()
    assert run.info.run_name == record_of()["name"] and run.data.params == {"lr": "7"} | record_of()["params"]
    assert client().get_experiment_by_name("trainmark") is None and described(given.experiment_id)
    assert store.find_run("a1b2", "trainmark") is None
    store.mark_run(given, record_of())
    assert store.find_run("a1b2", "trainmark") == given


def test_the_given_run_is_the_parent_of_the_repeats(given):
    parent = parent_of()
    child = repeat_of(parent, 1)
    assert parent == given != child and child.experiment_id == given.experiment_id
    found, rows = store.find_repeats(REPEATS_ID, "trainmark")
    assert found == given and [row["run_id"] for row in rows.values()] == [child.run_id]
    store.refer_given_run(REPEATS_ID)
    assert "mlflow.note.content" not in store.run_tags(parent)


def test_the_given_run_says_where_repeats_are_that_go_on(given, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delenv("MLFLOW_RUN_ID")
        parent = parent_of(experiment=client().get_experiment(given.experiment_id).name)
        store.refer_given_run(REPEATS_ID)
    assert "mlflow.note.content" not in store.run_tags(given)
    store.refer_given_run(REPEATS_ID)
    assert parent.run_id in store.run_tags(given)["mlflow.note.content"]


# --- repeats


def parent_of(**changes):
    tags = record_of()["tags"] | {"repeats.id": REPEATS_ID, "repeats": "2"}
    return store.start_run(record_of(name="both", tags=tags, datasets=[], **changes))


def repeat_of(parent, number, status="FINISHED"):
    tags = record_of()["tags"] | {"repeats.id": REPEATS_ID, "repeats": "2", "repeat": str(number)}
    handle = store.start_run(record_of(name=f"repeat {number}", tags=tags), parent)
    if status:
        store.end_run(handle, status)
    return handle


@pytest.mark.usefixtures("pages")
def test_finished_repeats_are_found_with_their_parent():
    assert store.find_repeats(REPEATS_ID, "trainmark") == (None, {})
    parent = parent_of()
    children = {number: repeat_of(parent, number).run_id for number in (2, 1)}
    repeat_of(parent, 3, status="FAILED")
    client().delete_run(repeat_of(parent, 4).run_id)
    store.start_run(record_of(tags={"repeats.id": "b" * 32}))
    found, rows = store.find_repeats(REPEATS_ID, "trainmark")
    assert found == parent and {number: row["run_id"] for number, row in rows.items()} == children
    assert client().get_run(children[1]).data.tags["mlflow.parentRunId"] == parent.run_id
    assert store.find_repeats(REPEATS_ID, "another") == (None, {})


def test_a_deleted_parent_is_found_unless_it_was_discarded():
    parent = parent_of()
    client().delete_run(parent.run_id)
    assert store.find_repeats(REPEATS_ID, "trainmark")[0] == parent
    client().restore_run(parent.run_id)
    store.discard_run(parent)
    assert store.find_repeats(REPEATS_ID, "trainmark") == (None, {})


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", None])
def test_every_finished_repeat_is_a_finished_run_whatever_became_of_its_parent(status):
    finished("alone", started=AT - 1)
    parent = parent_of()
    repeat_of(parent, 1)
    repeat_of(parent, 2, status="FAILED")
    if status:
        store.end_run(parent, status)
    assert finished_names() == ["repeat 1", "alone"]
    client().delete_run(parent.run_id)
    assert finished_names() == ["repeat 1", "alone"]


def test_only_repeats_that_still_run_are_ended():
    parent = parent_of(experiment="elsewhere")
    done, failed = repeat_of(parent, 1), repeat_of(parent, 2, status="FAILED")
    killed, logged = repeat_of(parent, 3, status=None), repeat_of(parent, 4, status=None)
    store.mark_run(logged, record_of(id="c" * 32))
    other = store.start_run(record_of(tags={"repeats.id": "b" * 32}))
    store.end_repeats(REPEATS_ID, "KILLED", ["c" * 32])
    statuses = [status_of(handle) for handle in (parent, done, failed, killed, logged, other)]
    assert statuses == ["KILLED", "FINISHED", "FAILED", "KILLED", "FINISHED", "RUNNING"]


# --- finding


def test_a_marked_run_is_found_in_its_experiment_though_it_is_deleted():
    handle = store.start_run(record_of())
    store.start_run(record_of(id="c3d4"))
    assert store.find_run("a1b2", "trainmark") is None
    store.mark_run(handle, record_of())
    assert store.find_run("a1b2", "trainmark") == handle
    assert store.find_run("c3d4", "trainmark") is store.find_run("a1b2", "trainmark-demo") is None
    client().delete_run(handle.run_id)
    assert store.find_run("a1b2", "trainmark") == handle and store.is_deleted(handle)


@pytest.mark.usefixtures("pages")
def test_finished_runs_are_the_trainings_that_came_to_their_end_newest_first():
    older = finished("older", started=AT)
    for number in range(1, 4):
        finished(f"newer {number}", started=AT + number, experiment="trainmark-demo")
    for status in ("FAILED", "KILLED", None):
        finished("not done", status)
    finished("no training", tags={"recipe": "x"})
    client().delete_run(finished("deleted").run_id)
    client().delete_experiment(finished("with its experiment", experiment="other").experiment_id)
    assert finished_names() == ["newer 3", "newer 2", "newer 1", "older"]
    (row,) = store.finished_runs("trainmark")
    assert row | {"tags": {}} == {
        "run_id": older.run_id, "experiment_id": older.experiment_id, "name": "older", "started": AT, "tags": {},
        "metrics": {"test/accuracy": 0.5}, "params": record_of()["params"],
    }  # fmt: skip
    assert record_of()["tags"].items() <= row["tags"].items()


# --- the model, and the system


class Mean(torch.nn.Module):
    """Of each image's three channels."""

    def forward(self, images):
        return images.mean((2, 3))


@QUIET
def test_a_model_is_logged_to_the_run_and_the_environment_left_as_it_was(given, monkeypatch):
    monkeypatch.setenv("MLFLOW_DEFAULT_PREDICTION_DEVICE", "cuda")
    handle = store.start_run(record_of())
    before = dict(os.environ)
    store.log_model(handle, Mean(), 8, 3, ["torch", "numpy"])
    assert dict(os.environ) == before
    (run,) = runs()
    assert run.info.status == "RUNNING" and mlflow.active_run() is None
    (model,) = run.outputs.model_outputs
    monkeypatch.setenv("MLFLOW_DEFAULT_PREDICTION_DEVICE", "cpu")
    loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    images = np.random.default_rng(0).random((5, 3, 8, 8), dtype=np.float32)
    assert np.allclose(loaded.predict(images), images.mean((2, 3)), atol=1e-6)
    schema = loaded.metadata.signature.inputs.inputs[0]
    assert (schema.type, schema.shape) == (np.dtype("float32"), (-1, 3, 8, 8))


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


def requests(handle):
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


def broken_file(tmp_path, monkeypatch, handle):
    (tmp_path / "broken.db").write_bytes(b"This is no database. " * 400)
    return f"sqlite:///{(tmp_path / 'broken.db').as_posix()}", "not a database"


def missing_table(tmp_path, monkeypatch, handle):
    with sqlite3.connect(tmp_path / "store.db") as rows:
        rows.execute("drop table runs")
    return f"sqlite:///{(tmp_path / 'store.db').as_posix()}", "no such table: runs"


def missing_server(tmp_path, monkeypatch, handle):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    return f"http://127.0.0.1:{port}", ""


@pytest.mark.parametrize("fault", [broken_file, missing_table, missing_server])
def test_a_store_that_fails_is_named_in_one_line(monkeypatch, tmp_path, caplog, fault):
    handle = store.start_run(record_of())
    uri, cause = fault(tmp_path, monkeypatch, handle)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for call in requests(handle):
        message = fails(StageError, call)
        assert message.startswith(f"the MLflow store {uri} can't be used: ") and cause in message
    assert caplog.text == ""  # MLflow would print a traceback beside it
