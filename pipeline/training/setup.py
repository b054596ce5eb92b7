"""Prepare a training on its device: model, loop, splits, warm-up, memory, and the peak speed of its step."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import config, devices, terminal
from pipeline.data import batching, datasets
from pipeline.devices import Backend
from pipeline.devices.base import WITHOUT_GRAPHS
from pipeline.errors import OutOfMemoryError, StageError, UsageError
from pipeline.models import classifier, folding
from pipeline.profiling import roofline
from pipeline.profiling.clock import Clock
from pipeline.startup import first_line
from pipeline.training import loop, optimizers

Splits = dict[str, batching.Split]
"""Split by name: `train`, and `validation` or `test` to validate on."""

TOTAL_SPANS = ("upload", "features", "train", "validate")
"""The spans of the clock that `time/total_seconds` adds up."""

FREE_SHARE = 0.9
"""Share of the device's free memory that images may take. Fragmentation and other programs need the rest."""

DEFAULT_THREADS = torch.get_num_threads()
"""The number of CPU threads that torch chooses, before any recipe sets another."""

TUNING_SECONDS = 20.0
"""How long libraries may time their kernels in a warm-up. cuDNN builds each kernel that fits a shape, which takes over
a minute for networks of many depthwise convolutions."""

TUNING_STOPPED = f"autotuning was stopped after {TUNING_SECONDS:.0f} s: the other kernels were chosen by rule"

MIN_BATCH, LARGEST_BATCH = 2, 2**20
"""The batch sizes to search. BatchNorm may reject a single image; the settings allow no more than the largest."""


