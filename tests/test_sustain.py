"""Fixed steps repeated: what is measured, what it depends on, and that it becomes part of the training's run."""

import gc
import math
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import fails
from mlflow.entities import ViewType
from stores import client, own_store, runs  # noqa: F401 (own_store: each test has its own)
from trainings import REPEATED, STEPS, generated, light, once, threads  # noqa: F401 (threads: one is enough)

from pipeline import config, devices, files, sustain
from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.errors import OutOfMemoryError, StageError
from pipeline.profiling import score_steps, system_state
from pipeline.profiling.clock import Clock
from pipeline.tracking import publisher, records, store
from pipeline.training import setup

FIGURES = {"images_per_second", "first_third_images_per_second", "seconds", "batch_size"}
CONVNET, BEST, TRANSFORMER = STEPS
SPEED = score_steps.metric("convnet_fp32", "images_per_second")


def metrics_of(*steps, figures=FIGURES):
    return {score_steps.metric(step.name, figure) for step in steps for figure in figures}


def course(*slices, batch_size=8, energy=None):
    return sustain.Course(batch_size, list(slices), energy)


@pytest.fixture
def outputs(once, own_store, tmp_path, light, monkeypatch):
    """What a training left, its run in the store, with nothing repeated yet, on a CPU whose best precision is bf16."""
    monkeypatch.setattr(Cpu, "best_precision", lambda self: "bf16")
    shutil.copy(once.trained, own_store)
    return shutil.copytree(once.outputs, tmp_path / "outputs", ignore=shutil.ignore_patterns("sustain", "evaluate"))


@pytest.fixture
def repeat(outputs):
    """Repeats steps, small ones unless told otherwise; gives the record."""

    def run(*overrides, steps=STEPS):
        return sustain.run(generated(*REPEATED, *overrides), outputs, steps=steps)

    return run


@pytest.fixture
def slices(monkeypatch):
    """Makes these be the slices that are measured, of every step."""

    def script(*slices):
        monkeypatch.setattr(sustain, "_slices", lambda *args: list(slices))

    return script


# --- figures


def test_the_speed_is_the_median_of_the_last_third_of_the_time_beside_the_firsts():
    speeds = (100, 90, 80, 70, 60, 30, 20, 10, 50)
    figures = course(*((speed, 1.0) for speed in speeds)).figures()
    assert figures == {
        "images_per_second": 20.0,
        "first_third_images_per_second": 90.0,
        "seconds": 9.0,
        "batch_size": 8.0,
    }


@pytest.mark.parametrize(
    ("seconds", "first", "last"),
    [
        ([1.0], [0], [0]),
        ([1.0, 1.0], [0], [1]),
        ([1.0, 1.0, 1.0], [0], [2]),
        ([0.1 + 0.2] * 3, [0], [2]),
        ([9.0, 1.0, 1.0], [0], [1, 2]),  # a third of the time, not of the slices
        ([1.0, 1.0, 9.0], [0, 1], [2]),
        ([1.0] * 4, [0], [3]),
        ([1.0] * 6, [0, 1], [4, 5]),
    ],
)
def test_a_slice_belongs_to_the_third_of_the_time_that_its_middle_lies_in(seconds, first, last):
    slices = [(number, each) for number, each in enumerate(seconds)]
    found = sustain.thirds(slices)
    assert found == ([slices[number] for number in first], [slices[number] for number in last])


def test_energy_is_that_of_all_slices():
    figures = course((30, 2.0), (10, 2.0), energy=("nvml", 80.0)).figures()
    assert (figures["images_per_joule"], figures["watts"]) == (40 / 80, 80 / 4)


