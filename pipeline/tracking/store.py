"""The MLflow store. Only this module imports mlflow, and nothing here is called while a clock runs."""

import logging
import os
import random
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.tracking import location

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a measuring tool makes no calls of its own
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # with MLflow's own 7, a dead server takes minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the address may hold a password
# Every session opens an SQLite file anew: when it was deleted and created again, an open one would be lost.
if location.database_file() is not None:
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from pipeline import files
from pipeline.errors import StageError, UsageError
from pipeline.tracking import views
from pipeline.tracking.location import store_uri

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # else a new store prints its migrations
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # else an error is also printed with traceback

RECORD_TAG = "record"
"""Tag with the id of the training's record, by which a cached training finds its run in any store."""

REPEATS_TAG, REPEAT_TAG = "repeats.id", "repeat"
"""Tags of a repeat (see records.py). The parent run of the repeats has only the first."""

PARENT_TAG = "mlflow.parentRunId"
COMPARISON_TAG = "comparison"
"""Tag of the one run of an experiment that holds the comparison of all others. It is no training."""

_IS_COMPARISON = f"tags.`{COMPARISON_TAG}` = 'true'"
_IS_TRAINING = "tags.workload != ''"


CONNECTION_ERRORS = {
    "refused": "connection refused",
    "resolve": "unknown host",
    "getaddrinfo": "unknown host",
    "name or service": "unknown host",
    "unreachable": "network unreachable",
    "certificate": "its certificate is not trusted",
    "ssl": "TLS failed",
    "proxy": "the proxy does not connect",
    "reset": "connection lost",
    "timed out": "timeout",
    "": "no connection",
}
"""Words in the error of a connection -> what is wrong, in a few words."""

DRIVERS = {
    "psycopg2": "psycopg2-binary",
    "psycopg": "'psycopg[binary]'",
    "MySQLdb": "mysqlclient",
    "mysql": "mysql-connector-python",
}
"""Module of a database's driver -> the package that has it, where their names differ."""


class StoreError(StageError):
    """The store does not answer, or refuses what it was asked for. It may work later."""


@dataclass(frozen=True)
class Handle:
    """A run in the store."""

    run_id: str
    experiment_id: str


@contextmanager
def _store_errors() -> Iterator[None]:
    """Turn an error of the store into a StageError of one line that names the store."""
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, RequestException, OSError, ValueError, ModuleNotFoundError) as error:
        message = location.hide_secrets(f"the MLflow store {location.store_uri()} {_what_is_wrong(error)}")
        raise StoreError(message) from None


