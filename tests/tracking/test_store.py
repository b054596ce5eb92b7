"""The store: whole runs in it, what it holds of repeats and experiments, and the one line with which it fails."""

import os
import socket
import sqlite3
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


def start(parent=None, given=None, **changes):
    """The run of a new record, with what the record begins with."""
    record = record_of(**{"id": uuid.uuid4().hex} | changes)
    handle = store.start_run(record, given, parent)
    store.describe_start(handle, record)
    return handle


def finished(name, status="FINISHED", **changes):
    handle = start(name=name, **changes)
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


# --- a run


def test_a_run_starts_with_params_tags_and_datasets():
    handle = start(tags={"workload": "w1", "hardware.cores": 2})
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
    handle = start(params=params)
    metrics = {f"figure{index}": index / 4 for index in range(1001)}
    store.log_metrics(handle, metrics, AT)
    assert (run_of(handle).data.params, run_of(handle).data.metrics) == (params, metrics)


def test_metrics_are_logged_under_their_steps():
    handle = start()
    samples = [{"figures": {"system/cpu": 7.5}, "at": AT + step, "step": step} for step in (4, 5)]
    store.log_epochs(handle, [{"at": AT + 9, "figures": {"epoch": 3, "train/loss": 0.25}, "system": samples}])
    store.log_series(handle, "course", [7.5, 8], AT)
    store.log_series(handle, "nothing", [], AT)
    store.log_metrics(handle, {"train/loss": 0.125}, AT + 99, step=3)  # an epoch that was resumed
    store.log_metrics(handle, {"train/loss": 0.5}, AT + 3, step=2)
    assert {
        key: sorted((m.value, m.step, m.timestamp) for m in client().get_metric_history(handle.run_id, key))
        for key in run_of(handle).data.metrics
    } == {
        "train/loss": [(0.125, 3, AT + 99), (0.25, 3, AT + 9), (0.5, 2, AT + 3)],
        "system/cpu": [(7.5, 4, AT + 4), (7.5, 5, AT + 5)],
        "course": [(7.5, 1, AT), (8.0, 2, AT)],
    }
    keys = ("train/loss", "course", "test/loss")
    assert store.history(handle.run_id, keys) == {"train/loss": [0.5, 0.125], "course": [7.5, 8.0], "test/loss": []}


# --- experiments


def described(experiment_id, report_id=None):
    """Whether the experiment has its description and views, with a link to the report and the tags of the runs here."""
    tags = client().get_experiment(experiment_id).tags
    return views.experiment_tags(experiment_id, report_id, record_of()["tags"]).items() <= tags.items()


def test_an_experiment_is_created_once_and_described_whoever_created_it():
    first, second = start(), start()
    assert first.experiment_id == second.experiment_id and first.run_id != second.run_id
    assert described(first.experiment_id)
    other = client().create_experiment("other")
    assert start(experiment="other").experiment_id == other and described(other)


def test_a_deleted_experiment_is_refused_and_not_shown():
    client().delete_experiment(start().experiment_id)
    assert fails(StageError, store.start_run, record_of()).startswith("tracking.experiment:")
    assert len(runs()) == 1 and store.experiment_to_show("trainmark") is None


def test_the_experiment_to_show_is_the_one_with_runs():
    assert store.experiment_to_show("trainmark") is None
    real = client().create_experiment("trainmark")
    assert store.experiment_to_show("trainmark") == real
    demo = start(experiment="trainmark-demo").experiment_id
    assert store.experiment_to_show("trainmark") == demo
    start()
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
    assert start(id="a1b2", given=given.run_id) == given
    (run,) = runs()
    assert run.info.run_name == record_of()["name"] and run.data.params == {"lr": "7"} | record_of()["params"]
    assert client().get_experiment_by_name("trainmark") is None and described(given.experiment_id)
    assert store.find_run("a1b2", "trainmark", given.run_id) == given
    assert store.find_run("a1b2", "trainmark") is None
    store.check_given_run(["a1b2"])  # it may be resumed


@pytest.mark.parametrize("state", ["FINISHED", "FAILED", "deleted", "params", "record", "repeats", "unknown"])
def test_a_given_run_that_a_training_must_not_write_to_is_refused(given, monkeypatch, state):
    store.check_given_run([])  # it is new
    if state in ("FINISHED", "FAILED"):
        client().set_terminated(given.run_id, state)
    elif state == "deleted":
        client().delete_run(given.run_id)
    elif state == "params":
        client().log_param(given.run_id, "train.lr", "0.2")
    elif state == "unknown":
        monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    else:
        client().set_tag(given.run_id, {"record": "record", "repeats": "repeats.id"}[state], "c3d4")
    before = [run.to_dictionary() for run in runs()]
    assert fails(UsageError, store.check_given_run, ["a1b2"]).startswith("MLFLOW_RUN_ID: ")
    if state != "unknown":
        assert start(given=given.run_id).run_id != given.run_id
        assert [run.to_dictionary() for run in runs() if run.info.run_id == given.run_id] == before
    monkeypatch.delenv("MLFLOW_RUN_ID")
    store.check_given_run([])