def clocked(step_seconds):
    """A work whose steps take so long by a clock of its own, and notes how many were taken at each wait."""
    time, waits, steps = [0.0], [], []

    def take(images, labels):
        assert images == labels == "batch"
        steps.append(1)
        time[0] += step_seconds

    clock = Clock(lambda: waits.append(len(steps)), lambda: time[0])
    work = SimpleNamespace(loop=SimpleNamespace(step=take, clock=clock), recipe=SimpleNamespace(batch_size=4))
    return work, waits, iter(lambda: ("batch", "batch"), None)


@pytest.mark.parametrize(
    ("step", "seconds", "expected"),
    [
        (0.25, 3.0, [(16, 1.0)] * 3),  # until the time has passed
        (0.25, 3.5, [(16, 1.0)] * 4),
        (0.3, 3.0, [(12, 0.9)] * 4),
        (0.25, 1.5, [(8, 0.5)] * 3),  # a short time is cut in three
        (7.0, 10.0, [(4, 7.0)] * 3),  # three at least, however long a step takes
        (7.0, 30.0, [(4, 7.0)] * 5),
    ],
)
def test_the_device_is_waited_for_once_a_slice(step, seconds, expected):
    work, waits, batches = clocked(step)
    steps = sustain._steps_a_slice(work, batches, seconds)
    found = sustain._slices("a title", work, batches, steps, seconds)
    assert [count for count, _ in found] == [count for count, _ in expected]
    assert [took for _, took in found] == pytest.approx([took for _, took in expected])
    # Two steps before the first slice, of which the second tells how many make one; within a slice nobody waits.
    assert waits == [0, 1, 1, 2, *(2 + steps * done for before in range(len(found)) for done in (before, before + 1))]


def test_the_images_are_the_same_every_time_and_come_again_and_again():
    one, other = sustain._made(6, 16), sustain._made(6, 16)
    assert torch.equal(one.inputs, other.inputs) and torch.equal(one.labels, other.labels)
    assert one.inputs.shape == (6, 16, 16, 3) and one.inputs.dtype == torch.uint8
    assert 0 <= one.labels.min() and one.labels.max() < sustain.CLASSES
    batches = sustain._forever(one, 2)
    for start in (0, 2, 4, 0, 2):
        inputs, labels = next(batches)
        assert torch.equal(inputs, one.inputs[start : start + 2])
        assert torch.equal(labels, one.labels[start : start + 2])


def test_the_images_that_lie_on_the_device_are_few():
    for step in score_steps.STEPS:
        assert sustain.BATCHES * step.batch_size * step.image_size**2 * 3 <= 64 * 2**20


# --- what is repeated


@pytest.mark.parametrize(
    "override",
    [
        *(f"recipe={name}" for name in ("blog", "finetune")),
        "recipes.linear-probe.precision=bf16",
        "recipes.linear-probe.channels_last=true",
        "recipes.linear-probe.compile=default",
        "recipes.linear-probe.graph=false",
        "recipes.linear-probe.threads=3",
        "recipes.finetune.batch_size=1",
        "seed=5",
        "label=mine",
    ],
)
def test_the_steps_are_the_same_whatever_the_settings(outputs, slices, monkeypatch, override):
    slices((8, 1.0))
    built, build = [], setup.TrainingSetup

    def noted(recipe, seed, *args):
        built.append((recipe, seed, torch.get_num_threads()))
        return build(recipe, seed, *args)

    monkeypatch.setattr(setup, "TrainingSetup", noted)
    sustain.run(config.load(["sustain_seconds=1", "device=cpu", override]), outputs, steps=STEPS)
    recipes = [recipe for recipe, *_ in built]
    assert [(recipe.model, recipe.image_size, recipe.batch_size, recipe.precision) for recipe in recipes] == [
        ("test_resnet.r160_in1k", 32, 8, "fp32"),
        ("test_resnet.r160_in1k", 32, 8, "bf16"),
        ("test_vit.r160_in1k", 160, 2, "bf16"),
    ]
    for recipe, seed, cores in built:
        assert (recipe.weights, recipe.trainable, recipe.optimizer) == ("random", "all", "adamw")
        assert (recipe.channels_last, recipe.compile, recipe.graph) == ("auto", "off", "auto")
        assert (seed, cores) == (0, setup.THREADS)


