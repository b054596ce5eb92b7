"""Where the store and its artifacts are, and that no secret is shown."""

import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import fails
from stores import own_store, record_of  # noqa: F401 (own_store: each test has its own)

from pipeline import config, ui
from pipeline.errors import StageError
from pipeline.tracking import location, pending, store, views

SERVER = "https://server:5000/mlflow"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "sqlite:///{project}/mlflow.db"),
        ("", "sqlite:///{project}/mlflow.db"),
        ("sqlite:///mine/other.db", "sqlite:///{project}/mine/other.db"),
        ("sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        ("https://server/mlflow/", "https://server/mlflow/"),
        ("postgresql://user@server/db", "postgresql://user@server/db"),
    ],
)
def test_a_relative_sqlite_store_is_in_the_project(monkeypatch, tmp_path, given, expected):
    monkeypatch.setattr(config, "PROJECT", tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if given is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert location.store_uri() == expected.format(project=tmp_path.as_posix())
    assert location.shown_uri() == (given or "sqlite:///mlflow.db").replace("user@", "")


def test_a_temporary_experiment_of_dvc_uses_the_projects_store():
    assert config._project(Path("/home/jane/trainmark/.dvc/tmp/exps/standalone/tmpx1")) == Path("/home/jane/trainmark")
    assert config._project(Path("/home/jane/trainmark")) == Path("/home/jane/trainmark")


@pytest.mark.parametrize("name", ["a b", "issue #7", "100%", "50%25", "what?"])
@pytest.mark.parametrize("given", [None, "sqlite:///mlflow.db", "sqlite:///{project}/mlflow.db?timeout=20"])
def test_store_and_artifacts_are_in_the_projects_folder_whatever_it_is_called(
    own_store, monkeypatch, tmp_path, name, given
):
    project = tmp_path / name
    project.mkdir()
    own_store.rename(project / "mlflow.db")
    monkeypatch.setattr(config, "PROJECT", project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if given:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given.format(project=quote(project.as_posix())))
    (tmp_path / "notes.txt").write_text("from another folder")
    handle = store.start_run(record_of())
    store.log_artifacts(handle, {"papers/notes.txt": tmp_path / "notes.txt"})
    assert location.database_file() == project / "mlflow.db"
    assert (project / "mlartifacts" / handle.run_id / "artifacts" / "papers" / "notes.txt").exists()
    assert {path.name for path in project.iterdir()} == {"mlflow.db", "mlartifacts"}
    others = [path for path in tmp_path.iterdir() if path not in (project, tmp_path / "notes.txt")]
    assert all("%" in path.name and not any(path.iterdir()) for path in others)  # MLflow's, of escaped names
    assert given or others == [] or name in ("100%", "50%25", "what?")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://jane:hunter2@server:5000/mlflow", SERVER),
        ("https://hunter2@server:5000/mlflow", SERVER),
        ("https://jane:p@ss:hunter2@server:5000/mlflow", SERVER),
        ("mysql+pymysql://jane:p/hunter2@server/db", "mysql+pymysql://server/db"),
        ("postgresql://server/db?user=jane&password=hunter2", "postgresql://server/db?user=jane&password=***"),
        ("https://server:5000/a@b?API_KEY=hunter2", "https://server:5000/a@b?API_KEY=***"),
        ("sqlite:////home/jane@firm/mlflow.db", "sqlite:////home/jane@firm/mlflow.db"),
    ],
)
def test_an_address_is_shown_without_its_secrets(monkeypatch, uri, shown):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert location.shown_uri() == location.public_uri() == pending.target("x")["store"] == shown
    assert location.hide_secrets(f"it is {uri} !") == f"it is {shown} !"
    links = [store.run_table_link("7"), store.charts_link("7"), store.run_link("7", "abc")]
    assert not any("hunter2" in link for link in links)
    if shown == SERVER:
        assert links[2] == views.run_link(SERVER, "7", "abc")


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"])
def test_a_secret_of_the_environment_is_in_no_message(monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "hunter2")
    (tmp_path / "hunter2").write_text("no folder")
    for uri in ("hunter2://server", "mysql://jane:hunter2@server:hunter2/db", f"sqlite:///{tmp_path}/hunter2/x.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        message = fails(store.StoreError, store.find_run, "a1b2", "trainmark")
        assert message.startswith("the MLflow store ") and "hunter2" not in message
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////srv/hunter2.db")
    assert location.public_uri() == "sqlite:////srv/hunter2.db"  # it tells stores apart, whatever is secret


def test_the_last_line_of_the_uis_server_is_shown_without_secrets(monkeypatch, tmp_path):
    store.start_run(record_of())
    monkeypatch.setattr(ui, "_answers", lambda port: False)
    command = [sys.executable, "-c", "import sys; sys.exit('no answer from mysql://jane:hunter2@server/db')"]
    message = fails(StageError, ui.run, config.load(), tmp_path, lambda port: command)
    assert message.endswith("status 1: no answer from mysql://server/db")


def test_the_experiment_of_mlflows_environment_is_used(monkeypatch):
    assert location.experiment_name("trainmark") == "trainmark"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert location.experiment_name("trainmark") == "mine"