class TrainingSetup:
    """A recipe's model on its device, and the loop that trains the model, or only its head on cached features."""

    def __init__(
        self,
        recipe: config.Recipe,
        seed: int,
        classes: int,
        weights: Path | None,
        splits: Splits,
        backend: Backend,
        clock: Clock,
    ):
        """Build the model with random numbers from `seed`. Raises UsageError if a setting does not fit the model or the
        device."""
        train = splits["train"]
        self.recipe = recipe
        self._classes, self._weights, self._backend, self._clock = classes, weights, backend, clock
        self._train_images = len(train)
        self.tuning_stopped = False
        """Whether autotuning took more than TUNING_SECONDS."""
        net = self._new_model(seed)
        self.channels_last = (
            backend.channels_last(recipe.precision) and backend.supports_channels_last(net)
            if recipe.channels_last == "auto"
            else recipe.channels_last
        )
        self._initial = {seed: {name: tensor.to("cpu", copy=True) for name, tensor in net.state_dict().items()}}
        self.net = net.to(backend.device).to(memory_format=memory_format(self.channels_last))
        images, _ = first_batch(train, min(2, len(train)), backend)
        example = batching.prepare(images, recipe.image_size, channels_last=self.channels_last)
        self.on_features = classifier.caches_features(self.net, recipe, example)
        """Whether only the head is trained, on features that are computed once."""
        trained = self.net.head if self.on_features else self.net
        self.trains_batch_norm = classifier.trains_batch_norm(trained, recipe)
        """Whether BatchNorm uses the statistics of the batch. A last batch of one image then joins the one before."""
        if self.trains_batch_norm and min(recipe.batch_size, len(train)) == 1:
            self._check_single_image(example[:1])
            self.net.load_state_dict(self._initial[seed])
        passes = 1 if self.on_features else recipe.epochs
        images_per_pass = len(train) + len(val_split(splits))
        self.compile_mode = backend.compile_mode(recipe.compile, images_per_pass * passes)
        self.use_cuda_graph = backend.use_cuda_graph(recipe.graph, self.compile_mode)

        prepare = make_prepare(train, recipe.image_size, backend, channels_last=self.channels_last)
        self._prepare = _compiled(prepare, WITHOUT_GRAPHS.get(self.compile_mode, self.compile_mode))
        self._network = self.net.head if self.on_features else _compiled(self.net, self.compile_mode)
        self._backbone: Callable[[Tensor], Tensor] = self.net.features
        self._refold: Callable[[], None] = lambda: None
        if self.on_features:
            folded, self._refold = folding.fold_batch_norm(self.net, example)
            self._backbone = _compiled(folded, self.compile_mode)
        self.feature_step = self._make_feature_step(self._prepare, self.use_cuda_graph)
        """Computes the head's input, (B, D) float32, for uint8 images (B, H, W, 3), valid until the next call."""
        self.loop = self._make_loop(loop.unchanged if self.on_features else self._prepare, self.use_cuda_graph)

    def make_step(self, *, raw: bool, use_cuda_graph: bool) -> Callable[[Tensor, Tensor], object]:
        """Make another training step with a new optimizer, or another feature pass if `on_features`. The step takes
        images and labels; the images are uint8 if `raw`, else already prepared."""
        prepare = self._prepare if raw else loop.unchanged
        if not self.on_features:
            return self._make_loop(prepare, use_cuda_graph).step
        feature_step = self._make_feature_step(prepare, use_cuda_graph)
        return lambda images, _: feature_step(images)

    def set_step_mode(self) -> None:
        """Set the model to evaluation mode for a feature pass, else to training mode."""
        self.net.eval() if self.on_features else self.loop.set_train_mode()

    def restart(self, seed: int) -> None:
        """Reset model, optimizer, schedule and random numbers for a training with `seed`. The memory stays the same, so
        that compiled functions and captured graphs stay valid."""
        state = self._initial.pop(seed, None)  # once, then its memory is free again
        self.net.load_state_dict(self._new_model(seed).state_dict() if state is None else state)
        self._refold()
        self.loop.restart()
        torch.manual_seed(seed)  # dropout must not depend on how many numbers the model drew
        np.random.seed(seed % 2**32)  # some optimizers draw numbers there

    def compute_features(self, split: batching.Split, progress: loop.Progress = loop.silent) -> batching.Split:
        """Compute the head's input for each image of `split`, on the device of `split`."""
        self.net.eval()
        batches = batching.batches(split, self.recipe.batch_size, self._backend)
        return loop.compute_features(self.feature_step, split, batches, progress)

    def train_batches(self, split: batching.Split, seed: int, epoch: int) -> loop.Batches:
        """The batches of training epoch `epoch`, counted from 1."""
        return batching.shuffled_batches(
            split,
            self.recipe.batch_size,
            self._backend,
            seed,
            epoch,
            flip=self.recipe.flip,
            join_single=self.trains_batch_norm,
        )

    def val_batches(self, split: batching.Split) -> loop.Batches:
        """The batches of `split` in their order, for validation."""
        return batching.batches(split, self.recipe.batch_size, self._backend)

    @torch.no_grad()
    def _check_single_image(self, image: Tensor) -> None:
        """Raise UsageError if BatchNorm can't be trained on the batch `image`, (1, 3, H, W). It may move statistics."""
        classifier.set_train_mode(self.net, self.recipe.frozen_batch_norm)
        try:
            self.net(image)
        except ValueError:
            raise UsageError(
                f"batch_size: {self.recipe.batch_size} of {self._train_images} training images leaves BatchNorm, which "
                "is trained here, with one value: expected at least 2 of both"
            ) from None

    def _new_model(self, seed: int) -> classifier.Classifier:
        torch.manual_seed(seed)
        return classifier.build(self.recipe, self._classes, self._weights)

    def _make_loop(self, prepare: loop.Prepare, use_cuda_graph: bool) -> loop.TrainLoop:
        recipe = self.recipe
        return loop.TrainLoop(
            self._network,
            self._make_optimizer,
            self._backend,
            self._clock,
            loop.LoopOptions(
                epochs=recipe.epochs,
                precision=recipe.precision,
                schedule_per_batch=recipe.scheduler_step == "batch",
                on_features=self.on_features,
                use_cuda_graph=use_cuda_graph,
            ),
            prepare=prepare,
            set_train_mode=lambda: classifier.set_train_mode(self.net, recipe.frozen_batch_norm),
        )

    def _make_optimizer(self) -> loop.Schedule:
        params = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        steps_per_epoch = len(
            batching.bounds(self._train_images, self.recipe.batch_size, join_single=self.trains_batch_norm)
        )
        return optimizers.build(self.recipe, params, steps_per_epoch, self._backend.optimizer_options)

    def _make_feature_step(self, prepare: loop.Prepare, use_cuda_graph: bool) -> Callable[[Tensor], Tensor]:
        return loop.make_feature_step(
            self._backbone, prepare, self._backend, self.recipe.precision, use_cuda_graph=use_cuda_graph
        )


