"""What a training needs on its device: model, loop, batches, memory, and this machine's own ceilings for it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
"""Of the memory that is free beside a step's own: the rest is for what fragmentation and other programs take."""

THREADS = torch.get_num_threads()
"""What torch takes by itself, before any recipe sets another number."""

LARGEST_BATCH = 2**20
"""As far as `batch_size` goes."""


class StepFactory(Protocol):
    """See `TrainingSetup.make_step`."""

    def __call__(self, *, raw: bool, recorded: bool) -> Callable[[Tensor, Tensor], object]:
        """A function of a batch and its labels; `raw`: of uint8 images, else of prepared ones."""


@dataclass(frozen=True)
class TrainingSetup:
    """A model on its device and the job that trains it, or its head on features computed before."""

    recipe: config.Recipe
    net: classifier.Classifier
    job: loop.TrainLoop
    features: Callable[[Tensor], Tensor]
    """What the head takes of a batch of uint8 images, (B, D) float32; it stands until the next batch."""
    channels_last: bool
    compile_mode: str
    recorded: bool
    """Whether launches are recorded and replayed (`Backend.captured`)."""
    make_step: StepFactory
    """Makes another step of the same work, or pass that computes features, with an optimizer of its own."""
    reinit_weights: Callable[[int], None]
    """Puts the model, in its own memory, into the state that it has before any step with random numbers from a seed."""


def device_for(device: str, recipe: config.Recipe) -> Backend:
    """The backend for a value of `device`, tuned, and set to the recipe's precision and CPU threads. Raises UsageError
    where it is not there or can't do them."""
    backend = devices.select(device)
    backend.tune()
    backend.set_precision(recipe.precision)
    torch.set_num_threads(recipe.threads or THREADS)  # one process may run stages with several recipes
    return backend


def decoded(settings: config.Settings, found: dict[str, Any]) -> Splits:
    """All images that are trained and validated on, in host memory, by their split in the source, which `found` tells
    of (`sources.resolve`)."""
    recipe = settings.work
    return {
        split: batching.as_split(*datasets.decode(settings.data, found, split, recipe.image_size))
        for split in (("train", "test") if recipe.validation == "test" else ("train",))
    }


def drawn(images: Splits, settings: config.Settings) -> Splits:
    """The `decoded` images to train and to validate on, as the seed draws them."""
    if settings.work.validation == "test":
        return images
    every = images["train"]
    kept, held_out = batching.stratified_split(every.labels.numpy(), settings.seed)
    return {"train": every.take(kept), "validation": every.take(held_out)}


def build(
    recipe: config.Recipe, seed: int, classes: int, weights: Path | None, splits: Splits, backend: Backend, clock: Clock
) -> TrainingSetup:
    """The recipe's model with fresh random numbers from `seed`, and its job. Raises UsageError where a setting does not
    fit the model or the device."""
    train, validated = splits["train"], val_split(splits)

    def fresh(seed: int) -> classifier.Classifier:
        torch.manual_seed(seed)
        return classifier.build(recipe, classes, weights)

    net = fresh(seed)
    auto = recipe.channels_last == "auto"
    channels_last = backend.channels_last(recipe.precision) if auto else bool(recipe.channels_last)
    net = net.to(backend.device).to(memory_format=layout(channels_last))
    few = batching.prepare(first(train, min(2, len(train)), backend)[0], recipe.image_size, channels_last=channels_last)
    cached = classifier.caches_features(net, recipe, few)
    mode = backend.compile_mode(recipe.compile, (len(train) + len(validated)) * (1 if cached else recipe.epochs))
    recorded = backend.recorded(recipe.graph, mode)

    def compiled(function: Any, mode: str = mode) -> Any:
        return function if mode == "off" else torch.compile(function, mode=mode, dynamic=False)

    height, width, _ = train.inputs.shape[1:]
    enlarge = batching.resize_weights(height, width, recipe.image_size, backend.device)

    def prepared(images: Tensor) -> Tensor:
        return batching.prepare(images, recipe.image_size, enlarge, channels_last=channels_last)

    ready = compiled(prepared, WITHOUT_GRAPHS.get(mode, mode))
    folded, fold_again = folding.fold_batch_norm(net, few) if cached else (net.features, lambda: None)
    frozen = compiled(folded) if cached else folded
    network = net.head if cached else compiled(net)

    def unchanged(inputs: Tensor) -> Tensor:
        return inputs

    def job(ready: loop.Ready, *, recorded: bool = recorded) -> loop.TrainLoop:
        return loop.TrainLoop(
            network=network,
            build=lambda: schedule(recipe, net, len(train), backend.optimizer_options),
            backend=backend,
            clock=clock,
            ready=ready,
            set_mode=lambda: classifier.set_train_mode(net, recipe.frozen_batch_norm),
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            per_batch=recipe.scheduler_step == "batch",
            precision=recipe.precision,
            on_features=cached,
            recorded=recorded,
        )

    def extractor(ready: loop.Ready, *, recorded: bool = recorded) -> Callable[[Tensor], Tensor]:
        @torch.no_grad()
        def extract(images: Tensor) -> Tensor:
            inputs = ready(images)
            with backend.autocast(recipe.precision):
                return frozen(inputs).float()

        return backend.capture_graph(extract) if recorded else extract

    def make_step(*, raw: bool, recorded: bool) -> Callable[[Tensor, Tensor], object]:
        taken = ready if raw else unchanged
        if not cached:
            return job(taken, recorded=recorded).step
        extract = extractor(taken, recorded=recorded)
        return lambda images, _: extract(images)

    def reinit_weights(seed: int) -> None:
        net.load_state_dict(fresh(seed).state_dict())
        fold_again()

    return TrainingSetup(
        recipe=recipe,
        net=net,
        job=job(unchanged if cached else ready),
        features=extractor(ready),
        channels_last=channels_last,
        compile_mode=mode,
        recorded=recorded,
        make_step=make_step,
        reinit_weights=reinit_weights,
    )


