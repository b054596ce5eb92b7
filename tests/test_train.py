"""A training: what it leaves, in which order, and how it ends. Nothing is learnt here that matters."""

import csv
import gc
import json
import weakref
from contextlib import contextmanager

import pytest
import torch
from conftest import fails
from loops import without_times
from stores import client, fresh_store, own_store, runs  # noqa: F401 (own_store: each test has its own)
from trainings import REPEATED, SMALL, STEPS, driven, generated, light, once, prepare, threads  # noqa: F401 (threads: one is enough)

from pipeline import config, devices, files, hardware, plots, train
from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.errors import OutOfMemoryError, StageError, UsageError
from pipeline.models import checkpoints
from pipeline.profiling import system_info, system_state
from pipeline.profiling.clock import Clock
from pipeline.tracking import records, store
from pipeline.training import loop, setup

CEILINGS = {"ceiling/matmul_tflops", "ceiling/memory_gb_per_second", "ceiling/synthetic_images_per_second"}
ONCE = {
    "time/startup_seconds", "time/setup_seconds", "time/data_seconds", "time/total_seconds", "time/ceilings_seconds",
    "time/inspect_seconds", "time/checkpoint_seconds", "time/logging_seconds", "time/unaccounted_seconds",
    "time/process_seconds",
    "efficiency/vs_synthetic", "efficiency/model_flops_utilisation", *CEILINGS, "best/epoch", "best/val_accuracy",
}  # fmt: skip
PER_EPOCH = {
    "epoch", "train/loss", "train/accuracy", "val/loss", "val/accuracy", "train/lr", "time/train_seconds",
    "time/val_seconds", "memory/peak_mib", "memory/peak_share",
}  # fmt: skip
LEFT = {
    "best.safetensors", "curves.csv", "hardware.json", "metrics.json", "params.yaml", "record.json",
    "plots/samples.png", "plots/loss.png", "plots/accuracy.png",
}  # fmt: skip


@pytest.fixture
def trained(settings_of, tmp_path, light):
    """Trains on `pictures` with `key=value` overrides; gives the record."""

    def run(*overrides):
        settings = settings_of(*SMALL, *overrides)
        prepare(settings, tmp_path / "outputs")
        return train.run(settings, tmp_path / "outputs")

    return run


@pytest.fixture
def repeated(settings_of, tmp_path, light, driven):
    """As `trained`, of several repeats; the seeds of the model are as those of processes."""

    def run(*overrides):
        settings = settings_of(*SMALL, *overrides)
        prepare(settings, tmp_path / "outputs")
        driven(settings, tmp_path / "outputs", "train")

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "outputs" / "train"


def left_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def script(monkeypatch, accuracies, then=None):
    """Trains by script: epochs with these validation accuracies, each leaving its number in the head's bias; `then`
    what is raised after them."""

    def epochs(train_loop, train_batches, val_batches, progress):
        for epoch, accuracy in enumerate(accuracies, 1):
            with torch.no_grad():
                train_loop.network.bias.fill_(epoch)
            yield {
                "epoch": epoch, "train/loss": 1.0, "train/accuracy": 0.5, "val/loss": 1.0, "val/accuracy": accuracy,
                "train/lr": 0.1, "time/train_seconds": 1.0, "time/val_seconds": 1.0,
            }  # fmt: skip
        if then is not None:
            raise then

    monkeypatch.setattr(loop, "train", epochs)


# --- repeats


def untimed(record):
    return without_times(epoch["figures"] for epoch in record["epochs"])


