"""An MLflow store of each test's own: a copy of one that is made once, because a first migration takes seconds."""

import shutil

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from pipeline.tracking import location

AT = 1_750_000_000_000
QUIET = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")
"""For tests that log a model: what MLflow then imports warns of its own code."""
DATASET = {"name": "folder-train", "digest": "0" * 32, "source": "{}", "context": "training", "profile": "{}"}


def fresh_store(path, factory):
    """Create an empty store in the file `path`. Returns its URI."""
    template = factory.getbasetemp() / "template.db"
    if not template.exists():
        made = template.with_suffix(".part")
        MlflowClient(f"sqlite:///{made.as_posix()}").search_experiments()
        made.replace(template)
    shutil.copy(template, path)
    return f"sqlite:///{path.as_posix()}"


@pytest.fixture(autouse=True)
def own_store(tmp_path, tmp_path_factory, monkeypatch):
    """The path of a store of the test's own, whose artifacts are beside it."""
    for key in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fresh_store(tmp_path / "store.db", tmp_path_factory))
    monkeypatch.chdir(tmp_path)  # MLflow puts the artifacts of an experiment that a test creates itself there
    yield tmp_path / "store.db"
    mlflow.set_tracking_uri(None)  # else the next test would be in this one's store


def client():
    return MlflowClient(location.store_uri())


def record_of(**changes):
    """What `start` reads of a training's record."""
    record = {
        "id": "a1b2", "name": "AMD EPYC · blog · fp32", "experiment": "trainmark", "started": AT,
        "params": {"train.lr": "0.1", "train.epochs": "2"}, "tags": {"workload": "w1", "recipe": "blog"},
        "datasets": [DATASET],
    }  # fmt: skip
    return record | changes


def runs():
    """Every run of every experiment, deleted ones too."""
    ids = [experiment.experiment_id for experiment in client().search_experiments(ViewType.ALL)]
    return list(client().search_runs(ids, run_view_type=ViewType.ALL))
