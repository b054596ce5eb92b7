"""Everything that a training needs on its device: model, loop, batches, memory, and the roofline of its own step."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import config, devices
from pipeline.data import batching, datasets
from pipeline.devices import Backend
from pipeline.devices.base import WITHOUT_GRAPHS
from pipeline.errors import OutOfMemoryError, StageError
from pipeline.models import classifier, folding
from pipeline.profiling import roofline
from pipeline.profiling.clock import Clock
from pipeline.training import loop, optimizers

Splits = dict[str, batching.Split]
"""By name: `train`, and the one to validate on."""

TOTAL = ("upload", "features", "train", "validate")
"""The clock's spans that make `time/total_seconds`."""

FREE_SHARE = 0.9
"""How much of the device's free memory the images may take; fragmentation and other programs need the rest."""

THREADS = torch.get_num_threads()
"""torch's own choice, before any recipe sets another number."""

LARGEST_BATCH = 2**20
"""The largest `batch_size` that the settings allow."""


class TrainingSetup:
    """A recipe's model on its device, and the loop that trains it, or that trains its head on features."""

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
        """Build the model with random numbers from `seed`. Raises UsageError where a setting fits neither the model nor
        the device."""
        train = splits["train"]
        self.recipe = recipe
        self._classes, self._weights, self._backend, self._clock = classes, weights, backend, clock
        self._images = len(train)
        auto = recipe.channels_last == "auto"
        self.channels_last = backend.channels_last(recipe.precision) if auto else bool(recipe.channels_last)
        net = self._new_model(seed)
        self.net = net.to(backend.device).to(memory_format=memory_format(self.channels_last))
        few = first_batch(train, min(2, len(train)), backend)[0]
        example = batching.prepare(few, recipe.image_size, channels_last=self.channels_last)
        self.on_features = classifier.caches_features(self.net, recipe, example)
        """Whether the head alone is trained, on features that are computed once."""
        passes = 1 if self.on_features else recipe.epochs
        images = len(train) + len(val_split(splits))
        self.compile_mode = backend.compile_mode(recipe.compile, images * passes)
        self.use_cuda_graph = backend.use_cuda_graph(recipe.graph, self.compile_mode)

        prepare = make_prepare(train, recipe.image_size, backend, channels_last=self.channels_last)
        self._prepare = self._compiled(prepare, WITHOUT_GRAPHS.get(self.compile_mode, self.compile_mode))
        self._network = self.net.head if self.on_features else self._compiled(self.net, self.compile_mode)
        self._backbone: Callable[[Tensor], Tensor] = self.net.features
        self._fold_again: Callable[[], None] = lambda: None
        if self.on_features:
            folded, self._fold_again = folding.fold_batch_norm(self.net, example)
            self._backbone = self._compiled(folded, self.compile_mode)
        self.feature_step = self._make_feature_step(self._prepare, self.use_cuda_graph)
        """Computes the head's input, (B, D) float32, for a batch of uint8 images; it is valid until the next call."""
        self.loop = self._make_loop(loop.unchanged if self.on_features else self._prepare, self.use_cuda_graph)

    def make_step(self, *, raw: bool, use_cuda_graph: bool) -> Callable[[Tensor, Tensor], object]:
        """Another step of the same work, with an optimizer of its own, or another pass that computes features. It takes
        a batch and its labels; `raw`: of uint8 images, else of prepared ones."""
        prepare = self._prepare if raw else loop.unchanged
        if not self.on_features:
            return self._make_loop(prepare, use_cuda_graph).step
        feature_step = self._make_feature_step(prepare, use_cuda_graph)
        return lambda images, _: feature_step(images)

    def set_step_mode(self) -> None:
        """Put the model into the mode in which `make_step`'s steps run."""
        self.net.eval() if self.on_features else self.loop.set_train_mode()

    def restart(self, seed: int) -> None:
        """Reset model, optimizer, schedule and random numbers for a training with `seed`, in place: what was compiled
        or captured stays valid."""
        self.net.load_state_dict(self._new_model(seed).state_dict())
        self._fold_again()
        self.loop.restart()
        torch.manual_seed(seed)  # what dropout draws must not depend on how the model was built

    def compute_features(self, split: batching.Split, progress: loop.Progress = loop.silent) -> batching.Split:
        """The head's input for each image of `split`, on the device of `split`."""
        self.net.eval()
        batches = batching.batches(split, self.recipe.batch_size, self._backend)
        return loop.compute_features(self.feature_step, split, batches, progress)

    def train_batches(self, split: batching.Split, seed: int, epoch: int) -> loop.Batches:
        """The batches of a training epoch."""
        return batching.shuffled_batches(
            split, self.recipe.batch_size, self._backend, seed, epoch, flip=self.recipe.flip
        )

    def val_batches(self, split: batching.Split) -> loop.Batches:
        """The batches of a validation."""
        return batching.batches(split, self.recipe.batch_size, self._backend)

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
        steps_per_epoch = math.ceil(self._images / self.recipe.batch_size)
        return optimizers.build(self.recipe, params, steps_per_epoch, self._backend.optimizer_options)

    def _make_feature_step(self, prepare: loop.Prepare, use_cuda_graph: bool) -> Callable[[Tensor], Tensor]:
        return loop.make_feature_step(
            self._backbone, prepare, self._backend, self.recipe.precision, use_cuda_graph=use_cuda_graph
        )

    @staticmethod
    def _compiled(function: Any, mode: str) -> Any:
        return function if mode == "off" else torch.compile(function, mode=mode, dynamic=False)