def check(device: str, recipe: config.Recipe) -> None:
    """Check all that can be checked without data: device, precision, compile mode, graph, model, optimizer, schedule.
    Raises UsageError. Call it before data is downloaded or loaded."""
    devices.select(device).check(precision=recipe.precision, compile_mode=recipe.compile, graph=recipe.graph)
    classifier.check_name(recipe.model)
    optimizers.check(recipe)


def configure_backend(device: str, recipe: config.Recipe) -> Backend:
    """Select the backend for the setting `device`, tune it, and set the recipe's precision and CPU threads.

    Raises UsageError if the device is missing or does not support the precision.
    """
    backend = devices.select(device)
    backend.tune()
    backend.set_precision(recipe.precision)
    torch.set_num_threads(recipe.threads or DEFAULT_THREADS)  # one process may run stages with several recipes
    return backend


def decode_splits(settings: config.Settings, resolved: dict[str, Any]) -> Splits:
    """Load the images to train and validate on into host memory: `train`, and `test` if it is the validation split.

    `resolved` is the result of `datasets.resolve`.
    """
    recipe = settings.work
    names = ("train", "test") if recipe.validation == "test" else ("train",)
    return {
        name: batching.as_split(*datasets.decode(settings.data, resolved, name, recipe.image_size)) for name in names
    }


def hold_out(images: Splits, settings: config.Settings) -> Splits:
    """The splits to train and to validate on. `images` is the result of `decode_splits`; if it has no `test`, hold out
    a validation split, chosen by the seed."""
    if settings.work.validation == "test":
        return images
    train, validation = batching.stratified_split(images["train"].labels.numpy(), settings.seed)
    return {"train": images["train"].take(train), "validation": images["train"].take(validation)}


def warm_up(training: TrainingSetup, splits: Splits) -> float:
    """Run every batch shape once, so that autotuning, compilation and graph capture are not timed.

    Returns the peak of device memory in a second run, in bytes; 0 on a CPU, whose peak includes the whole process. The
    model learns from these steps: call `restart` afterwards.
    """
    backend = training.loop.backend
    try:
        # Whoever compiles expects a long setup, of which autotuning is a small part.
        with limited_tuning(backend, TUNING_SECONDS if training.compile_mode == "off" else None) as stopped:
            _warm_up_once(training, splits)
        training.tuning_stopped = stopped.is_set()
        if not backend.asynchronous:
            return 0.0
        backend.release_memory()  # autotuning tries kernels that need far more memory than the chosen ones
        backend.reset_peak_memory()
        _warm_up_once(training, splits)
    except (torch._dynamo.exc.TorchDynamoException, OSError) as error:  # OSError: its cache can't be used
        if training.compile_mode == "off":
            raise
        reason = first_line(error)
        raise StageError(f'compile: "{training.compile_mode}" fails here ({reason}): set compile to off') from error
    return backend.memory_mib().get("peak", 0.0) * 2**20


@contextmanager
def limited_tuning(backend: Backend, seconds: float | None = TUNING_SECONDS) -> Iterator[threading.Event]:
    """Stop the backend's autotuning after `seconds`, even in the middle of a step. None: don't stop it.

    Yields an event that is set if it was stopped.
    """
    stopped = threading.Event()

    def stop() -> None:
        backend.tune(repeated=False)
        stopped.set()

    if not backend.autotunes or seconds is None:
        yield stopped
        return
    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        yield stopped
    finally:
        timer.cancel()
    if stopped.is_set():
        terminal.say(f"note     {TUNING_STOPPED}")