def warm_up(work: TrainingSetup, splits: Splits) -> float:
    """Does once all that is done once by shape: kernels are chosen, graphs compiled and recorded. `restart` is due.

    Gives the bytes of device memory that the same takes when it is done again, most of them; 0 on a CPU, whose memory
    is not the training's alone.
    """
    job, backend = work.job, work.job.backend

    def some(split: batching.Split, at_once: int) -> Iterator[batching.Split]:
        """The first samples, as many as are taken at once, and as many as are left at last."""
        for size in sizes(split, at_once):
            few = split.take(np.arange(size))
            if job.on_features:  # before they are sent: so many images at once may not fit the device
                few = features(work, few)
            yield batching.Split(*first(few, size, backend))

    def once() -> None:
        train, validated = splits["train"], val_split(splits)
        training = [batch for few in some(train, job.at_once) for batch in shuffled(work, few, seed=0, epoch=0)]
        if backend.asynchronous or work.recorded or work.compile_mode != "off":
            validation = [(few.inputs, few.labels) for few in some(validated, job.batch_size)]
        else:  # a CPU by itself does nothing once by shape
            validation = training[:1]
        batching.epoch_permutation(len(train), backend, seed=0, epoch=0)  # of so many, sorted by kernels of their own
        loop.warm_up(job, training, validation)

    try:
        once()
        if not backend.asynchronous:
            return 0.0
        backend.release_memory()  # kernels that were tried may have had far more than those that were chosen
        backend.reset_peak_memory()
        once()
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise StageError(f'compile: "{work.compile_mode}" fails here ({reason}): set compile to off') from error
    return backend.memory_mib().get("peak", 0.0) * 2**20


def restart(work: TrainingSetup, seed: int) -> None:
    """Puts model, optimizer, schedule and random numbers to the beginning of a training with `seed`; what was compiled
    and recorded stays."""
    work.reinit_weights(seed)
    work.job.restart()
    torch.manual_seed(seed)  # what dropout draws does not depend on how the model was built


def features(work: TrainingSetup, split: batching.Split, progress: loop.Progress = loop.silent) -> batching.Split:
    """What the head takes of each of the split's images, where these are."""
    work.net.eval()
    batches = batching.batches(split, work.recipe.batch_size, work.job.backend)
    return loop.compute_features(work.features, split, batches, progress)


def shuffled(work: TrainingSetup, split: batching.Split, seed: int, epoch: int) -> loop.Batches:
    """The split's samples as an epoch of the training takes them, so many at once as its step does."""
    return batching.shuffled_batches(split, work.job.at_once, work.job.backend, seed, epoch, flip=work.recipe.flip)


def fixed_step(work: TrainingSetup, splits: Splits) -> tuple[Callable[[], object], int]:
    """The step, or the pass that computes features, on one prepared batch that lies on the device, as often as it is
    called; and the batch's size. The model learns from it."""
    backend, recipe = work.job.backend, work.recipe
    size = min(recipe.batch_size, len(splits["train"]))
    images, labels = first(splits["train"], size, backend)
    fixed = batching.prepare(images, recipe.image_size, channels_last=work.channels_last)
    step = work.make_step(raw=False, recorded=work.recorded)
    work.net.eval() if work.job.on_features else work.job.set_mode()
    return lambda: step(fixed, labels), size


def measure_peaks(work: TrainingSetup, splits: Splits) -> roofline.Peaks:
    """This machine's own limits for this work; the model has learnt from it, and `restart` is due."""
    backend = work.job.backend
    once, size = fixed_step(work, splits)
    steps = roofline.time_calls(
        once, backend.synchronize, seconds=roofline.STEP_SECONDS, min_windows=roofline.STEP_WINDOWS
    )
    measured = roofline.Peaks(
        images_per_second=size / min(steps),
        slowest_images_per_second=size / max(steps),
        matmul_flops=roofline.matmul_flops(backend, work.recipe.precision),
        memory_bytes_per_second=roofline.memory_bytes_per_second(backend),
    )
    backend.release_memory()
    return measured