def device_for(device: str, recipe: config.Recipe) -> Backend:
    """The backend for a value of `device`, tuned, and set to the recipe's precision and CPU threads. Raises UsageError
    where it is not there or can't do them."""
    backend = devices.select(device)
    backend.tune()
    backend.set_precision(recipe.precision)
    torch.set_num_threads(recipe.threads or THREADS)  # one process may run stages with several recipes
    return backend


def decode_splits(settings: config.Settings, resolved: dict[str, Any]) -> Splits:
    """All images to train and validate on, in host memory, by their split in the source that `datasets.resolve`
    found."""
    recipe = settings.work
    return {
        split: batching.as_split(*datasets.decode(settings.data, resolved, split, recipe.image_size))
        for split in (("train", "test") if recipe.validation == "test" else ("train",))
    }


def hold_out(images: Splits, settings: config.Settings) -> Splits:
    """The images to train and to validate on, from those of `decode_splits`; a validation split is drawn by the
    seed."""
    if settings.work.validation == "test":
        return images
    train, validation = batching.stratified_split(images["train"].labels.numpy(), settings.seed)
    return {"train": images["train"].take(train), "validation": images["train"].take(validation)}


def warm_up(training: TrainingSetup, splits: Splits) -> float:
    """Run every batch shape once, so that autotuning, compilation and graph capture are not timed. Call `restart`
    afterwards.

    Returns the bytes of device memory that another such run takes at its peak; 0 on a CPU, where the memory is not the
    training's alone.
    """
    backend = training.loop.backend
    try:
        _warm_up_once(training, splits)
        if not backend.asynchronous:
            return 0.0
        backend.release_memory()  # kernels that were tried may have taken far more than those that were chosen
        backend.reset_peak_memory()
        _warm_up_once(training, splits)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise StageError(f'compile: "{training.compile_mode}" fails here ({reason}): set compile to off') from error
    return backend.memory_mib().get("peak", 0.0) * 2**20


def _warm_up_once(training: TrainingSetup, splits: Splits) -> None:
    train, backend = splits["train"], training.loop.backend
    batches = [batch for few in _batch_shapes(training, train) for batch in training.train_batches(few, 0, 0)]
    if backend.asynchronous or training.use_cuda_graph or training.compile_mode != "off":
        val_batches = [(few.inputs, few.labels) for few in _batch_shapes(training, val_split(splits))]
    else:  # an eager CPU does nothing once per shape
        val_batches = batches[:1]
    batching.epoch_permutation(len(train), backend, seed=0, epoch=0)  # sorting so many has kernels of its own
    loop.warm_up(training.loop, batches, val_batches)


def _batch_shapes(training: TrainingSetup, split: batching.Split) -> Iterator[batching.Split]:
    """For each batch size of `split`, its first samples on the device."""
    for size in batch_sizes(split, training.recipe.batch_size):
        few = split.take(np.arange(size))
        if training.on_features:
            few = training.compute_features(few)
        yield batching.Split(*first_batch(few, size, training.loop.backend))


