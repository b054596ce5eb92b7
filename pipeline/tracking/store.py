"""The MLflow store. Only this module imports mlflow, and nothing here is called while a clock runs."""

import logging
import os
import re
import threading
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a measuring tool makes no calls of its own
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # with MLflow's own 7, a dead server takes minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from pipeline.config import ROOT
from pipeline.errors import StageError, UsageError
from pipeline.tracking import views

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
    except (MlflowException, SQLAlchemyError, RequestException, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        causes = [line for line in lines if not line.startswith("(raised as a result of Query-invoked autoflush")]
        cause = next(iter(causes + lines), type(error).__name__)
        raise StageError(f"the MLflow store {store_uri()} can't be used: {cause}") from error


# --- where the store is


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, else SQLite beside params.yaml. A relative SQLite path starts there, too.

    Raises UsageError if the store would be lost with the temporary folder of a DVC experiment.
    """
    uri = shown_uri()
    relative = uri.removeprefix("sqlite:///")
    if relative == uri or Path(relative).is_absolute():
        return uri
    if ".dvc/tmp/exps" in ROOT.as_posix():
        raise UsageError(
            f"MLFLOW_TRACKING_URI: {uri} would be lost with this experiment's temporary folder: expected an absolute "
            f"one for queued and --temp experiments, such as sqlite:////home/me/{relative}"
        )
    return f"sqlite:///{(ROOT / relative).as_posix()}"


def shown_uri() -> str:
    """The store as a person may type it in the project's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def run_table_link(experiment_id: str, base: str | None = None) -> str:
    """The UI's page with the experiment's runs side by side. `base` is the address of the UI."""
    return views.run_table_link(base or _server_url(), experiment_id)


def charts_link(experiment_id: str, base: str | None = None) -> str:
    """The UI's page with charts of the newest training's workload and precision."""
    return views.charts_link(base or _server_url(), experiment_id)


def run_link(experiment_id: str, run_id: str) -> str:
    """The UI's page of one run, without a name or password of the server: reports are shared."""
    return views.run_link(re.sub(r"//[^/@]*@", "//", _server_url()), experiment_id, run_id)


def _server_url() -> str:
    uri = store_uri()
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"


def _client() -> MlflowClient:
    return MlflowClient(store_uri())


def _is_missing() -> bool:
    """Whether the store is an SQLite file that does not exist. MLflow creates one even to read it."""
    path = store_uri().removeprefix("sqlite:///")
    return path != store_uri() and not Path(path).exists()


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
    experiment_id = _given_experiment_id() or experiment_to_show(experiment)
    if experiment_id is None:
        return None
    client = _client()
    runs = client.search_runs([experiment_id], _IS_COMPARISON, ViewType.ALL, 1)
    tags = {COMPARISON_TAG: "true"}
    handle = _handle(runs[0] if runs else client.create_run(experiment_id, tags=tags, run_name="comparison"))
    _describe_experiment(client, experiment_id)  # it links to this run
    return None if is_deleted(handle) else handle


def _given_experiment_id() -> str | None:
    """The id of the experiment of the run that `mlflow run` created, if any."""
    given = os.environ.get("MLFLOW_RUN_ID")
    return str(_client().get_run(given).info.experiment_id) if given else None


def _get_or_create_experiment(client: MlflowClient, name: str) -> str:
    """The id of the experiment `name`. A new one in our own SQLite store keeps its artifacts beside it."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        if experiment.lifecycle_stage == LifecycleStage.DELETED:
            raise StageError(f'tracking.experiment: "{name}" is deleted in this store: restore it, or name another')
        return str(experiment.experiment_id)
    own_store = not os.environ.get("MLFLOW_TRACKING_URI")
    return str(client.create_experiment(name, (ROOT / "mlartifacts").as_uri() if own_store else None))


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


def start_run(record: Mapping[str, Any], parent: Handle | None = None) -> Handle:
    """Open a run with the record's params, tags and datasets: a new one below `parent`, else the one that `mlflow run`
    created, else a new one."""
    with _store_errors():
        client, given = _client(), os.environ.get("MLFLOW_RUN_ID")
        if given and parent is None:
            run = client.get_run(given)
            client.update_run(given, status="RUNNING", name=record["name"])
        else:
            experiment_id = parent.experiment_id if parent else _get_or_create_experiment(client, record["experiment"])
            tags = {PARENT_TAG: parent.run_id} if parent else None
            run = client.create_run(experiment_id, record["started"], tags, record["name"])
        handle = _handle(run)
    with end_on_failure(handle), _store_errors():
        params = [Param(key, value) for key, value in record["params"].items()]
        for start in range(0, len(params), 100):  # the most that one call takes
            client.log_batch(handle.run_id, params=params[start : start + 100])
        set_tags(handle, record["tags"])
        log_datasets(handle, record["datasets"])
        _describe_experiment(client, handle.experiment_id)
    return handle


def mark_run(handle: Handle, record: Mapping[str, Any]) -> None:
    """Tag the run as the record's, so that `find_run` finds it."""
    set_tags(handle, {RECORD_TAG: record["id"]})


@_store_errors()
def set_status(handle: Handle, status: str) -> None:
    """Set the run to RUNNING, or to SCHEDULED while it waits for others."""
    _client().update_run(handle.run_id, status=status)


@_store_errors()
def end_run(handle: Handle, status: str, at: int | None = None) -> None:
    """End the run as FINISHED, FAILED or KILLED, `at` milliseconds since 1970."""
    _client().set_terminated(handle.run_id, status, at)


@contextmanager
def end_on_failure(handle: Handle) -> Iterator[None]:
    """End the run as KILLED after Ctrl-C, else as FAILED, if the block raises. An error of the store meanwhile is
    suppressed, so that it does not hide the first one."""
    try:
        yield
    except BaseException as error:
        with suppress(StageError):
            end_run(handle, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


@contextmanager
def discard_on_failure(handles: Sequence[Handle]) -> Iterator[None]:
    """Discard the runs that `handles` holds by then if the block raises: nothing was trained, so no run has failed."""
    try:
        yield
    except BaseException:
        for handle in handles:
            with suppress(StageError):
                discard_run(handle)
        raise


@_store_errors()
def discard_run(handle: Handle) -> None:
    """Delete the run, so that `find_run` and `find_repeats` do not find it any more."""
    set_tags(handle, {RECORD_TAG: None, REPEATS_TAG: None})  # first: a deleted run can't be changed
    _client().delete_run(handle.run_id)


@_store_errors()
def end_repeats(repeats_id: str, status: str, finished: Collection[str] = ()) -> None:
    """End the repeats that still run, and their parent run, in whatever experiment: FAILED or KILLED, but FINISHED if
    the training's record is among `finished`."""
    client = _client()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in _search(client, experiments, f"tags.`{REPEATS_TAG}` = '{repeats_id}'"):
        if run.info.status == "RUNNING":
            is_finished = run.data.tags.get(RECORD_TAG) in finished
            client.set_terminated(run.info.run_id, "FINISHED" if is_finished else status)


def refer_given_run(repeats_id: str) -> None:
    """Write into the run that `mlflow run` created which other run is the parent of these repeats, if one is."""
    given = os.environ.get("MLFLOW_RUN_ID")
    parent = find_repeats(repeats_id, "")[0] if given else None
    if given and parent and parent.run_id != given:
        note = f"resumed: all of it is in run {parent.run_id}"
        set_tags(Handle(given, parent.experiment_id), {"mlflow.note.content": note})


# --- what a run holds


@_store_errors()
def set_tags(handle: Handle, tags: Mapping[str, Any]) -> None:
    """Set tags of the run, and delete those whose value is None."""
    client = _client()
    deleted = [key for key, value in tags.items() if value is None]
    present = client.get_run(handle.run_id).data.tags if deleted else {}
    for key in deleted:
        if key in present:
            client.delete_tag(handle.run_id, key)
    client.log_batch(handle.run_id, tags=[RunTag(k, str(v)) for k, v in tags.items() if v is not None])


def log_metrics(handle: Handle, metrics: Mapping[str, float], at: int, step: int = 0) -> None:
    """Log metrics at `at` (milliseconds since 1970) under `step`."""
    _log_batches(handle, [Metric(key, float(value), at, step) for key, value in metrics.items()])


def log_series(handle: Handle, key: str, values: Sequence[float], at: int) -> None:
    """Log the course of one metric. Its steps count from 1."""
    _log_batches(handle, [Metric(key, float(value), at, step) for step, value in enumerate(values, 1)])


def log_epoch(handle: Handle, epoch: Mapping[str, Any]) -> None:
    """Log an epoch of a record: its figures under its number, and the samples of the system under theirs."""
    figures = {key: value for key, value in epoch["figures"].items() if key != "epoch"}
    log_metrics(handle, figures, epoch["at"], epoch["figures"]["epoch"])
    for sample in epoch["system"]:
        log_metrics(handle, sample["figures"], sample["at"], sample["step"])


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
        )


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
    """The values of a run's metrics in order of step. A metric that the run lacks has none."""
    courses = {key: _client().get_metric_history(run_id, key) for key in keys}
    return {key: [m.value for m in sorted(course, key=lambda m: int(m.step))] for key, course in courses.items()}


def find_run(record_id: str, experiment: str) -> Handle | None:
    """The run of a record in `experiment`, under `mlflow run` in the experiment of the given run. Includes deleted
    runs, so that they are not recreated."""
    runs = _find_tagged(RECORD_TAG, record_id, experiment)
    return _handle(runs[0]) if runs else None


def find_repeats(repeats_id: str, experiment: str) -> tuple[Handle | None, dict[int, dict[str, Any]]]:
    """The parent run of these repeats, found as `find_run` does, and the finished repeats by number (see `_row`)."""
    runs = _find_tagged(REPEATS_TAG, repeats_id, experiment)
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
def _find_tagged(key: str, value: str, experiment: str) -> list[Run]:
    client = _client()
    experiment_id = _given_experiment_id()
    if experiment_id is None and (by_name := client.get_experiment_by_name(experiment)):
        experiment_id = by_name.experiment_id
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


# --- the system while a training runs


class SystemMetrics:
    """Sample MLflow's system metrics (CPU, memory, disk, network, GPU) in a thread.

    MLflow's own monitor writes to the store while the clock runs. This one keeps the samples for the caller to log
    between two timed spans.
    """

    def __init__(self, run_id: str, interval_seconds: float = 5.0):
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(run_id, tracking_uri=store_uri())  # type: ignore[no-untyped-call]
        self._interval_seconds = interval_seconds
        self._samples: list[dict[str, Any]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "SystemMetrics":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def take(self) -> list[dict[str, Any]]:
        """The samples since the last call: `figures`, `at` (milliseconds since 1970), `step`."""
        samples, self._samples = self._samples, []
        return samples

    def _sample(self) -> None:
        step = 0
        while step == 0 or not self._done.wait(self._interval_seconds):
            self._monitor.collect_metrics()  # type: ignore[no-untyped-call]
            metrics = self._monitor.aggregate_metrics()  # type: ignore[no-untyped-call]
            for monitor in self._monitor.monitors:
                monitor.clear_metrics()  # type: ignore[no-untyped-call]
            figures = {f"system/{key}": float(value) for key, value in metrics.items()}
            self._samples.append({"figures": figures, "at": now(), "step": step})
            step += 1


def now() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return time.time_ns() // 1_000_000
