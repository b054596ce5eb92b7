"""Repeat one training step on random images, to measure the speeds that a device reaches and sustains."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline import config, terminal
from pipeline.data import batching
from pipeline.devices import Backend
from pipeline.errors import OutOfMemoryError
from pipeline.profiling.clock import Clock
from pipeline.profiling.score_steps import Step
from pipeline.training import loop, setup

CLASSES = 10
"""Classes of the random images."""

BATCHES = 4
"""Batches of random images on the device: 36 MiB for the largest step."""

SEED = 0
"""Seed of images, labels and weights."""

SLICE_SECONDS = 1.0
"""Length of a slice, after which the device is synchronized. It is longer if a single step is, and a third of the whole
time if that is less than three seconds."""

MIN_SLICES = 3
"""At least one slice for each third of the time."""

MEMORY_MARGIN = 2
"""A step needs at most this many times the bytes that it saves for its backward pass. The rest is for gradients, copies
in other layouts, and the allocator's reserve."""

Batches = Iterator[tuple[Tensor, Tensor]]


class Slice(NamedTuple):
    """Steps between two synchronizations of the device."""

    images: int
    seconds: float

    @property
    def speed(self) -> float:
        """Images per second."""
        return self.images / self.seconds


@dataclass(frozen=True)
class StepRun:
    """The measurements of a repeated step."""

    batch_size: int
    slices: list[Slice]
    energy: tuple[str, float] | None
    """The energy counter's name, and the joules of all slices; None without a counter, or if it did not move."""

    def figures(self) -> dict[str, float]:
        """The step's figures, by the names in the docstring of `score_steps.metric`."""
        first, last = split_thirds(self.slices)
        seconds = math.fsum(piece.seconds for piece in self.slices)
        figures = {
            "images_per_second": median(piece.speed for piece in last),
            "first_third_images_per_second": median(piece.speed for piece in first),
            "seconds": seconds,
            "batch_size": float(self.batch_size),
        }
        if self.energy is not None:
            joules = self.energy[1]
            figures["images_per_joule"] = sum(piece.images for piece in self.slices) / joules
            figures["watts"] = joules / seconds
        return figures


def split_thirds(slices: Sequence[Slice]) -> tuple[list[Slice], list[Slice]]:
    """Returns the slices whose middle is in the first third of the whole time, and those whose middle is in the last
    third. If there are none, the first slice or the last stands for them."""
    ends = list(itertools.accumulate(piece.seconds for piece in slices))
    middles = [(piece, end - piece.seconds / 2) for end, piece in zip(ends, slices, strict=True)]
    first = [piece for piece, middle in middles if middle < ends[-1] / 3]
    last = [piece for piece, middle in middles if middle > ends[-1] * 2 / 3]
    return first or [slices[0]], last or [slices[-1]]


def run_step(step: Step, precision: str, device: str, seconds: float) -> StepRun | None:
    """Repeat `step` for `seconds`. If its batch does not fit the memory, try a half, a quarter, ... of it.

    Returns None if not even one image fits. Frees the memory at the end.
    """
    batch_size = step.batch_size
    while batch_size:
        recipe = _recipe(step, precision, batch_size)
        backend = setup.configure_backend(device, recipe)
        try:
            with backend.memory_errors():
                return _repeat(step.title, recipe, backend, seconds)
        except OutOfMemoryError:
            batch_size //= 2  # try again only after this clause, since the error holds memory
        finally:
            backend.release_memory()
    return None


def largest_batch(step: Step, device: str) -> int | None:
    """The largest power of two that fits the memory as batch size of `step` at fp32, without CUDA graphs; None if it is
    unknown."""
    recipe = replace(_recipe(step, "fp32", step.batch_size), graph=False)
    backend = setup.configure_backend(device, recipe)
    if not backend.raises_oom:
        return None
    try:
        with backend.memory_errors():
            training = _build(recipe, random_images(2, step.image_size), backend)
    except OutOfMemoryError:
        return None
    return setup.largest_batch(training, (step.image_size, step.image_size, 3))