def _warm_up_once(training: TrainingSetup, splits: Splits) -> None:
    train, backend = splits["train"], training.loop.backend
    one_batch_splits = _one_batch_splits(training, train, join_single=training.trains_batch_norm)
    batches = [batch for split in one_batch_splits for batch in training.train_batches(split, 0, 0)]
    if backend.asynchronous or training.use_cuda_graph or training.compile_mode != "off":
        val_batches = [(split.inputs, split.labels) for split in _one_batch_splits(training, val_split(splits))]
    else:  # on a CPU, eager evaluation has nothing to prepare for each shape
        val_batches = batches[-1:]
    batching.epoch_permutation(len(train), backend, seed=0, epoch=0)  # a sort of this length has its own kernels
    loop.warm_up(training.loop, batches, val_batches)


def _one_batch_splits(
    training: TrainingSetup, split: batching.Split, *, join_single: bool = False
) -> Iterator[batching.Split]:
    """For each batch size of `split`: a split on the device that holds the first samples, one batch of them."""
    for size in batch_sizes(split, training.recipe.batch_size, join_single=join_single):
        samples = split.take(np.arange(size))
        if training.on_features:
            samples = training.compute_features(samples)
        yield batching.Split(*first_batch(samples, size, training.loop.backend))


def fixed_step(training: TrainingSetup, splits: Splits) -> tuple[Callable[[], object], int]:
    """Returns a function that runs the training step, or the feature pass, on one prepared batch, and the size of this
    batch. The model learns from the step."""
    size = min(training.recipe.batch_size, len(splits["train"]))
    images, labels = first_batch(splits["train"], size, training.loop.backend)
    prepared = batching.prepare(images, training.recipe.image_size, channels_last=training.channels_last)
    step = training.make_step(raw=False, use_cuda_graph=training.use_cuda_graph)
    training.set_step_mode()
    return lambda: step(prepared, labels), size


def measure_peaks(training: TrainingSetup, splits: Splits) -> roofline.Peaks:
    """Measure the peak rates of this machine for this training. The model learns: call `restart` afterwards."""
    backend = training.loop.backend
    step, size = fixed_step(training, splits)
    seconds = roofline.time_calls(
        step, backend.synchronize, seconds=roofline.STEP_SECONDS, min_windows=roofline.STEP_WINDOWS
    )
    peaks = roofline.Peaks(
        images_per_second=size / min(seconds),
        matmul_flops=roofline.matmul_flops(backend, training.recipe.precision),
        memory_bytes_per_second=roofline.memory_bytes_per_second(backend),
    )
    backend.release_memory()
    return peaks


def flops_per_image(training: TrainingSetup) -> float | None:
    """Floating-point operations per image in a training step, or in the feature pass. None if they can't be counted."""
    recipe = training.recipe
    shape = (3, recipe.image_size, recipe.image_size)
    if training.on_features:
        return roofline.forward_flops(classifier.Features(training.net), shape)
    return roofline.train_flops(
        training.net, shape, set_mode=lambda net: classifier.set_train_mode(net, recipe.frozen_batch_norm)
    )


def place_splits(
    training: TrainingSetup, splits: Splits, step_bytes: float, device_gib: float | None
) -> tuple[Splits, str]:
    """Copy the splits to the device if they fit beside the `step_bytes` of a step.

    Returns the splits and where they are: `device` or `host`. `device_gib` limits the device memory that they may take.
    """
    backend = training.loop.backend
    free = backend.free_bytes()
    available = math.inf if free is None else FREE_SHARE * free - step_bytes
    if device_gib is not None:
        available = min(available, device_gib * 2**30)
    if sum(split.nbytes for split in splits.values()) > available:
        return dict(splits), "host"  # a copy, since the caller may replace images by features
    return {name: split.to(backend.device) for name, split in splits.items()}, "device"


