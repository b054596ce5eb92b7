"""Repeats fixed steps of training, the same whatever the recipe: the speeds that a machine keeps up."""

from pipeline import repeats

if __name__ == "__main__":
    repeats.start_stage(__doc__, "sustain")

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline import config, devices, files, terminal
from pipeline.data import batching
from pipeline.errors import OutOfMemoryError
from pipeline.profiling import score_steps, system_state
from pipeline.profiling.clock import Clock
from pipeline.tracking import publisher, records, store
from pipeline.training import setup

CLASSES = 10
"""Of the images that are made."""

BATCHES = 4
"""How many batches of made images lie on the device: 36 MiB of the largest step's."""

SEED = 0
"""Of images, labels and weights."""

SLICE_SECONDS = 1.0
"""How often the speed is read, the device being waited for. A single step may take longer, and where all the time is
less than three of these, a slice is a third of it."""

LEAST_SLICES = 3
"""One for each third of the time."""

MEMORY_MARGIN = 2
"""How many times what it saves for its backward pass a step takes at most: gradients, copies in other layouts, and
what the allocator keeps."""

Slice = tuple[int, float]
"""Images, and the seconds they took."""


@dataclass(frozen=True)
class Course:
    """How a repeated step went."""

    batch_size: int
    slices: list[Slice]
    energy: tuple[str, float] | None
    """Where the device's energy was read, and the joules of all slices; None where it does not tell."""

    def figures(self) -> dict[str, float]:
        """By the names that `score.metric` lists."""
        first, last = thirds(self.slices)
        seconds = math.fsum(taken for _, taken in self.slices)
        found = {
            "images_per_second": median(count / taken for count, taken in last),
            "first_third_images_per_second": median(count / taken for count, taken in first),
            "seconds": seconds,
            "batch_size": float(self.batch_size),
        }
        if self.energy is not None:
            joules = self.energy[1]
            found["images_per_joule"] = sum(count for count, _ in self.slices) / joules
            found["watts"] = joules / seconds
        return found


def run(
    settings: config.Settings, folder: Path, number: int = 1, steps: Sequence[score_steps.Step] = score_steps.STEPS
) -> dict[str, Any]:
    """Measures `steps` for `sustain_seconds` each, as part of the run of repeat `number` (from 1) that `train` made;
    leaves its part of `folder/sustain`. For 0 seconds nothing is measured, and the run keeps what it has. Returns the
    record.

    The largest batch of the first step is sought when all else is written: that search may end the process.
    """
    folders = records.stage_folders(folder, number)
    record = files.read_json(folders["train"] / "record.json")
    result: dict[str, Any] = {"id": record["id"], "metrics": {}, "tags": {}, "series": {}, "warnings": []}
    if settings.sustain_seconds:
        began = store.now()
        result |= _measured(settings, steps)
        attempts = publisher.count_attempts(record, records.experiment_name(settings, record["tags"])) + 1
        result["tags"] |= {"sustained.started": str(began), "sustained.attempts": str(attempts)}
    result["ended"] = store.now()
    repeats.clear_outputs(folder, "sustain", number, records.planned_repeats(folder))
    _leave(result, record, settings, folders)
    if settings.sustain_seconds and settings.largest_batch:
        largest = _largest_batch(settings.device, steps[0])
        if largest is not None:
            terminal.say(f"sustain  {steps[0].title}: the largest batch that fits is {largest:,}")
            result["metrics"]["memory/largest_batch_size"] = largest
            _leave(result, record, settings, folders)
    return result


def _leave(
    result: Mapping[str, Any], record: Mapping[str, Any], settings: config.Settings, folders: Mapping[str, Path]
) -> None:
    """Writes the record, and puts it into the training's run. A second time adds nothing but what is new."""
    out = folders["sustain"]
    files.write_json(out / "metrics.json", result["metrics"])
    files.write_json(out / "record.json", result)
    if result["metrics"] or result["warnings"]:
        publisher.publish_stage("sustain", record, result, records.experiment_name(settings, record["tags"]), folders)


