"""One step repeated: what is measured, what it depends on, and that it becomes part of the training's run."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import fails
from mlflow.entities import ViewType
from test_config import changed, params  # noqa: F401 (params: writes a params.yaml)
from test_tracking import client, runs, store  # noqa: F401 (store: each test has its own)
from test_train import REPEATED, generated, light, once, threads  # noqa: F401 (threads: one is enough)

from pipeline import backends, conditions, config, data, files, publish, records, sustain, tracking, training
from pipeline.backends.cpu import Cpu
from pipeline.clock import Clock
from pipeline.errors import OutOfMemoryError, StageError, UsageError

MEASURED = {"speed/sustained_images_per_second", "time/sustain_seconds", "speed/sustained_last_to_first"}


@pytest.fixture
def outputs(once, store, tmp_path, light, monkeypatch):  # noqa: F811
    """What a training left, its run in the store, with nothing repeated yet. A slice is a single step."""
    monkeypatch.setattr(sustain, "SLICE_SECONDS", 1e-3)
    shutil.copy(once.trained, store)
    return shutil.copytree(once.outputs, tmp_path / "outputs", ignore=shutil.ignore_patterns("sustain", "evaluate"))


@pytest.fixture
def slices(monkeypatch):
    """Makes these be the slices that are measured."""

    def script(*slices):
        monkeypatch.setattr(sustain, "_slices", lambda *args: list(slices))

    return script


# --- figures


def test_the_speed_is_all_images_over_all_seconds_and_of_the_last_third_over_the_firsts():
    figures = sustain.speeds([(8, 1.0), (16, 1.0), (24, 2.0), (8, 2.0), (8, 1.0), (2, 2.0), (99, 1.0)])
    assert figures == {
        "speed/sustained_images_per_second": 165 / 10,
        "time/sustain_seconds": 10.0,
        "speed/sustained_last_to_first": (101 / 3) / (24 / 2),  # thirds of two slices
    }


@pytest.mark.parametrize("count", [1, 2])
def test_of_less_than_three_slices_none_is_the_last_third(count):
    assert sustain.speeds([(10, 2.0)] * count) == {
        "speed/sustained_images_per_second": 5.0,
        "time/sustain_seconds": 2.0 * count,
    }


def test_a_slice_longer_than_others_counts_for_as_much_longer():
    assert sustain.speeds([(10, 1.0), (10, 9.0), (10, 1.0)])["speed/sustained_images_per_second"] == 30 / 11


@pytest.mark.parametrize(
    ("step", "seconds", "expected"),
    [
        (0.25, 2.5, [(16, 1.0)] * 3),  # until the time has passed
        (0.25, 2.0, [(16, 1.0)] * 2),
        (0.3, 0.1, [(12, 0.9)]),
        (7.0, 10.0, [(4, 7.0)] * 2),  # a machine whose single step takes longer
        (7.0, 0.1, [(4, 7.0)]),
    ],
)
def test_the_device_is_waited_for_once_a_second(step, seconds, expected):
    time, waits, steps = [0.0], [], []

    def take(images, labels):
        assert len(images) == len(labels) == 4
        steps.append(1)
        time[0] += step

    clock = Clock(lambda: waits.append(len(steps)), lambda: time[0])
    job = SimpleNamespace(step=take, at_once=4, clock=clock, backend=Cpu(), set_mode=lambda: None)
    work = SimpleNamespace(job=job, recipe=SimpleNamespace(batch_size=4, flip=True))
    found = sustain._slices(work, sustain._noise(8), seconds, seed=0)
    assert [count for count, _ in found] == [count for count, _ in expected]
    assert [took for _, took in found] == pytest.approx([took for _, took in expected])
    # A step before the first slice tells how many make one; within a slice nobody waits.
    each = expected[0][0] // 4
    assert waits == [0, 1, *(1 + each * done for before in range(len(found)) for done in (before, before + 1))]


def test_the_images_are_like_cifar10s_and_the_same_every_time():
    one, other = sustain._noise(300), sustain._noise(300)
    assert torch.equal(one.inputs, other.inputs) and torch.equal(one.labels, other.labels)
    assert one.inputs.shape == (300, 32, 32, 3) and one.inputs.dtype == torch.uint8
    assert set(one.labels.tolist()) == set(range(10))


# --- what is repeated


def sustained_of(*overrides):
    return config.sustained(config.load(overrides))


def workload(*overrides, seconds=60.0):
    return config.sustained_workload(sustained_of(*overrides), seconds)


@pytest.mark.parametrize(
    "override",
    [
        *(f"recipe={name}" for name in ("blog", "linear-probe", "finetune")),
        "recipes.linear-probe.batch_size=1",
        "recipes.linear-probe.model=resnet34.a1_in1k",
        "recipes.finetune.lr=0.1",
        "recipes.finetune.epochs=1",
        "recipes.finetune.scheduler=cosine",
        "recipes.finetune.scheduler_options.onecycle.pct_start=0.001",
        "recipes.finetune.warmup_epochs=2",
        "recipes.finetune.validation=test",
        "recipes.finetune.weights=mine.safetensors",
        "recipes.finetune.head_init=xavier_normal",
        "recipes.finetune.features=cache",
        "recipes.finetune.precision=bf16",
        "recipes.linear-probe.precision=bf16",
        "recipes.linear-probe.threads=1",
        "data.limit=5",
        "device=cpu",
        "seed=5",
        "label=mine",
    ],
)
def test_the_step_is_the_same_whatever_the_recipe(override):
    assert workload("recipe=linear-probe", override) == workload("recipe=linear-probe")


def test_steps_that_differ():
    works = [
        workload(),
        workload(seconds=30.0),
        *(
            workload(f"recipes.finetune.{change}")
            for change in (
                "model=resnet34.a1_in1k", "trainable=head", "frozen_batch_norm=train", "normalize=false", "flip=false",
                "image_size=64", "batch_size=128", "optimizer=sgd", "optimizer_options.adamw.weight_decay=0.1",
            )
        ),
    ]  # fmt: skip
    assert len(set(works)) == len(works) and all(len(work) == 10 for work in works)


def test_a_version_raised_is_another_step(monkeypatch):
    before = workload()
    monkeypatch.setattr(config, "WORKLOAD_VERSION", config.WORKLOAD_VERSION + 1)
    assert workload() != before


def test_it_is_executed_as_the_chosen_recipe_is():
    how = {"precision": "bf16", "channels_last": True, "compile": "default", "graph": False, "threads": 3}
    chosen = [f"recipes.linear-probe.{key}={str(value).lower()}" for key, value in how.items()]
    recipe = sustained_of("recipe=linear-probe", *chosen, "recipes.finetune.precision=tf32")
    assert {key: getattr(recipe, key) for key in how} == how
    assert recipe.batch_size == config.load().recipes["finetune"].batch_size and recipe.weights == "random"
    # The head alone, on features computed before, would be another step.
    assert sustained_of("recipes.linear-probe.features=cache").features == "recompute"


def test_without_a_step_to_repeat_none_may_be_asked_for(params):  # noqa: F811
    path = params(changed("recipes", finetune=None))
    mine = ["recipe=linear-probe", "sustain_seconds=60"]
    line = fails(UsageError, config.load, mine, path)
    assert line == "sustain_seconds: 60.0 is not allowed: expected 0 without recipes.finetune"
    assert config.load([*mine, "sustain_seconds=0"], path).sustain_seconds == 0


# --- what it leaves


def test_it_becomes_part_of_the_trainings_run(outputs, capsys):
    (before,) = runs()
    settings = generated(*REPEATED)
    result = sustain.run(settings, outputs)
    (run,) = runs()
    assert run.info.run_id == before.info.run_id
    assert (run.info.status, run.info.end_time) == ("FINISHED", result["ended"])

    metrics = result["metrics"]
    assert set(metrics) == MEASURED and all(0 < value < math.inf for value in metrics.values())
    course = client().get_metric_history(run.info.run_id, "sustained/images_per_second")
    assert [(each.step, each.value) for each in course] == list(enumerate(result["series"], 1))
    assert len(course) >= 3
    assert run.data.metrics == before.data.metrics | metrics | {"sustained/images_per_second": result["series"][-1]}

    name = config.sustained_workload(config.sustained(settings), 0.3)
    assert run.data.tags["sustained.workload"] == result["tags"]["sustained.workload"] == name
    assert "sustained.taints" not in run.data.tags and result["warnings"] == []
    speed = f"{metrics['speed/sustained_images_per_second']:,.0f} images/s of finetune's step"
    note = run.data.tags["mlflow.note.content"]
    assert f"**Sustained** {speed} (workload `{name}`)" in note
    assert note.startswith(before.data.tags["mlflow.note.content"].rstrip("\n"))
    assert f"sustain  {speed}, fp32, for " in capsys.readouterr().out

    folder = outputs / "sustain"
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "record.json"}
    assert files.read_json(folder / "record.json") == result
    assert set(result) == {"id", "metrics", "tags", "series", "warnings", "ended"}
    assert result["id"] == files.read_json(outputs / "train" / "record.json")["id"]
    assert files.read_json(folder / "metrics.json") == metrics


@pytest.mark.parametrize("measured", [False, True])
def test_for_no_time_nothing_is_repeated_and_the_run_stays_as_it_is(outputs, slices, monkeypatch, measured):
    slices((8, 1.0))
    if measured:
        sustain.run(generated(*REPEATED), outputs)
    monkeypatch.setattr(backends, "select", lambda device: pytest.fail("asked for a device"))
    (before,) = runs()
    result = sustain.run(generated(), outputs)
    (after,) = runs()
    assert (result["metrics"], result["tags"], result["series"], result["warnings"]) == ({}, {}, [], [])
    assert after.to_dictionary() == before.to_dictionary()
    assert ("sustained.workload" in after.data.tags) == measured
    assert files.read_json(outputs / "sustain" / "metrics.json") == {}
    assert files.read_json(outputs / "sustain" / "record.json") == result
    assert "sustain" not in publish.results(records.trained(outputs)[0], records.folders(outputs))


def test_nothing_of_an_earlier_one_stays(outputs, slices):
    (outputs / "sustain" / "plots").mkdir(parents=True)
    slices((8, 1.0))
    sustain.run(generated(*REPEATED), outputs)
    assert {path.name for path in (outputs / "sustain").iterdir()} == {"metrics.json", "record.json"}


def test_the_precision_and_threads_are_the_chosen_recipes(outputs, slices, monkeypatch, capsys):
    slices((8, 1.0))
    asked, build = [], training.build

    def built(recipe, *args):
        asked.append((recipe.model, recipe.precision, torch.get_num_threads()))
        return build(recipe, *args)

    monkeypatch.setattr(Cpu, "set_precision", lambda self, precision: asked.append(precision))
    monkeypatch.setattr(training, "build", built)
    monkeypatch.setattr(training, "warm_up", lambda *args: 0.0)
    sustain.run(generated(*REPEATED, "precision=bf16", "threads=2", "recipes.finetune.threads=1"), outputs)
    assert asked == ["bf16", ("test_resnet.r160_in1k", "bf16", 2)]
    assert "finetune's step, bf16, for 1 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "odd",
    [
        ["trainable=head", "flip=false"],  # features could be computed once
        ["scheduler_options.onecycle.pct_start=0.01", "epochs=1"],  # too few steps for such a schedule
        ["scheduler=cosine", "warmup_epochs=9"],
        ["optimizer=ranger21"],
    ],
    ids=" ".join,
)
def test_whole_steps_are_repeated_whatever_else_finetune_says(outputs, odd):
    result = sustain.run(generated(*REPEATED, *(f"recipes.finetune.{each}" for each in odd)), outputs)
    assert result["metrics"]["speed/sustained_images_per_second"] > 0


def test_warm_up_is_not_measured(outputs, monkeypatch):
    order = []
    warm_up, measured = training.warm_up, sustain._slices
    monkeypatch.setattr(training, "warm_up", lambda *args: (order.append("warm-up"), warm_up(*args))[1])
    monkeypatch.setattr(sustain, "_slices", lambda *args: (order.append("slices"), measured(*args))[1])
    monkeypatch.setattr(Cpu, "energy", lambda self: order.append("energy"))
    sustain.run(generated(*REPEATED), outputs)
    assert order == ["warm-up", "energy", "slices", "energy"]


def test_what_disturbed_it_is_said_and_a_calm_one_takes_it_back(outputs, slices, monkeypatch):
    slices((8, 1.0))
    samples = [{"cpu_load": 0.4}, {"power_source": "battery"}]
    with monkeypatch.context() as patch:
        patch.setattr(conditions, "sample", lambda *_: samples.pop(0))
        result = sustain.run(generated(*REPEATED), outputs)
    assert result["tags"]["sustained.taints"] == "battery load"
    assert result["warnings"] == [
        "while one step was repeated, the machine ran on battery",
        "while one step was repeated, other processes used 40% of the CPU when it started",
    ]
    tags = runs()[0].data.tags
    assert tags["sustained.taints"] == "battery load" and "taints" not in tags
    assert "- while one step was repeated, the machine ran on battery" in tags["mlflow.note.content"]

    sustain.run(generated(*REPEATED), outputs)
    tags = runs()[0].data.tags
    assert "sustained.taints" not in tags and "battery" not in tags["mlflow.note.content"]


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ([("rapl", 100.0), ("rapl", 104.0)], 24 / 4),  # two slices, and the step before them
        ([("rapl", 100.0), ("rapl", 100.0)], None),
        ([None, ("rapl", 100.0)], None),
        ([("rapl", 100.0), None], None),
    ],
)
def test_energy_is_that_of_the_steps(outputs, slices, monkeypatch, readings, expected):
    slices((8, 1.0), (8, 1.0))
    monkeypatch.setattr(Cpu, "energy", lambda self: readings.pop(0))
    metrics = sustain.run(generated(*REPEATED), outputs)["metrics"]
    assert metrics.get("energy/sustained_images_per_joule") == expected and readings == []


# --- the largest batch


class Refusing(Cpu):
    """A device that says no: it has no room for more than 8 images."""

    refuses_memory = True

    def __init__(self):
        super().__init__()
        self.largest = 0

    def capacity_mib(self):
        return 8.0

    def reset_peak_memory(self):
        self.largest = 0

    def memory_mib(self):
        return {"peak": float(self.largest)}


@pytest.fixture
def refusing(monkeypatch, slices):
    backend, takes_step = Refusing(), training._takes_step

    def takes(work, size, shape):
        assert not work.recorded and work.compile_mode == "off" and shape == sustain.IMAGES_SHAPE
        backend.largest = size
        return takes_step(work, size, shape)

    slices((8, 1.0))
    monkeypatch.setattr(backends, "select", lambda device: backend)
    monkeypatch.setattr(training, "_takes_step", takes)
    return backend


@pytest.mark.usefixtures("refusing")
def test_the_largest_batch_that_fits_is_found_on_a_device_that_refuses_memory(outputs, capsys):
    result = sustain.run(generated(*REPEATED), outputs)
    assert result["metrics"]["memory/largest_batch_size"] == 8
    assert runs()[0].data.metrics["memory/largest_batch_size"] == 8
    assert "; largest batch 8" in capsys.readouterr().out


@pytest.mark.usefixtures("refusing")
def test_it_is_not_looked_for_where_nobody_asks(outputs):
    assert "memory/largest_batch_size" not in sustain.run(
        generated(*REPEATED, "largest_batch=false"), outputs
    )["metrics"]  # fmt: skip


def test_a_cpu_which_would_swap_is_not_filled(outputs, slices, monkeypatch):
    slices((8, 1.0))
    monkeypatch.setattr(training, "largest_batch", lambda *args: pytest.fail("looked for"))
    assert "memory/largest_batch_size" not in sustain.run(generated(*REPEATED), outputs)["metrics"]


# --- where it is put, and how it ends


def test_a_store_without_the_run_gets_it_whole(outputs):
    (run,) = runs()
    result = sustain.run(generated(*REPEATED, "tracking.experiment=another"), outputs)
    (restored,) = [each for each in runs() if each.info.run_id != run.info.run_id]
    assert client().get_experiment(restored.info.experiment_id).name == "another"
    last = {"sustained/images_per_second": result["series"][-1]}
    assert restored.data.metrics == run.data.metrics | result["metrics"] | last
    assert restored.data.tags["sustained.workload"] == result["tags"]["sustained.workload"]
    assert "restored" in restored.data.tags and restored.info.status == "FINISHED"
    assert restored.info.end_time == result["ended"]
    assert "**Sustained**" in restored.data.tags["mlflow.note.content"]
    assert not MEASURED & set(client().get_run(run.info.run_id).data.metrics)


def test_a_run_that_was_deleted_stays_deleted(outputs, slices, capsys):
    slices((8, 1.0))
    (run,) = runs()
    client().delete_run(run.info.run_id)
    result = sustain.run(generated(*REPEATED), outputs)
    assert files.read_json(outputs / "sustain" / "record.json") == result
    assert "deleted in this store: what `sustain` found is not put there" in capsys.readouterr().out
    (after,) = client().search_runs([run.info.experiment_id], run_view_type=ViewType.ALL)
    assert after.info.lifecycle_stage == "deleted" and not MEASURED & set(after.data.metrics)


@pytest.mark.parametrize(
    ("error", "status"), [(StageError("the store is away"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_store_that_fails_meanwhile_is_said_by_the_run(outputs, slices, monkeypatch, error, status):
    def fail(*args):
        raise error

    slices((8, 1.0))
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "log_series", fail)
        with pytest.raises(type(error)):
            sustain.run(generated(*REPEATED), outputs)
    assert runs()[0].info.status == status
    sustain.run(generated(*REPEATED), outputs)
    assert runs()[0].info.status == "FINISHED"


def test_a_step_that_does_not_fit_ends_it_and_leaves_the_run_as_it_was(outputs, monkeypatch):
    prepare = data.prepare

    def prepared(images, *args, **kwargs):
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return prepare(images, *args, **kwargs)

    monkeypatch.setattr(data, "prepare", prepared)
    (before,) = runs()
    line = fails(OutOfMemoryError, sustain.run, generated(*REPEATED), outputs)
    assert line.startswith("cpu is out of memory: lower batch_size")
    (after,) = runs()
    assert after.to_dictionary() == before.to_dictionary() and not (outputs / "sustain").exists()


def test_without_a_training_it_says_what_to_run(tmp_path):
    with pytest.raises(StageError, match=r"record\.json is missing: run the stage"):
        sustain.run(generated(*REPEATED), tmp_path)


def test_what_was_found_for_another_training_is_not_this_ones(outputs, slices):
    slices((8, 1.0))
    sustain.run(generated(*REPEATED), outputs)
    record = files.read_json(outputs / "train" / "record.json")
    assert set(publish.results(record, records.folders(outputs))) == {"sustain"}
    assert publish.results(record | {"id": "another"}, records.folders(outputs)) == {}
