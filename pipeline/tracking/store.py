"""MLflow: the only importer of it. Nothing here is called while the clock runs.

A training leaves a record (a JSON file, see `train.py`) that holds all that its run in MLflow shows. The live run
and one put back from a cached record are written by the same functions.
"""

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
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # MLflow's own 7 make a dead server take minutes
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
"""Tag with the id of the training's record: how a cached training finds its run again, in any store."""

REPEATS_TAG, REPEAT_TAG = "repeats.id", "repeat"
"""Tags of a training that is repeated (see `records.py`). The run above the repeats has the first alone."""

PARENT_TAG = "mlflow.parentRunId"
"""How MLflow knows which run another stands below."""

COMPARISON_TAG = "comparison"
"""Tag of the one run of an experiment that holds charts of all others; no training, so it has no workload."""

_COMPARISON = f"tags.`{COMPARISON_TAG}` = 'true'"

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Handle:
    """A run in a store."""

    client: MlflowClient
    run_id: str
    experiment_id: str


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, else SQLite beside params.yaml; a relative path starts there too, wherever we are.

    Raises UsageError where the store would be lost with the temporary folder it is in.
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


def start_run(record: Mapping[str, Any], parent: Handle | None = None) -> Handle:
    """Opens the record's run, with its params, tags and datasets: a new one below `parent`, else the one that
    `mlflow run` made, else a new one."""
    with _store_errors():
        client = _client()
        given = os.environ.get("MLFLOW_RUN_ID")
        if parent is not None:
            run = client.create_run(
                parent.experiment_id, record["started"], {PARENT_TAG: parent.run_id}, record["name"]
            )
        elif given:
            run = client.get_run(given)
            client.update_run(given, status="RUNNING", name=record["name"])
            _describe_experiment(client, run.info.experiment_id)
        else:
            run = client.create_run(
                _get_or_create_experiment(client, record["experiment"]),
                start_time=record["started"],
                run_name=record["name"],
            )
        handle = Handle(client, run.info.run_id, run.info.experiment_id)
        params = [Param(key, _param_text(value)) for key, value in record["params"].items()]
    with end_on_failure(handle), _store_errors():
        for part in range(0, len(params), 100):  # the most that one call takes
            client.log_batch(handle.run_id, params=params[part : part + 100])
        set_tags(handle, record["tags"])
        log_datasets(handle, record["datasets"])
    return handle


def mark_run(handle: Handle, record: Mapping[str, Any]) -> None:
    """Says that the run is the record's, so that `find` finds it."""
    set_tags(handle, {RECORD_TAG: record["id"]})


def find_run(record_id: str, experiment: str) -> Handle | None:
    """The run of a record in `experiment` of the current store, under `mlflow run` in that of the run given.

    A deleted one counts: who deleted it does not want it back.
    """
    runs = _find_tagged(RECORD_TAG, record_id, experiment)
    return _handle(runs[0]) if runs else None


def find_repeats(repeats_id: str, experiment: str) -> tuple[Handle | None, dict[int, dict[str, Any]]]:
    """The run above these repeats, found as `find` does, and by their numbers those that are finished, as
    `finished_runs` gives them."""
    runs = _find_tagged(REPEATS_TAG, repeats_id, experiment)
    parent = next((run for run in runs if REPEAT_TAG not in run.data.tags), None)
    finished = {
        int(run.data.tags[REPEAT_TAG]): _row_of(run)
        for run in runs
        if REPEAT_TAG in run.data.tags
        and (run.info.status, run.info.lifecycle_stage) == ("FINISHED", LifecycleStage.ACTIVE)
    }
    return None if parent is None else _handle(parent), finished


def end_repeats(repeats_id: str, status: str, finished: Collection[str] = ()) -> None:
    """Ends what still runs of these repeats, the run above them included, in whatever experiment: FAILED or KILLED,
    but FINISHED a training whose record is among `finished`. (`mlflow run` calls its own run FAILED all the same.)"""
    with _store_errors():
        client = _client()
        everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
        for run in _search(client, everywhere, f"tags.`{REPEATS_TAG}` = '{repeats_id}'"):
            if run.info.status == "RUNNING":
                came_to_its_end = run.data.tags.get(RECORD_TAG) in finished
                client.set_terminated(run.info.run_id, "FINISHED" if came_to_its_end else status)


def refer_given_run(repeats_id: str) -> None:
    """Says in the run that `mlflow run` made, where another is the one above these repeats, which it is."""
    given = os.environ.get("MLFLOW_RUN_ID")
    parent = find_repeats(repeats_id, "")[0] if given else None
    if given and parent and parent.run_id != given:
        note = f"resumed: all of it is in run {parent.run_id}"
        set_tags(Handle(parent.client, given, parent.experiment_id), {"mlflow.note.content": note})


