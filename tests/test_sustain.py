"""The stage `sustain`: which steps it asks for, and that their figures become part of the training's run."""

import math
import shutil

import pytest
import torch
from stores import client, own_store, runs  # noqa: F401 (own_store: each test has its own)
from trainings import REPEATED, STEPS, delivered, generated, light, once, threads  # noqa: F401 (threads: one is enough)

from pipeline import config, devices, files, sustain
from pipeline.devices.cpu import Cpu
from pipeline.profiling import score_steps, system_state
from pipeline.tracking import pending, publisher, records
from pipeline.training.sustained import Slice, StepRun

FIGURES = {"images_per_second", "first_third_images_per_second", "seconds", "batch_size"}
CONVNET, BEST, TRANSFORMER = STEPS
SPEED = score_steps.metric("convnet_fp32", "images_per_second")


def metrics_of(*steps):
    return {score_steps.metric(step.name, figure) for step in steps for figure in FIGURES}


class Runner:
    """Runs no step. `asked` holds the arguments of each call; the results are scripted by the title of the step."""

    def __init__(self):
        self.asked = []
        self.slices = [Slice(8, 1.0), Slice(8, 2.0), Slice(8, 1.5)]
        self.energy = None
        self.too_large = ()

    def __call__(self, step, precision, device, seconds):
        self.asked.append((step, precision, device, seconds))
        return None if step in self.too_large else StepRun(step.batch_size, self.slices, self.energy)


@pytest.fixture
def runner():
    return Runner()


@pytest.fixture
def outputs(once, own_store, tmp_path, light, monkeypatch):
    """What a training left, its run in the store, with nothing repeated yet, on a CPU whose best precision is bf16."""
    monkeypatch.setattr(Cpu, "best_precision", lambda self: "bf16")
    shutil.copy(once.trained, own_store)
    return shutil.copytree(once.outputs, tmp_path / "outputs", ignore=shutil.ignore_patterns("sustain", "evaluate"))


@pytest.fixture
def sustained(outputs, runner):
    """Run the stage; return its record."""

    def run(*overrides, steps=STEPS, largest_batch=lambda step, device: None):
        settings = generated(*REPEATED, *overrides)
        return sustain.run(settings, outputs, steps=steps, run_step=runner, largest_batch=largest_batch)

    return run


# --- what is asked for