def _what_is_wrong(error: BaseException) -> str:
    """What is wrong with the store, in a few words."""
    from requests import exceptions

    chain = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    statuses = [getattr(getattr(link, "response", None), "status_code", None) for link in chain]
    codes = {getattr(link, "error_code", None) for link in chain}
    if {401, 403} & {*statuses} or {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"} & codes:
        return "refuses the login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    for link in chain:
        if isinstance(link, ModuleNotFoundError) and link.name:
            module = link.name.partition(".")[0]
            return f"needs a package: pip install {DRIVERS.get(module, module)}"
        if isinstance(link, exceptions.RetryError):
            return "does not answer (its answers are errors)"
        if isinstance(link, exceptions.Timeout):
            return "does not answer (timeout)"
        if isinstance(link, exceptions.ConnectionError):
            reason = next((key for key in CONNECTION_ERRORS if key.lower() in str(link).lower()), "")
            return f"does not answer ({CONNECTION_ERRORS[reason]})"
    lines = [line for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith("(raised as a result of Query-invoked autoflush")]
    cause = location.hide_secrets(next(iter(causes + lines), type(error).__name__).strip())  # before it is cut
    return f"can't be used: {cause if len(cause) <= 200 else cause[:199] + '…'}"


# --- links


def run_table_link(experiment_id: str, base: str | None = None) -> str:
    """The UI's page with the experiment's runs side by side. `base` is the address of the UI."""
    return views.run_table_link(base or _server_url(), experiment_id)


def charts_link(experiment_id: str, base: str | None = None) -> str:
    """The UI's page with charts of the newest training's workload and precision."""
    return views.charts_link(base or _server_url(), experiment_id)


def run_link(experiment_id: str, run_id: str) -> str:
    """The UI's page of one run."""
    return views.run_link(_server_url(), experiment_id, run_id)


def _server_url() -> str:
    uri = location.public_uri()  # reports are shared, and terminals are looked at
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"


def _client() -> MlflowClient:
    _create_database()
    return MlflowClient(store_uri())


def _create_database() -> None:
    """Create the file of an SQLite store, whole or not at all. MLflow would migrate it in place: interrupted, or done
    by two processes at once, that leaves a file that can't be used."""
    path = location.database_file()
    if path is None or path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    try:
        lock = files.lock(path.with_name(f"{path.name}.lock"), patience_seconds=120.0)
    except StageError as error:
        raise OSError(str(error)) from None  # see _store_errors
    with lock:
        if path.exists():
            return
        for rest in path.parent.glob(f"{path.name}.new*"):
            rest.unlink()
        new = path.with_name(f"{path.name}.new")
        SqlAlchemyStore(location.sqlite_uri(new), _artifacts_uri(path)).engine.dispose()  # type: ignore[no-untyped-call]
        try:
            os.link(new, path)  # unlike a rename it replaces no file
        except FileExistsError:  # MLflow itself created it meanwhile
            pass
        except OSError:  # a file system without links
            new.replace(path)
        new.unlink(missing_ok=True)
        files.sync_folder(path.parent)


def _artifacts_uri(database: Path) -> str:
    """Where the artifacts of an SQLite store are: beside its file."""
    return (database.parent.absolute() / "mlartifacts").as_uri()


def _is_missing() -> bool:
    """Whether the store is an SQLite file that does not exist. MLflow creates one even to read it."""
    path = location.database_file()
    return path is not None and not path.exists()


# --- experiments


@_store_errors()
def experiment_to_show(name: str) -> str | None:
    """The id of the experiment `name`, or of its demo if only that has runs. None if neither exists."""
    if _is_missing():
        return None
    client = _client()
    experiments = [client.get_experiment_by_name(candidate) for candidate in (name, f"{name}-demo")]
    ids = [str(e.experiment_id) for e in experiments if e and e.lifecycle_stage == LifecycleStage.ACTIVE]
    with_runs = [experiment_id for experiment_id in ids if client.search_runs([experiment_id], max_results=1)]
    return next(iter(with_runs + ids), None)


@_store_errors()
def comparison_run(experiment: str) -> Handle | None:
    """The run that holds the comparison, created if missing: in `experiment` or its demo, under `mlflow run` in the
    experiment of the given run. None without such an experiment, or if the run was deleted."""
    given = _given_run(os.environ.get("MLFLOW_RUN_ID"))
    experiment_id = str(given.info.experiment_id) if given else experiment_to_show(experiment)
    if experiment_id is None:
        return None
    client = _client()
    runs = client.search_runs([experiment_id], _IS_COMPARISON, ViewType.ALL, 1)
    tags = {COMPARISON_TAG: "true"}
    handle = _handle(runs[0] if runs else client.create_run(experiment_id, tags=tags, run_name="comparison"))
    _describe_experiment(client, experiment_id)  # it links to this run
    return None if is_deleted(handle) else handle


def _given_run(given: str | None) -> Run | None:
    """The run that `mlflow run` created, by its id; None without an id, or if this store has no such run."""
    try:
        return _client().get_run(given) if given else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _is_unused(run: Run) -> bool:
    """Whether a run that `mlflow run` created can still become the run of a training: it runs, and holds none."""
    tags, params = run.data.tags, run.data.params
    return (
        run.info.status in ("RUNNING", "SCHEDULED")
        and run.info.lifecycle_stage == LifecycleStage.ACTIVE
        and not {RECORD_TAG, REPEATS_TAG, "workload"} & tags.keys()
        and not any(key.startswith("train.") for key in params)
    )


@_store_errors()
def check_given_run(resumable: Collection[str]) -> None:
    """Refuse, as a UsageError, a MLFLOW_RUN_ID that a new training must not write to: no run of this store, one that
    has ended, or one that holds another training. `resumable`: records of trainings that may go on in their run."""
    given = os.environ.get("MLFLOW_RUN_ID")
    if not given:
        return
    run = _given_run(given)
    if run is None:
        raise UsageError(f"MLFLOW_RUN_ID: {given} is no run of the store {location.shown_uri()}: unset it")
    tags = run.data.tags
    if not _is_unused(run) and not {tags.get(RECORD_TAG), tags.get(REPEATS_TAG)} & set(resumable):
        holds = "holds another training" if RECORD_TAG in tags else f"is {run.info.status} already"
        raise UsageError(f"MLFLOW_RUN_ID: the run {given} {holds}: unset it, or give a new run")


def _get_or_create_experiment(client: MlflowClient, name: str) -> str:
    """The id of the experiment `name`. The artifacts of a new one in an SQLite store are beside the
    database."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        if experiment.lifecycle_stage == LifecycleStage.DELETED:
            raise StageError(f'tracking.experiment: "{name}" is deleted in this store: restore it, or name another')
        return str(experiment.experiment_id)
    path = location.database_file()
    try:
        # MLflow's own default is below the current folder, which may be thrown away.
        return str(client.create_experiment(name, _artifacts_uri(path) if path else None))
    except MlflowException:  # another process may have created it meanwhile
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def _describe_experiment(client: MlflowClient, experiment_id: str) -> None:
    """Bring the experiment's description and views in the UI up to date."""
    present = client.get_experiment(experiment_id).tags
    comparison = client.search_runs([experiment_id], _IS_COMPARISON, max_results=1)
    newest = client.search_runs([experiment_id], _IS_TRAINING, max_results=1)
    report_id = comparison[0].info.run_id if comparison else None
    tags = views.experiment_tags(experiment_id, report_id, newest[0].data.tags if newest else {})
    for key, value in tags.items():
        if present.get(key) != value:
            client.set_experiment_tag(experiment_id, key, value)


# --- a run, from its start to its end


@_store_errors()
def start_run(record: Mapping[str, Any], given: str | None = None, parent: Handle | None = None) -> Handle:
    """The new run of a record, or of the parent of repeats: the run `given` by `mlflow run` if it is unused, else one
    in its experiment, else one below `parent` or in the record's experiment. It can be found from the start.

    If another process created the same run at the same time, both withdraw theirs, and the first to try again wins.
    """
    key, value = (RECORD_TAG, record["id"]) if "id" in record else (REPEATS_TAG, record["tags"][REPEATS_TAG])
    client, given_run = _client(), None if parent else _given_run(given)
    if given_run and _is_unused(given_run):
        client.update_run(given_run.info.run_id, status="RUNNING", name=record["name"])
        client.set_tag(given_run.info.run_id, key, value)
        return _handle(given_run)
    if parent or given_run:
        experiment_id = parent.experiment_id if parent else str(given_run.info.experiment_id)  # type: ignore[union-attr]
    else:
        experiment_id = _get_or_create_experiment(client, record["experiment"])
    tags = {key: value} | ({PARENT_TAG: parent.run_id} if parent else {})
    while True:
        handle = _handle(client.create_run(experiment_id, record["started"], tags, record["name"]))
        if not _others(client, handle, key, value):
            return handle
        discard_run(handle)
        time.sleep(random.uniform(0.1, 1.0))
        if others := _others(client, handle, key, value):
            return _handle(others[0])


def _others(client: MlflowClient, handle: Handle, key: str, value: str) -> list[Run]:
    """The other runs of the same record; of the same repeats, the other parent runs."""
    runs = _search(client, [handle.experiment_id], f"tags.`{key}` = '{value}'")
    return [
        run
        for run in runs
        if run.info.run_id != handle.run_id and (key == RECORD_TAG or REPEAT_TAG not in run.data.tags)
    ]


@_store_errors()
def describe_start(handle: Handle, record: Mapping[str, Any]) -> None:
    """Log what a record begins with: params, tags and datasets. The run is RUNNING from then on."""
    client = _client()
    client.update_run(handle.run_id, status="RUNNING")
    params = [Param(key, value) for key, value in record["params"].items()]
    for start in range(0, len(params), 100):  # the most that one call takes
        client.log_batch(handle.run_id, params=params[start : start + 100])
    set_tags(handle, record["tags"])
    log_datasets(handle, record["datasets"])
    _describe_experiment(client, handle.experiment_id)


@_store_errors()
def set_status(handle: Handle, status: str) -> None:
    """Set the run to RUNNING, or to SCHEDULED while it waits for others."""
    _client().update_run(handle.run_id, status=status)


@_store_errors()
def end_run(handle: Handle, status: str, at: int | None = None) -> None:
    """End the run as FINISHED, FAILED or KILLED, `at` milliseconds since 1970."""
    _client().set_terminated(handle.run_id, status, at)


@_store_errors()
def discard_run(handle: Handle) -> None:
    """Delete the run, so that `find_run` and `find_repeats` do not find it any more."""
    set_tags(handle, {RECORD_TAG: None, REPEATS_TAG: None})  # first: a deleted run can't be changed
    _client().delete_run(handle.run_id)


@_store_errors()
def refer_to(given: str | None, parent: Handle) -> None:
    """Write into the run that `mlflow run` created which other run holds the repeats, if it is another."""
    run = _given_run(given)
    if run and run.info.run_id != parent.run_id and _is_unused(run):
        set_tags(_handle(run), {"mlflow.note.content": f"resumed: all of it is in run {parent.run_id}"})


# --- what a run holds


@_store_errors()
def set_tags(handle: Handle, tags: Mapping[str, Any]) -> None:
    """Set tags of the run, then delete those whose value is None."""
    client = _client()
    client.log_batch(handle.run_id, tags=[RunTag(k, str(v)) for k, v in tags.items() if v is not None])
    deleted = [key for key, value in tags.items() if value is None]
    present = client.get_run(handle.run_id).data.tags if deleted else {}
    for key in deleted:
        if key in present:
            client.delete_tag(handle.run_id, key)


def log_metrics(handle: Handle, metrics: Mapping[str, float], at: int, step: int = 0) -> None:
    """Log metrics at `at` (milliseconds since 1970) under `step`."""
    _log_batches(handle, [Metric(key, float(value), at, step) for key, value in metrics.items()])


def log_series(handle: Handle, key: str, values: Sequence[float], at: int) -> None:
    """Log the course of one metric. Its steps count from 1."""
    _log_batches(handle, [Metric(key, float(value), at, step) for step, value in enumerate(values, 1)])


def log_epochs(handle: Handle, epochs: Iterable[Mapping[str, Any]]) -> None:
    """Log epochs of a record, in few requests: their figures under their numbers, and the samples of the system under
    theirs."""
    metrics = []
    for epoch in epochs:
        figures = {key: value for key, value in epoch["figures"].items() if key != "epoch"}
        for values, at, step in (
            (figures, epoch["at"], epoch["figures"]["epoch"]),
            *((sample["figures"], sample["at"], sample["step"]) for sample in epoch["system"]),
        ):
            metrics += [Metric(key, float(value), at, step) for key, value in values.items()]
    _log_batches(handle, metrics)


@_store_errors()
def _log_batches(handle: Handle, metrics: Sequence[Metric]) -> None:
    for start in range(0, len(metrics), 1000):  # the most that one call takes
        _client().log_batch(handle.run_id, metrics=metrics[start : start + 1000])


@_store_errors()
def log_datasets(handle: Handle, datasets: Iterable[Mapping[str, str]]) -> None:
    """Log splits (see `records.dataset_inputs`) as the run's inputs."""
    inputs = []
    for dataset in datasets:
        fields = {key: value for key, value in dataset.items() if key != "context"}
        tags = [InputTag("mlflow.data.context", dataset["context"])]
        inputs.append(DatasetInput(Dataset(source_type="trainmark", **fields), tags))
    _client().log_inputs(handle.run_id, inputs)


@_store_errors()
def log_artifacts(handle: Handle, artifacts: Mapping[str, Path]) -> None:
    """Log files by their artifact paths. Each keeps its own file name."""
    for name, file in artifacts.items():
        folder = Path(name).parent.as_posix()
        _client().log_artifact(handle.run_id, str(file), None if folder == "." else folder)


@_store_errors()
def log_text(handle: Handle, name: str, text: str) -> None:
    """Write `text` to the artifact `name`, over an earlier one."""
    _client().log_text(handle.run_id, text, name)


@_store_errors()
def log_model(handle: Handle, model: Any, image_size: int, classes: int, requirements: list[str]) -> None:
    """Log a torch module (on the CPU, in evaluation mode) from (N, 3, image_size, image_size) float32 images in 0..1
    to (N, classes) logits.

    It is saved as a torch.export program, which loads without our code and without the accelerator. Signature and
    requirements are given, because MLflow would load the model several times to infer them, and fails on CUDA.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape = (-1, 3, image_size, image_size)
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("float32"), shape)]),
        Schema([TensorSpec(np.dtype("float32"), (-1, classes))]),
    )
    example = np.zeros((2, *shape[1:]), np.float32)  # one image alone would fix the batch size at 1
    with _active_run(handle), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # torch 2.11's export
        mlflow.pytorch.log_model(
            model,
            name="model",
            signature=signature,
            input_example=example,
            pip_requirements=requirements,
            serialization_format="pt2",
            tags={"mlflow.user": "", "mlflow.source.name": ""},  # else who is logged in, and where the project is
        )


def preload() -> None:
    """Import what `log_model` needs."""
    import mlflow.pytorch  # noqa: F401
    import torch.export._trace  # noqa: F401


@contextmanager
def _active_run(handle: Handle) -> Iterator[None]:
    """Make the run MLflow's active one, for calls that take neither client nor run id. Its status stays RUNNING."""
    environment = dict(os.environ)
    # MLflow loads the logged model to try it, and would move an exported program, which can't be moved.
    os.environ["MLFLOW_DEFAULT_PREDICTION_DEVICE"] = "cpu"
    for key in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):  # mlflow.start_run refuses a run of another experiment
        os.environ.pop(key, None)
    mlflow.set_tracking_uri(store_uri())  # this writes into the environment, too
    try:
        with mlflow.start_run(run_id=handle.run_id):
            yield
        set_status(handle, "RUNNING")
    finally:
        os.environ.clear()
        os.environ.update(environment)


