"""A run put back from its record is the run that was live."""

import shutil

import pytest
from mlflow import MlflowClient
from stores import QUIET, client, own_store, runs  # noqa: F401 (own_store: each test has its own)
from trainings import light, once, threads  # noqa: F401 (threads: one is enough)

from pipeline import files
from pipeline.errors import StageError
from pipeline.profiling import score_steps
from pipeline.tracking import bundles, publisher, records, store

OTHER = {"restored", "mlflow.log-model.history"}
"""Tags in which a restored run differs from the live one; the second holds ids and the time."""


@pytest.fixture
def left(once, tmp_path):
    """The record of the training, and the folder that it, its evaluation and what was sustained were left in, for the
    test to change."""
    folder = shutil.copytree(once.outputs, tmp_path / "outputs")
    return files.read_json(folder / "train" / "record.json"), folder


def result_of(stage, folder):
    return files.read_json(folder / stage / "record.json")


def whole(at, run_id, tmp_path):
    """All of a run in the store of the client `at`, but for its ids."""
    run = at.get_run(run_id)
    folder = tmp_path / run_id
    folder.mkdir()
    at.download_artifacts(run_id, "", str(folder))
    return {
        "info": (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "tags": {k: v for k, v in run.data.tags.items() if k not in OTHER},
        "metrics": {
            key: [(each.value, each.step, each.timestamp) for each in at.get_metric_history(run_id, key)]
            for key in run.data.metrics
        },
        "datasets": sorted(
            (d.dataset.name, d.dataset.digest, d.dataset.source, d.dataset.profile, [(t.key, t.value) for t in d.tags])
            for d in run.inputs.dataset_inputs
        ),
        "artifacts": {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        },
        "models": len(run.outputs.model_outputs),
    }


@QUIET
def test_a_restored_run_is_the_live_one(once, left, tmp_path):
    record, folder = left
    root = once.completed.parent
    shutil.copytree(root / "kept", root / "mlruns", dirs_exist_ok=True)
    at = MlflowClient(f"sqlite:///{once.completed.as_posix()}")
    (live,) = at.search_runs([at.get_experiment_by_name("trainmark").experiment_id])
    (handle,) = publisher.restore_run(record, "trainmark", records.stage_folders(folder))

    before, after = whole(at, live.info.run_id, tmp_path), whole(client(), handle.run_id, tmp_path)
    for part in before:
        assert after[part] == before[part], part
    assert set(before["metrics"]) >= {
        "train/loss",
        "time/total_seconds",
        "test/accuracy",
        "speed/test_images_per_second",
        "time/process_seconds",
        score_steps.metric("transformer_best", "images_per_second"),
    }
    assert len(before["metrics"][score_steps.metric("convnet_fp32", "course")]) >= 3
    assert {score_steps.tag("convnet_fp32", "workload"), "data.placement"} <= set(before["tags"])
    assert "**Sustained**" in before["tags"]["mlflow.note.content"]
    assert len(before["metrics"]["val/loss"]) == 2 and len(before["datasets"]) == 3
    assert before["models"] == 1 and "checkpoints/best.safetensors" in before["artifacts"]
    tags = client().get_run(handle.run_id).data.tags
    assert tags["restored"] == "from the cache of `dvc repro`; nothing was trained"
    assert "restored" not in live.data.tags
    assert tags["record"] == live.data.tags["record"] == record["id"]
    assert store.find_run(record["id"], "trainmark").run_id == handle.run_id


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("gone", [["evaluate"], ["sustain"]], ids=" ".join)
def test_a_training_is_restored_without_what_was_never_found(left, gone):
    record, folder = left
    for stage in gone:
        shutil.rmtree(folder / stage)
    (handle,) = publisher.restore_run(record, "trainmark", records.stage_folders(folder))
    run = client().get_run(handle.run_id)
    ended = [record["ended"], *(result_of(stage, folder)["ended"] for stage in {"evaluate", "sustain"} - set(gone))]
    assert (run.info.status, run.info.end_time) == ("FINISHED", max(ended))
    note = run.data.tags["mlflow.note.content"]
    for stage, metric, word in (
        ("evaluate", "test/accuracy", "test accuracy"),
        ("sustain", score_steps.metric("convnet_fp32", "course"), "**Sustained**"),
    ):
        assert (metric in run.data.metrics) == (word in note) == (stage not in gone)
    tested = [] if "evaluate" in gone else ["test"]
    assert sorted(d.dataset.name for d in run.inputs.dataset_inputs) == [
        f"synthetic-{split}" for split in (*tested, "train", "validation")
    ]
    plots = (
        ["accuracy", "loss", "samples"] if "evaluate" in gone else ["accuracy", "confusion_matrix", "loss", "samples"]
    )
    assert [each.path for each in client().list_artifacts(handle.run_id, "plots")] == [
        f"plots/{name}.png" for name in plots
    ]


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("gone", [["evaluate"], ["sustain"], []], ids=" ".join)
def test_what_a_run_lacks_of_later_stages_is_added_to_it_once(left, gone):
    record, folder = left
    for stage in gone:
        shutil.move(folder / stage, folder / f"{stage} later")
    (handle,) = publisher.restore_run(record, "trainmark", records.stage_folders(folder))
    for stage in gone:
        shutil.move(folder / f"{stage} later", folder / stage)
    assert publisher.add_missing_stages(record, "trainmark", records.stage_folders(folder)) is bool(gone)
    run = client().get_run(handle.run_id)
    for stage in ("evaluate", "sustain"):
        result = result_of(stage, folder)
        assert result["metrics"].items() <= run.data.metrics.items()
        assert run.data.tags[publisher.digest_tag(stage)] == publisher.digest(result)
    assert run.info.status == "FINISHED"
    assert publisher.add_missing_stages(record, "trainmark", records.stage_folders(folder)) is False


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    ("broken", "error", "status"),
    [
        *((name, StageError("the store is away"), "FAILED") for name in ("log_epoch", "mark_run")),
        ("log_datasets", KeyboardInterrupt(), "KILLED"),
        ("log_series", StageError("the store is away"), "FAILED"),
    ],
)
def test_a_restore_that_fails_half_way_is_not_taken_for_the_run(left, monkeypatch, broken, error, status):
    record, folder = left
    real, calls = getattr(store, broken), []

    def fails(*args):
        calls.append(args)
        if broken == "log_datasets" and len(calls) == 1:
            return real(*args)  # the training's, as the run starts; the evaluation's fails
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(store, broken, fails)
        with pytest.raises(type(error)):
            publisher.restore_run(record, "trainmark", records.stage_folders(folder))
    assert store.find_run(record["id"], "trainmark") is None
    (failed,) = runs()
    assert failed.info.status == status and store.finished_runs() == []

    (handle,) = publisher.restore_run(record, "trainmark", records.stage_folders(folder))
    assert store.find_run(record["id"], "trainmark").run_id == handle.run_id != failed.info.run_id
    assert [run["run_id"] for run in store.finished_runs()] == [handle.run_id]