# --- repeats


SET = record_of()["tags"] | {"repeats.id": REPEATS_ID, "repeats": "2"}


def parent_of(**changes):
    fields = record_of(name="both", tags=SET, datasets=[], **changes)
    del fields["id"]
    handle = store.start_run(fields)
    store.describe_start(handle, fields)
    return handle


def repeat_of(parent, number, status="FINISHED"):
    handle = start(parent, name=f"repeat {number}", tags=SET | {"repeat": str(number)})
    if status:
        store.end_run(handle, status)
    return handle


@pytest.mark.usefixtures("pages")
def test_finished_repeats_are_found_with_their_parent_and_are_finished_runs():
    assert store.find_repeats(REPEATS_ID, "trainmark") == (None, {})
    finished("alone", started=AT - 1)
    parent = parent_of()
    children = {number: repeat_of(parent, number).run_id for number in (2, 1)}
    repeat_of(parent, 3, status="FAILED")
    client().delete_run(repeat_of(parent, 4).run_id)
    start(tags={"repeats.id": "b" * 32, "repeat": "1"})
    present, rows = store.find_repeats(REPEATS_ID, "trainmark")
    assert present == parent == parent_of() and {number: row["run_id"] for number, row in rows.items()} == children
    assert client().get_run(children[1]).data.tags["mlflow.parentRunId"] == parent.run_id
    assert store.find_repeats(REPEATS_ID, "another") == (None, {})
    for status in ("FAILED", "FINISHED"):  # whatever became of their parent
        store.end_run(parent, status)
        assert sorted(finished_names()) == ["alone", "repeat 1", "repeat 2"]
    client().delete_run(parent.run_id)
    assert sorted(finished_names()) == ["alone", "repeat 1", "repeat 2"]


def test_a_deleted_parent_is_found_unless_it_was_discarded():
    parent = parent_of()
    client().delete_run(parent.run_id)
    assert store.find_repeats(REPEATS_ID, "trainmark")[0] == parent
    client().restore_run(parent.run_id)
    store.discard_run(parent)
    assert store.find_repeats(REPEATS_ID, "trainmark") == (None, {})


# --- finding


def test_a_run_is_found_in_its_experiment_though_it_is_deleted():
    handle = start(id="a1b2")
    assert start(id="c3d4") != handle == start(id="a1b2")
    assert store.find_run("a1b2", "trainmark") == handle
    assert store.find_run("e5f6", "trainmark") is store.find_run("a1b2", "trainmark-demo") is None
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


# --- the model


class Mean(torch.nn.Module):
    """Of each image's three channels."""

    def forward(self, images):
        return images.mean((2, 3))


@QUIET
def test_a_model_is_logged_to_the_run_and_the_environment_left_as_it_was(given, monkeypatch):
    monkeypatch.setenv("MLFLOW_DEFAULT_PREDICTION_DEVICE", "cuda")
    handle = start(given=given.run_id)
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


# --- a store that fails


def requests(handle):
    """What is asked of a store, each as a call without arguments."""
    return [
        lambda: store.start_run(record_of()),
        lambda: store.check_given_run([]),
        lambda: store.refer_to("f" * 32, handle),
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
    return f"http://127.0.0.1:{port}", "connection refused"


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("psycopg2", "psycopg2-binary"),
        ("psycopg", "'psycopg[binary]'"),
        ("MySQLdb", "mysqlclient"),
        ("pymysql", "pymysql"),
    ],
)
def test_a_database_without_its_driver_names_the_package(monkeypatch, module, package):
    scheme = {"MySQLdb": "mysql+mysqldb", "pymysql": "mysql+pymysql"}.get(module, f"postgresql+{module}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://me:secret@127.0.0.1:1/runs")
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    message = fails(store.StoreError, store.find_run, "a1b2", "trainmark")
    assert message.endswith(f"needs a package: pip install {package}") and "secret" not in message


@pytest.mark.parametrize("fault", [broken_file, missing_table, missing_server])
def test_a_store_that_fails_is_named_in_one_line(monkeypatch, tmp_path, caplog, fault):
    handle = start()
    uri, cause = fault(tmp_path, monkeypatch, handle)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    for call in requests(handle):
        message = fails(store.StoreError, call)
        assert message.startswith(f"the MLflow store {uri} ") and cause in message
    assert caplog.text == ""  # MLflow would print a traceback beside it


@pytest.mark.parametrize(
    ("status", "expected"),
    [(401, "refuses the login"), (403, "refuses the login"), (500, "does not answer"), (404, "")],
)
def test_a_server_that_answers_with_an_error_is_named_without_its_page(monkeypatch, status, expected):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>" + b"x" * 5000)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://jane:hunter2@127.0.0.1:{server.server_port}")
        message = fails(store.StoreError, store.find_run, "a1b2", "trainmark")
        server.shutdown()
    assert message.startswith(f"the MLflow store http://127.0.0.1:{server.server_port} {expected}")
    assert len(message) < 300 and "hunter2" not in message
