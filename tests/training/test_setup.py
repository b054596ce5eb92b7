"""What a training needs on its device: the same model after all that comes before, and what is said of the machine."""

import dataclasses

import pytest
import torch
from conftest import fails
from standin import Recording
from test_loop import never_warmed
from trainings import SMALL, threads  # noqa: F401 (threads: one is enough)

from pipeline import config
from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.errors import OutOfMemoryError, StageError
from pipeline.models import classifier
from pipeline.profiling import roofline
from pipeline.profiling.clock import Clock
from pipeline.training import loop, setup

CLASSES = 3
PIXELS = 16 * 16 * 3


def recipe_of(name, *overrides):
    return config.load([f"recipe={name}", "weights=random", *SMALL, "batch_size=8", *overrides]).work


def split_of(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return batching.Split(images, torch.arange(count) % CLASSES)


@pytest.fixture
def splits():
    return {"train": split_of(20, 1), "validation": split_of(11, 2)}


@pytest.fixture
def build(splits):
    """Makes the work of a recipe on `splits`, on the CPU or another backend."""

    def make(recipe, backend=None, seed=0):
        backend = backend or Cpu()
        return setup.build(recipe, seed, CLASSES, None, splits, backend, Clock(backend.synchronize))

    return make


def epochs(work, splits):
    """Trains; the figures of the epochs that do not tell the time, and the model's state."""
    recipe, backend, train = work.recipe, work.job.backend, splits["train"]
    validated = setup.val_split(splits)
    if work.job.on_features:
        train, validated = (setup.features(work, split) for split in (train, validated))
    found = loop.train(
        work.job,
        lambda epoch: setup.shuffled(work, train, 0, epoch),
        lambda: batching.batches(validated, recipe.batch_size, backend),
    )
    timed = ("time/", "speed/", "memory/")
    figures = [{key: value for key, value in each.items() if not key.startswith(timed)} for each in found]
    return figures, {name: tensor.clone() for name, tensor in work.net.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- from the beginning to the training


WORKS = [
    ("linear-probe",),
    ("linear-probe", "features=recompute", "optimizer=sgd"),
    ("finetune", "flip=false"),
    ("finetune", "optimizer=sgd", "scheduler=cosine"),
    ("finetune", "precision=bf16", "frozen_batch_norm=train", "trainable=head"),
    ("blog",),
]


@never_warmed
@pytest.mark.parametrize("recorded", [False, True], ids=["launched", "recorded"])
@pytest.mark.parametrize("chosen", WORKS, ids=" ".join)
def test_a_model_that_was_warmed_up_and_measured_trains_as_if_it_never_had_been(build, splits, chosen, recorded):
    recipe = recipe_of(*chosen)
    cold = build(recipe, Recording(warm_ups=0) if recorded else Cpu())  # else recording would be a warm-up
    warm = build(recipe, Recording() if recorded else Cpu())
    assert cold.recorded == warm.recorded == recorded
    begun = {name: tensor.clone() for name, tensor in warm.net.state_dict().items()}
    assert same(begun, cold.net.state_dict())

    setup.warm_up(warm, splits)
    setup.measure_peaks(warm, splits)
    assert not same(begun, warm.net.state_dict())  # else nothing is tested here
    setup.restart(warm, seed=0)
    assert same(begun, warm.net.state_dict())

    expected, state = epochs(cold, splits)
    figures, warmed = epochs(warm, splits)
    assert figures == expected and same(warmed, state)
    assert not same(begun, state)


@pytest.mark.parametrize("recorded", [False, True], ids=["launched", "recorded"])
@pytest.mark.parametrize("chosen", WORKS, ids=" ".join)
def test_a_training_begun_with_another_seed_is_one_built_with_it(build, splits, chosen, recorded):
    recipe = recipe_of(*chosen)
    used = build(recipe, Recording() if recorded else Cpu(), seed=0)
    setup.warm_up(used, splits)
    setup.restart(used, seed=0)
    where = [tensor.data_ptr() for tensor in used.net.state_dict().values()]
    first, _ = epochs(used, splits)
    taken = used.job.times
    setup.restart(used, seed=1)
    assert used.job.times is not taken
    assert [tensor.data_ptr() for tensor in used.net.state_dict().values()] == where  # where what is recorded reads it

    fresh = build(recipe, Recording() if recorded else Cpu(), seed=1)
    setup.warm_up(fresh, splits)
    setup.restart(fresh, seed=1)
    expected, state = epochs(fresh, splits)
    second, again = epochs(used, splits)
    assert second == expected != first and same(again, state)


def test_random_numbers_begin_anew_whatever_was_drawn_before(build, splits):
    work = build(recipe_of("finetune"))
    drawn = []
    for before in (3, 5):
        torch.rand(before)
        setup.restart(work, seed=7)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


def test_other_seeds_build_other_heads(build):
    heads = [build(recipe_of("linear-probe"), seed=seed).net.head.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize(("backend", "recorded"), [(Cpu, False), (Recording, True)])
def test_launches_are_recorded_where_the_device_can(build, backend, recorded):
    assert build(recipe_of("finetune"), backend()).recorded is recorded
    assert build(recipe_of("finetune", "graph=false"), backend()).recorded is False


@pytest.mark.parametrize(("batch_size", "expected"), [(8, [4, 8]), (10, [10]), (64, [20])])
def test_the_warm_up_takes_each_shape_that_the_training_will(build, splits, monkeypatch, batch_size, expected):
    """Of 20 images: two batches of 8 and one of 4, two of 10, one of all."""
    taken, step = [], loop.TrainLoop.step

    def sized(job, inputs, labels):
        taken.append(len(labels))
        return step(job, inputs, labels)

    monkeypatch.setattr(loop.TrainLoop, "step", sized)
    setup.warm_up(build(recipe_of("finetune", f"batch_size={batch_size}")), splits)
    assert taken == expected


@pytest.mark.parametrize(("batch_size", "expected"), [(2, [4, 16]), (3, [20]), (8, [20])])
def test_the_warm_up_of_a_recorded_head_takes_as_many_steps_at_once_as_its_training(
    build, splits, batch_size, expected
):
    backend = Recording()
    setup.warm_up(build(recipe_of("linear-probe", f"batch_size={batch_size}"), backend), splits)
    assert [size for name, size in backend.recorder.recorded if name == "_whole_steps"] == expected


@pytest.mark.parametrize("chosen", WORKS, ids=" ".join)
def test_the_training_records_nothing_that_the_warm_up_has_not(build, splits, chosen):
    backend = Recording()
    work = build(recipe_of(*chosen, "batch_size=2"), backend)
    setup.warm_up(work, splits)
    warmed = list(backend.recorder.recorded)
    setup.restart(work, seed=0)
    epochs(work, splits)
    assert warmed and backend.recorder.recorded == warmed  # which would take time


@pytest.mark.parametrize(("asynchronous", "expected"), [(True, [5, 6, 5, 6]), (False, [2])])
def test_a_device_that_chooses_kernels_by_shape_is_shown_those_of_the_validation(
    build, splits, monkeypatch, asynchronous, expected
):
    """Of 20 images to train on and 11 to validate on, six at a time; twice, for its memory. A CPU has what is trained
    on scored once."""
    monkeypatch.setattr(Cpu, "asynchronous", asynchronous)
    work, scored = build(recipe_of("finetune", "batch_size=6")), []
    monkeypatch.setattr(work.job, "score", lambda inputs, labels: scored.append(len(labels)))
    setup.warm_up(work, splits)
    assert scored == expected


@pytest.mark.parametrize(("asynchronous", "expected"), [(True, 300 * 2**20), (False, 0)])
def test_what_a_step_takes_of_memory_is_told_of_devices_of_our_own(build, splits, monkeypatch, asynchronous, expected):
    monkeypatch.setattr(Cpu, "asynchronous", asynchronous)
    monkeypatch.setattr(Cpu, "memory_mib", lambda self: {"peak": 300.0})
    assert setup.warm_up(build(recipe_of("linear-probe")), splits) == expected


def test_a_model_that_cannot_be_compiled_is_said_in_one_line(build, splits, monkeypatch):
    def fail(*args):
        raise torch._dynamo.exc.Unsupported("graph break in user code\n  and where it is")

    monkeypatch.setattr(loop, "warm_up", fail)
    work = dataclasses.replace(build(recipe_of("finetune")), compile_mode="default")
    line = fails(StageError, setup.warm_up, work, splits)
    assert line == 'compile: "default" fails here (graph break in user code): set compile to off'


# --- where the samples lie


def room(backend, free):
    backend.free_bytes = lambda: free
    return backend


BYTES = 31 * PIXELS
"""Of all of `splits`."""


@pytest.mark.parametrize(
    ("free", "working", "most", "place"),
    [
        (None, 0, None, "device"),  # of a device that does not tell
        (None, 1e12, None, "device"),
        (None, 0, BYTES / 2**30, "device"),
        (None, 0, (BYTES - 1) / 2**30, "host"),
        (BYTES / 0.9 + 1, 0, None, "device"),
        (BYTES / 0.9 - 1, 0, None, "host"),  # a tenth of what is free is left alone
        (BYTES / 0.9 + 1, 2, None, "host"),
        ((BYTES + 1000) / 0.9 + 1, 1000, None, "device"),
        ((BYTES + 1000) / 0.9 - 1, 1000, None, "host"),
        (1e12, 0, 0.0, "host"),
        (1e12, 0, 1.0, "device"),
        (1000, 0, 1.0, "host"),  # the most there may be is not what there is
        (0, 1e9, None, "host"),
    ],
)
def test_samples_lie_on_the_device_where_they_fit_beside_a_step(build, splits, free, working, most, place):
    work = build(recipe_of("finetune"), room(Cpu(), free))
    placed, name = setup.place(work, splits, working, most)
    assert name == place and placed.keys() == splits.keys()
    for which, split in placed.items():
        assert (split is splits[which]) == (place == "host")
        assert torch.equal(split.inputs, splits[which].inputs)


def test_what_is_placed_in_host_memory_may_be_replaced(build, splits):
    placed, _ = setup.place(build(recipe_of("linear-probe")), splits, 0, 0.0)
    own = splits["train"]
    placed["train"] = None
    assert splits["train"] is own


def test_a_splits_own_samples_alone_count(build, splits):
    few = {"train": splits["train"].take(torch.arange(4).numpy()), "validation": splits["validation"]}
    work = build(recipe_of("finetune"), Cpu())
    assert setup.place(work, few, 0, 15 * PIXELS / 2**30)[1] == "device"
    assert setup.place(work, few, 0, (15 * PIXELS - 1) / 2**30)[1] == "host"


# --- the largest batch


class Sized(Cpu):
    """Each image of a step takes a MiB; there are `capacity` MiB, and beyond `refused` it says no."""

    def __init__(self, capacity, refused=2**30):
        super().__init__()
        self.capacity, self.refused, self.tried, self.peak, self.released = capacity, refused, [], 0, 0
        self.repeated = True

    def capacity_mib(self):
        return self.capacity

    def reset_peak_memory(self):
        self.peak = 0

    def memory_mib(self):
        return {"peak": float(self.peak)}

    def release_memory(self):
        self.released += 1

    def tune(self, *, repeated=True):
        self.repeated = repeated

    def make_step(self, *, raw, recorded):
        assert raw and not recorded

        def step(images, labels):
            size, shape = len(images), tuple(images.shape[1:])
            assert not self.repeated  # nothing is tried out for a shape that is seen twice
            assert shape == (16, 16, 3) and images.dtype == torch.uint8 and labels.shape == (size,)
            self.tried += [size] if size not in self.tried else []
            if size > self.refused:
                raise torch.OutOfMemoryError("no more")
            self.peak = max(self.peak, size)

        return step


@pytest.mark.parametrize(
    ("capacity", "refused", "below", "largest", "tried"),
    [
        # upwards, by what is refused
        (1000, 40, None, 32, [2, 4, 8, 16, 32, 64]),
        (1000, 32, None, 32, [2, 4, 8, 16, 32, 64]),
        (1000, 2, None, 2, [2, 4]),
        (1000, 1, None, None, [2]),
        (None, 40, None, None, []),  # what has no capacity might never refuse
        # by the capacity: what would need half as much again is not tried
        (32, 2**30, None, 32, [2, 4, 8, 16, 32]),
        (33, 2**30, None, 32, [2, 4, 8, 16, 32]),
        (43, 2**30, None, 32, [2, 4, 8, 16, 32, 64]),  # 64 of 1.5 * 43 is tried, and was more than there is
        (42, 2**30, None, 32, [2, 4, 8, 16, 32]),
        (1, 2**30, None, None, [2]),
        # downwards
        (None, 2**30, 256, 128, [128]),
        (None, 2**30, 200, 128, [128]),
        (None, 40, 256, 32, [128, 64, 32]),
        (31, 2**30, 129, 16, [128, 64, 32, 16]),
        (None, 1, 16, None, [8, 4, 2]),
        (None, 2**30, 2, None, []),  # nothing is smaller than 2 but a single image
        (None, 2**30, 1, None, []),
    ],
)
def test_the_largest_batch_is_the_last_that_fits(build, capacity, refused, below, largest, tried):
    backend = Sized(capacity, refused)
    work = dataclasses.replace(build(recipe_of("finetune"), backend), make_step=backend.make_step)
    assert setup.largest_batch(work, (16, 16, 3), below=below) == largest
    assert backend.tried == tried
    assert backend.released == len(tried) and backend.repeated


def test_no_batch_larger_than_the_setting_allows_is_tried(build, monkeypatch):
    monkeypatch.setattr(setup, "LARGEST_BATCH", 64)
    backend = Sized(1000)
    work = dataclasses.replace(build(recipe_of("finetune"), backend), make_step=backend.make_step)
    assert setup.largest_batch(work, (16, 16, 3)) == 64 and backend.tried[-1] == 64
    assert setup.LARGEST_BATCH <= 2**20  # what `batch_size` takes


@pytest.mark.parametrize("chosen", [("finetune",), ("linear-probe",)], ids=" ".join)
def test_the_steps_are_those_of_the_work(build, monkeypatch, chosen):
    """Of a backend that has no room for 9 images, with real steps; images of one pixel a map are none too few."""
    prepare, seen = batching.prepare, []

    def prepared(images, *args, **kwargs):
        seen.append(len(images))
        if len(images) > 8:
            raise torch.OutOfMemoryError("no more")
        return prepare(images, *args, **kwargs)

    work = build(recipe_of(*chosen))
    monkeypatch.setattr(batching, "prepare", prepared)
    assert setup.largest_batch(work, (16, 16, 3)) == 8
    assert seen == [2, 2, 4, 4, 8, 8, 16]  # twice each: an optimizer has its state after the first


@pytest.mark.parametrize(("given", "expected"), [(2, 2), ("null", 1)])
def test_a_recipe_without_threads_gets_torchs_own_number_whatever_was_set_before(given, expected):
    torch.set_num_threads(3)
    setup.device_for("cpu", recipe_of("finetune", f"threads={given}"))
    assert torch.get_num_threads() == expected


def test_what_a_step_saves_grows_with_its_images_not_with_its_parameters(build, splits):
    narrow = setup.saved_bytes_per_image(build(recipe_of("finetune")), splits["train"])
    wide = setup.saved_bytes_per_image(build(recipe_of("finetune", "image_size=64")), splits["train"])
    # ReLU, BatchNorm and convolutions save maps, whose pixels are four times as many; the pooled features are few.
    assert wide == pytest.approx(4 * narrow, rel=0.01)
    pixels = 32 * 32 * 3 * 4
    assert narrow > pixels


def test_what_is_not_a_lack_of_memory_is_no_answer(build):
    def fail(images, labels):
        raise RuntimeError("shapes do not fit")

    work = dataclasses.replace(build(recipe_of("finetune")), make_step=lambda **_: fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        setup.largest_batch(work, (16, 16, 3), below=9)


# --- what is said of the machine


def test_what_an_image_takes_is_a_pass_of_the_features_or_a_whole_step(build):
    cached, recomputed, whole = (
        build(recipe_of(*chosen))
        for chosen in [("linear-probe",), ("linear-probe", "features=recompute"), ("finetune",)]
    )
    assert cached.job.on_features and not recomputed.job.on_features
    features = setup.flops_per_image(cached)
    assert features == roofline.forward_flops(classifier.Features(cached.net), (3, 32, 32)) > 0
    # The head's products: forwards, and backwards for its weights alone, since nothing before it learns.
    head = 2 * cached.net.head.weight.numel()
    assert setup.flops_per_image(recomputed) - features == 2 * head
    # Backwards twice as much again, but for the images' own gradient, which nothing asks for.
    forward = features + head
    first = next(module for module in whole.net.modules() if isinstance(module, torch.nn.Conv2d))
    images = 2 * first.weight.numel() * 16 * 16  # its output's pixels, by its stride of 2
    assert setup.flops_per_image(whole) == 3 * forward - images


@pytest.mark.parametrize("backend", [Cpu, Recording], ids=["launched", "recorded"])
@pytest.mark.parametrize("name", ["finetune", "linear-probe"])
def test_the_ceiling_is_that_of_the_trainings_own_step_on_one_batch(build, splits, monkeypatch, name, backend):
    work = build(recipe_of(name), backend())
    setup.warm_up(work, splits)
    taken, prepared, prepare = [], [], batching.prepare

    def make_step(*, raw, recorded):
        assert not raw and recorded == work.recorded
        step = work.make_step(raw=raw, recorded=recorded)
        return lambda images, labels: taken.append((images, labels)) or step(images, labels)

    monkeypatch.setattr(batching, "prepare", lambda *args, **kwargs: prepared.append(1) or prepare(*args, **kwargs))
    before = {key: tensor.clone() for key, tensor in work.net.state_dict().items()}
    measured = setup.measure_peaks(dataclasses.replace(work, make_step=make_step), splits)

    assert all(value > 0 for value in vars(measured).values())
    assert len(taken) == 3 and all(each[0] is taken[0][0] for each in taken)
    assert taken[0][0].shape == (8, 3, 32, 32) and torch.equal(taken[0][1], splits["train"].labels[:8])
    assert prepared == [1]
    # A step learns; computing features does not.
    assert same(before, work.net.state_dict()) == (name == "linear-probe")


def test_a_training_of_less_than_a_batch_is_measured_with_what_there_is(build, splits, monkeypatch):
    sizes, step, asked = [], loop.TrainLoop.step, []

    def sized(job, inputs, labels):
        sizes.append(len(labels))
        step(job, inputs, labels)

    def lasting(work, wait, *, min_windows=2, **_):
        asked.append(min_windows)
        work()
        return [0.5, 1.0, 2.0]

    monkeypatch.setattr(loop.TrainLoop, "step", sized)
    monkeypatch.setattr(roofline, "time_calls", lasting)
    measured = setup.measure_peaks(build(recipe_of("finetune", "batch_size=64")), splits)
    assert set(sizes) == {20} and asked[0] == roofline.STEP_WINDOWS
    assert (measured.images_per_second, measured.slowest_images_per_second) == (20 / 0.5, 20 / 2.0)


def test_memory_that_does_not_last_for_the_ceilings_is_told_as_such(build, splits, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(roofline, "memory_bytes_per_second", fail)
    work = build(recipe_of("finetune"))
    with pytest.raises(OutOfMemoryError), work.job.backend.memory_errors():
        setup.measure_peaks(work, splits)


# --- odds and ends


def test_the_split_to_validate_on_is_the_one_that_is_not_trained_on(splits):
    assert setup.val_split(splits) is splits["validation"]
    assert setup.val_split({"train": splits["train"], "test": splits["validation"]}) is splits["validation"]


def test_the_first_samples_are_one_batch_on_the_device(splits):
    images, labels = setup.first(splits["train"], 7, Cpu())
    assert torch.equal(images, splits["train"].inputs[:7]) and labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