# --- reading


@_store_errors()
def run_tags(handle: Handle) -> dict[str, str]:
    """The run's tags."""
    return dict(_client().get_run(handle.run_id).data.tags)


@_store_errors()
def is_finished(handle: Handle) -> bool:
    """Whether the run came to its end."""
    return bool(_client().get_run(handle.run_id).info.status == "FINISHED")


@_store_errors()
def is_deleted(handle: Handle) -> bool:
    """Whether somebody deleted the run. It then takes nothing more."""
    return bool(_client().get_run(handle.run_id).info.lifecycle_stage == LifecycleStage.DELETED)


@_store_errors()
def list_artifacts(run_id: str, folder: str) -> list[str]:
    """The paths of a run's artifacts directly below `folder`."""
    return [artifact.path for artifact in _client().list_artifacts(run_id, folder)]


@_store_errors()
def download_artifact(run_id: str, name: str, folder: Path) -> Path:
    """Fetch a run's artifact to somewhere in `folder`. Returns where it is then."""
    return Path(_client().download_artifacts(run_id, name, str(folder)))


@_store_errors()
def history(run_id: str, keys: Iterable[str]) -> dict[str, list[float]]:
    """The values of a run's metrics in order of step, of each step the latest: a resumed training may repeat an epoch.
    A metric that the run lacks has none."""
    courses = {}
    for key in keys:
        course = sorted(_client().get_metric_history(run_id, key), key=lambda metric: (metric.step, metric.timestamp))
        courses[key] = list({metric.step: metric.value for metric in course}.values())
    return courses