def test_the_real_steps_are_models_that_can_be_built():
    for step in score_steps.STEPS:
        images = sustain._made(2, step.image_size)
        work = sustain._built(sustain._recipe(step, "fp32", 2), images, Cpu())
        assert not work.on_features and all(each.requires_grad for each in work.net.parameters())


@pytest.mark.parametrize("best", ["fp32", "bf16"])
def test_what_is_the_same_work_is_not_repeated_twice(repeat, slices, monkeypatch, best):
    slices((8, 1.0), (16, 1.0))
    monkeypatch.setattr(Cpu, "best_precision", lambda self: best)
    measured, repeated = [], sustain._repeated
    monkeypatch.setattr(sustain, "_repeated", lambda step, *args: measured.append(step.name) or repeated(step, *args))
    result = repeat()
    assert measured == [step.name for step in STEPS if step is not BEST or best == "bf16"]
    assert set(result["metrics"]) == metrics_of(*STEPS)
    for figure in FIGURES:
        convnet, other = (result["metrics"][score_steps.metric(step.name, figure)] for step in (CONVNET, BEST))
        assert convnet == other
    assert result["tags"]["sustained.convnet_fp32.precision"] == "fp32"
    assert {result["tags"][score_steps.tag(step.name, "precision")] for step in (BEST, TRANSFORMER)} == {best}


def test_the_memory_of_one_step_is_free_before_the_next_one_is_built(repeat, monkeypatch):
    nets, alive, build = [], [], setup.TrainingSetup

    def noted(*args):
        gc.collect()  # as the GPUs' `release_memory` does
        alive.append(sum(net() is not None for net in nets))
        work = build(*args)
        nets.append(weakref.ref(work.net))
        return work

    monkeypatch.setattr(setup, "TrainingSetup", noted)
    repeat()
    assert alive == [0, 0, 0]


# --- what it leaves


def test_it_becomes_part_of_the_trainings_run(repeat, outputs, capsys):
    (before,) = runs()
    result = repeat()
    (run,) = runs()
    assert run.info.run_id == before.info.run_id
    assert (run.info.status, run.info.end_time) == ("FINISHED", result["ended"])

    metrics, tags = result["metrics"], result["tags"]
    assert set(metrics) == metrics_of(*STEPS) and all(0 < value < math.inf for value in metrics.values())
    courses = {}
    for step in STEPS:
        key = score_steps.metric(step.name, "course")
        logged = client().get_metric_history(run.info.run_id, key)
        assert [(each.step, each.value) for each in logged] == list(enumerate(result["series"][key], 1))
        assert len(logged) >= 3 and metrics[score_steps.metric(step.name, "seconds")] >= 0.1
        courses[key] = logged[-1].value
        assert metrics[score_steps.metric(step.name, "batch_size")] == step.batch_size
        assert run.data.tags[score_steps.tag(step.name, "workload")] == score_steps.workload(step, step.batch_size, 0.1)
    assert set(result["series"]) == set(courses)
    assert run.data.metrics == before.data.metrics | metrics | courses
    assert [tags[score_steps.tag(step.name, "precision")] for step in STEPS] == ["fp32", "bf16", "bf16"]
    assert int(run.data.tags["sustained.started"]) <= result["ended"]
    assert run.data.tags["sustained.attempts"] == "1"
    assert run.data.tags["sustained.threads"] == str(torch.get_num_threads())
    told = {"sustained.taints", "sustained.behavior", "sustained.energy_source"}
    assert not told & set(run.data.tags) and result["warnings"] == []

    note = run.data.tags["mlflow.note.content"]
    assert f"**Sustained** convnet fp32 {metrics[SPEED]:,.1f} images/s (fp32, batch 8); convnet best " in note
    assert note.startswith(before.data.tags["mlflow.note.content"].rstrip("\n"))
    assert f"sustain  convnet fp32 (fp32, batch 8): {metrics[SPEED]:,.1f} images/s" in capsys.readouterr().out

    folder = outputs / "sustain"
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "record.json"}
    assert files.read_json(folder / "record.json") == result
    assert set(result) == {"id", "metrics", "tags", "series", "warnings", "ended"}
    assert result["id"] == files.read_json(outputs / "train" / "record.json")["id"]
    assert files.read_json(folder / "metrics.json") == metrics