def run_tags(handle: Handle) -> dict[str, str]:
    """The run's tags."""
    with _store_errors():
        return dict(handle.client.get_run(handle.run_id).data.tags)


def log_metrics(handle: Handle, figures: Figures, at: int, step: int = 0) -> None:
    """Logs metrics at `at` (milliseconds since 1970) under `step`."""
    _log_batches(handle, [Metric(key, float(value), at, step) for key, value in figures.items()])


def log_series(handle: Handle, key: str, values: Sequence[float], at: int) -> None:
    """Logs the course of one metric, its steps counted from 1."""
    _log_batches(handle, [Metric(key, float(value), at, step) for step, value in enumerate(values, 1)])


def log_epoch(handle: Handle, epoch: Mapping[str, Any]) -> None:
    """Logs one epoch of a record: its figures under its number, and what the machine did meanwhile."""
    figures = {key: value for key, value in epoch["figures"].items() if key != "epoch"}
    log_metrics(handle, figures, epoch["at"], epoch["figures"]["epoch"])
    for sample in epoch["system"]:
        log_metrics(handle, sample["figures"], sample["at"], sample["step"])


def log_datasets(handle: Handle, datasets: Iterable[Mapping[str, str]]) -> None:
    """Logs splits as the run's inputs."""
    with _store_errors():
        handle.client.log_inputs(handle.run_id, [_dataset(**dataset) for dataset in datasets])


def log_artifacts(handle: Handle, artifacts: Mapping[str, Path]) -> None:
    """Logs files under the artifact paths that key them; each keeps its own file name."""
    with _store_errors():
        for name, file in artifacts.items():
            folder = str(Path(name).parent.as_posix())
            handle.client.log_artifact(handle.run_id, str(file), None if folder == "." else folder)


def log_text(handle: Handle, name: str, text: str) -> None:
    """Logs `text` as the artifact `name`, in place of one that is there."""
    with _store_errors():
        handle.client.log_text(handle.run_id, text, name)


def list_artifacts(run_id: str, folder: str) -> list[str]:
    """The paths of a run's artifacts right below `folder`."""
    with _store_errors():
        return [each.path for each in _client().list_artifacts(run_id, folder)]


def download_artifact(run_id: str, name: str, folder: Path) -> Path:
    """Fetches a run's artifact to somewhere in `folder`, which depends on the store; where it is then."""
    with _store_errors():
        return Path(_client().download_artifacts(run_id, name, str(folder)))


def set_tags(handle: Handle, tags: Mapping[str, Any]) -> None:
    """Sets tags of the run; one that is None is taken away."""
    with _store_errors():
        gone = [key for key, value in tags.items() if value is None]
        have = handle.client.get_run(handle.run_id).data.tags if gone else {}
        for key in gone:
            if key in have:
                handle.client.delete_tag(handle.run_id, key)
        handle.client.log_batch(handle.run_id, tags=[RunTag(k, str(v)) for k, v in tags.items() if v is not None])