def find_run(record_id: str, experiment: str, given: str | None = None) -> Handle | None:
    """The run of a record in `experiment`, or in that of the run `given` by `mlflow run`. Includes deleted runs, so
    that they are not recreated."""
    runs = _find_tagged(RECORD_TAG, record_id, experiment, given)
    return _handle(runs[0]) if runs else None


def find_repeats(
    repeats_id: str, experiment: str, given: str | None = None
) -> tuple[Handle | None, dict[int, dict[str, Any]]]:
    """The parent run of these repeats, found as `find_run` does, and the finished repeats by number (see `_row`)."""
    runs = _find_tagged(REPEATS_TAG, repeats_id, experiment, given)
    parent = next((run for run in runs if REPEAT_TAG not in run.data.tags), None)
    finished = {
        int(run.data.tags[REPEAT_TAG]): _row(run)
        for run in runs
        if REPEAT_TAG in run.data.tags
        and (run.info.status, run.info.lifecycle_stage) == ("FINISHED", LifecycleStage.ACTIVE)
    }
    return _handle(parent) if parent else None, finished


@_store_errors()
def finished_runs(experiment: str | None = None) -> list[dict[str, Any]]:
    """The finished trainings of all experiments, or of the one named, newest first (see `_row`). The parent run of
    repeats is no training."""
    if _is_missing():
        return []
    client = _client()
    experiments = [e.experiment_id for e in client.search_experiments() if experiment in (None, e.name)]
    runs = _search(client, experiments, f"attributes.status = 'FINISHED' and {_IS_TRAINING}")
    return [_row(run) for run in runs if REPEATS_TAG not in run.data.tags or REPEAT_TAG in run.data.tags]