def largest_batch(training: TrainingSetup, image_shape: tuple[int, ...]) -> int | None:
    """The largest power of two whose training step fits the device's memory. Tries steps from 2 images upwards.

    Returns None if not even 2 images fit, or if the device's capacity is unknown. Images are (N, *image_shape) uint8. A
    batch size that would probably need more than 1.5 times the capacity is not tried. The model learns from the steps.
    """
    capacity = training.loop.backend.capacity_mib()
    if capacity is None:
        return None
    largest, size = None, MIN_BATCH
    while size <= LARGEST_BATCH:
        peak = _step_peak_mib(training, size, image_shape)
        if peak is None or peak > capacity:
            break
        largest = size
        if 2 * peak > 1.5 * capacity:
            break
        size *= 2
    return largest


def largest_batch_below(training: TrainingSetup, image_shape: tuple[int, ...], limit: int) -> int | None:
    """The largest power of two below `limit` whose training step fits the device's memory; None if none fits.

    Tries steps downwards. Images are (N, *image_shape) uint8. The model learns from the steps.
    """
    capacity = training.loop.backend.capacity_mib() or math.inf
    size: int = 2 ** (math.ceil(math.log2(limit)) - 1)
    while size >= MIN_BATCH:
        peak = _step_peak_mib(training, size, image_shape)
        if peak is not None and peak <= capacity:
            return size
        size //= 2
    return None


def _step_peak_mib(training: TrainingSetup, size: int, image_shape: tuple[int, ...]) -> float | None:
    """The peak memory of a step on `size` images, in MiB; None if it runs out of memory.

    The peak may exceed the device's capacity: the system then swaps. It is 0 if the backend does not know it.
    """
    backend = training.loop.backend
    training.set_step_mode()
    backend.reset_peak_memory()
    backend.tune(repeated=False)
    try:
        with backend.memory_errors():
            images = torch.zeros((size, *image_shape), dtype=torch.uint8, device=backend.device)
            labels = torch.zeros(size, dtype=torch.int64, device=backend.device)
            step = training.make_step(raw=True, use_cuda_graph=False)
            for _ in range(2):  # the first step allocates the optimizer's state
                step(images, labels)
            backend.synchronize()
        return backend.memory_mib().get("peak", 0.0)
    except OutOfMemoryError:
        return None
    finally:
        backend.tune()
        backend.release_memory()


def saved_bytes_per_image(training: TrainingSetup, images: batching.Split) -> float:
    """Bytes per image that a step saves for its backward pass: the difference between steps on 2 and on 4 of `images`.
    The model learns from the steps."""
    step = training.make_step(raw=True, use_cuda_graph=False)

    def saved_bytes(size: int) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(*first_batch(images, size, training.loop.backend))
        return sum(storages.values())

    return (saved_bytes(4) - saved_bytes(2)) / 2


def first_batch(split: batching.Split, size: int, backend: Backend) -> tuple[Tensor, Tensor]:
    """The first `size` samples of `split` as one batch on the device."""
    (batch,) = batching.batches(split.take(np.arange(size)), size, backend)
    return batch


def val_split(splits: Splits) -> batching.Split:
    """The split to validate on."""
    return next(split for name, split in splits.items() if name != "train")


def _compiled(function: Any, mode: str) -> Any:
    return function if mode == "off" else torch.compile(function, mode=mode, dynamic=False)


def memory_format(channels_last: bool) -> torch.memory_format:
    """torch's memory format."""
    return torch.channels_last if channels_last else torch.contiguous_format


def batch_sizes(split: batching.Split, batch_size: int, *, join_single: bool = False) -> list[int]:
    """The different sizes of the split's batches, descending (see `batching.bounds`)."""
    bounds = batching.bounds(len(split), batch_size, join_single=join_single)
    return sorted({stop - start for start, stop in bounds}, reverse=True)


def make_prepare(images: batching.Split, image_size: int, backend: Backend, *, channels_last: bool) -> loop.Prepare:
    """Make a function that turns a batch of `images` into the network's input by `batching.prepare`."""
    height, width, _ = images.inputs.shape[1:]
    weights = batching.resize_weights(height, width, image_size, backend.device)

    def prepare(batch: Tensor) -> Tensor:
        return batching.prepare(batch, image_size, weights, channels_last=channels_last)

    return prepare