@pytest.mark.parametrize("measured", [False, True])
def test_for_no_time_nothing_is_repeated_and_the_run_stays_as_it_is(repeat, outputs, slices, monkeypatch, measured):
    slices((8, 1.0))
    if measured:
        repeat()
    monkeypatch.setattr(devices, "select", lambda device: pytest.fail("asked for a device"))
    (before,) = runs()
    result = sustain.run(generated(), outputs)
    (after,) = runs()
    assert (result["metrics"], result["tags"], result["series"], result["warnings"]) == ({}, {}, {}, [])
    assert after.to_dictionary() == before.to_dictionary()
    assert ("sustained.convnet_fp32.workload" in after.data.tags) == measured
    assert files.read_json(outputs / "sustain" / "metrics.json") == {}
    assert files.read_json(outputs / "sustain" / "record.json") == result
    assert "sustain" not in publisher.stage_records(
        records.training_records(outputs)[0], records.stage_folders(outputs)
    )


def test_a_score_counts_how_often_it_was_measured_undisturbed(repeat, slices, monkeypatch):
    slices((8, 1.0))
    loads = iter([0.0, 0.0, 0.4, 0.4, 0.0, 0.0])
    monkeypatch.setattr(system_state, "sample", lambda *_: {"cpu_load": next(loads)})
    attempts = [repeat(steps=[CONVNET])["tags"]["sustained.attempts"] for _ in range(3)]
    assert attempts == ["1", "2", "2"]


def test_nothing_of_an_earlier_one_stays(repeat, outputs, slices):
    (outputs / "sustain" / "plots").mkdir(parents=True)
    slices((8, 1.0))
    repeat()
    assert {path.name for path in (outputs / "sustain").iterdir()} == {"metrics.json", "record.json"}


def test_a_repeat_leaves_its_own_part(outputs, slices):
    slices((8, 1.0))
    second = records.stage_folders(outputs, 2)
    shutil.copytree(outputs / "train", second["train"], ignore=shutil.ignore_patterns("repeats"))
    record = files.read_json(second["train"] / "record.json") | {"id": "2" * 32}
    files.write_json(second["train"] / "record.json", record)
    files.write_json(outputs / "sustain" / "record.json", {"of": "the first"})
    result = sustain.run(generated(*REPEATED), outputs, 2, STEPS)
    assert result["id"] == record["id"] and files.read_json(second["sustain"] / "record.json") == result
    assert files.read_json(outputs / "sustain" / "record.json") == {"of": "the first"}


def test_only_whole_slices_are_measured(repeat, monkeypatch):
    order = []
    steps, measured = sustain._steps_a_slice, sustain._slices
    monkeypatch.setattr(sustain, "_steps_a_slice", lambda *args: (order.append("warm-up"), steps(*args))[1])
    monkeypatch.setattr(sustain, "_slices", lambda *args: (order.append("slices"), measured(*args))[1])
    monkeypatch.setattr(Cpu, "energy", lambda self: order.append("energy"))
    repeat(steps=[CONVNET])
    assert order == ["warm-up", "energy", "slices", "energy"]