@_store_errors()
def _find_tagged(key: str, value: str, experiment: str, given: str | None) -> list[Run]:
    client, given_run = _client(), _given_run(given)
    named = None if given_run else client.get_experiment_by_name(experiment)
    experiment_id = given_run.info.experiment_id if given_run else named and named.experiment_id
    return _search(client, [experiment_id] if experiment_id else [], f"tags.`{key}` = '{value}'", ViewType.ALL)


def _search(client: MlflowClient, experiments: list[str], query: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    """All runs that match `query`, newest first."""
    runs: list[Run] = []
    token = None
    while experiments:
        page = client.search_runs(experiments, query, view, order_by=["attributes.start_time DESC"], page_token=token)
        runs += page
        token = page.token
        if not token:
            break
    return runs


def _handle(run: Run) -> Handle:
    return Handle(run.info.run_id, str(run.info.experiment_id))


def _row(run: Run) -> dict[str, Any]:
    """The run as plain values. `started` is in milliseconds since 1970."""
    return {
        "run_id": run.info.run_id,
        "experiment_id": str(run.info.experiment_id),
        "name": run.info.run_name,
        "started": run.info.start_time,
        "tags": dict(run.data.tags),
        "metrics": dict(run.data.metrics),
        "params": dict(run.data.params),
    }
