"""A training as the stage `train` does it, without MLflow, files or plots. The other benchmarks compare with it."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline import config
from pipeline.data import batching, datasets
from pipeline.devices import Backend
from pipeline.models import weights
from pipeline.profiling.clock import Clock
from pipeline.training import loop, setup

FIXED_SECONDS = 10.0
"""The longest time for which one fixed batch is repeated; it gets no more steps than the training had."""


def splits_of(settings: config.Settings) -> setup.Splits:
    """The images to train and validate on, in host memory. Ends the process where CIFAR-10 can't be had."""
    data = datasets.resolve(settings.data, settings.work.image_size)
    if data["reason"]:
        sys.exit(f"data: CIFAR-10 can't be had ({data['reason']}): -S data.source=synthetic, or a folder")
    return setup.hold_out(setup.decode_splits(settings, data), settings)


def weights_of(recipe: config.Recipe) -> Path | None:
    """The file of the recipe's weights; None for random ones. Ends the process where pretrained ones can't be had."""
    facts = weights.resolve(recipe)
    if facts["reason"]:
        sys.exit(f"weights: pretrained ones can't be had ({facts['reason']}): -S weights=random, or a file")
    return weights.locate(facts, recipe)


def classes_of(splits: setup.Splits) -> int:
    """The number of classes of the images."""
    return int(splits["train"].labels.max()) + 1


def train(settings: config.Settings, splits: setup.Splits, *, fixed: bool = False) -> dict[str, Any]:
    """Train, and return `epochs` (their figures), `at` (the time at each one's end), `seconds` (as
    `time/total_seconds`), `setup` and `speed` (images a second; if features are computed once, of computing them).
    `fixed` adds `fixed_speed`: the speed of the same step or pass on one prepared batch on the device."""
    recipe = settings.work
    training, step_bytes = set_up(settings, splits)
    backend, clock = training.loop.backend, training.loop.clock
    rows, at, placement = trained_once(training, settings, splits, step_bytes)
    images = sum(map(len, splits.values()))
    trained = len(splits["train"]) * recipe.epochs / clock.total("train")
    result = {
        "epochs": rows,
        "at": at,
        "seconds": clock.total(*setup.TOTAL_SPANS),
        "upload": clock.total("upload"),
        "setup": clock.total("setup"),
        "speed": images / clock.total("features") if training.on_features else trained,
        "steps": training.loop.times.percentiles(),
        "fault": backend.capture_error,
        "how": {
            "features": "cache" if training.on_features else "recompute",
            "channels_last": training.channels_last,
            "compile": training.compile_mode,
            "recorded": training.use_cuda_graph,
            "placement": placement,
        },
        **({"features": images / clock.total("features")} if training.on_features else {}),
    }
    if fixed:
        passed = images if training.on_features else len(splits["train"]) * recipe.epochs
        result["fixed_speed"] = _fixed_speed(training, splits, passed)
    if training.compile_mode != "off":
        torch.compiler.reset()  # else it stops compiling after some turns of the same code
    return result


def set_up(settings: config.Settings, splits: setup.Splits) -> tuple[setup.TrainingSetup, float]:
    """A training that is warmed up and reset, and the bytes of device memory that a step takes. Its clock has the span
    `setup`."""
    recipe = settings.work
    backend = setup.configure_backend(settings.device, recipe)
    backend.release_memory()  # of an earlier turn
    clock = Clock(backend.synchronize)
    path = weights_of(recipe)
    with clock.span("setup"):
        training = setup.TrainingSetup(recipe, settings.seed, classes_of(splits), path, splits, backend, clock)
        step_bytes = setup.warm_up(training, splits)
        training.restart(settings.seed)
    return training, step_bytes


def trained_once(
    training: setup.TrainingSetup, settings: config.Settings, splits: setup.Splits, step_bytes: float
) -> tuple[list[dict[str, Any]], list[float], str]:
    """Train what `set_up` returned or `restart` reset. Returns the epochs' figures, the time at each one's end, and
    where the images lay. Its clock has the spans `setup.TOTAL_SPANS`."""
    recipe, backend, clock = training.recipe, training.loop.backend, training.loop.clock
    with clock.span("upload"):
        samples, placement = setup.place_splits(training, splits, step_bytes, settings.data.device_gib)
    if training.on_features:
        with clock.span("features"):
            for name, split in samples.items():
                samples[name] = training.compute_features(split)
    rows, at = [], [time.perf_counter()]
    for row in loop.train(
        training.loop,
        lambda epoch: training.train_batches(samples["train"], settings.seed, epoch),
        lambda: batching.batches(setup.val_split(samples), recipe.batch_size, backend),
    ):
        rows.append(row)
        at.append(time.perf_counter())
    return rows, at, placement


def seconds_of(step: Callable[[], object], steps: int, backend: Backend) -> float:
    """Seconds that `steps` calls of `step` take."""
    backend.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    backend.synchronize()
    return time.perf_counter() - start


def _fixed_speed(training: setup.TrainingSetup, splits: setup.Splits, passed: int) -> float:
    """Images a second on one fixed batch: the mean over as many steps as `passed` images make, not the fastest."""
    backend = training.loop.backend
    step, size = setup.fixed_step(training, splits)

    seconds_of(step, 2, backend)  # autotuning and graph capture
    steps = min(math.ceil(passed / size), math.ceil(FIXED_SECONDS / seconds_of(step, 1, backend)))
    return steps * size / seconds_of(step, steps, backend)