def test_what_disturbed_it_is_said_and_a_calm_one_takes_it_back(repeat, slices, monkeypatch):
    slices((8, 1.0))
    samples = [
        {"cpu_load": 0.4}, {}, {"power_source": "battery"}, {"cpu_load": 0.2, "gpu_throttle": "hw slowdown"},
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(system_state, "sample", lambda *_: samples.pop(0))
        result = repeat()
    assert samples == [] and set(result["tags"]["sustained.taints"].split()) == {"load", "battery"}
    assert result["tags"]["sustained.behavior"] == "throttled"
    assert sorted(result["warnings"]) == [
        "transformer best: the GPU was throttled at the end (hw slowdown)",
        "while steps were repeated, other processes used 40% of the CPU when it started",
        "while steps were repeated, the machine ran on battery",
    ]
    tags = runs()[0].data.tags
    assert tags["sustained.taints"] == result["tags"]["sustained.taints"] and "taints" not in tags
    assert tags["sustained.behavior"] == "throttled"
    assert "- while steps were repeated, the machine ran on battery" in tags["mlflow.note.content"]

    repeat()
    tags = runs()[0].data.tags
    assert not {"sustained.taints", "sustained.behavior"} & set(tags)
    assert "battery" not in tags["mlflow.note.content"]


def test_a_machine_that_slows_down_behaves_so(repeat, slices, monkeypatch):
    monkeypatch.setattr(system_state, "MIN_DRIFT", 0.03)
    slices(*((8, 1.0 + 0.05 * number) for number in range(12)))
    result = repeat(steps=[CONVNET])
    assert result["tags"]["sustained.behavior"] == "drift" and result["tags"]["sustained.taints"] is None
    assert len(result["warnings"]) == 1 and result["warnings"][0].startswith("convnet fp32: the last third took ")


@pytest.mark.parametrize(
    ("readings", "watts"),
    [
        ([("rapl", 100.0), ("rapl", 104.0)], 2.0),
        ([("rapl", 100.0), ("rapl", 100.0)], None),
        ([None, ("rapl", 100.0)], None),
        ([("rapl", 100.0), None], None),
    ],
)
def test_energy_is_told_where_the_counter_moves(repeat, slices, monkeypatch, readings, watts):
    slices((8, 1.0), (8, 1.0))
    monkeypatch.setattr(Cpu, "energy", lambda self: readings.pop(0))
    result = repeat(steps=[CONVNET])
    assert readings == []
    assert result["metrics"].get("sustained/convnet_fp32_watts") == watts
    assert result["metrics"].get("sustained/convnet_fp32_images_per_joule") == (watts and 16 / 4)
    assert result["tags"]["sustained.energy_source"] == (watts and "rapl")


# --- batches that do not fit


@pytest.fixture
def full(monkeypatch):
    """Makes a device that says no to more than so many images."""

    def make(images):
        prepare = batching.prepare

        def prepared(batch, *args, **kwargs):
            if len(batch) > images:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
            return prepare(batch, *args, **kwargs)

        monkeypatch.setattr(batching, "prepare", prepared)
        # Else the step's memory is looked at with steps of four images.
        monkeypatch.setattr(setup, "saved_bytes_per_image", lambda *args: 0.0)

    return make


@pytest.mark.parametrize(("images", "fitting"), [(7, 4), (4, 4), (2, 2)])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(repeat, full, images, fitting):
    full(images)
    result = repeat(steps=[CONVNET, BEST])
    for step in (CONVNET, BEST):
        assert result["metrics"][score_steps.metric(step.name, "batch_size")] == fitting
        assert result["tags"][score_steps.tag(step.name, "workload")] == score_steps.workload(step, fitting, 0.1)
    assert result["warnings"] == []
    assert score_steps.workload(CONVNET, fitting, 0.1) != score_steps.workload(CONVNET, 8, 0.1)


def test_nothing_of_a_batch_that_was_too_large_is_in_the_way_of_a_smaller_one(repeat, full, monkeypatch):
    full(4)
    nets, alive, build = [], [], setup.TrainingSetup

    def noted(*args):
        gc.collect()
        alive.append(sum(net() is not None for net in nets))
        work = build(*args)
        nets.append(weakref.ref(work.net))
        return work

    monkeypatch.setattr(setup, "TrainingSetup", noted)
    repeat(steps=[CONVNET])
    assert alive == [0, 0]


def test_a_step_of_which_not_even_one_image_fits_is_left_out_with_a_warning(repeat, outputs, monkeypatch):
    repeated = sustain._repeated

    def refuse(step, *args):
        if step is BEST:
            raise OutOfMemoryError("no more")
        return repeated(step, *args)

    monkeypatch.setattr(sustain, "_repeated", refuse)
    result = repeat()
    assert set(result["metrics"]) == metrics_of(CONVNET, TRANSFORMER)
    assert not {score_steps.tag(BEST.name, fact) for fact in ("workload", "precision")} & set(result["tags"])
    (warning,) = result["warnings"]
    assert warning.startswith("convnet best was not measured")
    assert f"- {warning}" in runs()[0].data.tags["mlflow.note.content"]


def test_a_device_on_which_nothing_fits_says_so_in_the_run(repeat, monkeypatch):
    def refuse(*args):
        raise OutOfMemoryError("no more")

    monkeypatch.setattr(sustain, "_repeated", refuse)
    result = repeat()
    assert result["metrics"] == {} and len(result["warnings"]) == 3
    assert result["warnings"][0] in runs()[0].data.tags["mlflow.note.content"]


@pytest.mark.parametrize(
    ("free", "fitting"), [(8 * 100 * sustain.MEMORY_MARGIN, 8), (799 * sustain.MEMORY_MARGIN, 4), (None, 8)]
)
def test_a_processor_is_not_given_more_than_its_free_memory(repeat, slices, monkeypatch, free, fitting):
    slices((8, 1.0))
    monkeypatch.setattr(setup, "saved_bytes_per_image", lambda *args: 100.0)
    monkeypatch.setattr(Cpu, "free_bytes", lambda self: free)
    assert repeat(steps=[CONVNET])["metrics"]["sustained/convnet_fp32_batch_size"] == fitting


# --- the largest batch


class Refusing(Cpu):
    """A device that says no: it has no room for more than 8 images."""

    raises_oom = True

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
    backend, takes_step = Refusing(), setup._step_fits

    def takes(work, size, shape):
        assert not work.use_cuda_graph and work.compile_mode == "off" and work.recipe.precision == "fp32"
        assert shape == (32, 32, 3)
        backend.largest = size
        return takes_step(work, size, shape)

    slices((8, 1.0))
    monkeypatch.setattr(devices, "select", lambda device: backend)
    monkeypatch.setattr(setup, "_step_fits", takes)
    return backend


@pytest.mark.usefixtures("refusing")
def test_the_largest_batch_that_fits_is_found_on_a_device_that_refuses_memory(repeat, outputs):
    result = repeat()
    assert result["metrics"]["memory/largest_batch_size"] == 8
    assert files.read_json(outputs / "sustain" / "record.json") == result
    (run,) = runs()
    assert run.data.metrics["memory/largest_batch_size"] == 8 and run.info.status == "FINISHED"
    # Put into the run twice, the courses are there once.
    assert len(client().get_metric_history(run.info.run_id, "sustained/convnet_fp32_course")) == 1


@pytest.mark.usefixtures("refusing")
def test_a_search_that_crashes_loses_nothing_of_what_was_measured(repeat, outputs, monkeypatch):
    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "largest_batch", crash)
    with pytest.raises(KeyboardInterrupt):
        repeat()
    kept = files.read_json(outputs / "sustain" / "record.json")
    assert set(kept["metrics"]) == metrics_of(*STEPS)
    (run,) = runs()
    assert run.data.metrics[SPEED] == kept["metrics"][SPEED] and run.info.status == "FINISHED"


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize("none", ["largest_batch=false", "no capacity"])
def test_a_largest_batch_that_is_not_found_is_no_figure(repeat, monkeypatch, none):
    if none == "no capacity":
        monkeypatch.setattr(Refusing, "capacity_mib", lambda self: None)
    else:
        monkeypatch.setattr(setup, "largest_batch", lambda *args: pytest.fail("looked for"))
    result = repeat(*([none] if "=" in none else []))
    assert "memory/largest_batch_size" not in result["metrics"]