def flops_per_image(work: TrainingSetup) -> float | None:
    """Floating-point operations that an image takes in one training step, or in computing its features."""
    shape = (3, work.recipe.image_size, work.recipe.image_size)
    if work.job.on_features:
        return roofline.forward_flops(classifier.Features(work.net), shape)
    frozen_batch_norm = work.recipe.frozen_batch_norm
    return roofline.train_flops(work.net, shape, set_mode=lambda net: classifier.set_train_mode(net, frozen_batch_norm))


def place(work: TrainingSetup, splits: Splits, working: float, device_gib: float | None) -> tuple[Splits, str]:
    """The splits where they are trained from, and that place: `device`, where they fit beside the `working` bytes of
    a step, else `host`. `device_gib`: the most they may take, in GiB, where that is less."""
    backend = work.job.backend
    needed = sum(split.nbytes for split in splits.values())
    free = backend.free_bytes()
    room = math.inf if free is None else FREE_SHARE * free - working
    if device_gib is not None:
        room = min(room, device_gib * 2**30)
    if needed > room:
        return dict(splits), "host"  # whose images may be replaced by features: the caller's own stay
    return {name: split.to(backend.device) for name, split in splits.items()}, "device"


def largest_batch(work: TrainingSetup, image_shape: tuple[int, ...], *, below: int | None = None) -> int | None:
    """The largest power of two whose step fits the device's memory, by taking steps: downwards from under `below`, or
    upwards from 2; None where none fits. Images are (N, *image_shape) uint8. The model learns from it. A single image
    is not tried: BatchNorm refuses one whose maps are a pixel.

    One that takes more than the device's capacity (where the system would swap) does not fit, and what would need
    half as much again is not tried. Upwards, a device whose capacity is not known is not searched: None.
    """
    backend = work.job.backend
    capacity = backend.capacity_mib()
    if capacity is None:
        if below is None:
            return None
        capacity = math.inf
    largest, size = None, 2 if below is None else 2 ** (math.ceil(math.log2(below)) - 1)
    while size >= 2:
        backend.reset_peak_memory()
        done = _takes_step(work, size, image_shape)
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


def saved_bytes_per_image(work: TrainingSetup, images: batching.Split) -> float:
    """Bytes that a step saves of each image for its backward pass, from steps of two and of four of `images`. The model
    learns from them."""

    def saved(size: int) -> int:
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            step(*first(images, size, work.job.backend))
        return sum(storages.values())

    step = work.make_step(raw=True, recorded=False)
    return (saved(4) - saved(2)) / 2


def _takes_step(work: TrainingSetup, size: int, image_shape: tuple[int, ...]) -> bool:
    """Whether a step of `size` images is done without running out of memory."""
    backend = work.job.backend
    work.net.eval() if work.job.on_features else work.job.set_mode()
    backend.tune(repeated=False)
    try:
        with backend.memory_errors():
            images = torch.zeros((size, *image_shape), dtype=torch.uint8, device=backend.device)
            labels = torch.zeros(size, dtype=torch.int64, device=backend.device)
            step = work.make_step(raw=True, recorded=False)
            for _ in range(2):  # the optimizer's state is there from the first one's end on
                step(images, labels)
            backend.synchronize()
    except OutOfMemoryError:
        return False
    finally:
        backend.tune()
        backend.release_memory()
    return True


def first(split: batching.Split, size: int, backend: Backend) -> tuple[Tensor, Tensor]:
    """The first `size` samples as one batch on the device."""
    (batch,) = batching.batches(split.take(np.arange(size)), size, backend)
    return batch


def val_split(splits: Splits) -> batching.Split:
    """The split that a training is validated on."""
    return next(split for name, split in splits.items() if name != "train")


def layout(channels_last: bool) -> torch.memory_format:
    """Torch's word for it."""
    return torch.channels_last if channels_last else torch.contiguous_format


def sizes(split: batching.Split, batch_size: int) -> list[int]:
    """The sizes of the split's batches, in rising order."""
    return sorted({min(batch_size, len(split)), len(split) % batch_size} - {0})


def schedule(
    recipe: config.Recipe, net: torch.nn.Module, images: int, fastest: Mapping[str, Any] | None = None
) -> loop.Schedule:
    """The recipe's optimizer of what is trainable in `net`, and its schedule over epochs of so many images. As for
    `fastest`, see `optim.build_optimizer`."""
    steps = -(-images // recipe.batch_size)
    chosen = recipe.resolved()
    optimizer = optimizers.build_optimizer(
        recipe.optimizer,
        [parameter for parameter in net.parameters() if parameter.requires_grad],
        lr=recipe.lr,
        options=chosen["optimizer_options"],
        total_steps=steps * recipe.epochs,
        fastest=fastest,
    )
    scheduler = optimizers.build_scheduler(
        recipe.scheduler,
        optimizer,
        options=chosen["scheduler_options"],
        lr=recipe.lr,
        epochs=recipe.epochs,
        moves_per_epoch=steps if recipe.scheduler_step == "batch" else 1,
        warmup_epochs=recipe.warmup_epochs,
    )
    return optimizer, scheduler
