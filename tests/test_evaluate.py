"""The stage `evaluate`: what it leaves of the best checkpoint, where it is logged, what is refused."""

import csv
import shutil

import numpy as np
import pytest
from mlflow.entities import ViewType
from stores import client, own_store, runs  # noqa: F401 (own_store: each test has its own)
from trainings import delivered, driven, generated, light, once, prepare, threads  # noqa: F401 (threads: one is enough)

from pipeline import evaluate, files, plots, train
from pipeline.data import batching, datasets
from pipeline.errors import StageError, UsageError
from pipeline.models import checkpoints
from pipeline.tracking import pending, publisher, records, store

FILES = {"metrics.json", "predictions.csv", "record.json"}


@pytest.fixture
def outputs(once, own_store, tmp_path, light):
    """What a training left, its run in the store, not evaluated yet."""
    shutil.copy(once.trained, own_store)
    return shutil.copytree(once.outputs, tmp_path / "outputs", ignore=shutil.ignore_patterns("evaluate", "sustain"))


@pytest.fixture
def repeated(tmp_path, light, driven):
    """Train several repeats; return their settings and outputs."""

    def train_repeats(count):
        settings, outputs = generated(f"repeats={count}", "epochs=1"), tmp_path / "outputs"
        prepare(settings, outputs)
        driven(settings, outputs, "train")
        return settings, outputs

    return train_repeats


def refusal(settings, folder, number=1):
    """The line that an evaluation is refused with, which changes nothing."""
    with pytest.raises(UsageError) as caught:
        evaluate.run(settings, folder, number)
    assert len(str(caught.value).splitlines()) == 1
    assert pending.entries() == [] and not (folder / "evaluate").exists()
    return str(caught.value)


# --- what is left