WAYS = [
    ("recipe=linear-probe",),
    pytest.param(("recipe=finetune", "batch_size=16"), marks=pytest.mark.slow),
    pytest.param(("recipe=blog", "optimizer=sgd", "lr=0.01"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_each_repeat_is_the_training_that_its_seed_alone_gives(trained, repeated, out, way):
    repeated(*way, "repeats=2", "seed=4")
    two = records.training_records(out.parent)
    alone = [trained(*way, f"seed={seed}") for seed in (4, 5)]
    for repeat, single in zip(two, alone, strict=True):
        assert untimed(repeat) == untimed(single)
        assert repeat["params"] == single["params"] | {"settings.repeats": "2"}
        assert repeat["datasets"] == single["datasets"]
        assert not {"repeats.id", "repeat", "repeats"} & set(single["tags"])
    assert untimed(alone[0]) != untimed(alone[1])


def test_repeats_are_runs_below_one_that_tells_of_them_all(repeated, out):
    repeated("repeats=3")
    three = records.training_records(out.parent)
    assert len({record["id"] for record in three}) == 3
    (shared,) = {record["tags"]["repeats.id"] for record in three}
    assert [(record["tags"]["repeat"], record["tags"]["repeats"]) for record in three] == [(n, "3") for n in "123"]
    assert ["repeat.pause_seconds" in record["tags"] for record in three] == [False, True, True]
    others = {f"repeats/{number}/{name}" for number in (2, 3) for name in LEFT}
    assert left_in(out) == LEFT | others | {"repeats/figures.csv", "set.json"}
    for number, record in enumerate(three, 1):
        _, facts = checkpoints.load(records.stage_folders(out.parent, number)["train"] / "best.safetensors")
        assert facts.record == record["id"]
    assert files.read_json(out / "metrics.json") == records.summarise_metrics(
        [records.final_metrics(record) for record in three]
    )
    with (out / "repeats" / "figures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["repeat"], row["seed"]) for row in rows] == [("1", "0"), ("2", "1"), ("3", "2")]
    assert [float(row["train/loss"]) for row in rows] == [
        records.final_metrics(record)["train/loss"] for record in three
    ]

    parent, children = store.find_repeats(shared, "trainmark")
    run = client().get_run(parent.run_id)
    hardware = three[0]["tags"]["hardware"]
    assert run.info.status == "FINISHED" and run.info.run_name == f"{hardware} · linear-probe · fp32 × 3"
    for key in ("time/total_seconds", "time/startup_seconds", "ceiling/matmul_tflops"):
        assert run.data.metrics[key] == sorted(record["metrics"][key] for record in three)[1]
        assert f"std/{key}" in run.data.metrics
    assert not {"repeat", "repeat.pause_seconds"} & set(run.data.tags)
    for number, row in children.items():
        child = client().get_run(row["run_id"])
        assert child.info.status == "FINISHED" and child.data.tags["mlflow.parentRunId"] == parent.run_id
        assert child.data.tags["record"] == three[number - 1]["id"]
        assert child.info.run_name == f"{hardware} · linear-probe · fp32 · {number}/3"
    assert len(runs()) == 4


@pytest.mark.parametrize(
    ("failing", "error", "status"), [(1, StageError("no more"), "FAILED"), (2, KeyboardInterrupt(), "KILLED")]
)
def test_a_repeat_that_fails_ends_the_run_above_and_what_is_missing_is_trained_later(
    repeated, out, monkeypatch, failing, error, status
):
    epochs, begun = loop.train, []

    def fails(*args):
        begun.append(args)
        if len(begun) == failing:
            raise error
        return epochs(*args)

    monkeypatch.setattr(loop, "train", fails)
    with pytest.raises(type(error)):
        repeated("repeats=3", "epochs=1")

    def names():
        return sorted((run.info.run_name.split(" · ")[-1], run.info.status) for run in runs())

    ended = [(f"{number}/3", status if number == failing else "FINISHED") for number in range(1, failing + 1)]
    assert names() == [*ended, ("fp32 × 3", status)]
    assert len(store.finished_runs()) == failing - 1
    first = [record["id"] for record in records.present_records(out.parent)]

    repeated("repeats=3", "epochs=1")
    assert len(begun) == 4  # the one that failed, and three
    whole = [(f"{number}/3", "FINISHED") for number in (1, 2, 3)]
    assert names() == sorted([*whole, (f"{failing}/3", status), ("fp32 × 3", "FINISHED")])
    assert [record["id"] for record in records.training_records(out.parent)][: failing - 1] == first
    assert len({record["tags"]["repeats.id"] for record in records.training_records(out.parent)}) == 1


def test_repeats_below_a_run_that_was_deleted_meanwhile_come_to_their_end(repeated, out, monkeypatch):
    start = store.start_run

    def deletes(record, parent=None):
        if parent is not None and not store.is_deleted(parent):
            client().delete_run(parent.run_id)
        return start(record, parent)

    monkeypatch.setattr(store, "start_run", deletes)
    repeated("repeats=2", "epochs=1")
    assert sorted(run["name"].split(" · ")[-1] for run in store.finished_runs()) == ["1/2", "2/2"]


# --- what it leaves


def test_the_record_holds_all_that_the_run_shows(once, monkeypatch):
    record = files.read_json(once.outputs / "train" / "record.json")
    assert set(record) == {
        "id", "name", "experiment", "started", "ended", "params", "tags", "datasets", "epochs", "metrics", "warnings",
        "facts", "hardware",
    }  # fmt: skip
    assert record["name"] == f"{record['tags']['hardware']} · linear-probe · fp32"
    assert record["experiment"] == "trainmark" and record["warnings"] == []
    assert record["params"]["train.epochs"] == "2" and record["params"]["settings.data.source"] == "synthetic"
    assert [row["name"] for row in record["datasets"]] == ["synthetic-train", "synthetic-validation"]
    facts = record["facts"]
    assert facts["images"] == {"train": 50, "validation": 10}  # at least one of each class is held out
    assert len(facts["classes"]) == 10 and facts["features_cached"] and facts["image_size"] == 32
    assert 0 < facts["trainable"] < facts["parameters"] and facts["weights_digest"] is None  # random ones
    assert set(record["hardware"]) == {"machine", "accelerator", "torch", "conditions"}
    assert record["hardware"]["machine"]["machine"] == record["tags"]["machine"]
    assert record["hardware"]["torch"]["threads"] == 1
    assert [epoch["figures"]["epoch"] for epoch in record["epochs"]] == [1, 2]
    assert all(set(epoch["figures"]) == PER_EPOCH for epoch in record["epochs"])
    times = [record["started"], *(epoch["at"] for epoch in record["epochs"]), record["ended"]]
    assert times == sorted(times)
    # Two steps have a median; of what one in ten took they tell nothing.
    assert set(record["metrics"]) - {"time/to_target_seconds"} == ONCE | {
        "speed/feature_images_per_second",
        "time/step_p50_seconds",
    }
    assert record["tags"]["data.placement"] == "device"
    assert facts["verdict"].startswith("images passed at ") and not facts["recorded"]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{once.trained.as_posix()}")
    (run,) = runs()
    assert (run.info.run_name, run.info.status) == (record["name"], "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (record["started"], record["ended"])
    assert run.data.params == record["params"]
    assert record["tags"].items() <= run.data.tags.items()
    assert run.data.tags[store.RECORD_TAG] == record["id"]
    assert "**Machine**" in run.data.tags["mlflow.note.content"]
    last = {key: value for key, value in record["epochs"][-1]["figures"].items() if key != "epoch"}
    shown = {key: value for key, value in run.data.metrics.items() if not key.startswith("system/")}
    assert shown == last | record["metrics"]
    samples = [sample for epoch in record["epochs"] for sample in epoch["system"]]
    assert len({sample["step"] for sample in samples}) == len(samples)
    assert len(run.outputs.model_outputs) == 1


def test_curves_metrics_and_settings_are_files_of_their_own(once):
    folder = once.outputs / "train"
    assert left_in(folder) == LEFT
    record = files.read_json(folder / "record.json")
    epochs = [epoch["figures"] for epoch in record["epochs"]]
    with (folder / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(epochs[0])
    assert [{key: float(value) for key, value in row.items()} for row in rows] == epochs
    metrics = files.read_json(folder / "metrics.json")
    assert metrics["train/loss"] == epochs[-1]["train/loss"] != epochs[0]["train/loss"]
    assert set(metrics) == set(epochs[-1]) - {"epoch"} | set(record["metrics"])
    assert files.read_json(folder / "hardware.json") == record["hardware"]
    settings = config.read_yaml(folder / "params.yaml")
    assert list(settings["recipes"]) == ["linear-probe"] and settings["recipes"]["linear-probe"]["epochs"] == 2
    _, facts = checkpoints.load(folder / "best.safetensors")
    assert (facts.record, facts.model) == (record["id"], "test_resnet.r160_in1k")
    assert facts.classes == tuple(record["facts"]["classes"])
    assert facts.epoch == record["metrics"]["best/epoch"]
    assert facts.val_accuracy == record["metrics"]["best/val_accuracy"] == max(e["val/accuracy"] for e in epochs)


def test_no_absolute_path_is_left(trained, out, pictures):
    record = trained()
    assert record["params"]["settings.data.path"] == "pictures"
    for path in out.rglob("*"):
        assert path.is_dir() or str(pictures.parent).encode() not in path.read_bytes(), path


@pytest.mark.parametrize(("accuracies", "best"), [([0.5, 0.75, 0.75, 0.5], 2), ([0.0, 0.0], 1), ([0.25, 0.5, 0.75], 3)])
def test_the_checkpoint_is_of_the_first_best_epoch(trained, out, monkeypatch, accuracies, best):
    script(monkeypatch, accuracies)
    record = trained(f"epochs={len(accuracies)}")
    net, facts = checkpoints.load(out / "best.safetensors")
    assert (facts.epoch, facts.val_accuracy) == (best, max(accuracies))
    assert net.head.bias.tolist() == [best] * 3
    assert record["metrics"]["best/epoch"] == best
    assert record["metrics"]["best/val_accuracy"] == max(accuracies)


def test_nothing_of_an_earlier_training_stays(trained, out, monkeypatch):
    script(monkeypatch, [0.5])
    (out / "plots").mkdir(parents=True)
    for name in ("record.json", "plots/extra.png"):
        (out / name).write_text("stale")
    record = trained("epochs=1")
    assert left_in(out) == LEFT
    assert files.read_json(out / "record.json") == json.loads(json.dumps(record))


def test_validation_on_the_test_split_is_said(trained):
    record = trained("validation=test")
    assert record["facts"]["images"] == {"train": 60, "test": 30}
    assert [row["context"] for row in record["datasets"]] == ["training", "testing"]
    (warning,) = record["warnings"]
    assert "test split" in warning and "flatters" in warning


# --- how it ends


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (loop.NonFiniteLossError("the training loss is nan in epoch 2"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (ZeroDivisionError(), "FAILED"),
    ],
)
def test_a_training_that_does_not_come_to_its_end_says_so(trained, out, monkeypatch, error, status):
    script(monkeypatch, [0.5], then=error)
    with pytest.raises(type(error)):
        trained()
    (run,) = runs()
    assert run.info.status == status and run.info.end_time is not None
    assert run.data.metrics["val/accuracy"] == 0.5  # what was reached stays
    assert left_in(out) == {"best.safetensors"}


def test_a_store_that_is_not_there_ends_it_before_it_starts(trained, out, monkeypatch, tmp_path):
    (tmp_path / "broken.db").write_bytes(b"This is no database. " * 400)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(tmp_path / 'broken.db').as_posix()}")
    out.mkdir(parents=True)
    (out / "record.json").write_text("stale")
    with pytest.raises(StageError, match=r"broken\.db can't be used"):
        trained()
    assert left_in(out) == set()


@pytest.mark.parametrize("broken", ["log_epoch", "log_artifacts", "log_model", "set_tags"])
def test_a_store_that_fails_meanwhile_fails_the_run(trained, out, monkeypatch, broken):
    script(monkeypatch, [0.5])
    mark = store.mark_run
    real = getattr(store, broken)
    marked = []

    def fails(*args):
        if not marked:
            return real(*args)  # `mark` sets a tag, too
        raise StageError("the store is away")

    monkeypatch.setattr(store, "mark_run", lambda *args: (mark(*args), marked.append(True)))
    monkeypatch.setattr(store, broken, fails)
    with pytest.raises(StageError, match="the store is away"):
        trained("epochs=1")
    (run,) = runs()
    assert run.info.status == "FAILED"
    # The record comes last, so that `evaluate` does not take a training that was not logged whole.
    assert left_in(out) == ({"best.safetensors"} if broken == "log_epoch" else LEFT - {"record.json"})
    assert checkpoints.load(out / "best.safetensors")[1].epoch == 1


def test_a_store_that_would_be_lost_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "ROOT", tmp_path / ".dvc" / "tmp" / "exps" / "x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(UsageError, match=r"^MLFLOW_TRACKING_URI: "):
        train.run(generated(), tmp_path / "outputs")
    assert not (tmp_path / "outputs").exists()


def test_what_the_stages_before_leave_is_asked_for(tmp_path):
    with pytest.raises(StageError, match=r"hardware\.json is missing: run the stage"):
        train.run(generated(), tmp_path)
    hardware.run(generated(), tmp_path)
    with pytest.raises(StageError, match=r"inputs\.json is missing: run the stage"):
        train.run(generated(), tmp_path)
    assert runs() == []


# --- the clock


LASTING = {
    "inspect": 3.0, "decode": 1.0, "setup": 10.0, "ceilings": 50.0, "upload": 100.0, "features": 1000.0,
    "train": 10_000.0, "validate": 200_000.0, "checkpoint": 7.0, "log": 8.0,
}  # fmt: skip
"""Seconds that each span lasts by `Scripted`; of no two spans do the sums look alike."""


class Scripted(Clock):
    """Its time passes in spans alone, in each as long as is said, and for a quarter of a second before each."""

    def __init__(self, synchronize):
        self.time = 0.0
        super().__init__(synchronize, lambda: self.time)

    @contextmanager
    def span(self, name):
        self.time += 0.25
        with super().span(name) as span:
            yield span
            self.time += LASTING[name]


@pytest.fixture
def clocks(monkeypatch):
    """The clocks that a training makes."""
    made = []
    real = train.Clock
    monkeypatch.setattr(train, "Clock", lambda synchronize: made.append(real(synchronize)) or made[-1])
    return made


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(train, "Clock", Scripted)


def test_nothing_is_logged_saved_or_drawn_while_the_clock_runs(trained, monkeypatch, clocks):
    spans, called = [], []

    def watched(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            called.append(name)
            spans.extend((name, clock._open) for clock in clocks if clock._open not in (None, "log", "checkpoint"))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    names = {
        store: (
            "start_run",
            "mark_run",
            "log_epoch",
            "log_metrics",
            "log_artifacts",
            "log_model",
            "set_tags",
            "end_run",
        ),
        checkpoints: ("save",),
        plots: ("save",),
        files: ("write_json", "write_text"),
    }
    for module, functions in names.items():
        for name in functions:
            watched(module, name)
    trained("features=recompute")
    (clock,) = clocks
    assert spans == []
    assert set(called) == {name for functions in names.values() for name in functions}
    assert called.count("log_epoch") == 2 and called.count("log_model") == 1
    assert set(clock.seconds) == set(LASTING) - {"features"}


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("features", ["cache", "recompute"])
def test_the_total_is_upload_features_training_and_validation(trained, features):
    record = trained(f"features={features}")
    metrics = record["metrics"]
    assert metrics["time/data_seconds"] == 1
    assert metrics["time/setup_seconds"] == 3 * 10  # building, warming up, back to the beginning
    assert metrics["time/inspect_seconds"] == 2 * 3
    assert metrics["time/ceilings_seconds"] == 50
    assert metrics["time/logging_seconds"] == 4 * 8  # the start, the mark, two epochs
    checkpoints = metrics["time/checkpoint_seconds"] / 7
    assert checkpoints in (1, 2)  # the second epoch may be no better
    spans = 3 + 1 + 2 + 1 + 4 + checkpoints + 1 + (features == "cache") + 4
    assert metrics["time/unaccounted_seconds"] == 0.25 * (spans - 1)
    assert [epoch["figures"]["time/train_seconds"] for epoch in record["epochs"]] == [10_000] * 2
    assert [epoch["figures"]["time/val_seconds"] for epoch in record["epochs"]] == [200_000] * 2
    if features == "cache":
        assert metrics["time/total_seconds"] == 421_100
        assert metrics["speed/feature_images_per_second"] == 60 / 1000  # training's and validation's
        assert "speed/train_images_per_second" not in record["epochs"][0]["figures"]
    else:
        assert metrics["time/total_seconds"] == 420_100
        assert "speed/feature_images_per_second" not in metrics
        assert record["epochs"][0]["figures"]["speed/train_images_per_second"] == 54 / 10_000


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("earlier", [0.0, 2.25])
def test_the_times_of_starting_up_and_of_all_are_the_processs_without_earlier_stages(monkeypatch, tmp_path, earlier):
    script(monkeypatch, [0.5])
    passed = [12.5]
    monkeypatch.setattr(system_info, "process_age", lambda: passed[0])
    mark = store.mark_run
    monkeypatch.setattr(store, "mark_run", lambda *args: (passed.append(passed.pop() + 30), mark(*args)))
    prepare(generated(), tmp_path / "outputs")
    metrics = train.run(generated("epochs=1"), tmp_path / "outputs", earlier=earlier)["metrics"]
    assert metrics["time/startup_seconds"] == pytest.approx(12.5 - earlier, abs=1e-3)
    assert metrics["time/process_seconds"] == pytest.approx(42.5 - earlier, abs=1e-3)
    assert runs()[0].data.metrics["time/process_seconds"] == metrics["time/process_seconds"]


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(("target", "epochs"), [("0.5", 2), ("0.25", 1), ("0.75", 3), ("0.8", None), ("null", None)])
def test_the_time_to_the_target_is_that_of_the_first_epoch_that_reaches_it(trained, monkeypatch, target, epochs):
    def paced(train_loop, *args):
        for epoch, accuracy in enumerate((0.25, 0.5, 0.75, 0.5), 1):
            for name in ("train", "validate"):
                with train_loop.clock.span(name):
                    pass
            yield {
                "epoch": epoch, "train/loss": 1.0, "train/accuracy": 0.5, "val/loss": 1.0, "val/accuracy": accuracy,
                "train/lr": 0.1, "time/train_seconds": 10_000.0, "time/val_seconds": 200_000.0,
            }  # fmt: skip

    monkeypatch.setattr(loop, "train", paced)
    metrics = trained("epochs=4", f"target_accuracy={target}", "features=cache")["metrics"]
    assert metrics["time/total_seconds"] == 1100 + 4 * 210_000
    assert metrics.get("time/to_target_seconds") == (epochs and 1100 + epochs * 210_000)


@pytest.mark.parametrize(("steps", "told"), [(2, {"p50"}), (18, {"p50", "p90"})])
def test_of_steps_the_percentiles_are_told_that_enough_of_them_tell(trained, steps, told):
    """Of two epochs of 54 images each, cut so that there are as many steps; on the CPU every step is timed."""
    metrics = trained(f"batch_size={54 * 2 // steps}")["metrics"]
    assert {key for key in metrics if key.startswith("time/step_")} == {f"time/step_{name}_seconds" for name in told}


# --- too little memory


@pytest.fixture
def room(monkeypatch):
    """Makes the device take so many images at a time, from the warm-up on or once the images are placed; gives the
    batches of which it was then tried whether they fit."""

    def make(images, *, at_once=True):
        full, tried = [at_once], []
        prepare, place, takes_step = batching.prepare, setup.place_splits, setup._step_fits

        def prepared(batch, *args, **kwargs):
            if full[0] and len(batch) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2.00 GiB")
            return prepare(batch, *args, **kwargs)

        def placed(*args):
            full[0] = True
            return place(*args)

        monkeypatch.setattr(batching, "prepare", prepared)
        monkeypatch.setattr(setup, "place_splits", placed)
        monkeypatch.setattr(
            setup, "_step_fits", lambda training, size, shape: tried.append(size) or takes_step(training, size, shape)
        )
        return tried

    return make


@pytest.mark.parametrize("features", ["cache", "recompute"])
@pytest.mark.parametrize("at_once", [True, False], ids=["in the warm-up", "in the training"])
def test_a_batch_that_is_too_large_is_answered_with_the_largest_that_fits(trained, room, out, features, at_once):
    tried = room(5, at_once=at_once)
    line = fails(StageError, trained, "batch_size=50", f"features={features}")
    assert line.startswith("batch_size: 50") and line.endswith("cpu: the largest that fits is 4")
    assert tried == [32, 16, 8, 4]
    (run,) = runs()
    assert run.info.status == "FAILED" and run.info.end_time is not None
    assert left_in(out) == set()


def test_nothing_of_the_training_is_in_the_way_of_a_smaller_batch(trained, room, monkeypatch):
    room(5)
    nets, build, largest = [], setup.TrainingSetup, setup.largest_batch

    def built(*args):
        training = build(*args)
        nets.append(weakref.ref(training.net))
        return training

    def looked_for(*args, **kwargs):
        gc.collect()  # as the GPUs' `release_memory` does
        assert [net() is None for net in nets] == [True, False]
        return largest(*args, **kwargs)

    monkeypatch.setattr(setup, "TrainingSetup", built)
    monkeypatch.setattr(setup, "largest_batch", looked_for)
    assert "the largest that fits is 4" in fails(StageError, trained, "batch_size=50")


@pytest.mark.parametrize(
    ("images", "batch_size", "tried"),
    [(0, 1, []), (2, 3, [2]), (1, 50, [])],
    ids=["one image", "none fits", "no model"],
)
def test_without_a_batch_that_fits_the_advice_is_general(trained, room, monkeypatch, images, batch_size, tried):
    tried_batches = room(images, at_once=False)
    if images == 2:
        monkeypatch.setattr(Cpu, "capacity_mib", lambda self: 1.0)  # a step is done, but the system swaps
    expected = StageError if images == 2 or batch_size == 1 else OutOfMemoryError
    assert fails(expected, trained, f"batch_size={batch_size}", "features=recompute").startswith(
        "cpu is out of memory: lower batch_size"
    )
    assert tried_batches == tried
    assert [run.info.status for run in runs()] == ["FAILED"]


def test_a_model_that_does_not_fit_ends_it_before_there_is_a_run(trained, room):
    room(1)
    assert fails(OutOfMemoryError, trained).startswith("cpu is out of memory: lower batch_size")
    assert runs() == []


# --- the device


def test_a_gpu_that_torch_cannot_use_makes_it_a_demo(trained, monkeypatch, capsys):
    script(monkeypatch, [0.5])
    monkeypatch.setattr(devices, "select", lambda device: Cpu())
    monkeypatch.setattr(devices, "unused_gpu", lambda: "GTX 1060 is there, but this torch is built without CUDA")
    record = trained("epochs=1", "device=auto")
    assert record["tags"]["fallback"] == "device"
    assert record["name"].startswith("DEMO · ") and record["experiment"] == "trainmark-demo"
    assert any("GTX 1060" in warning and warning.startswith("DEMO") for warning in record["warnings"])
    said = capsys.readouterr().err
    assert "!!  DEMO" in said and "GTX 1060 is there, but this torch is built without CUDA" in said
    (run,) = runs()
    assert client().get_experiment(run.info.experiment_id).name == "trainmark-demo"
    assert run.data.tags["fallback"] == "device"


def test_the_cpu_that_was_asked_for_is_no_fallback(trained, monkeypatch, capsys):
    script(monkeypatch, [0.5])
    monkeypatch.setattr(devices, "unused_gpu", lambda: "GTX 1060 is there")
    record = trained("epochs=1", "device=cpu")
    assert "fallback" not in record["tags"] and record["experiment"] == "trainmark"
    assert "DEMO" not in capsys.readouterr().err


@pytest.mark.parametrize(("setting", "expected"), [("threads=1", 1), ("threads=null", 2)])
def test_threads_are_those_of_the_setting(trained, monkeypatch, setting, expected):
    script(monkeypatch, [0.5])
    monkeypatch.setattr(setup, "THREADS", 2)
    record = trained("epochs=1", setting)
    assert torch.get_num_threads() == expected
    assert record["hardware"]["torch"]["threads"] == expected


# --- conditions and energy


def test_what_taints_the_figures_is_said_and_tagged(trained, monkeypatch):
    samples = iter([{"power_source": "battery", "cpu_load": 0.4, "gpu_power_watts": 21.5}, {"power_source": "battery"}])
    monkeypatch.setattr(system_state, "sample", lambda *_: next(samples))
    record = trained("epochs=1")
    assert record["tags"]["taints"] == "battery load"
    assert any("40%" in sentence for sentence in record["warnings"])
    assert record["tags"]["power_source"] == "battery"
    assert record["metrics"]["energy/idle_watts"] == 21.5
    assert record["hardware"]["conditions"]["before"]["cpu_load"] == 0.4
    (run,) = runs()
    assert run.data.tags["taints"] == "battery load"
    assert "other processes" in run.data.tags["mlflow.note.content"]


def test_how_the_machine_itself_behaved_is_no_taint(trained, monkeypatch):
    samples = iter([{"cpu_load": 0.4}, {"gpu_throttle": "hw thermal slowdown"}])
    monkeypatch.setattr(system_state, "sample", lambda *_: next(samples))
    record = trained("epochs=1")
    assert (record["tags"]["taints"], record["tags"]["behavior"]) == ("load", "throttled")
    assert any("thermal slowdown" in sentence for sentence in record["warnings"])
    assert runs()[0].data.tags["behavior"] == "throttled"


def test_a_calm_machine_has_no_taint_and_no_energy(trained):
    record = trained("epochs=1")
    assert not {"taints", "behavior"} & set(record["tags"]) and record["warnings"] == []
    assert not [key for key in record["metrics"] if key.startswith("energy/")]


# --- execution


@pytest.mark.slow
def test_compiled_trains_as_eager_does(trained):
    figures = {}
    for mode in ("off", "default"):
        record = trained("recipe=finetune", "epochs=1", "flip=false", f"compile={mode}")
        assert record["facts"]["compile"] == mode
        figures[mode] = record["epochs"][0]["figures"]
    for key in ("train/loss", "val/loss"):
        assert figures["default"][key] == pytest.approx(figures["off"][key], rel=1e-3)