def log_model(handle: Handle, model: Any, image_size: int, classes: int, requirements: list[str]) -> None:
    """Logs a torch module on the CPU, in evaluation mode, that takes (N, 3, image_size, image_size) float32 images
    from 0 to 1 and gives (N, classes) logits.

    As a torch.export program: it is loaded without our code, and without the accelerator it was trained on. The
    signature and the requirements are given, for MLflow's own way of finding them loads the model several times
    (11 s here), and fails on CUDA.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape = (-1, 3, image_size, image_size)
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("float32"), shape)]),
        Schema([TensorSpec(np.dtype("float32"), (-1, classes))]),
    )
    example = np.zeros((2, *shape[1:]), np.float32)  # one image alone would fix the batch size at 1
    with _store_errors(), _active_run(handle), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # torch 2.11's export
        mlflow.pytorch.log_model(
            model,
            name="model",
            signature=signature,
            input_example=example,
            pip_requirements=requirements,
            serialization_format="pt2",
        )


def resume_run(handle: Handle) -> None:
    """Says that work on the run goes on."""
    with _store_errors():
        handle.client.update_run(handle.run_id, status="RUNNING")


def schedule_run(handle: Handle) -> None:
    """Says that the run waits for others, and that nothing works on it."""
    with _store_errors():
        handle.client.update_run(handle.run_id, status="SCHEDULED")


def is_finished(handle: Handle) -> bool:
    """Whether the run came to its end."""
    with _store_errors():
        return bool(handle.client.get_run(handle.run_id).info.status == "FINISHED")


def is_deleted(handle: Handle) -> bool:
    """Whether somebody deleted the run, which then takes nothing more."""
    with _store_errors():
        return bool(handle.client.get_run(handle.run_id).info.lifecycle_stage == LifecycleStage.DELETED)


def end_run(handle: Handle, status: str, at: int | None = None) -> None:
    """Ends the run: FINISHED, FAILED or KILLED."""
    with _store_errors():
        handle.client.set_terminated(handle.run_id, status, at)


@contextmanager
def end_on_failure(handle: Handle) -> Iterator[None]:
    """Ends the run as KILLED (Ctrl-C; MLflow's context manager would call it FAILED) or FAILED when that is how the
    block ends. A store that does not answer then does not hide why."""
    try:
        yield
    except BaseException as error:
        with suppress(StageError):
            end_run(handle, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def discard_run(handle: Handle) -> None:
    """Deletes the run, which is then no record's any more, nor among repeats."""
    # First: nobody can change a deleted run, and `find` counts it.
    set_tags(handle, {RECORD_TAG: None, REPEATS_TAG: None})
    with _store_errors():
        handle.client.delete_run(handle.run_id)


@contextmanager
def discard_on_failure(handles: Sequence[Handle]) -> Iterator[None]:
    """Discards the runs that `handles` holds by then where the block fails: nothing was trained, so none has failed. A
    store that does not answer then does not hide why."""
    try:
        yield
    except BaseException:
        for handle in handles:
            with suppress(StageError):
                discard_run(handle)
        raise


def finished_runs(experiment: str | None = None) -> list[dict[str, Any]]:
    """All finished trainings of all experiments, or of the one named, newest first: `run_id`, `experiment_id`, `name`,
    `started` (milliseconds since 1970), `tags`, `metrics`, `params`.

    A repeat counts whether the run above it is finished or not. That run itself is no training.
    """
    with _store_errors():
        client = _client()
        experiments = [e.experiment_id for e in client.search_experiments() if experiment in (None, e.name)]
        runs = _search(client, experiments, "attributes.status = 'FINISHED' and tags.workload != ''")
    return [_row_of(run) for run in runs if REPEATS_TAG not in run.data.tags or REPEAT_TAG in run.data.tags]


def history(run_id: str, keys: Iterable[str]) -> dict[str, list[float]]:
    """The course of metrics of one run by step; empty for a metric that it doesn't have."""
    with _store_errors():
        client = _client()
        courses = {key: client.get_metric_history(run_id, key) for key in keys}
    return {key: [metric.value for metric in sorted(course, key=_step)] for key, course in courses.items()}


def comparison_run(experiment: str) -> Handle | None:
    """The run that holds the comparison of all others, in `experiment`, under `mlflow run` in the one given; made where
    it is missing. None where it was deleted: who deleted it does not want it back."""
    with _store_errors():
        client = _client()
        where = _given_experiment_id(client) or _get_or_create_experiment(client, experiment)
        found = client.search_runs([where], _COMPARISON, ViewType.ALL, 1)
        if found:
            run = found[0]
        else:
            run = client.create_run(where, tags={COMPARISON_TAG: "true"}, run_name="comparison")
            _describe_experiment(client, where)  # which now links to it
    handle = Handle(client, run.info.run_id, where)
    return None if is_deleted(handle) else handle


class SystemMetrics:
    """Samples what MLflow's system metrics hold (CPU, memory, disk, network, GPU) in a thread of its own.

    MLflow's own monitor writes to the store as it samples, also while the clock runs; this one keeps the samples
    for the caller to log between two timed spans.
    """

    INTERVAL = 5.0

    def __init__(self, run_id: str):
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(run_id, tracking_uri=store_uri())  # type: ignore[no-untyped-call]
        self._samples: list[dict[str, Any]] = []
        self._step = 0
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
        taken, self._samples = self._samples, []
        return taken

    def _sample(self) -> None:
        while True:
            self._monitor.collect_metrics()  # type: ignore[no-untyped-call]
            figures = {f"system/{key}": float(v) for key, v in self._monitor.aggregate_metrics().items()}  # type: ignore[no-untyped-call]
            for monitor in self._monitor.monitors:
                monitor.clear_metrics()  # type: ignore[no-untyped-call]
            self._samples.append({"figures": figures, "at": now(), "step": self._step})
            self._step += 1
            if self._done.wait(self.INTERVAL):
                return


def now() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return time.time_ns() // 1_000_000


def _client() -> MlflowClient:
    return MlflowClient(store_uri())


def _given_experiment_id(client: MlflowClient) -> str | None:
    """The id of the experiment of the run that `mlflow run` made; None without one."""
    given = os.environ.get("MLFLOW_RUN_ID")
    return str(client.get_run(given).info.experiment_id) if given else None


def _find_tagged(key: str, value: str, experiment: str) -> list[Run]:
    """The runs with this tag in `experiment`, under `mlflow run` in that of the run given; deleted ones, too."""
    with _store_errors():
        client = _client()
        where = _given_experiment_id(client)
        if where is None and (found := client.get_experiment_by_name(experiment)):
            where = found.experiment_id
        return _search(client, [where] if where else [], f"tags.`{key}` = '{value}'", ViewType.ALL)


def _search(client: MlflowClient, experiments: list[str], query: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    """All runs that `query` finds, newest first."""
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
    return Handle(_client(), run.info.run_id, str(run.info.experiment_id))


def _row_of(run: Run) -> dict[str, Any]:
    return {
        "run_id": run.info.run_id,
        "experiment_id": str(run.info.experiment_id),
        "name": run.info.run_name,
        "started": run.info.start_time,
        "tags": dict(run.data.tags),
        "metrics": dict(run.data.metrics),
        "params": dict(run.data.params),
    }


def _get_or_create_experiment(client: MlflowClient, name: str) -> str:
    """The id of the experiment `name`, made where it is missing, its artifacts beside an SQLite store of ours."""
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == LifecycleStage.DELETED:
        raise StageError(f'tracking.experiment: "{name}" is deleted in this store: restore it, or name another')
    if found is not None:
        _describe_experiment(client, found.experiment_id)
        return str(found.experiment_id)
    ours = not os.environ.get("MLFLOW_TRACKING_URI")
    made = client.create_experiment(name, (ROOT / "mlartifacts").as_uri() if ours else None)
    _describe_experiment(client, made)
    return str(made)


def _describe_experiment(client: MlflowClient, experiment_id: str) -> None:
    have = client.get_experiment(experiment_id).tags
    found = client.search_runs([experiment_id], _COMPARISON, max_results=1)
    for key, value in views.experiment_tags(experiment_id, found[0].info.run_id if found else None).items():
        if have.get(key) != value:
            client.set_experiment_tag(experiment_id, key, value)


def _dataset(name: str, digest: str, source: str, context: str, profile: str) -> DatasetInput:
    dataset = Dataset(name=name, digest=digest, source_type="trainmark", source=source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _log_batches(handle: Handle, metrics: Sequence[Metric]) -> None:
    with _store_errors():
        for part in range(0, len(metrics), 1000):  # the most that one call takes
            handle.client.log_batch(handle.run_id, metrics=metrics[part : part + 1000])


def _step(metric: Metric) -> int:
    return int(metric.step)


def _param_text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


@contextmanager
def _active_run(handle: Handle) -> Iterator[None]:
    """Makes the run the active one, for calls that take neither client nor run id; its status stays RUNNING."""
    environment = dict(os.environ)
    # MLflow loads the logged model once to try it, and would move an exported program, which can't be moved.
    os.environ["MLFLOW_DEFAULT_PREDICTION_DEVICE"] = "cpu"
    # start_run refuses a run of another experiment than MLFLOW_EXPERIMENT_ID.
    for key in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        os.environ.pop(key, None)
    mlflow.set_tracking_uri(store_uri())  # it writes into the environment, too
    try:
        with mlflow.start_run(run_id=handle.run_id):
            yield
        resume_run(handle)
    finally:
        os.environ.clear()
        os.environ.update(environment)


@contextmanager
def _store_errors() -> Iterator[None]:
    """What goes wrong in the store ends as one line that names it."""
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, RequestException, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = [line for line in lines if not line.startswith("(raised as a result of Query-invoked autoflush")]
        first = next(iter(said + lines), type(error).__name__)
        raise StageError(f"the MLflow store {store_uri()} can't be used: {first}") from error


def run_table_link(experiment_id: str, base: str | None = None) -> str:
    """Where the UI shows the experiment's runs side by side; `base` is the server's address."""
    return views.run_table_link(base or _server_url(), experiment_id)


def run_link(experiment_id: str, run_id: str) -> str:
    """Where the UI shows one run; no name or password of the server's is in it, for reports are shared."""
    return views.run_link(re.sub(r"//[^/@]*@", "//", _server_url()), experiment_id, run_id)


def _server_url() -> str:
    uri = store_uri()
    return uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"


def experiment_to_show(name: str) -> str | None:
    """The id of the experiment `name`, or of its demo where there is no real run; None where there is neither."""
    with _store_errors():
        client = _client()
        found = [client.get_experiment_by_name(each) for each in (name, f"{name}-demo")]
        there = [each.experiment_id for each in found if each and each.lifecycle_stage == LifecycleStage.ACTIVE]
        filled = [each for each in there if client.search_runs([each], max_results=1)]
    return next(iter(filled + there), None)
