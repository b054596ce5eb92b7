"""A training's setup: the same model after all that comes before it, the memory, and the roofline."""

import threading
from types import MethodType

import pytest
import timm
import torch
from conftest import fails
from loops import images_of, make_setup, recipe_of, without_times
from standin import Capturing
from trainings import threads  # noqa: F401 (one is enough)

from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.errors import StageError, UsageError
from pipeline.models import classifier
from pipeline.profiling import roofline
from pipeline.training import loop, setup

PIXELS = 16 * 16 * 3


@pytest.fixture
def splits():
    return {"train": images_of(20, 1), "validation": images_of(11, 2)}


@pytest.fixture
def build(splits):
    return lambda recipe, backend=None, seed=0: make_setup(recipe, splits, backend=backend, seed=seed)


def train(training, splits):
    """Trains; the figures of the epochs that do not tell the time, and the model's state."""
    samples = dict(splits)
    if training.on_features:
        samples = {name: training.compute_features(split) for name, split in splits.items()}
    rows = loop.train(
        training.loop,
        lambda epoch: training.train_batches(samples["train"], 0, epoch),
        lambda: training.val_batches(setup.val_split(samples)),
    )
    return without_times(rows), state_of(training)


def state_of(training):
    return {name: tensor.clone() for name, tensor in training.net.state_dict().items()}


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


@pytest.mark.parametrize("chosen", WORKS, ids=" ".join)
def test_a_model_that_was_warmed_up_and_measured_trains_as_if_it_never_had_been(build, splits, chosen):
    recipe = recipe_of(*chosen)
    cold, warm = build(recipe), build(recipe)
    begun = state_of(warm)
    assert same(begun, cold.net.state_dict())
    setup.warm_up(warm, splits)
    setup.measure_peaks(warm, splits)
    assert not same(begun, warm.net.state_dict())  # else nothing is tested here
    warm.restart(0)
    assert same(begun, warm.net.state_dict())
    expected, state = train(cold, splits)
    figures, warmed = train(warm, splits)
    assert figures == expected and same(warmed, state) and not same(begun, state)


@pytest.mark.parametrize("backend", [Cpu, Capturing])
@pytest.mark.parametrize("chosen", [WORKS[0], WORKS[2]], ids=" ".join)
def test_a_restart_with_another_seed_is_a_setup_built_with_it(build, splits, chosen, backend):
    recipe = recipe_of(*chosen, "batch_size=6")
    trainings = [build(recipe, backend(), seed=seed) for seed in (0, 1)]
    for training, seed in zip(trainings, (0, 1), strict=True):
        setup.warm_up(training, splits)
        training.restart(seed)
    used, fresh = trainings
    memory = [tensor.data_ptr() for tensor in used.net.state_dict().values()]
    captured = list(getattr(used.loop.backend, "captured", []))
    first, _ = train(used, splits)
    times = used.loop.times
    used.restart(1)
    assert used.loop.times is not times
    assert [tensor.data_ptr() for tensor in used.net.state_dict().values()] == memory  # where a graph reads it
    expected, state = train(fresh, splits)
    second, again = train(used, splits)
    assert second == expected != first and same(again, state)
    # A capture takes time, so the training adds none to those of the warm-up.
    assert bool(captured) == used.use_cuda_graph == (backend is Capturing)
    assert getattr(used.loop.backend, "captured", []) == captured


def test_graphs_are_used_where_the_device_has_them_and_the_setting_allows(build):
    for backend in (Cpu, Capturing):
        assert build(recipe_of("finetune"), backend()).use_cuda_graph is backend.supports_graphs
        assert build(recipe_of("finetune", "graph=false"), backend()).use_cuda_graph is False


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [
        (8, ([8, 4], [8, 3])),
        (10, ([10], [10, 1])),
        (64, ([20], [11])),
    ],
)
@pytest.mark.parametrize("name", ["finetune", "linear-probe"])
def test_the_warm_up_runs_each_shape_of_training_and_validation(build, splits, name, batch_size, expected):
    """Of 20 images to train and 11 to validate on."""
    backend = Capturing()
    setup.warm_up(build(recipe_of(name, f"batch_size={batch_size}"), backend), splits)
    shapes = [[size for step, size in backend.captured if step == which] for which in ("_train_step", "eval_step")]
    assert tuple(shapes) == expected