def test_a_cpu_which_would_swap_is_not_filled(repeat, slices, monkeypatch):
    slices((8, 1.0))
    monkeypatch.setattr(setup, "largest_batch", lambda *args: pytest.fail("looked for"))
    assert "memory/largest_batch_size" not in repeat()["metrics"]


# --- where it is put, and how it ends


def test_a_store_without_the_run_gets_it_whole(repeat, slices):
    slices((8, 1.0))
    (run,) = runs()
    result = repeat("tracking.experiment=another")
    (restored,) = [each for each in runs() if each.info.run_id != run.info.run_id]
    assert client().get_experiment(restored.info.experiment_id).name == "another"
    courses = {key: values[-1] for key, values in result["series"].items()}
    assert restored.data.metrics == run.data.metrics | result["metrics"] | courses
    workload = score_steps.tag(CONVNET.name, "workload")
    assert restored.data.tags[workload] == result["tags"][workload]
    assert "restored" in restored.data.tags and restored.info.status == "FINISHED"
    assert restored.info.end_time == result["ended"]
    assert "**Sustained**" in restored.data.tags["mlflow.note.content"]
    assert SPEED not in client().get_run(run.info.run_id).data.metrics


def test_a_run_that_was_deleted_stays_deleted(repeat, outputs, slices, capsys):
    slices((8, 1.0))
    (run,) = runs()
    client().delete_run(run.info.run_id)
    result = repeat()
    assert files.read_json(outputs / "sustain" / "record.json") == result
    assert "deleted in this store: what `sustain` found is not put there" in capsys.readouterr().out
    (after,) = client().search_runs([run.info.experiment_id], run_view_type=ViewType.ALL)
    assert after.info.lifecycle_stage == "deleted" and SPEED not in after.data.metrics


