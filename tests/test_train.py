"""The stage train: what it leaves, in which order, how it ends, and how it goes on after an interruption."""

import csv
import errno
import gc
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import fails
from loops import ScriptedClock, without_times
from stores import client, own_store, runs  # noqa: F401 (own_store: each test has its own)
from trainings import SMALL, delivered, driven, generated, light, once, prepare, threads  # noqa: F401 (threads: one is enough)

from pipeline import config, devices, files, hardware, train
from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.errors import OutOfMemoryError, StageError, Stopped
from pipeline.models import checkpoints
from pipeline.profiling import roofline, system_info
from pipeline.profiling.clock import Clock
from pipeline.tracking import pending, publisher, records, store, training_record
from pipeline.training import loop, measured, setup, state

ONCE = {
    "time/startup_seconds", "time/setup_seconds", "time/data_seconds", "time/total_seconds", "time/ceilings_seconds",
    "time/inspect_seconds", "time/checkpoint_seconds", "time/logging_seconds", "time/unaccounted_seconds",
    "time/process_seconds", "efficiency/vs_synthetic", "efficiency/model_flops_utilisation",
    "ceiling/matmul_tflops", "ceiling/memory_gb_per_second", "ceiling/synthetic_images_per_second",
    "best/epoch", "best/val_accuracy", "speed/feature_images_per_second",
    "time/step_p50_seconds",  # of two steps; p90 needs ten
}  # fmt: skip
PER_EPOCH = {
    "epoch", "train/loss", "train/accuracy", "val/loss", "val/accuracy", "train/lr", "time/train_seconds",
    "time/val_seconds", "memory/peak_mib", "memory/peak_share",
}  # fmt: skip
LEFT = {
    "best.safetensors", "curves.csv", "hardware.json", "metrics.json", "params.yaml", "record.json", "samples.npy",
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


@pytest.fixture
def script(monkeypatch):
    """Makes trainings follow a script: epochs with these validation accuracies, each leaving its number in the head's
    bias and `seconds` in its spans; `then` is raised after them, once."""

    def set_script(accuracies, then=None):
        errors = [then] if then else []

        def epochs(training, splits, settings, record, limits, saved=None):
            if saved:
                state.restore(training, saved)
            record["facts"]["verdict"] = "not judged"
            record["metrics"]["speed/feature_images_per_second"] = 1000.0
            done = len(record["epochs"])
            for epoch, accuracy in enumerate(accuracies[done:], done + 1):
                with torch.no_grad():
                    training.net.head.bias.fill_(epoch)
                for span in ("train", "validate"):
                    with training.loop.clock.span(span):
                        pass
                yield {
                    "epoch": epoch, "train/loss": 1.0, "train/accuracy": 0.5, "val/loss": 1.0,
                    "val/accuracy": accuracy, "train/lr": 0.1, "time/train_seconds": 1.0, "time/val_seconds": 1.0,
                }  # fmt: skip
            if errors:
                raise errors.pop()

        peaks = roofline.Peaks(1e12, 1e9, 1000.0)
        monkeypatch.setattr(measured, "measure_limits", lambda *args: measured.Limits(0.0, peaks))
        monkeypatch.setattr(measured, "train", epochs)

    return set_script


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def end_of(entry):
    """How the journal of an entry ends: status, and whether it is final."""
    event = pending.journal(entry)[-1]
    return event["status"], event["final"]


# --- repeats


WAYS = [
    ("recipe=linear-probe",),
    ("recipe=finetune", "batch_size=16"),
    ("recipe=blog", "optimizer=sgd", "lr=0.01"),
]


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_each_repeat_is_the_training_that_its_seed_alone_gives(trained, repeated, out, way):
    repeated(*way, "repeats=2", "seed=4")
    two = records.training_records(out.parent)
    alone = [trained(*way, f"seed={seed}") for seed in (4, 5)]
    figures = [[without_times(epoch["figures"] for epoch in row["epochs"]) for row in rows] for rows in (two, alone)]
    assert figures[0] == figures[1] and figures[0][0] != figures[0][1]
    for repeat, single in zip(two, alone, strict=True):
        assert repeat["params"] == single["params"] | {"settings.repeats": "2"}
        assert repeat["datasets"] == single["datasets"]
        assert not {"repeats.id", "repeat", "repeats"} & set(single["tags"])


def test_repeats_are_runs_below_one_that_tells_of_them_all(repeated, out):
    repeated("repeats=3")
    three = records.training_records(out.parent)
    metrics = [records.final_metrics(record) for record in three]
    assert len({record["id"] for record in three}) == 3
    (shared,) = {record["tags"]["repeats.id"] for record in three}
    assert [(record["tags"]["repeat"], record["tags"]["repeats"]) for record in three] == [(n, "3") for n in "123"]
    assert ["repeat.pause_seconds" in record["tags"] for record in three] == [False, True, True]
    others = {f"repeats/{number}/{name}" for number in (2, 3) for name in LEFT}
    assert files_in(out) == LEFT | others | {"repeats/figures.csv", "set.json"}
    for number, record in enumerate(three, 1):
        _, facts = checkpoints.load(records.stage_folders(out.parent, number)["train"] / "best.safetensors")
        assert facts.record == record["id"]
    assert files.read_json(out / "metrics.json") == records.summarise_metrics(metrics)
    with (out / "repeats" / "figures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["repeat"], row["seed"]) for row in rows] == [("1", "0"), ("2", "1"), ("3", "2")]
    assert [float(row["train/loss"]) for row in rows] == [figures["train/loss"] for figures in metrics]

    parent, children = store.find_repeats(shared, "trainmark")
    run = client().get_run(parent.run_id)
    hardware_name = three[0]["tags"]["hardware"]
    assert run.info.status == "FINISHED" and run.info.run_name == f"{hardware_name} · linear-probe · fp32 × 3"
    for key in ("time/total_seconds", "time/startup_seconds", "ceiling/matmul_tflops"):
        assert run.data.metrics[key] == sorted(record["metrics"][key] for record in three)[1]
        assert f"std/{key}" in run.data.metrics
    assert not {"repeat", "repeat.pause_seconds"} & set(run.data.tags)
    for number, row in children.items():
        child = client().get_run(row["run_id"])
        assert child.info.status == "FINISHED" and child.data.tags["mlflow.parentRunId"] == parent.run_id
        assert child.data.tags["record"] == three[number - 1]["id"]
        assert child.info.run_name == f"{hardware_name} · linear-probe · fp32 · {number}/3"
    assert len(runs()) == 4


def test_a_repeat_that_is_stopped_ends_the_run_above_and_goes_on_later(repeated, out, script, monkeypatch):
    script([0.5, 0.75])
    epochs, begun = measured.train, []

    def stopped_once(*args):
        begun.append(args)
        for figures in epochs(*args):
            if len(begun) == 2 and figures["epoch"] == 2:
                raise Stopped(143)
            yield figures

    monkeypatch.setattr(measured, "train", stopped_once)
    with pytest.raises(Stopped):
        repeated("repeats=3")

    def statuses():
        return {run.info.run_name.split(" · ")[-1]: run.info.status for run in delivered()}

    assert statuses() == {"1/3": "FINISHED", "2/3": "KILLED", "fp32 × 3": "KILLED"}
    assert len(store.finished_runs()) == 1
    first = [record["id"] for record in records.present_records(out.parent)]
    run_ids = {run.info.run_id for run in runs()}

    repeated("repeats=3")
    assert len(begun) == 4
    assert statuses() == dict.fromkeys(["1/3", "2/3", "3/3", "fp32 × 3"], "FINISHED")
    assert run_ids < {run.info.run_id for run in runs()} and len(runs()) == 4
    three = records.training_records(out.parent)
    assert three[0]["id"] == first[0]
    assert [record["tags"].get("resumed") for record in three] == [None, "1", None]
    assert len({record["tags"]["repeats.id"] for record in three}) == 1


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
    assert facts["verdict"] and not facts["recorded"]
    assert set(record["hardware"]) == {"machine", "accelerator", "torch", "conditions"}
    assert record["hardware"]["machine"]["machine"] == record["tags"]["machine"]
    assert record["hardware"]["torch"]["threads"] == 1
    assert [epoch["figures"]["epoch"] for epoch in record["epochs"]] == [1, 2]
    assert all(set(epoch["figures"]) == PER_EPOCH for epoch in record["epochs"])
    times = [record["started"], *(epoch["at"] for epoch in record["epochs"]), record["ended"]]
    assert times == sorted(times)
    assert set(record["metrics"]) - {"time/to_target_seconds"} == ONCE
    assert record["tags"]["data.placement"] == "device"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{once.trained.as_posix()}")
    (run,) = runs()
    assert (run.info.run_name, run.info.status) == (record["name"], "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (record["started"], record["ended"])
    assert run.data.params == record["params"]
    assert record["tags"].items() <= run.data.tags.items()
    assert run.data.tags[store.RECORD_TAG] == record["id"]
    assert facts["verdict"] in run.data.tags["mlflow.note.content"]
    last = {key: value for key, value in record["epochs"][-1]["figures"].items() if key != "epoch"}
    shown = {key: value for key, value in run.data.metrics.items() if not key.startswith("system/")}
    assert shown == last | record["metrics"]
    samples = [sample for epoch in record["epochs"] for sample in epoch["system"]]
    assert len({sample["step"] for sample in samples}) == len(samples)
    assert len(run.outputs.model_outputs) == 1


def test_curves_metrics_and_settings_are_files_of_their_own(once):
    folder = once.outputs / "train"
    assert files_in(folder) == LEFT
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


def test_no_absolute_path_is_left(trained, script, out, pictures):
    script([0.5])
    record = trained()
    assert record["params"]["settings.data.path"] == "pictures"
    for path in out.rglob("*"):
        assert path.is_dir() or str(pictures.parent).encode() not in path.read_bytes(), path


@pytest.mark.parametrize(("accuracies", "best"), [([0.5, 0.75, 0.75, 0.5], 2), ([0.0, 0.0], 1)])
def test_the_checkpoint_is_of_the_first_best_epoch(trained, script, out, accuracies, best):
    script(accuracies)
    record = trained()
    model, facts = checkpoints.load(out / "best.safetensors")
    assert (facts.record, facts.epoch, facts.val_accuracy) == (record["id"], best, max(accuracies))
    assert facts.model == "test_resnet.r160_in1k" and facts.classes == tuple(record["facts"]["classes"])
    assert model.head.bias.tolist() == [best] * 3
    assert (record["metrics"]["best/epoch"], record["metrics"]["best/val_accuracy"]) == (best, max(accuracies))


@pytest.mark.parametrize(
    ("before", "after", "tags"),
    [
        ({}, {}, {}),
        ({"power_source": "battery", "cpu_load": 0.4}, {"power_source": "battery"}, {"taints": "clock battery load"}),
        (
            {"cpu_load": 0.4},
            {"gpu_throttle": "hw thermal slowdown"},
            {"taints": "clock load", "behavior": "throttled"},
        ),
    ],
)
def test_what_disturbed_the_machine_and_how_it_behaved_are_tags_and_warnings(before, after, tags):
    record = {
        "tags": {"taints": "clock"}, "warnings": ["the clock"], "metrics": {}, "epochs": [],
        "facts": {"features_cached": True}, "hardware": {"conditions": {"before": before}},
    }  # fmt: skip
    training_record.add_conditions(record, after)
    assert record["tags"] == {"taints": "clock"} | tags
    assert len(record["warnings"]) == sum(len(words.split()) for words in record["tags"].values())
    assert record["hardware"]["conditions"] == {"before": before, "after": after}
    assert record["metrics"] == {}
    before["gpu_power_watts"] = 21.5
    training_record.add_conditions(record, after)
    assert record["metrics"] == {"energy/idle_watts": 21.5}


# --- how it ends


@pytest.mark.parametrize(
    ("error", "status", "final"),
    [
        (loop.NonFiniteLossError("the training loss is nan in epoch 2"), "FAILED", True),
        (OutOfMemoryError("cpu is out of memory"), "FAILED", True),
        (StageError("no disk space"), "FAILED", False),
        (KeyboardInterrupt(), "KILLED", False),
        (Stopped(143), "KILLED", False),
    ],
)
def test_a_training_that_does_not_come_to_its_end_says_so(trained, script, out, error, status, final):
    script([0.5], then=error)
    with pytest.raises(type(error)):
        trained("batch_size=1")
    (entry,) = pending.entries()
    assert end_of(entry) == (status, final) and pending.is_resumable(entry) is not final
    assert files_in(out) == set()
    (run,) = delivered()
    assert run.info.status == status and run.info.end_time is not None
    assert run.data.metrics["val/accuracy"] == 0.5  # what was reached stays
    assert pending.entries() == ([] if final else [entry]) and pending.waiting() == []

    assert trained("batch_size=1")["tags"].get("resumed") == (None if final else "1")
    assert [run.info.status for run in delivered()].count("FINISHED") == 1
    assert len(runs()) == 1 + final and pending.entries() == []


def test_a_training_needs_no_store(trained, script, out, monkeypatch):
    script([0.5])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:password@127.0.0.1:9")
    trained()
    assert files_in(out) == LEFT
    (entry,) = pending.waiting()
    assert files_in(entry / "train") == LEFT - {"curves.csv"} and not (entry / "state").exists()
    text = b"".join(path.read_bytes() for path in [*entry.rglob("*.json"), *out.rglob("*.json")])
    assert b"password" not in text


def test_what_the_stages_before_leave_is_asked_for(tmp_path):
    with pytest.raises(StageError, match=r"hardware\.json is missing"):
        train.run(generated(), tmp_path)
    hardware.run(generated(), tmp_path)
    with pytest.raises(StageError, match=r"inputs\.json is missing"):
        train.run(generated(), tmp_path)
    assert pending.entries() == []


# --- an interruption


@pytest.fixture
def interrupt(monkeypatch):
    """Stops trainings after they saved the state of these epochs, each once; gives the epochs that are left."""

    def stop_after(*epochs, error=None):
        left, save = list(epochs), state.save

        def stopping(folder, training, record):
            result = save(folder, training, record)
            if len(record["epochs"]) in left:
                left.remove(len(record["epochs"]))
                raise error or Stopped(143)
            return result

        monkeypatch.setattr(state, "save", stopping)
        return left

    return stop_after


WORKS = [
    ("recipe=linear-probe", "warmup_epochs=0.5"),
    ("recipe=finetune", "batch_size=16", "precision=bf16"),
    ("recipe=blog", "batch_size=16", "target_accuracy=0.1"),
]


@pytest.mark.parametrize("work", WORKS, ids=" ".join)
def test_the_same_command_goes_on_and_ends_as_if_it_never_was_interrupted(trained, out, interrupt, work):
    unbroken = trained(*work, "epochs=4", "label=another")
    weights, _ = checkpoints.load(out / "best.safetensors")
    left = interrupt(1, 3, 3)
    begun = []
    for _ in range(2):
        with pytest.raises(Stopped):
            trained(*work, "epochs=4")
        begun.append(delivered()[0].info.run_id)
    left.clear()
    record = trained(*work, "epochs=4")

    figures = [without_times(epoch["figures"] for epoch in row["epochs"]) for row in (unbroken, record)]
    assert figures[0] == figures[1] and len(figures[0]) == 4
    resumed, _ = checkpoints.load(out / "best.safetensors")
    assert all(
        torch.equal(*pair) for pair in zip(weights.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert record["metrics"].keys() == unbroken["metrics"].keys() - {"time/process_seconds"}
    assert record["metrics"]["time/total_seconds"] >= sum(
        epoch["figures"]["time/train_seconds"] + epoch["figures"]["time/val_seconds"] for epoch in record["epochs"]
    )
    assert (record["tags"].pop("resumed"), record["params"]["settings.label"]) == ("2", "null")
    assert record["tags"] | {"label": "another"} == unbroken["tags"]
    (run,) = [run for run in delivered() if run.data.tags.get("label") != "another"]
    assert begun == [run.info.run_id] * 2 and run.info.status == "FINISHED"
    assert run.data.tags["resumed"] == "2" and run.data.tags["record"] == record["id"]
    history = client().get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [
        (number, row["train/loss"]) for number, row in enumerate(figures[1], 1)
    ]
    assert pending.entries() == []


@pytest.mark.parametrize(
    ("override", "resumed", "said"),
    [
        ("label=null", "1", "after epoch 2"),
        ("tracking.experiment=another", "1", "after epoch 2"),
        ("lr=0.02", None, "recipes.linear-probe.lr"),
        ("seed=3", None, "another seed"),
        ("resume=never", None, None),
    ],
)
def test_another_setting_starts_anew_and_says_which(trained, script, capsys, override, resumed, said):
    script([0.5, 0.75], then=Stopped(143))
    with pytest.raises(Stopped):
        trained()
    capsys.readouterr()
    assert trained(override)["tags"].get("resumed") == resumed
    output = capsys.readouterr().out
    assert said in output if said else "resumed" not in output
    assert len(delivered()) == (1 if resumed else 2)


def test_a_training_that_will_never_be_resumed_saves_no_state(trained, script):
    script([0.5], then=Stopped(143))
    with pytest.raises(Stopped):
        trained("resume=never")
    (entry,) = pending.entries()
    assert list(entry.rglob("*.pt")) == [] and not pending.is_resumable(entry)


@pytest.mark.parametrize(("damaged", "epoch"), [(1, 2), (2, None)])
def test_of_damaged_states_the_one_before_is_used_or_none(trained, interrupt, capsys, damaged, epoch):
    expected = trained("epochs=4", "seed=5")
    interrupt(3)
    with pytest.raises(Stopped):
        trained("epochs=4", "seed=5", "resume=auto")
    (entry,) = [entry for entry in pending.entries() if pending.is_resumable(entry)]
    paths = sorted(entry.glob("state/*.pt"))[-damaged:]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    record = trained("epochs=4", "seed=5")
    output = capsys.readouterr().out
    assert all(path.name in output for path in paths)
    assert record["tags"].get("resumed") == (epoch and "1") and (f"after epoch {epoch}" in output) == bool(epoch)
    figures = [without_times(epoch["figures"] for epoch in row["epochs"]) for row in (expected, record)]
    assert figures[0] == figures[1]


def test_a_disk_that_is_full_ends_it_and_the_state_before_is_resumed(trained, monkeypatch):
    write, states = Path.write_bytes, []

    def fill(path, content):
        if path.name.startswith(".state"):
            states.append(path)
            if len(states) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    assert "no disk space left" in fails(StageError, trained, "epochs=3")
    (entry,) = pending.entries()
    assert end_of(entry) == ("FAILED", False) and [run.info.status for run in delivered()] == ["FAILED"]
    record = trained("epochs=3")
    assert record["tags"]["resumed"] == "1" and [run.info.status for run in delivered()] == ["FINISHED"]


def test_two_processes_do_not_resume_the_same_training(trained, script):
    script([0.5], then=Stopped(143))
    with pytest.raises(Stopped):
        trained()
    (entry,) = pending.entries()
    with pending.own(entry):
        assert "resumed" not in trained()["tags"]


# --- the clock


SECONDS = {
    "inspect": 3.0, "decode": 1.0, "setup": 10.0, "ceilings": 50.0, "upload": 100.0, "features": 1000.0,
    "train": 10_000.0, "validate": 200_000.0, "checkpoint": 7.0, "log": 8.0,
}  # fmt: skip
"""How long each span lasts by `Scripted`; no two sums of them are alike."""


Scripted = partial(ScriptedClock, seconds=SECONDS, gap=0.25)


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(train, "Clock", Scripted)


def test_nothing_is_written_while_the_clock_runs(trained, monkeypatch):
    clocks, spans, called = [], [], []
    monkeypatch.setattr(train, "Clock", lambda synchronize: clocks.append(Clock(synchronize)) or clocks[-1])

    def watch(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            called.append(name)
            spans.extend(clock._open for clock in clocks)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for module, name in ((pending, "append"), (state, "save"), (checkpoints, "save"), (files, "atomic_write")):
        watch(module, name)
    trained("features=recompute")
    (clock,) = clocks
    assert not {*setup.TOTAL_SPANS, "setup", "ceilings"} & set(spans)
    assert set(called) == {"append", "save", "atomic_write"}
    assert called.count("append") == 3  # the start, two epochs
    assert set(clock.seconds) == set(SECONDS) - {"features"}


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("features", ["cache", "recompute"])
def test_the_total_is_upload_features_training_and_validation(trained, features):
    record = trained(f"features={features}")
    metrics, cached = record["metrics"], features == "cache"
    assert metrics["time/total_seconds"] == 420_100 + 1000 * cached
    assert metrics["time/data_seconds"] == 1
    assert metrics["time/setup_seconds"] == 3 * 10  # building, warming up, back to the beginning
    assert metrics["time/inspect_seconds"] == 2 * 3
    assert metrics["time/ceilings_seconds"] == 2 * 50  # before, and the operations that a step takes
    assert metrics["time/logging_seconds"] == 2 * 8  # of each epoch
    saved = metrics["time/checkpoint_seconds"] / 7
    assert saved in (1, 2)  # the second epoch may be no better
    spans = 3 + 1 + 2 + 2 + 2 + saved + 1 + cached + 4
    assert metrics["time/unaccounted_seconds"] == 0.25 * (spans - 1)
    assert [epoch["figures"]["time/train_seconds"] for epoch in record["epochs"]] == [10_000] * 2
    assert [epoch["figures"]["time/val_seconds"] for epoch in record["epochs"]] == [200_000] * 2
    assert metrics.get("speed/feature_images_per_second") == (60 / 1000 if cached else None)
    speed = record["epochs"][0]["figures"].get("speed/train_images_per_second")
    assert speed == (None if cached else 54 / 10_000)


def test_startup_and_process_times_are_ages_of_the_process(trained, script, monkeypatch):
    script([0.5])
    ages = iter([12.5, 40.25])
    monkeypatch.setattr(system_info, "process_age", lambda: next(ages))
    metrics = trained()["metrics"]
    assert (metrics["time/startup_seconds"], metrics["time/process_seconds"]) == (12.5, 40.25)


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(("target", "epochs"), [("0.5", 2), ("0.8", None), ("null", None)])
def test_the_time_to_the_target_is_that_of_the_first_epoch_that_reaches_it(trained, script, target, epochs):
    script([0.25, 0.5, 0.75, 0.5])
    metrics = trained(f"target_accuracy={target}")["metrics"]
    assert metrics["time/total_seconds"] == 4 * 210_000
    assert metrics.get("time/to_target_seconds") == (epochs and epochs * 210_000)


# --- too little memory


@pytest.fixture
def room(monkeypatch):
    """Limits the device to so many images at a time, from the warm-up on or once the images are placed; gives the
    smaller batches that were tried."""

    def limit(images, *, in_warm_up=True):
        full, tried = [in_warm_up], []
        prepare, place, step_peak_mib = batching.prepare, setup.place_splits, setup._step_peak_mib

        def limited(batch, *args, **kwargs):
            if full[0] and len(batch) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2.00 GiB")
            return prepare(batch, *args, **kwargs)

        def fills(*args):
            full[0] = True
            return place(*args)

        monkeypatch.setattr(batching, "prepare", limited)
        monkeypatch.setattr(setup, "place_splits", fills)
        monkeypatch.setattr(
            setup,
            "_step_peak_mib",
            lambda training, size, shape: tried.append(size) or step_peak_mib(training, size, shape),
        )
        return tried

    return limit


@pytest.mark.parametrize(("features", "in_warm_up"), [("recompute", True), ("cache", False)])
def test_a_batch_that_is_too_large_is_answered_with_the_largest_that_fits(trained, room, out, features, in_warm_up):
    tried = room(5, in_warm_up=in_warm_up)
    line = fails(OutOfMemoryError, trained, "batch_size=50", f"features={features}")
    assert line.startswith("batch_size: 50") and line.endswith("cpu: the largest that fits is 4")
    assert tried == [32, 16, 8, 4]
    (entry,) = pending.entries()
    assert end_of(entry) == ("FAILED", True) and files_in(out) == set()


def test_the_failed_training_frees_its_memory_before_a_smaller_batch_is_tried(trained, room, monkeypatch):
    room(5)
    models, build, largest = [], setup.TrainingSetup, setup.largest_batch_below

    def noting(*args):
        training = build(*args)
        models.append(weakref.ref(training.net))
        return training

    def largest_batch(*args, **kwargs):
        gc.collect()  # as the GPUs' `release_memory` does
        assert [model() is None for model in models] == [True, False]
        return largest(*args, **kwargs)

    monkeypatch.setattr(setup, "TrainingSetup", noting)
    monkeypatch.setattr(setup, "largest_batch_below", largest_batch)
    assert "the largest that fits is 4" in fails(OutOfMemoryError, trained, "batch_size=50")


@pytest.mark.parametrize(
    ("images", "batch_size", "capacity", "tried"),
    [
        (0, 1, None, []),  # one image is too much
        (2, 3, 1.0, [2]),  # a step of two ends, but the system swaps
        (1, 50, None, []),  # not even the model fits
    ],
)
def test_without_a_batch_that_fits_the_advice_is_general(
    trained, room, monkeypatch, images, batch_size, capacity, tried
):
    attempts = room(images, in_warm_up=False)
    if capacity:
        monkeypatch.setattr(Cpu, "capacity_mib", lambda self: capacity)
    line = fails(OutOfMemoryError, trained, f"batch_size={batch_size}", "features=recompute")
    assert line.startswith("cpu is out of memory: lower batch_size")
    assert attempts == tried
    assert [end_of(entry) for entry in pending.entries()] == [("FAILED", True)]


def test_a_model_that_does_not_fit_ends_it_before_anything_waits(trained, room):
    room(1)
    assert "out of memory" in fails(OutOfMemoryError, trained)
    assert pending.entries() == []


# --- the device


def test_a_gpu_that_torch_cannot_use_makes_it_a_demo_unless_the_cpu_was_asked_for(trained, script, monkeypatch, capsys):
    script([0.5])
    monkeypatch.setattr(devices, "select", lambda device: Cpu())
    monkeypatch.setattr(devices, "unused_gpu", lambda: "GTX 1060: this torch is built without CUDA")
    assert "fallback" not in trained("device=cpu")["tags"]
    assert "DEMO" not in capsys.readouterr().err
    record = trained("device=auto")
    assert record["tags"]["fallback"] == "device"
    assert record["name"].startswith("DEMO · ") and record["experiment"] == "trainmark-demo"
    assert any("GTX 1060" in warning for warning in record["warnings"])
    shown = capsys.readouterr().err
    assert "DEMO" in shown and "GTX 1060" in shown
    publisher.deliver_all()
    demo = client().get_experiment_by_name("trainmark-demo")
    (run,) = client().search_runs([demo.experiment_id])
    assert run.data.tags["fallback"] == "device"


@pytest.mark.slow
def test_compiled_trains_as_eager_does(trained):
    figures = {}
    for mode in ("off", "default"):
        record = trained("recipe=finetune", "epochs=1", "flip=false", f"compile={mode}")
        assert record["facts"]["compile"] == mode
        figures[mode] = record["epochs"][0]["figures"]
    for key in ("train/loss", "val/loss"):
        assert figures["default"][key] == pytest.approx(figures["off"][key], rel=1e-3)