@pytest.mark.parametrize(("asynchronous", "scored", "step_bytes"), [(True, [6, 5, 6, 5], 300 * 2**20), (False, [2], 0)])
def test_a_device_of_its_own_is_warmed_up_twice_for_its_memory(
    build, splits, monkeypatch, asynchronous, scored, step_bytes
):
    """Of 11 images to validate on, six at a time. A CPU scores a batch of what is trained on once."""
    monkeypatch.setattr(Cpu, "asynchronous", asynchronous)
    monkeypatch.setattr(Cpu, "memory_mib", lambda self: {"peak": 300.0})
    training, sizes = build(recipe_of("finetune", "batch_size=6")), []
    training.loop.eval_step = lambda inputs, labels: sizes.append(len(labels))
    assert setup.warm_up(training, splits) == step_bytes
    assert sizes == scored


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch._dynamo.exc.Unsupported("graph break in user code\n  and where it is"), "graph break in user code"),
        (NotADirectoryError(20, "Not a directory", "/a/file/cache"), "/a/file/cache"),
        (PermissionError(), "PermissionError"),
    ],
)
def test_a_model_that_cannot_be_compiled_ends_with_one_line(build, splits, error, reason):
    def fail(*args):
        raise error

    training = build(recipe_of("finetune"))
    training.compile_mode, training.loop.step = "default", fail
    line = fails(StageError, setup.warm_up, training, splits)
    assert line.startswith('compile: "default"') and reason in line and "\n" not in line
    training.compile_mode = "off"
    with pytest.raises(type(error)):
        setup.warm_up(training, splits)


# --- BatchNorm and batches of one image


STEPS = ("_train_step", "_compute_gradients")


def sizes_of(training, split):
    return [len(labels) for _, labels in training.train_batches(split, 0, 1)]


@pytest.mark.parametrize(
    ("name", "sizes", "steps"),
    [
        ("finetune", [8, 9], 2),
        ("blog", [8, 9], 2),  # its BatchNorm is frozen, and its statistics move
        ("linear-probe", [8, 8, 1], 3),  # its BatchNorm is in evaluation mode
    ],
)
def test_a_last_batch_of_one_image_joins_the_one_before_where_batch_norm_is_trained(name, sizes, steps):
    splits = {"train": images_of(17, 1), "validation": images_of(9, 2)}
    options = ["batch_size=8", "scheduler=onecycle", "scheduler_step=batch"]
    training = make_setup(recipe_of(name, *options), splits, backend=Capturing())
    setup.warm_up(training, splits)
    assert sizes_of(training, splits["train"]) == sizes
    assert [len(labels) for _, labels in training.val_batches(splits["validation"])] == [8, 1]
    assert training.loop.scheduler.total_steps == training.recipe.epochs * steps
    captured = {size for step, size in training.loop.backend.captured if step in STEPS}
    assert captured == set(sizes)


def test_a_head_with_batch_norm_of_its_own_gets_no_single_image_either():
    splits = {"train": images_of(17, 1), "validation": images_of(9, 2)}
    options = "batch_size=8", "model=iformer_t", "image_size=32"
    training = make_setup(recipe_of("linear-probe", *options), splits)
    assert training.on_features and training.trains_batch_norm
    assert sizes_of(training, splits["train"]) == [8, 9]
    setup.warm_up(training, splits)
    line = fails(UsageError, make_setup, recipe_of("linear-probe", *options, "batch_size=1"), splits)
    assert line.startswith("batch_size: 1 of 17 training images")


@pytest.mark.parametrize(("batch_size", "count"), [(1, 17), (8, 1)])
def test_a_batch_of_one_image_is_refused_where_batch_norm_cannot_be_trained_on_it(batch_size, count):
    splits = {"train": images_of(count, 1), "validation": images_of(9, 2)}
    recipe = recipe_of("finetune", f"batch_size={batch_size}", "model=resnet18", "image_size=32")
    line = fails(UsageError, make_setup, recipe, splits)
    assert line.startswith(f"batch_size: {batch_size} of {count} training images")
    assert make_setup(recipe_of("linear-probe", f"batch_size={batch_size}"), splits).trains_batch_norm is False


def test_a_batch_of_one_large_image_trains_batch_norm_as_if_nothing_had_been_tried(splits):
    recipe = recipe_of("finetune", "batch_size=1", "image_size=96")
    state = make_setup(recipe, splits).net.state_dict()
    assert same(state, make_setup(recipe_of("finetune", "image_size=96"), splits).net.state_dict())


# --- the memory layout