@pytest.mark.parametrize(
    ("error", "status"), [(StageError("the store is away"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_store_that_fails_meanwhile_is_said_by_the_run(repeat, slices, monkeypatch, error, status):
    def fail(*args):
        raise error

    slices((8, 1.0))
    with monkeypatch.context() as patch:
        patch.setattr(store, "log_series", fail)
        with pytest.raises(type(error)):
            repeat()
    assert runs()[0].info.status == status
    repeat()
    assert runs()[0].info.status == "FINISHED"


def test_what_fails_in_a_step_leaves_the_run_as_it_was(repeat, outputs, monkeypatch):
    def fail(*args):
        raise RuntimeError("an unknown operator")

    monkeypatch.setattr(sustain, "_slices", fail)
    (before,) = runs()
    with pytest.raises(RuntimeError, match="an unknown operator"):
        repeat()
    (after,) = runs()
    assert after.to_dictionary() == before.to_dictionary() and not (outputs / "sustain").exists()


def test_without_a_training_it_says_what_to_run(tmp_path):
    line = fails(StageError, sustain.run, generated(*REPEATED), tmp_path)
    assert "record.json is missing: run the stage" in line


def test_what_was_found_for_another_training_is_not_this_ones(repeat, outputs, slices):
    slices((8, 1.0))
    repeat()
    record = files.read_json(outputs / "train" / "record.json")
    assert set(publisher.stage_records(record, records.stage_folders(outputs))) == {"sustain"}
    assert publisher.stage_records(record | {"id": "another"}, records.stage_folders(outputs)) == {}