@pytest.mark.parametrize(
    "override", ["recipe=blog", *(f"recipes.linear-probe.{key}" for key in ("precision=bf16", "threads=3"))]
)
def test_the_steps_are_the_same_whatever_the_settings(outputs, runner, override):
    settings = config.load(["sustain_seconds=1", "device=cpu", override])
    sustain.run(settings, outputs, run_step=runner)
    convnet, best, transformer = score_steps.STEPS
    assert runner.asked == [
        (convnet, "fp32", "cpu", 1.0), (best, "bf16", "cpu", 1.0), (transformer, "bf16", "cpu", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("best", ["fp32", "bf16"])
def test_the_same_work_is_not_repeated_twice(sustained, runner, monkeypatch, best):
    monkeypatch.setattr(Cpu, "best_precision", lambda self: best)
    result = sustained()
    assert [step for step, *_ in runner.asked] == [step for step in STEPS if step is not BEST or best == "bf16"]
    assert set(result["metrics"]) == metrics_of(*STEPS)
    precisions = [result["tags"][score_steps.tag(step.name, "precision")] for step in STEPS]
    assert precisions == ["fp32", best, best]


def test_for_no_time_nothing_is_repeated_and_the_run_stays_as_it_is(sustained, outputs, runner, monkeypatch):
    sustained()
    asked = len(runner.asked)
    monkeypatch.setattr(devices, "select", lambda device: pytest.fail("asked for a device"))
    (before,) = delivered()
    result = sustained("sustain_seconds=0")
    assert pending.entries() == []
    (after,) = runs()
    assert (result["metrics"], result["tags"], result["series"], result["warnings"]) == ({}, {}, {}, [])
    assert after.to_dictionary() == before.to_dictionary() and len(runner.asked) == asked
    assert files.read_json(outputs / "sustain" / "metrics.json") == {}
    assert files.read_json(outputs / "sustain" / "record.json") == result
    (record,) = records.training_records(outputs)
    assert "sustain" not in publisher.stage_records(record, records.stage_folders(outputs))


# --- what it leaves


def test_it_becomes_part_of_the_trainings_run(sustained, outputs, capsys):
    (before,) = runs()
    result = sustained()
    assert [run.to_dictionary() for run in runs()] == [before.to_dictionary()]
    (run,) = delivered()
    metrics, tags, series = result["metrics"], result["tags"], result["series"]
    assert run.info.run_id == before.info.run_id
    assert (run.info.status, run.info.end_time) == ("FINISHED", result["ended"])
    assert set(metrics) == metrics_of(*STEPS) and metrics[SPEED] == 8 / 1.5
    for step in STEPS:
        key = score_steps.metric(step.name, "course")
        logged = client().get_metric_history(run.info.run_id, key)
        assert [(each.step, each.value) for each in logged] == list(enumerate(series[key], 1))
        assert series[key] == [8 / 1.0, 8 / 2.0, 8 / 1.5]
        workload = score_steps.workload(step, step.batch_size, 0.1)
        assert run.data.tags[score_steps.tag(step.name, "workload")] == workload
    assert run.data.metrics == before.data.metrics | metrics | {key: values[-1] for key, values in series.items()}
    assert [tags[score_steps.tag(step.name, "precision")] for step in STEPS] == ["fp32", "bf16", "bf16"]
    assert int(run.data.tags["sustained.started"]) <= result["ended"]
    assert run.data.tags["sustained.attempts"] == "1"
    assert run.data.tags["sustained.threads"] == str(torch.get_num_threads())
    absent = {"sustained.taints", "sustained.behavior", "sustained.energy_source"}
    assert not absent & set(run.data.tags) and result["warnings"] == []
    assert "**Sustained** convnet fp32 5.3 images/s (fp32, batch 8)" in run.data.tags["mlflow.note.content"]
    assert "5.3 images/s" in capsys.readouterr().out

    folder = outputs / "sustain"
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "record.json"}
    assert files.read_json(folder / "record.json") == result
    assert files.read_json(folder / "metrics.json") == metrics
    assert set(result) == {"id", "metrics", "tags", "series", "warnings", "ended"}
    assert result["id"] == files.read_json(outputs / "train" / "record.json")["id"]


def test_steps_that_are_really_run_have_all_figures(once):
    metrics = files.read_json(once.outputs / "sustain" / "metrics.json")
    assert set(metrics) >= metrics_of(*STEPS) and all(0 < value < math.inf for value in metrics.values())


def test_a_score_counts_how_often_it_was_measured_undisturbed(sustained, monkeypatch):
    loads = iter([0.0, 0.0, 0.4, 0.4, 0.0, 0.0])
    monkeypatch.setattr(system_state, "sample", lambda *_: {"cpu_load": next(loads)})
    attempts = []
    for _ in range(3):
        assert "sustained.attempts" not in sustained(steps=[CONVNET])["tags"]  # only the store knows
        attempts.append(delivered()[0].data.tags["sustained.attempts"])
    assert attempts == ["1", "2", "2"]


def test_a_disturbance_is_told_and_a_calm_measurement_takes_it_back(sustained, monkeypatch):
    samples = [
        {"cpu_load": 0.4}, {}, {"power_source": "battery"}, {"cpu_load": 0.2, "gpu_throttle": "hw slowdown"},
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(system_state, "sample", lambda *_: samples.pop(0))
        result = sustained()
    assert samples == [] and set(result["tags"]["sustained.taints"].split()) == {"load", "battery"}
    assert result["tags"]["sustained.behavior"] == "throttled" and len(result["warnings"]) == 3
    tags = delivered()[0].data.tags
    assert tags["sustained.taints"] == result["tags"]["sustained.taints"] and "taints" not in tags
    assert tags["sustained.behavior"] == "throttled"
    assert all(f"- {warning}" in tags["mlflow.note.content"] for warning in result["warnings"])

    sustained()
    tags = delivered()[0].data.tags
    assert not {"sustained.taints", "sustained.behavior"} & set(tags)
    assert "battery" not in tags["mlflow.note.content"]


def test_a_machine_that_slows_down_behaves_so(sustained, runner, monkeypatch):
    monkeypatch.setattr(system_state, "MIN_DRIFT", 0.03)
    runner.slices = [Slice(8, 1.0 + 0.05 * number) for number in range(12)]
    result = sustained(steps=[CONVNET])
    assert result["tags"]["sustained.behavior"] == "drift" and result["tags"]["sustained.taints"] is None
    assert len(result["warnings"]) == 1


def test_energy_is_told_with_its_source(sustained, runner):
    runner.energy = ("rapl", 9.0)
    result = sustained(steps=[CONVNET])
    assert result["metrics"]["sustained/convnet_fp32_watts"] == 2.0
    assert result["metrics"]["sustained/convnet_fp32_images_per_joule"] == 24 / 9
    assert result["tags"]["sustained.energy_source"] == "rapl"


@pytest.mark.parametrize("too_large", [(BEST,), STEPS])
def test_a_step_that_does_not_fit_is_left_out_with_a_warning(sustained, runner, too_large):
    runner.too_large = too_large
    result = sustained()
    assert set(result["metrics"]) == metrics_of(*(step for step in STEPS if step not in too_large))
    assert not {score_steps.tag(step.name, fact) for step in too_large for fact in ("workload", "precision")} & set(
        result["tags"]
    )
    assert len(result["warnings"]) == len(too_large) and too_large[0].title in result["warnings"][0]
    assert f"- {result['warnings'][0]}" in delivered()[0].data.tags["mlflow.note.content"]


# --- the largest batch


def test_the_largest_batch_joins_what_was_measured(sustained, outputs):
    result = sustained(largest_batch=lambda step, device: 8)
    assert result["metrics"]["memory/largest_batch_size"] == 8
    assert files.read_json(outputs / "sustain" / "record.json") == result
    (run,) = delivered()
    assert run.data.metrics["memory/largest_batch_size"] == 8 and run.info.status == "FINISHED"
    assert run.data.tags["sustained.attempts"] == "1"
    # Delivered twice, the courses are there once.
    assert len(client().get_metric_history(run.info.run_id, "sustained/convnet_fp32_course")) == 3


def test_a_search_that_crashes_loses_nothing_of_what_was_measured(sustained, outputs):
    def crash(step, device):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sustained(largest_batch=crash)
    record = files.read_json(outputs / "sustain" / "record.json")
    assert set(record["metrics"]) == metrics_of(*STEPS)
    (run,) = delivered()
    assert run.data.metrics[SPEED] == record["metrics"][SPEED] and run.info.status == "FINISHED"


@pytest.mark.parametrize("override", ["largest_batch=false", "sustain_seconds=0"])
def test_the_largest_batch_is_not_searched_for_unasked(sustained, override):
    result = sustained(override, largest_batch=lambda step, device: pytest.fail("searched"))
    assert "memory/largest_batch_size" not in result["metrics"]


# --- how it ends


def test_a_step_that_fails_leaves_the_run_as_it_was(outputs):
    def fail(*args):
        raise RuntimeError("an unknown operator")

    with pytest.raises(RuntimeError, match="an unknown operator"):
        sustain.run(generated(*REPEATED), outputs, run_step=fail)
    assert pending.entries() == [] and not (outputs / "sustain").exists()
