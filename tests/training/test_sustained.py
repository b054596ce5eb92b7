"""One step repeated: its figures, when the device is synchronized, and batches that don't fit."""

import gc
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from trainings import STEPS, threads  # noqa: F401 (threads: one is enough)

from pipeline import devices
from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.profiling import score_steps
from pipeline.profiling.clock import Clock
from pipeline.training import setup, sustained
from pipeline.training.sustained import Slice, StepRun

CONVNET, _, TRANSFORMER = STEPS


def run_step(step=CONVNET, precision="fp32", seconds=0.1):
    return sustained.run_step(step, precision, "cpu", seconds)


# --- figures


def test_the_speed_is_the_median_of_the_last_third_of_the_time_beside_the_firsts():
    slices = [Slice(speed, 1.0) for speed in (100, 90, 80, 70, 60, 30, 20, 10, 50)]
    assert StepRun(8, slices, None).figures() == {
        "images_per_second": 20.0,
        "first_third_images_per_second": 90.0,
        "seconds": 9.0,
        "batch_size": 8.0,
    }


def test_energy_is_that_of_all_slices():
    figures = StepRun(8, [Slice(30, 2.0), Slice(10, 2.0)], ("nvml", 80.0)).figures()
    assert (figures["images_per_joule"], figures["watts"]) == (40 / 80, 80 / 4)


@pytest.mark.parametrize(
    ("seconds", "first", "last"),
    [
        ([1.0], [0], [0]),
        ([1.0, 1.0], [0], [1]),
        ([0.1 + 0.2] * 3, [0], [2]),
        ([9.0, 1.0, 1.0], [0], [1, 2]),  # a third of the time, not of the slices
        ([1.0, 1.0, 9.0], [0, 1], [2]),
        ([1.0] * 6, [0, 1], [4, 5]),
    ],
)
def test_a_slice_belongs_to_the_third_of_the_time_that_its_middle_lies_in(seconds, first, last):
    slices = [Slice(number, each) for number, each in enumerate(seconds)]
    expected = [slices[number] for number in first], [slices[number] for number in last]
    assert sustained.split_thirds(slices) == expected


# --- time


@pytest.mark.parametrize(
    ("step", "seconds", "expected"),
    [
        (0.25, 3.0, [(16, 1.0)] * 3),  # until the time has passed
        (0.25, 3.5, [(16, 1.0)] * 4),
        (0.3, 3.0, [(12, 0.9)] * 4),
        (0.25, 1.5, [(8, 0.5)] * 3),  # a short time is cut in three
        (7.0, 10.0, [(4, 7.0)] * 3),  # at least three, however long a step takes
        (7.0, 30.0, [(4, 7.0)] * 5),
    ],
)
def test_the_device_is_synchronized_once_a_slice(step, seconds, expected):
    time, waits, taken = [0.0], [], []

    def take(images, labels):
        taken.append(images)
        time[0] += step

    loop = SimpleNamespace(step=take, clock=Clock(lambda: waits.append(len(taken)), lambda: time[0]))
    batches = zip(itertools.count(), itertools.count(), strict=True)
    steps = sustained.steps_per_slice(loop, batches, seconds)
    slices = sustained.time_slices("a title", loop, batches, 4, steps, seconds)
    assert [piece.images for piece in slices] == [images for images, _ in expected]
    assert [piece.seconds for piece in slices] == pytest.approx([seconds for _, seconds in expected])
    # Two steps before the first slice, of which the second tells how many make one; within a slice nobody waits.
    assert waits == [0, 1, 1, 2, *(2 + steps * done for before in range(len(slices)) for done in (before, before + 1))]
    assert taken == list(range(2 + steps * len(slices)))


@pytest.mark.parametrize("step", [CONVNET, TRANSFORMER])
def test_a_step_is_repeated_for_the_time(step):
    step_run = run_step(step, "bf16")
    assert step_run.batch_size == step.batch_size and len(step_run.slices) >= 3
    assert step_run.figures()["seconds"] >= 0.1 and step_run.figures()["images_per_second"] > 0
    assert all(piece.images % step.batch_size == 0 for piece in step_run.slices)


# --- what is repeated


