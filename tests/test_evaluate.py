"""The best checkpoint on the test split: what is counted, where it is logged, what is refused."""

import csv
import shutil

import numpy as np
import pytest
from mlflow.entities import ViewType
from stores import client, own_store, runs  # noqa: F401 (own_store: each test has its own)
from trainings import driven, generated, light, once, prepare, threads  # noqa: F401 (threads: one is enough)

from pipeline import evaluate, files, plots, train
from pipeline.data import batching, datasets
from pipeline.errors import StageError, UsageError
from pipeline.models import checkpoints
from pipeline.tracking import publisher, records, store

LEFT = {"metrics.json", "predictions.csv", "record.json", "plots/confusion_matrix.png"}


@pytest.fixture
def outputs(once, own_store, tmp_path, light):
    """What a training left, its run in the store, not evaluated yet."""
    shutil.copy(once.trained, own_store)
    return shutil.copytree(once.outputs, tmp_path / "outputs", ignore=shutil.ignore_patterns("evaluate", "sustain"))


def line(settings, folder, number=1):
    before = [(run.info.run_id, run.info.status, dict(run.data.metrics)) for run in runs()]
    with pytest.raises(UsageError) as caught:
        evaluate.run(settings, folder, number)
    assert len(str(caught.value).splitlines()) == 1
    assert [(run.info.run_id, run.info.status, dict(run.data.metrics)) for run in runs()] == before
    assert not (folder / "evaluate").exists()
    return str(caught.value)


def rewrite(folder, **changes):
    """Puts a checkpoint there that says something else of itself."""
    path = folder / "train" / "best.safetensors"
    net, facts = checkpoints.load(path)
    checkpoints.save(path, net, checkpoints.Checkpoint(**vars(facts) | changes))


def in_sevens(outputs):
    """Settings by which the last of 9 batches of the 60 test images is short, as if they had been the training's."""
    settings = generated("batch_size=7")
    record = files.read_json(outputs / "train" / "record.json")
    record["tags"]["workload"] = evaluate.config.workload(settings.work, files.read_json(outputs / "inputs.json"))
    files.write_json(outputs / "train" / "record.json", record)
    return settings


# --- what is measured