@pytest.mark.parametrize(
    ("model", "expected"), [("test_resnet", True), ("mobileone_s0", False), ("repvgg_a0", False), ("fastvit_t8", False)]
)
def test_the_cpu_does_not_choose_a_layout_in_which_onednn_breaks(model, expected):
    assert Cpu().supports_channels_last(timm.create_model(model)) is expected


def test_the_layout_is_the_devices_choice_for_the_network_unless_it_is_set(build, monkeypatch):
    chosen = Cpu()
    assert build(recipe_of("finetune"), chosen).channels_last is True
    monkeypatch.setattr(chosen, "supports_channels_last", lambda network: False)
    assert build(recipe_of("finetune"), chosen).channels_last is False
    assert build(recipe_of("finetune", "channels_last=true"), chosen).channels_last is True


class Tuning(Cpu):
    """A device whose every step tunes until somebody stops that, for at most `patience` seconds."""

    def __init__(self, autotunes, patience):
        super().__init__()
        self.autotunes, self.patience, self.stopped = autotunes, patience, threading.Event()

    def tune(self, *, repeated=True):
        if not repeated:
            self.stopped.set()


@pytest.mark.parametrize(
    ("autotunes", "compile_mode", "limit", "stopped"),
    [
        (True, "off", 0.001, True),
        (True, "off", 60.0, False),
        (True, "default", 0.001, False),  # compiling takes longer than that
        (False, "off", 0.001, False),
    ],
)
def test_autotuning_that_takes_too_long_is_stopped_amid_a_step(
    build, splits, monkeypatch, capsys, autotunes, compile_mode, limit, stopped
):
    monkeypatch.setattr(setup, "TUNING_SECONDS", limit)
    backend = Tuning(autotunes, patience=30.0 if stopped else 0.05)
    training = build(recipe_of("finetune"), backend)
    training.compile_mode = compile_mode
    training.loop.step = lambda inputs, labels: backend.stopped.wait(backend.patience)
    setup.warm_up(training, splits)
    assert backend.stopped.is_set() == training.tuning_stopped == stopped
    assert (setup.TUNING_STOPPED in capsys.readouterr().out) == stopped


# --- where the samples lie


BYTES = 31 * PIXELS
"""Of all of `splits`."""


@pytest.mark.parametrize(
    ("free", "step_bytes", "most", "place"),
    [
        (None, 1e12, None, "device"),  # of a device that does not tell
        (None, 0, BYTES / 2**30, "device"),
        (None, 0, (BYTES - 1) / 2**30, "host"),
        (BYTES / 0.9 + 1, 0, None, "device"),
        (BYTES / 0.9 - 1, 0, None, "host"),  # a tenth of what is free is left alone
        ((BYTES + 1000) / 0.9 + 1, 1000, None, "device"),
        ((BYTES + 1000) / 0.9 - 1, 1000, None, "host"),
        (1e12, 0, 0.0, "host"),
        (1000, 0, 1.0, "host"),  # the most there may be is not what there is
    ],
)
def test_samples_lie_on_the_device_where_they_fit_beside_a_step(build, splits, free, step_bytes, most, place):
    training = build(recipe_of("finetune"))
    training.loop.backend.free_bytes = lambda: free
    placed, name = setup.place_splits(training, splits, step_bytes, most)
    assert name == place and placed.keys() == splits.keys()
    for which, split in placed.items():
        assert (split is splits[which]) == (place == "host")
        assert torch.equal(split.inputs, splits[which].inputs)
    placed["train"] = None
    assert splits["train"] is not None  # what is placed may be replaced


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

    def make_step(self, training, *, raw, use_cuda_graph):
        assert raw and not use_cuda_graph

        def step(images, labels):
            size, shape = len(images), tuple(images.shape[1:])
            assert not self.repeated  # nothing is autotuned for a shape that is seen twice
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
        (1000, 32, None, 32, [2, 4, 8, 16, 32, 64]),
        (1000, 1, None, None, [2]),
        (None, 40, None, None, []),  # what has no capacity might never refuse
        # by the capacity: what would need half as much again is not tried
        (32, 2**30, None, 32, [2, 4, 8, 16, 32]),
        (43, 2**30, None, 32, [2, 4, 8, 16, 32, 64]),  # 64 of 1.5 * 43 is tried, and was more than there is
        (42, 2**30, None, 32, [2, 4, 8, 16, 32]),
        (1, 2**30, None, None, [2]),
        (1e9, 2**30, None, 2**20, [2**power for power in range(1, 21)]),  # what `batch_size` takes
        # downwards
        (None, 2**30, 256, 128, [128]),
        (None, 40, 200, 32, [128, 64, 32]),
        (31, 2**30, 129, 16, [128, 64, 32, 16]),
        (None, 1, 16, None, [8, 4, 2]),
        (None, 2**30, 2, None, []),  # nothing is smaller than 2 but a single image
    ],
)
def test_the_largest_batch_is_the_last_that_fits(build, monkeypatch, capacity, refused, below, largest, tried):
    monkeypatch.setattr(torch, "zeros", torch.empty)  # touches no memory, however large
    backend = Sized(capacity, refused)
    training = build(recipe_of("finetune"), backend)
    training.make_step = MethodType(backend.make_step, training)
    if below is None:
        assert setup.largest_batch(training, (16, 16, 3)) == largest
    else:
        assert setup.largest_batch_below(training, (16, 16, 3), below) == largest
    assert backend.tried == tried
    assert backend.released == len(tried) and backend.repeated