@pytest.mark.parametrize("step", [score_steps.STEPS[0], score_steps.STEPS[2]], ids=lambda step: step.name)
def test_the_real_steps_train_every_parameter_by_adamw(step):
    training = sustained._build(sustained._recipe(step, "fp32", 2), sustained.random_images(2, step.image_size), Cpu())
    assert not training.on_features and all(parameter.requires_grad for parameter in training.net.parameters())
    assert isinstance(training.loop.optimizer, torch.optim.AdamW)
    assert training.net.training


def test_a_recipes_threads_have_no_part_in_it():
    torch.set_num_threads(3)
    run_step()
    assert torch.get_num_threads() == setup.DEFAULT_THREADS == 1


# --- energy


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ([("rapl", 100.0), ("rapl", 104.0)], ("rapl", 4.0)),
        ([("rapl", 100.0), ("rapl", 100.0)], None),
        ([None, ("rapl", 100.0)], None),
        ([("rapl", 100.0), None], None),
    ],
)
def test_energy_is_that_of_the_slices_where_the_counter_moves(monkeypatch, readings, expected):
    order = []
    measure, judge = sustained.time_slices, sustained.steps_per_slice
    monkeypatch.setattr(sustained, "time_slices", lambda *args: order.append("slices") or measure(*args))
    monkeypatch.setattr(sustained, "steps_per_slice", lambda *args: order.append("warm-up") or judge(*args))
    monkeypatch.setattr(Cpu, "energy", lambda self: order.append("energy") or readings.pop(0))
    assert run_step().energy == expected
    assert order == ["warm-up", "energy", "slices", "energy"]


# --- batches that do not fit


@pytest.fixture
def limited(monkeypatch):
    """Make a device that raises an error for a batch of more than so many images."""

    def limit(images):
        prepare = batching.prepare

        def prepared(batch, *args, **kwargs):
            if len(batch) > images:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
            return prepare(batch, *args, **kwargs)

        monkeypatch.setattr(batching, "prepare", prepared)
        monkeypatch.setattr(Cpu, "raises_oom", True)

    return limit


@pytest.mark.parametrize(("images", "expected"), [(7, 4), (4, 4), (2, 2)])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(limited, images, expected):
    limited(images)
    assert run_step().batch_size == expected


def test_the_memory_of_a_step_is_free_before_the_next_one_is_built(limited, monkeypatch):
    limited(4)
    nets, alive, build = [], [], setup.TrainingSetup

    def watched(*args):
        gc.collect()  # as the GPUs' `release_memory` does
        alive.append(sum(net() is not None for net in nets))
        training = build(*args)
        nets.append(weakref.ref(training.net))
        return training

    monkeypatch.setattr(setup, "TrainingSetup", watched)
    run_step()
    run_step()
    assert alive == [0, 0, 0, 0]  # a batch of 8 that failed, and one of 4, twice


@pytest.mark.parametrize(
    ("free", "expected"), [(8 * 100 * sustained.MEMORY_MARGIN, 8), (799 * sustained.MEMORY_MARGIN, 4), (None, 8)]
)
def test_a_cpu_is_not_given_more_than_its_free_memory(monkeypatch, free, expected):
    monkeypatch.setattr(setup, "saved_bytes_per_image", lambda *args: 100.0)
    monkeypatch.setattr(Cpu, "free_bytes", lambda self: free)
    assert run_step().batch_size == expected


# --- the largest batch


class Limited(Cpu):
    """A device that raises where memory is short, and has room for 8 images: one MiB each."""

    raises_oom = True
    capacity = 8.0

    def capacity_mib(self):
        return self.capacity


@pytest.fixture
def device(monkeypatch):
    backend, measure = Limited(), setup._step_peak_mib

    def step_peak_mib(training, size, shape):
        assert not training.use_cuda_graph and training.compile_mode == "off" and training.recipe.precision == "fp32"
        return None if measure(training, size, shape) is None else float(size)

    monkeypatch.setattr(devices, "select", lambda device: backend)
    monkeypatch.setattr(setup, "_step_peak_mib", step_peak_mib)
    return backend


def test_the_largest_batch_is_found_on_a_device_that_raises(device):
    assert sustained.largest_batch(CONVNET, "cpu") == 8
