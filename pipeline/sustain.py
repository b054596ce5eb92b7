"""Repeats one step of training, the same whatever the recipe: the speed that a machine keeps up."""

from pipeline import cli

if __name__ == "__main__":
    cli.answer_early(__doc__)

import dataclasses
import itertools
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline import backends, conditions, config, data, files, publish, records, terminal, tracking, training
from pipeline.clock import Clock

IMAGES_SHAPE, CLASSES = (32, 32, 3), 10
"""Of the images that are trained on: like CIFAR-10's, whatever the run's own are."""

BATCHES = 16
"""How many batches of them lie on the device."""

SLICE_SECONDS = 1.0
"""How often the speed is read, the device being waited for; a slow machine's single step may take longer."""


def run(settings: config.Settings, folder: Path) -> dict[str, Any]:
    """Measures for `sustain_seconds`, as part of the run that `train` made, the first of repeats; leaves
    `folder/sustain`. For 0 seconds the run stays as it is: what was measured for it before is as true as it was."""
    folders = records.folders(folder)
    record = files.read_json(folders["train"] / "record.json")
    result: dict[str, Any] = {"id": record["id"], "metrics": {}, "tags": {}, "series": [], "warnings": []}
    if settings.sustain_seconds:
        recipe = config.sustained(settings)
        backend = training.device_for(settings.device, recipe)
        with backend.memory_errors():
            result |= _measured(recipe, settings, backend)
            backend.release_memory()
            if settings.largest_batch and backend.refuses_memory:
                result["metrics"]["memory/largest_batch_size"] = _largest_batch(recipe, settings, backend)
        _announce(result["metrics"], recipe.precision)
    result["ended"] = tracking.now()
    out = folders["sustain"]
    shutil.rmtree(out, ignore_errors=True)
    files.write_json(out / "metrics.json", result["metrics"])
    files.write_json(out / "record.json", result)
    if result["metrics"]:
        experiment = records.experiment(settings, record["tags"])
        publish.complete("sustain", record, result, experiment, folders)
        publish.gather(record, experiment)
    return result


def _measured(recipe: config.Recipe, settings: config.Settings, backend: backends.Backend) -> dict[str, Any]:
    before = conditions.sample(backend.gpu_uuid())
    splits = {"train": _noise(BATCHES * recipe.batch_size), "validation": _noise(recipe.batch_size)}
    work = training.build(recipe, settings.seed, CLASSES, None, splits, backend, Clock(backend.synchronise))
    training.warm_up(work, splits)
    images = splits["train"].to(backend.device)
    begun = backend.energy()
    slices = _slices(work, images, settings.sustain_seconds, settings.seed)
    ended = backend.energy()
    taints = conditions.taints(
        before, conditions.sample(backend.gpu_uuid()), [seconds / count for count, seconds in slices]
    )
    figures = speeds(slices)
    source = None
    if begun and ended and ended[1] > begun[1]:
        images_done = recipe.batch_size + sum(count for count, _ in slices)  # with the step before the slices
        source = begun[0]
        figures["energy/sustained_images_per_joule"] = images_done / (ended[1] - begun[1])
    return {
        "metrics": figures,
        "tags": {
            "sustained.workload": config.sustained_workload(recipe, settings.sustain_seconds),
            "sustained.taints": " ".join(taints) or None,
            "sustained.energy_source": source,
        },
        "series": [count / seconds for count, seconds in slices],
        "warnings": [
            f"while one step was repeated, {sentence.replace('epochs', 'slices')}" for sentence in taints.values()
        ],
    }


def _largest_batch(recipe: config.Recipe, settings: config.Settings, backend: backends.Backend) -> int:
    """With nothing recorded, whose memory would be in the way."""
    plain = dataclasses.replace(recipe, graph=False, compile="off")
    splits = {"train": _noise(recipe.batch_size), "validation": _noise(recipe.batch_size)}
    work = training.build(plain, settings.seed, CLASSES, None, splits, backend, Clock(backend.synchronise))
    return training.largest_batch(work, IMAGES_SHAPE)


def _announce(figures: Mapping[str, float], precision: str) -> None:
    kept = figures.get("speed/sustained_last_to_first")
    largest = figures.get("memory/largest_batch_size")
    terminal.say(
        f"sustain  {figures['speed/sustained_images_per_second']:,.0f} images/s of finetune's step, {precision}, "
        f"for {figures['time/sustain_seconds']:.0f} s"
        + (f"; the last third of them at {kept:.1%} of the first's speed" if kept else "")
        + (f"; largest batch {largest:,.0f}" if largest else "")
    )


def speeds(slices: Sequence[tuple[int, float]]) -> dict[str, float]:
    """The figures of slices of (images, seconds): images a second over all, and of the last third over the first's,
    where there are three."""
    third = len(slices) // 3

    def speed(some: Sequence[tuple[int, float]]) -> float:
        return sum(count for count, _ in some) / math.fsum(seconds for _, seconds in some)

    figures = {
        "speed/sustained_images_per_second": speed(slices),
        "time/sustain_seconds": math.fsum(seconds for _, seconds in slices),
    }
    if third:
        figures["speed/sustained_last_to_first"] = speed(slices[-third:]) / speed(slices[:third])
    return figures


def _slices(work: training.Work, images: data.Split, seconds: float, seed: int) -> list[tuple[int, float]]:
    """(images, seconds) of slices of about SLICE_SECONDS, until `seconds` have passed."""
    job, clock = work.job, work.job.clock
    job.set_mode()
    batches = _forever(work, images, seed)
    with clock.span("one step") as span:
        job.step(*next(batches))
    steps = max(1, round(SLICE_SECONDS / span.seconds))
    slices: list[tuple[int, float]] = []
    with terminal.progress("sustain", steps * work.recipe.batch_size * round(seconds / SLICE_SECONDS)) as advance:
        while clock.total("sustain") < seconds:
            with clock.span("sustain") as span:
                for _ in range(steps):
                    job.step(*next(batches))
            slices.append((steps * work.recipe.batch_size, span.seconds))
            advance(slices[-1][0])
    return slices


def _forever(work: training.Work, images: data.Split, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for epoch in itertools.count(1):
        yield from training.shuffled(work, images, seed, epoch)


def _noise(count: int) -> data.Split:
    """Random images and labels: a step takes as long on them as on real ones."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (count, *IMAGES_SHAPE), dtype=torch.uint8, generator=generator)
    return data.Split(inputs, torch.randint(CLASSES, (count,), generator=generator))


if __name__ == "__main__":
    cli.main(run, __doc__)