def random_images(count: int, side: int) -> batching.Split:
    """Random images (count, side, side, 3) uint8 and labels. A step takes the same time as on real images."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    return batching.Split(inputs, torch.randint(CLASSES, (count,), generator=generator))


def steps_per_slice(train_loop: loop.TrainLoop, batches: Batches, seconds: float) -> int:
    """The number of steps in a slice, from the time of the second step. The first includes autotuning and capture."""
    with train_loop.clock.span("first step"):
        train_loop.step(*next(batches))
    with train_loop.clock.span("second step") as span:
        train_loop.step(*next(batches))
    return max(1, round(min(SLICE_SECONDS, seconds / MIN_SLICES) / span.seconds))


def time_slices(
    title: str, train_loop: loop.TrainLoop, batches: Batches, batch_size: int, steps: int, seconds: float
) -> list[Slice]:
    """Run slices of `steps` steps until `seconds` have passed, and at least MIN_SLICES of them."""
    clock, images = train_loop.clock, steps * batch_size
    slices: list[Slice] = []
    with terminal.progress(title, images * math.ceil(seconds / SLICE_SECONDS)) as advance:
        while clock.total("slices") < seconds or len(slices) < MIN_SLICES:
            with clock.span("slices") as span:
                for _ in range(steps):
                    train_loop.step(*next(batches))
            slices.append(Slice(images, span.seconds))
            advance(images)
    return slices


def _repeat(title: str, recipe: config.Recipe, backend: Backend, seconds: float) -> StepRun:
    """Repeat the recipe's step for `seconds`. Raises OutOfMemoryError if the batch does not fit."""
    images = random_images(BATCHES * recipe.batch_size, recipe.image_size)
    training = _build(recipe, images, backend)
    if not backend.raises_oom:
        _require_memory(training, images)
    images = images.to(backend.device)
    size = recipe.batch_size
    batches = itertools.cycle(zip(torch.split(images.inputs, size), torch.split(images.labels, size), strict=True))
    steps = steps_per_slice(training.loop, batches, seconds)
    before = backend.energy()
    slices = time_slices(title, training.loop, batches, size, steps, seconds)
    after = backend.energy()
    energy = None
    if before and after and after[1] > before[1]:
        energy = before[0], after[1] - before[1]
    return StepRun(size, slices, energy)


def _build(recipe: config.Recipe, images: batching.Split, backend: Backend) -> setup.TrainingSetup:
    """Build the step's model on the device, in training mode."""
    splits = {"train": images, "validation": images}
    training = setup.TrainingSetup(recipe, SEED, CLASSES, None, splits, backend, Clock(backend.synchronize))
    training.loop.set_train_mode()
    return training


def _require_memory(training: setup.TrainingSetup, images: batching.Split) -> None:
    """Raise OutOfMemoryError if a step would need more memory than is free. A CPU would swap instead, or the system
    would kill the process."""
    backend = training.loop.backend
    free = backend.free_bytes()
    needed_per_image = MEMORY_MARGIN * setup.saved_bytes_per_image(training, images)
    if free is not None and needed_per_image * training.recipe.batch_size > free:
        raise OutOfMemoryError(f"{backend.kind} has {free / 2**30:.1f} GiB free: lower batch_size")


def _recipe(step: Step, precision: str, batch_size: int) -> config.Recipe:
    """The step as a recipe. It does not depend on the user's settings."""
    return config.Recipe(
        model=step.model,
        weights="random",
        trainable="all",
        head_init="default",
        frozen_batch_norm="eval",
        normalize=True,
        flip=False,
        image_size=step.image_size,
        validation="split",
        batch_size=batch_size,
        epochs=1,
        optimizer="adamw",
        lr=1e-4,
        optimizer_options={"adamw": {"weight_decay": 0.05}},
        scheduler="constant",
        scheduler_options={},
        scheduler_step="epoch",
        warmup_epochs=0.0,
        precision=precision,  # type: ignore[arg-type]
        channels_last="auto",
        compile="off",
        graph="auto",
        features="auto",
        threads=None,
        target_accuracy=None,
    )
