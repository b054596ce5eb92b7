"""What is measured around a training: where the images lie, energy, and a speed that its own machine can't have."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from loops import ScriptedClock, images_of, make_setup, recipe_of, without_times
from trainings import threads  # noqa: F401 (one is enough)

from pipeline import config
from pipeline.devices.cpu import Cpu
from pipeline.profiling import energy, roofline
from pipeline.profiling.clock import Clock
from pipeline.training import measured, setup, state

SECONDS = {"features": 1000.0, "train": 10_000.0, "ceilings": 50.0}
"""How long each of these spans lasts by `Scripted`."""

SPEED = 20 / 10_000
"""Images a second by `Scripted`, where features are not computed once."""


Scripted = partial(ScriptedClock, seconds=SECONDS)


def peaks_of(images_per_second, matmul_flops=1e15):
    return roofline.Peaks(matmul_flops, 5e10, images_per_second)


@pytest.fixture
def splits():
    return {"train": images_of(20, 1), "validation": images_of(11, 2)}


@pytest.fixture
def run(splits, monkeypatch):
    """Trains two epochs by the scripted clock, or what is left after a `saved` state; gives the record, and the setup.
    The state after each epoch is in the folder `states`, if given."""

    # Many parameters: each is one thing that a test may vary.
    def train(*overrides, peaks=None, flops=1e6, backend=None, settings=(), clock=Scripted, tuning_stopped=False,
              states=None, saved=None):  # fmt: skip
        training = make_setup(recipe_of("linear-probe", *overrides), splits, backend=backend, clock=clock)
        record = {"tags": {}, "metrics": {}, "warnings": [], "facts": {}, "epochs": []}
        record = saved["record"] if saved else record
        training.tuning_stopped = tuning_stopped
        monkeypatch.setattr(setup, "flops_per_image", lambda training: flops)
        limits = measured.Limits(0.0, peaks or peaks_of(SPEED))
        for figures in measured.train(training, splits, config.load(list(settings)), record, limits, saved):
            record["epochs"].append({"figures": figures})
            if states:
                state.save(states, training, record)
        return record, training

    return train


# --- where the images lie


@pytest.mark.parametrize("features", ["cache", "recompute"])
def test_images_that_may_not_lie_on_the_device_are_trained_from_host_memory_alike(run, features):
    device, _ = run(f"features={features}")
    host, _ = run(f"features={features}", settings=["data.device_gib=0"])
    assert (device["tags"]["data.placement"], host["tags"]["data.placement"]) == ("device", "host")
    assert len(host["epochs"]) == 2
    rows = [without_times(epoch["figures"] for epoch in record["epochs"]) for record in (device, host)]
    assert rows[0] == rows[1]


def test_the_speed_of_features_is_that_of_all_images(run):
    record, _ = run("features=cache")
    assert record["metrics"]["speed/feature_images_per_second"] == 31 / 1000
    assert "speed/feature_images_per_second" not in run("features=recompute")[0]["metrics"]


def test_a_step_that_cannot_be_captured_is_a_warning(run):
    backend = Cpu()
    backend.capture_error = "it asks the host"
    (warning,) = run(backend=backend)[0]["warnings"]
    assert "it asks the host" in warning


def test_autotuning_that_was_stopped_is_a_warning(run):
    assert setup.TUNING_STOPPED in run(tuning_stopped=True)[0]["warnings"]
    assert setup.TUNING_STOPPED not in run()[0]["warnings"]


@pytest.mark.parametrize("features", ["cache", "recompute"])
def test_a_resumed_training_counts_each_epoch_once_and_the_rest_of_the_first_process(run, tmp_path, features):
    unbroken, first = run(f"features={features}", tuning_stopped=True, states=tmp_path)
    seconds = dict(first.loop.clock.seconds)
    newest = max(tmp_path.iterdir())
    newest.unlink()
    saved = state.load_newest(tmp_path)
    assert len(saved["record"]["epochs"]) == 1
    saved["record"]["metrics"] |= {"speed/feature_images_per_second": 7.0} if features == "cache" else {}
    backend = Counted(range(100))
    record, second = run(f"features={features}", tuning_stopped=True, saved=saved, backend=backend)
    rows = [without_times(epoch["figures"] for epoch in record["epochs"]) for record in (unbroken, record)]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert record["warnings"] == unbroken["warnings"] == [setup.TUNING_STOPPED]
    assert second.loop.clock.seconds == seconds  # what the second process prepared is not the training's
    assert record["metrics"].get("speed/feature_images_per_second") == (7.0 if features == "cache" else None)
    assert "energy/joules" not in record["metrics"]  # that of the first process is lost


# --- energy


class Counted(Cpu):
    """The CPU with a counter of energy that gives these joules, one a reading. `open_spans` holds the span that was
    open at each reading."""

    def __init__(self, joules):
        super().__init__()
        self.joules, self.open_spans = iter(joules), []

    def energy(self):
        value = next(self.joules)
        return None if value is None else ("rapl", float(value))


@pytest.mark.parametrize(("features", "spans", "images"), [("cache", 4, 31), ("recompute", 3, 62)])
def test_energy_is_that_of_the_timed_spans(run, features, spans, images):
    """The features, two epochs and the end of the loop are measured; what lies between them is not."""
    readings = []

    def clock(synchronize):
        readings.append(Scripted(synchronize))
        return readings[0]

    class Watched(Counted):
        def energy(self):
            assert readings[0]._open is None
            return super().energy()

    backend = Watched(range(0, 1000, 10))
    metrics = run(f"features={features}", backend=backend, clock=clock)[0]["metrics"]
    assert next(backend.joules) == 20 * spans  # so many readings
    assert metrics["energy/joules"] == 10 * spans
    assert metrics["energy/images_per_joule"] == pytest.approx(images / (10 * spans))


@pytest.mark.parametrize(
    ("joules", "clock"),
    [
        ([1, 2, None, *range(3, 20)], Scripted),  # a reading was missed
        ([5] * 20, Scripted),  # the counter stood still
        (range(20), Clock),  # less than a second is not measured
        ([None] * 20, Scripted),
    ],
)
def test_energy_that_cannot_be_told_is_left_out(run, joules, clock):
    record, _ = run(backend=Counted(joules), clock=clock)
    assert not [key for key in record["metrics"] if key.startswith("energy/")]
    assert "energy.source" not in record["tags"]


def test_apples_tool_takes_the_counters_place(run, monkeypatch):
    readings, ended = iter(range(0, 1000, 5)), []

    @contextmanager
    def source(name, counter):
        yield lambda: (name, float(next(readings)))
        ended.append(name)

    monkeypatch.setattr(energy, "source", source)
    record, _ = run("features=recompute", backend=Counted([]), settings=["energy.source=powermetrics"])
    assert ended == ["powermetrics"] and record["tags"]["energy.source"] == "powermetrics"
    assert record["metrics"]["energy/joules"] == 3 * 5


# --- efficiency


@pytest.fixture
def measuring(monkeypatch):
    """Makes these the peaks that are measured again, one after the other; gives those that are left."""
    monkeypatch.setattr(roofline, "MAX_VS_SYNTHETIC", 1.05)
    monkeypatch.setattr(roofline, "MAX_UTILISATION", 4.2)

    def script(*peaks):
        left = list(peaks)

        def measure(training, splits):
            assert training.loop.clock._open == "ceilings" and splits["train"].inputs.dtype == torch.uint8
            if isinstance(left[0], Exception):
                raise left.pop(0)
            return left.pop(0)

        monkeypatch.setattr(setup, "measure_peaks", measure)
        return left

    return script


@pytest.mark.parametrize(
    ("shares", "best"),
    [
        ([1.04], 1.04),
        ([1.1, 1.0], 1.0),  # other load held the machine down while it was measured first
        ([1.1, 1.2, 1.0], 1.0),  # and for longer
        ([2.0, 0.9], 0.9),
    ],
)
def test_a_speed_above_the_peaks_is_compared_with_peaks_measured_again(run, measuring, shares, best):
    first, *again = [peaks_of(SPEED / share) for share in shares]
    left = measuring(*again)
    record, training = run("features=recompute", peaks=first)
    assert left == []
    assert record["metrics"]["efficiency/vs_synthetic"] == pytest.approx(best)
    assert record["metrics"]["ceiling/synthetic_images_per_second"] == SPEED / best
    assert record["metrics"]["ceiling/matmul_tflops"] == 1000
    assert training.loop.clock.total("ceilings") == 50 * (1 + len(again))  # 1: the operations are counted
    assert "taints" not in record["tags"] and record["warnings"] == [] and record["facts"]["verdict"]


@pytest.mark.parametrize(
    ("shares", "flops", "share"), [([1.1] * 3, 1e6, 1.1), ([2.2, 2.0, 2.1], 1e6, 2.0), ([1.0] * 3, 1e20, 1.0)]
)
def test_a_speed_that_stays_impossible_taints_the_run(run, measuring, shares, flops, share):
    first, *again = [peaks_of(SPEED / share) for share in shares]
    left = measuring(*again)
    record, _ = run("features=recompute", peaks=first, flops=flops)
    assert left == [] and record["tags"]["taints"] == "clock" and len(record["warnings"]) == 1
    assert record["metrics"]["efficiency/vs_synthetic"] == pytest.approx(share)


@pytest.mark.parametrize(("share", "judged"), [(1.0, False), (12.0, True)])
def test_a_short_training_is_not_judged_unless_its_clock_made_it_short(run, measuring, monkeypatch, share, judged):
    monkeypatch.setattr(roofline, "STEP_SECONDS", 20_000.5)
    measuring(*[peaks_of(SPEED / share)] * 2)
    record, _ = run("features=recompute", peaks=peaks_of(SPEED / share))
    assert (record["tags"].get("taints") == "clock") is judged
    assert ("efficiency/vs_synthetic" in record["metrics"]) is judged
    assert record["metrics"]["ceiling/synthetic_images_per_second"] == SPEED / share
    assert record["facts"]["verdict"].startswith("not judged") is not judged


@pytest.mark.parametrize("most", ["null", "0"])
def test_features_are_compared_with_their_own_peak(run, most):
    record, _ = run("features=cache", peaks=peaks_of(31 / 1000), settings=[f"data.device_gib={most}"])
    assert record["metrics"]["efficiency/vs_synthetic"] == 1