def fixed_step(training: TrainingSetup, splits: Splits) -> tuple[Callable[[], object], int]:
    """A function that runs the training step, or the pass that computes features, on one prepared batch on the device;
    and that batch's size. The model learns from it."""
    size = min(training.recipe.batch_size, len(splits["train"]))
    images, labels = first_batch(splits["train"], size, training.loop.backend)
    prepared = batching.prepare(images, training.recipe.image_size, channels_last=training.channels_last)
    step = training.make_step(raw=False, use_cuda_graph=training.use_cuda_graph)
    training.set_step_mode()
    return lambda: step(prepared, labels), size


def measure_peaks(training: TrainingSetup, splits: Splits) -> roofline.Peaks:
    """This machine's limits for this work. The model learns from it: call `restart` afterwards."""
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
    """Floating-point operations for one image in a training step, or in computing its features."""
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
    """The splits where they are trained from, and that place: `device` if they fit beside the `step_bytes` of a step,
    else `host`. `device_gib` limits how much of the device they may take."""
    backend = training.loop.backend
    free = backend.free_bytes()
    room = math.inf if free is None else FREE_SHARE * free - step_bytes
    if device_gib is not None:
        room = min(room, device_gib * 2**30)
    if sum(split.nbytes for split in splits.values()) > room:
        return dict(splits), "host"  # a copy: the caller may replace images by features
    return {name: split.to(backend.device) for name, split in splits.items()}, "device"


def largest_batch(training: TrainingSetup, image_shape: tuple[int, ...], *, below: int | None = None) -> int | None:
    """The largest power of two whose step fits the device's memory, found by taking steps; None where none fits.

    Searches downwards from below `below`, or upwards from 2; not for a single image, since BatchNorm refuses one whose
    maps are a pixel. Images are (N, *image_shape) uint8. The model learns from the steps. A batch that takes more than
    the device's capacity, where the system would swap, does not fit; one that would need half as much again is not
    tried. Upwards, a device of unknown capacity is not searched: None.
    """
    backend = training.loop.backend
    capacity = backend.capacity_mib()
    if capacity is None:
        if below is None:
            return None
        capacity = math.inf
    largest, size = None, 2 if below is None else 2 ** (math.ceil(math.log2(below)) - 1)
    while size >= 2:
        backend.reset_peak_memory()
        done = _step_fits(training, size, image_shape)
        peak = backend.memory_mib().get("peak", 0.0)
        fits = done and peak <= capacity
        if below is not None:
            if fits:
                return size
            size //= 2
        elif not fits or 2 * peak > 1.5 * capacity or size == LARGEST_BATCH:
            return size if fits else largest
        else:
            largest, size = size, 2 * size
    return None


def _step_fits(training: TrainingSetup, size: int, image_shape: tuple[int, ...]) -> bool:
    """Whether a step of `size` images ends without running out of memory."""
    backend = training.loop.backend
    training.set_step_mode()
    backend.tune(repeated=False)
    try:
        with backend.memory_errors():
            images = torch.zeros((size, *image_shape), dtype=torch.uint8, device=backend.device)
            labels = torch.zeros(size, dtype=torch.int64, device=backend.device)
            step = training.make_step(raw=True, use_cuda_graph=False)
            for _ in range(2):  # the first step allocates the optimizer's state
                step(images, labels)
            backend.synchronize()
    except OutOfMemoryError:
        return False
    finally:
        backend.tune()
        backend.release_memory()
    return True


def saved_bytes_per_image(training: TrainingSetup, images: batching.Split) -> float:
    """Bytes that a step saves per image for its backward pass, from steps on two and on four of `images`. The model
    learns from them."""
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
    """The first `size` samples as one batch on the device."""
    (batch,) = batching.batches(split.take(np.arange(size)), size, backend)
    return batch


def val_split(splits: Splits) -> batching.Split:
    """The split to validate on."""
    return next(split for name, split in splits.items() if name != "train")


def memory_format(channels_last: bool) -> torch.memory_format:
    """torch's name for the layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


def batch_sizes(split: batching.Split, batch_size: int) -> list[int]:
    """The sizes of the split's batches, in rising order."""
    return sorted({min(batch_size, len(split)), len(split) % batch_size} - {0})


def make_prepare(images: batching.Split, image_size: int, backend: Backend, *, channels_last: bool) -> loop.Prepare:
    """A function that turns a batch of `images` into the network's input (`batching.prepare`)."""
    height, width, _ = images.inputs.shape[1:]
    enlarge = batching.resize_weights(height, width, image_size, backend.device)

    def prepare(batch: Tensor) -> Tensor:
        return batching.prepare(batch, image_size, enlarge, channels_last=channels_last)

    return prepare