def _measured(settings: config.Settings, steps: Sequence[score_steps.Step]) -> dict[str, Any]:
    """The record's part that is measured. A step that is the same work as one before it takes that one's figures."""
    backend = devices.select(settings.device)
    best, gpu = backend.best_precision(), backend.gpu_uuid()
    before = system_state.sample(gpu)  # nothing of ours has run on the device for a second
    metrics: dict[str, float] = {}
    tags: dict[str, str | None] = {}
    series: dict[str, list[float]] = {}
    taints: dict[str, str] = {}
    behavior: dict[str, list[str]] = {}
    unfit: list[str] = []
    known: dict[tuple[str, int, int, str], Course | None] = {}
    for step in steps:
        precision = best if step.best_precision else "fp32"
        work = (step.model, step.image_size, step.batch_size, precision)
        if work not in known:
            known[work] = course = _course(step, precision, settings)
            after = system_state.sample(gpu)
            taints = system_state.taints(before, after) | taints
            seconds = [taken for _, taken in course.slices] if course else []
            for word, sentence in system_state.behavior(before, after, seconds).items():
                behavior.setdefault(word, []).append(f"{step.title}: {sentence}")
        course = known[work]
        if course is None:
            unfit.append(f"{step.title} was not measured: not even a batch of one image fits the memory")
            continue
        metrics |= {score_steps.metric(step.name, figure): value for figure, value in course.figures().items()}
        series[score_steps.metric(step.name, "course")] = [count / taken for count, taken in course.slices]
        tags[score_steps.tag(step.name, "workload")] = score_steps.workload(
            step, course.batch_size, settings.sustain_seconds
        )
        tags[score_steps.tag(step.name, "precision")] = precision
        _announce(step, precision, course)
    sources = {course.energy[0] for course in known.values() if course and course.energy}
    tags |= {
        "sustained.taints": " ".join(taints) or None,
        "sustained.behavior": " ".join(behavior) or None,
        "sustained.energy_source": " ".join(sources) or None,
        "sustained.threads": str(torch.get_num_threads()),
    }
    warnings = [*unfit, *(f"while steps were repeated, {sentence}" for sentence in taints.values())]
    warnings += itertools.chain.from_iterable(behavior.values())
    for sentence in warnings:
        terminal.say(f"note     {sentence}")
    return {"metrics": metrics, "tags": tags, "series": series, "warnings": warnings}


def _course(step: score_steps.Step, precision: str, settings: config.Settings) -> Course | None:
    """Repeats the step with its batch, or the largest half, quarter, ... that fits the memory; None where not even one
    image does. Its memory is free again afterwards."""
    batch_size = step.batch_size
    while batch_size:
        recipe = _recipe(step, precision, batch_size)
        backend = setup.device_for(settings.device, recipe)
        try:
            with backend.memory_errors():
                return _repeated(step, recipe, settings.sustain_seconds, backend)
        except OutOfMemoryError:
            batch_size //= 2  # tried outside: what the error holds would be in the way
        finally:
            backend.release_memory()
    return None


def _recipe(step: score_steps.Step, precision: str, batch_size: int) -> config.Recipe:
    """The step as a recipe. No setting has a part in it."""
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


def _repeated(step: score_steps.Step, recipe: config.Recipe, seconds: float, backend: devices.Backend) -> Course:
    """Raises OutOfMemoryError where the batch does not fit."""
    images = _made(BATCHES * recipe.batch_size, recipe.image_size)
    work = _built(recipe, images, backend)
    if not backend.raises_oom:
        _refuse_too_large(work, images)
    batches = _forever(images.to(backend.device), recipe.batch_size)
    steps = _steps_a_slice(work, batches, seconds)
    before = backend.energy()
    slices = _slices(step.title, work, batches, steps, seconds)
    after = backend.energy()
    spent = (before[0], after[1] - before[1]) if before and after and after[1] > before[1] else None
    return Course(recipe.batch_size, slices, spent)


def _built(recipe: config.Recipe, images: batching.Split, backend: devices.Backend) -> setup.TrainingSetup:
    """The step's model on the device, in training mode."""
    splits = {"train": images, "validation": images}
    work = setup.TrainingSetup(recipe, SEED, CLASSES, None, splits, backend, Clock(backend.synchronize))
    work.loop.set_train_mode()
    return work