def test_the_checkpoint_is_measured_on_every_test_image(outputs, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "confusion_matrix", lambda counts, classes, **words: drawn.update(words, counts=counts))
    settings = generated()
    metrics = evaluate.run(settings, outputs)["metrics"]
    assert drawn == {}  # nothing is drawn where it is measured
    publisher.deliver_all()

    net, facts = checkpoints.load(outputs / "train" / "best.safetensors")
    images, labels = datasets.decode(settings.data, files.read_json(outputs / "inputs.json")["data"], "test", 32)
    answers = net(batching.prepare(batching.as_split(images, labels).inputs, 32)).argmax(1).numpy()
    assert set(metrics) == {"test/accuracy", "test/loss", "speed/test_images_per_second"}
    assert metrics["test/accuracy"] == drawn["accuracy"] == (answers == labels).mean()
    with (outputs / "evaluate" / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["actual", "predicted"] and len(rows) == 60
    assert rows == [[facts.classes[a], facts.classes[p]] for a, p in zip(labels, answers, strict=True)]
    for actual, predicted in np.ndindex(10, 10):
        assert drawn["counts"][actual, predicted] == ((labels == actual) & (answers == predicted)).sum()
    assert drawn["title"] == files.read_json(outputs / "train" / "record.json")["name"]


# --- where it is logged


def test_the_model_that_was_just_trained_gives_the_same_figures(tmp_path, light):
    settings, folder = generated("recipe=finetune"), tmp_path / "outputs"
    prepare(settings, folder)
    _, net = train.train(settings, folder)
    with_net = evaluate.run(settings, folder, net=net)["metrics"]
    alone = evaluate.run(settings, folder)["metrics"]
    assert all(with_net[key] == alone[key] for key in ("test/loss", "test/accuracy"))


def test_the_trainings_own_run_is_completed(outputs, monkeypatch, capsys):
    (before,) = runs()
    statuses = []
    publish = publisher.publish_evaluation
    watched = {"evaluate": lambda *args: statuses.append(runs()[0].info.status) or publish(*args)}
    monkeypatch.setattr(publisher, "LATER_STAGES", publisher.LATER_STAGES | watched)
    record = files.read_json(outputs / "train" / "record.json")
    result = evaluate.run(generated("label=under the desk"), outputs)
    assert [run.to_dictionary() for run in runs()] == [before.to_dictionary()]
    (run,) = delivered()
    assert run.info.run_id == before.info.run_id
    assert statuses == ["RUNNING"]
    assert (run.info.status, run.info.end_time) == ("FINISHED", result["ended"])
    assert result["ended"] >= record["ended"]
    assert run.data.metrics == before.data.metrics | result["metrics"]
    assert run.data.tags["label"] == "under the desk"
    artifacts = [each.path for each in client().list_artifacts(run.info.run_id, "plots")]
    assert "plots/confusion_matrix.png" in artifacts
    folder = outputs / "evaluate"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == FILES
    assert files.read_json(folder / "record.json") == result
    assert set(result) == {"id", "metrics", "tags", "datasets", "ended"} and result["id"] == record["id"]
    assert files.read_json(folder / "metrics.json") == result["metrics"]
    accuracy = f"{result['metrics']['test/accuracy']:.2%}"
    output = capsys.readouterr().out
    assert accuracy in run.data.tags["mlflow.note.content"] and accuracy in output
    assert "-S repeats=3" in output  # how to get an interval


def test_a_test_split_that_was_validated_on_is_logged_once(tmp_path, light):
    settings = generated("validation=test", "epochs=1")
    prepare(settings, tmp_path / "outputs")
    record = train.run(settings, tmp_path / "outputs")
    result = evaluate.run(settings, tmp_path / "outputs")
    assert result["datasets"] == []
    contexts = [(each.dataset.name, each.tags[0].value) for each in delivered()[0].inputs.dataset_inputs]
    assert sorted(contexts) == [("synthetic-test", "testing"), ("synthetic-train", "training")]
    assert result["metrics"]["test/accuracy"] == record["metrics"]["best/val_accuracy"]  # the same images and network


def test_every_repeats_checkpoint_is_measured_and_its_own_run_completed(repeated, driven, capsys):
    settings, outputs = repeated(3)
    driven(settings, outputs, "evaluate")
    results = [
        files.read_json(outputs / "evaluate" / place / "record.json") for place in (".", "repeats/2", "repeats/3")
    ]
    for result, record in zip(results, records.training_records(outputs), strict=True):
        run = client().get_run(store.find_run(record["id"], "trainmark").run_id)
        assert result["id"] == record["id"] and result["metrics"].items() <= run.data.metrics.items()
        assert run.info.status == "FINISHED"
    assert len({result["metrics"]["test/loss"] for result in results}) == 3  # heads of three seeds
    summary = records.summarise_metrics([result["metrics"] for result in results])
    assert files.read_json(outputs / "evaluate" / "metrics.json") == summary
    (parent,) = [run for run in runs() if run.info.run_name.endswith(" × 3")]
    assert summary.items() <= parent.data.metrics.items()
    output = capsys.readouterr().out
    assert "test accuracy" in output.splitlines()[-1] and "-S repeats=3" not in output


def test_a_store_without_the_run_gets_it_back(outputs):
    (run,) = runs()
    result = evaluate.run(generated("tracking.experiment=another"), outputs)
    (restored,) = [each for each in delivered() if each.info.run_id != run.info.run_id]
    assert client().get_experiment(restored.info.experiment_id).name == "another"
    assert restored.data.metrics == run.data.metrics | result["metrics"]
    assert restored.info.status == "FINISHED"
    assert "test/accuracy" not in client().get_run(run.info.run_id).data.metrics


def test_a_run_that_was_deleted_is_left_alone(outputs, capsys):
    (run,) = runs()
    client().delete_run(run.info.run_id)
    result = evaluate.run(generated(), outputs)
    publisher.deliver_all()
    assert files.read_json(outputs / "evaluate" / "record.json") == result
    assert "deleted" in capsys.readouterr().out
    (after,) = client().search_runs([run.info.experiment_id], run_view_type=ViewType.ALL)
    assert after.info.lifecycle_stage == "deleted" and "test/accuracy" not in after.data.metrics


@pytest.mark.parametrize("error", [StageError("no disk space"), KeyboardInterrupt()])
def test_an_evaluation_that_ends_early_leaves_the_run_as_it_was(outputs, monkeypatch, error):
    (before,) = runs()

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_write_predictions", fail)
        with pytest.raises(type(error)):
            evaluate.run(generated(), outputs)
    assert pending.entries() == [] and not (outputs / "evaluate" / "record.json").exists()
    assert runs()[0].to_dictionary() == before.to_dictionary()


# --- what is refused


def test_another_execution_is_the_same_work(outputs):
    evaluate.run(generated("precision=bf16", "seed=7", "label=desk"), outputs)
    assert delivered()[0].info.status == "FINISHED"


@pytest.mark.parametrize(("override", "key"), [("lr=0.5", "recipe: "), ("data.limit=5", "data.limit: 5")])
def test_another_work_is_refused(outputs, override, key):
    assert refusal(generated(override), outputs).startswith(key)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"record": "another"}, "training (another)"),
        ({"model": "test_resnet"}, "model (test_resnet)"),
        ({"classes": tuple(f"class{index}" for index in range(10))}, "classes (['class0', "),
    ],
)
def test_another_checkpoint_is_refused(outputs, changes, name):
    path = outputs / "train" / "best.safetensors"
    net, facts = checkpoints.load(path)
    checkpoints.save(path, net, checkpoints.Checkpoint(**vars(facts) | changes))
    line = refusal(generated(), outputs)
    assert line.startswith("best.safetensors: ") and name in line


@pytest.mark.parametrize("missing", ["inputs.json", "train/record.json", "train/best.safetensors"])
def test_a_missing_file_is_named(outputs, missing):
    (outputs / missing).unlink()
    with pytest.raises(StageError, match=missing.rpartition("/")[2]):
        evaluate.run(generated(), outputs)