@pytest.mark.usefixtures("light")
def test_a_damaged_checkpoint_is_no_run(left):
    record, folder = left
    best = folder / "train" / "best.safetensors"
    best.write_bytes(best.read_bytes()[:1000])
    with pytest.raises(StageError, match=r"best\.safetensors"):
        publisher.restore_run(record, "trainmark", records.stage_folders(folder))
    assert store.find_run(record["id"], "trainmark") is None


@pytest.mark.usefixtures("light")
def test_the_parent_of_repeats_gets_their_summary_and_the_first_ones_pictures_and_settings(left):
    record, folder = left
    for number in (2, 1):
        tags = record["tags"] | {"repeats.id": "a" * 32, "repeats": "2", "repeat": str(number)}
        repeat = record | {"id": str(number) * 32, "tags": tags, "name": f"{record['name']} · {number}/2"}
        for stage in ("evaluate", "sustain"):
            path = folder / stage / "record.json"
            files.write_json(path, files.read_json(path) | {"id": repeat["id"]})
        publisher.restore_run(repeat, "trainmark", records.stage_folders(folder))
        publisher.update_parent(repeat, "trainmark")
        parent, _ = store.find_repeats("a" * 32, "trainmark")
        assert store.is_finished(parent) == (number == 1)
    metrics = client().get_run(parent.run_id).data.metrics
    assert metrics["test/accuracy"] == result_of("evaluate", folder)["metrics"]["test/accuracy"]
    assert metrics["std/test/accuracy"] == 0
    assert store.list_artifacts(parent.run_id, "") == ["params.yaml", "plots"]
    assert store.list_artifacts(parent.run_id, "plots") == [
        f"plots/{name}.png" for name in ("accuracy", "confusion_matrix", "loss", "samples")
    ]


def test_the_model_asks_for_released_packages(left, monkeypatch):
    record, folder = left
    asked = []
    monkeypatch.setattr(store, "log_model", lambda handle, net, *rest: asked.append((net.training, *rest)))
    publisher.restore_run(record, "trainmark", records.stage_folders(folder))
    ((training, image_size, classes, requirements),) = asked
    assert (training, image_size, classes) == (False, 32, 10)
    assert [each.split("==")[0] for each in requirements] == ["mlflow", "torch", "numpy"]
    assert not any("+" in each for each in requirements)  # a build such as 2.14.1+cu130 is not on the index


def test_what_the_stages_leave_may_go_into_a_bundle(once):
    run = bundles.load_run(once.outputs, "outputs", "a" * 32)
    assert set(run.stages) == {"train", "evaluate", "sustain"}