def _refuse_too_large(work: setup.TrainingSetup, images: batching.Split) -> None:
    """Raises OutOfMemoryError where a step would take more memory than is free. A CPU does not refuse: it swaps, or the
    system kills the process."""
    backend = work.loop.backend
    free, needed = backend.free_bytes(), MEMORY_MARGIN * setup.saved_bytes_per_image(work, images)
    if free is not None and needed * work.recipe.batch_size > free:
        raise OutOfMemoryError(f"{backend.kind} has {free / 2**30:.1f} GiB free: lower batch_size")


def _forever(images: batching.Split, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The images, (batch_size, H, W, 3) uint8, and their labels, batch by batch, again and again."""
    cut = zip(torch.split(images.inputs, batch_size), torch.split(images.labels, batch_size), strict=True)
    return itertools.cycle(list(cut))


def _steps_a_slice(
    work: setup.TrainingSetup, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], seconds: float
) -> int:
    """How many steps make a slice, by the second step: the first one also does what is done once."""
    train_loop, clock = work.loop, work.loop.clock
    with clock.span("first step"):
        train_loop.step(*next(batches))
    with clock.span("second step") as span:
        train_loop.step(*next(batches))
    return max(1, round(min(SLICE_SECONDS, seconds / LEAST_SLICES) / span.seconds))


def _slices(
    title: str,
    work: setup.TrainingSetup,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    seconds: float,
) -> list[Slice]:
    """Slices of so many steps until `seconds` have passed, LEAST_SLICES at least."""
    train_loop, clock = work.loop, work.loop.clock
    images = steps * work.recipe.batch_size
    slices: list[Slice] = []
    with terminal.progress(title, images * math.ceil(seconds / SLICE_SECONDS)) as advance:
        while clock.total("slices") < seconds or len(slices) < LEAST_SLICES:
            with clock.span("slices") as span:
                for _ in range(steps):
                    train_loop.step(*next(batches))
            slices.append((images, span.seconds))
            advance(images)
    return slices


def thirds(slices: Sequence[Slice]) -> tuple[list[Slice], list[Slice]]:
    """The slices whose middle lies in the first third of all the time, and those whose middle lies in the last; where
    there is none, the first slice, and the last."""
    ends = list(itertools.accumulate(seconds for _, seconds in slices))
    middles = [end - seconds / 2 for end, (_, seconds) in zip(ends, slices, strict=True)]
    placed = list(zip(slices, middles, strict=True))
    first = [each for each, middle in placed if middle < ends[-1] / 3]
    last = [each for each, middle in placed if middle > ends[-1] * 2 / 3]
    return first or [slices[0]], last or [slices[-1]]


def _made(count: int, side: int) -> batching.Split:
    """Random images (count, side, side, 3) uint8 and labels: a step takes as long on them as on real ones."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    return batching.Split(inputs, torch.randint(CLASSES, (count,), generator=generator))


def _largest_batch(device: str, step: score_steps.Step) -> int | None:
    """The largest power of two that fits as the step's batch, launched without recording; None where that can't be
    found."""
    recipe = dataclasses.replace(_recipe(step, "fp32", step.batch_size), graph=False)
    backend = setup.device_for(device, recipe)
    if not backend.raises_oom:
        return None
    try:
        with backend.memory_errors():
            work = _built(recipe, _made(2, step.image_size), backend)
    except OutOfMemoryError:
        return None
    return setup.largest_batch(work, (step.image_size, step.image_size, 3))


def _announce(step: score_steps.Step, precision: str, course: Course) -> None:
    figures = course.figures()
    power = f", {figures['watts']:,.0f} W" if "watts" in figures else ""
    terminal.say(
        f"sustain  {step.title} ({precision}, batch {course.batch_size}): {figures['images_per_second']:,.1f} images/s "
        f"in the last third of {figures['seconds']:.0f} s, {figures['first_third_images_per_second']:,.1f} in the "
        f"first{power}"
    )


if __name__ == "__main__":
    repeats.run_stage("sustain", run, __doc__)