def test_the_checkpoint_is_measured_on_every_test_image(outputs, monkeypatch):
    drawn = {}

    def matrix(counts, classes, *, accuracy, title):
        drawn.update(counts=counts.copy(), classes=list(classes), accuracy=accuracy, title=title)

    monkeypatch.setattr(plots, "confusion_matrix", matrix)
    settings = in_sevens(outputs)
    result = evaluate.run(settings, outputs)

    net, facts = checkpoints.load(outputs / "train" / "best.safetensors")
    images, labels = datasets.decode(settings.data, files.read_json(outputs / "inputs.json")["data"], "test", 32)
    logits = net(batching.prepare(batching.as_split(images, labels).inputs, 32)).detach().numpy().astype(np.float64)
    answers = logits.argmax(1)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    metrics = result["metrics"]
    assert metrics["test/accuracy"] == (answers == labels).mean()
    assert metrics["test/loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert set(metrics) == {"test/accuracy", "test/loss", "speed/test_images_per_second"}
    assert 0 < metrics["speed/test_images_per_second"] < np.inf

    with (outputs / "evaluate" / "predictions.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["actual", "predicted"]
    assert rows[1:] == [[facts.classes[a], facts.classes[p]] for a, p in zip(labels, answers, strict=True)]
    assert len(rows) == 1 + 60
    assert drawn["counts"].sum() == 60 and drawn["counts"].trace() == (answers == labels).sum()
    for actual, predicted in np.ndindex(10, 10):
        assert drawn["counts"][actual, predicted] == ((labels == actual) & (answers == predicted)).sum()
    assert drawn["classes"] == list(facts.classes)
    assert (drawn["accuracy"], drawn["title"]) == (
        metrics["test/accuracy"],
        files.read_json(outputs / "train" / "record.json")["name"],
    )


def test_a_batch_of_each_size_is_passed_before_the_clock_starts(outputs, monkeypatch):
    passed = []
    whole = evaluate.loop.evaluate
    clock = []

    def measured(net, score, totals, batches, *args):
        batches = list(batches)
        passed.append(([len(labels) for _, labels in batches], [c._open for c in clock]))
        return whole(net, score, totals, batches, *args)

    real = evaluate.Clock
    monkeypatch.setattr(evaluate, "Clock", lambda *args: clock.append(real(*args)) or clock[-1])
    monkeypatch.setattr(evaluate.loop, "evaluate", measured)
    evaluate.run(in_sevens(outputs), outputs)
    assert passed == [([4, 7], []), ([7] * 8 + [4], ["test"])]


def test_the_speed_is_images_over_the_time_of_the_clock(outputs, monkeypatch):
    readings = iter([10.0, 12.5])
    real = evaluate.Clock
    monkeypatch.setattr(evaluate, "Clock", lambda synchronize: real(synchronize, lambda: next(readings)))
    assert evaluate.run(generated(), outputs)["metrics"]["speed/test_images_per_second"] == 60 / 2.5


@pytest.mark.parametrize("place", ["device", "host"])
def test_the_images_lie_where_the_trainings_did(outputs, monkeypatch, place):
    expected = evaluate.run(generated(), outputs)["metrics"]
    record = files.read_json(outputs / "train" / "record.json")
    record["tags"]["data.placement"] = place
    files.write_json(outputs / "train" / "record.json", record)
    copied, copy = [], batching.Split.to
    monkeypatch.setattr(batching.Split, "to", lambda split, device: copied.append(len(split)) or copy(split, device))
    metrics = evaluate.run(generated(), outputs)["metrics"]
    assert copied == ([60] if place == "device" else [])
    for key in ("test/accuracy", "test/loss"):
        assert metrics[key] == expected[key]


# --- where it is logged


def test_the_trainings_own_run_is_completed(outputs, monkeypatch, capsys):
    (before,) = runs()
    statuses = []
    log = publisher.publish_evaluation
    watched = {"evaluate": lambda *args: (statuses.append(runs()[0].info.status), log(*args))}
    monkeypatch.setattr(publisher, "LATER_STAGES", publisher.LATER_STAGES | watched)
    record = files.read_json(outputs / "train" / "record.json")
    result = evaluate.run(generated("label=under the desk"), outputs)
    (run,) = runs()
    assert run.info.run_id == before.info.run_id
    assert statuses == ["RUNNING"]
    assert (run.info.status, run.info.end_time) == ("FINISHED", result["ended"])
    assert result["ended"] >= record["ended"]
    assert run.data.metrics == before.data.metrics | result["metrics"]
    assert run.data.tags["label"] == "under the desk"
    assert "test accuracy" in run.data.tags["mlflow.note.content"]
    assert "plots/confusion_matrix.png" in [
        each.path for each in client().list_artifacts(run.info.run_id, "plots")
    ]  # fmt: skip
    folder = outputs / "evaluate"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == LEFT
    assert files.read_json(folder / "record.json") == result
    assert set(result) == {"id", "metrics", "tags", "datasets", "ended"} and result["id"] == record["id"]
    assert files.read_json(folder / "metrics.json") == result["metrics"]
    assert f"test accuracy {result['metrics']['test/accuracy']:.2%}" in capsys.readouterr().out


def test_the_test_split_is_an_input_of_the_run(outputs):
    result = evaluate.run(generated(), outputs)
    evaluate.run(generated(), outputs)
    contexts = [(d.dataset.name, d.tags[0].value) for d in runs()[0].inputs.dataset_inputs]
    assert sorted(contexts) == [
        ("synthetic-test", "testing"), ("synthetic-train", "training"), ("synthetic-validation", "validation")
    ]  # fmt: skip
    assert [each["name"] for each in result["datasets"]] == ["synthetic-test"]


def test_every_repeats_checkpoint_is_measured_and_its_own_run_completed(tmp_path, light, driven, capsys):
    settings, outputs = generated("repeats=3", "epochs=1"), tmp_path / "outputs"
    prepare(settings, outputs)
    driven(settings, outputs, "train")
    driven(settings, outputs, "evaluate")
    results = [
        files.read_json(outputs / "evaluate" / place / "record.json") for place in (".", "repeats/2", "repeats/3")
    ]
    for each, record in zip(results, records.training_records(outputs), strict=True):
        run = client().get_run(store.find_run(record["id"], "trainmark").run_id)
        assert each["id"] == record["id"] and each["metrics"].items() <= run.data.metrics.items()
        assert run.info.status == "FINISHED"
    # Heads of three seeds answer differently.
    assert len({each["metrics"]["test/loss"] for each in results}) == 3
    summary = records.summarise_metrics([each["metrics"] for each in results])
    assert files.read_json(outputs / "evaluate" / "metrics.json") == summary
    (parent,) = [run for run in runs() if run.info.run_name.endswith(" × 3")]
    assert summary.items() <= parent.data.metrics.items()
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("repeats  median and range of 3: ") and "test accuracy" in said[-1]
    assert not [each for each in said if "-S repeats=3" in each]


def test_a_repeat_is_evaluated_beside_what_the_others_left(tmp_path, light, driven):
    settings, outputs = generated("repeats=2", "epochs=1"), tmp_path / "outputs"
    prepare(settings, outputs)
    driven(settings, outputs, "train")
    for number in (2, 1, 2):
        stale = records.stage_folders(outputs, number)["evaluate"] / "stale.txt"
        files.write_text(stale, "stale")
        evaluate.run(settings, outputs, number)
        assert not stale.exists()
    left = {path.relative_to(outputs / "evaluate").as_posix() for path in (outputs / "evaluate").rglob("*.json")}
    assert left == {"record.json", "metrics.json", "repeats/2/record.json", "repeats/2/metrics.json"}


def test_a_repeat_with_a_checkpoint_of_another_is_refused(tmp_path, light, driven):
    settings, outputs = generated("repeats=2", "epochs=1"), tmp_path / "outputs"
    prepare(settings, outputs)
    driven(settings, outputs, "train")
    shutil.copy(outputs / "train" / "best.safetensors", outputs / "train" / "repeats" / "2" / "best.safetensors")
    assert "it is a checkpoint of another training" in line(settings, outputs, 2)


def test_a_single_run_is_told_how_to_get_an_interval(outputs, capsys):
    evaluate.run(generated(), outputs)
    assert capsys.readouterr().out.splitlines()[-1].endswith("-S repeats=3 trains three times")


def test_the_test_split_that_was_validated_on_is_logged_once(tmp_path, light):
    settings = generated("validation=test", "epochs=1")
    prepare(settings, tmp_path / "outputs")
    record = train.run(settings, tmp_path / "outputs")
    result = evaluate.run(settings, tmp_path / "outputs")
    assert result["datasets"] == []
    contexts = [(d.dataset.name, d.tags[0].value) for d in runs()[0].inputs.dataset_inputs]
    assert sorted(contexts) == [("synthetic-test", "testing"), ("synthetic-train", "training")]
    assert result["metrics"]["test/accuracy"] == record["metrics"]["best/val_accuracy"]  # the same images and network


def test_nothing_of_an_earlier_evaluation_stays(outputs):
    (outputs / "evaluate" / "plots").mkdir(parents=True)
    (outputs / "evaluate" / "plots" / "stale.png").write_text("stale")
    evaluate.run(generated(), outputs)
    assert [path.name for path in (outputs / "evaluate" / "plots").iterdir()] == ["confusion_matrix.png"]
    assert all("stale" not in each.path for each in client().list_artifacts(runs()[0].info.run_id, "plots"))


def test_a_store_without_the_run_gets_it_back(outputs):
    (run,) = runs()
    result = evaluate.run(generated("tracking.experiment=another"), outputs)
    (restored,) = [each for each in runs() if each.info.run_id != run.info.run_id]
    assert client().get_experiment(restored.info.experiment_id).name == "another"
    assert restored.data.metrics == run.data.metrics | result["metrics"]
    assert "restored" in restored.data.tags and restored.info.status == "FINISHED"
    assert "test/accuracy" not in client().get_run(run.info.run_id).data.metrics


def test_a_run_that_was_deleted_is_left_alone(outputs, capsys):
    (run,) = runs()
    client().delete_run(run.info.run_id)
    result = evaluate.run(generated(), outputs)
    assert files.read_json(outputs / "evaluate" / "record.json") == result
    assert "deleted in this store" in capsys.readouterr().out
    (after,) = client().search_runs([run.info.experiment_id], run_view_type=ViewType.ALL)
    assert after.info.lifecycle_stage == "deleted" and "test/accuracy" not in after.data.metrics


@pytest.mark.parametrize(
    ("error", "status"), [(StageError("the store is away"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_an_evaluation_that_does_not_come_to_its_end_says_so(outputs, monkeypatch, error, status):
    def fails(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(store, "log_datasets", fails)
        with pytest.raises(type(error)):
            evaluate.run(generated(), outputs)
    (run,) = runs()
    assert run.info.status == status and run.info.end_time is not None
    evaluate.run(generated(), outputs)
    assert runs()[0].info.status == "FINISHED"


# --- what is refused


def test_another_work_is_refused(outputs):
    said = line(generated("lr=0.5"), outputs)
    assert said.startswith('recipe: "linear-probe" as it is set now is workload ')
    assert files.read_json(outputs / "train" / "record.json")["tags"]["workload"] in said


def test_another_execution_is_the_same_work(outputs):
    evaluate.run(generated("precision=bf16", "seed=7", "label=desk"), outputs)
    assert runs()[0].info.status == "FINISHED"


def test_a_checkpoint_of_another_training_is_refused(outputs):
    rewrite(outputs, record="another")
    assert line(generated(), outputs).startswith(
        "best.safetensors: it is a checkpoint of another training (another), expected "
    )


def test_a_checkpoint_of_another_model_is_refused(outputs, monkeypatch):
    load = checkpoints.load

    def other(path):
        net, facts = load(path)
        return net, checkpoints.Checkpoint(**vars(facts) | {"model": "resnet18.a1_in1k"})

    monkeypatch.setattr(checkpoints, "load", other)
    said = line(generated(), outputs)
    assert "a checkpoint of another model (resnet18.a1_in1k), expected test_resnet.r160_in1k: run " in said


def test_a_checkpoint_of_other_classes_is_refused(outputs):
    classes = tuple(f"class{index}" for index in range(10))
    rewrite(outputs, classes=classes)
    assert "a checkpoint of another classes (['class0', " in line(generated(), outputs)


def test_inputs_of_other_settings_are_refused(outputs):
    assert line(generated("data.limit=5"), outputs).startswith("data.limit: 5 is not what `download` looked at (6)")


@pytest.mark.parametrize("gone", ["inputs.json", "train/record.json", "train/best.safetensors"])
def test_what_is_missing_is_named(outputs, gone):
    (outputs / gone).unlink()
    with pytest.raises(StageError, match=gone.rpartition("/")[2]):
        evaluate.run(generated(), outputs)


def test_a_failing_restore_is_not_evaluated(outputs, monkeypatch):
    def fails(*args):
        raise StageError("the store is away")

    monkeypatch.setattr(publisher, "publish_training", fails)
    with pytest.raises(StageError, match="the store is away"):
        evaluate.run(generated("tracking.experiment=another"), outputs)
    record = files.read_json(outputs / "train" / "record.json")
    assert store.find_run(record["id"], "another") is None