@pytest.mark.parametrize("name", ["finetune", "linear-probe"])
def test_the_batches_tried_are_those_of_the_work(build, monkeypatch, name):
    """Of a backend that has no room for 9 images, with real steps."""
    prepare, seen = batching.prepare, []

    def limited(images, *args, **kwargs):
        seen.append(len(images))
        if len(images) > 8:
            raise torch.OutOfMemoryError("no more")
        return prepare(images, *args, **kwargs)

    training = build(recipe_of(name))
    monkeypatch.setattr(batching, "prepare", limited)
    assert setup.largest_batch(training, (16, 16, 3)) == 8
    assert seen == [2, 2, 4, 4, 8, 8, 16]  # twice each: an optimizer has its state after the first


def test_what_a_step_saves_grows_with_its_images_not_with_its_parameters(build, splits):
    narrow = setup.saved_bytes_per_image(build(recipe_of("finetune")), splits["train"])
    wide = setup.saved_bytes_per_image(build(recipe_of("finetune", "image_size=64")), splits["train"])
    # ReLU, BatchNorm and convolutions save maps, whose pixels are four times as many; the pooled features are few.
    assert wide == pytest.approx(4 * narrow, rel=0.01)
    assert narrow > 32 * 32 * 3 * 4


# --- the roofline


def test_what_an_image_takes_is_a_pass_of_the_features_or_a_whole_step(build):
    cached, recomputed, whole = (
        build(recipe_of(*chosen))
        for chosen in [("linear-probe",), ("linear-probe", "features=recompute"), ("finetune",)]
    )
    assert cached.on_features and not recomputed.on_features
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


@pytest.mark.parametrize("backend", [Cpu, Capturing])
@pytest.mark.parametrize("name", ["finetune", "linear-probe"])
def test_the_roofline_is_that_of_the_trainings_own_step_on_one_batch(build, splits, name, backend):
    training, calls = build(recipe_of(name), backend()), []
    setup.warm_up(training, splits)
    make_step = training.make_step

    def watched(*, raw, use_cuda_graph):
        assert not raw and use_cuda_graph == training.use_cuda_graph
        step = make_step(raw=raw, use_cuda_graph=use_cuda_graph)
        return lambda images, labels: calls.append((images, labels)) or step(images, labels)

    training.make_step = watched
    before = state_of(training)
    measured = setup.measure_peaks(training, splits)
    assert all(value > 0 for value in vars(measured).values())
    assert len(calls) == 3 and all(images is calls[0][0] for images, _ in calls)
    assert calls[0][0].shape == (8, 3, 32, 32) and torch.equal(calls[0][1], splits["train"].labels[:8])
    # A step learns; computing features does not.
    assert same(before, training.net.state_dict()) == (name == "linear-probe")


def test_a_training_of_less_than_a_batch_is_measured_with_what_there_is(build, splits, monkeypatch):
    asked = []

    def timed(step, synchronize, *, min_windows=2, **_):
        asked.append(min_windows)
        step()
        return [0.5, 1.0, 2.0]

    monkeypatch.setattr(roofline, "time_calls", timed)
    measured = setup.measure_peaks(build(recipe_of("finetune", "batch_size=64")), splits)
    assert asked[0] == roofline.STEP_WINDOWS
    assert measured.images_per_second == 20 / 0.5


# --- odds and ends


@pytest.mark.parametrize(("given", "expected"), [(2, 2), ("null", 1)])
def test_a_recipe_without_threads_gets_torchs_own_number_whatever_was_set_before(given, expected):
    torch.set_num_threads(3)
    setup.configure_backend("cpu", recipe_of("finetune", f"threads={given}"))
    assert torch.get_num_threads() == expected
