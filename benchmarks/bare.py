"""A training as `train` does it, without MLflow, files or plots: what the other benchmarks take turns with."""

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
"""How long one fixed batch is repeated at most; for no more steps than the training had."""


def splits_of(settings: config.Settings) -> setup.Splits:
    """The images that `train` trains on and validates on, in host memory; ends the process where CIFAR-10 can't be
    had."""
    found = datasets.resolve(settings.data)
    if found["reason"]:
        sys.exit(f"data: CIFAR-10 can't be had ({found['reason']}): -S data.source=synthetic, or a folder")
    return setup.hold_out(setup.decode_splits(settings, found), settings)


def weights_of(recipe: config.Recipe) -> Path | None:
    """The file of the recipe's weights, None for random ones; ends the process where pretrained ones can't be had."""
    found = weights.resolve(recipe)
    if found["reason"]:
        sys.exit(f"weights: pretrained ones can't be had ({found['reason']}): -S weights=random, or a file")
    return weights.locate(found, recipe)


def classes_of(splits: setup.Splits) -> int:
    """How many classes the images have."""
    return int(splits["train"].labels.max()) + 1


def train(settings: config.Settings, splits: setup.Splits, *, fixed: bool = False) -> dict[str, Any]:
    """Trains; gives `epochs` (figures by epoch), `at` (the clock at each one's end), `seconds` (data in host memory to
    the last epoch validated, as `time/total_seconds`), `setup`, `speed` (images a second; of a frozen network, of
    computing its features) and, where `fixed`, `fixed_speed`: of the same step or pass on one batch that lies prepared
    on the device."""
    recipe = settings.work
    work, working = set_up(settings, splits)
    backend, clock = work.loop.backend, work.loop.clock
    rows, at, placement = trained_once(work, settings, splits, working)
    images = sum(map(len, splits.values()))
    trained = len(splits["train"]) * recipe.epochs / clock.total("train")
    result = {
        "epochs": rows,
        "at": at,
        "seconds": clock.total(*setup.TOTAL),
        "upload": clock.total("upload"),
        "setup": clock.total("setup"),
        "speed": images / clock.total("features") if work.on_features else trained,
        "steps": work.loop.times.percentiles(),
        "fault": backend.capture_error,
        "how": {
            "features": "cache" if work.on_features else "recompute",
            "channels_last": work.channels_last,
            "compile": work.compile_mode,
            "recorded": work.use_cuda_graph,
            "placement": placement,
        },
        **({"features": images / clock.total("features")} if work.on_features else {}),
    }
    if fixed:
        passed = images if work.on_features else len(splits["train"]) * recipe.epochs
        result["fixed_speed"] = _fixed_speed(work, splits, passed)
    if work.compile_mode != "off":
        torch.compiler.reset()  # else it stops compiling after some turns of the same code
    return result


def set_up(settings: config.Settings, splits: setup.Splits) -> tuple[setup.TrainingSetup, float]:
    """What a training needs, built, warmed up and put back to its beginning, with the bytes that a step takes on the
    device; its clock has `setup`."""
    recipe = settings.work
    backend = setup.device_for(settings.device, recipe)
    backend.release_memory()  # what an earlier turn held
    clock = Clock(backend.synchronize)
    path = weights_of(recipe)
    with clock.span("setup"):
        work = setup.TrainingSetup(recipe, settings.seed, classes_of(splits), path, splits, backend, clock)
        working = setup.warm_up(work, splits)
        work.restart(settings.seed)
    return work, working


def trained_once(
    work: setup.TrainingSetup, settings: config.Settings, splits: setup.Splits, working: float
) -> tuple[list[dict[str, Any]], list[float], str]:
    """Trains what `set_up` gave or `training.restart` put back: figures by epoch, the clock at each one's end, and
    where the images lay; the work's clock has `training.TOTAL`."""
    recipe, backend, clock = work.recipe, work.loop.backend, work.loop.clock
    with clock.span("upload"):
        samples, placement = setup.place_splits(work, splits, working, settings.data.device_gib)
    if work.on_features:
        with clock.span("features"):
            for name, split in samples.items():
                samples[name] = work.compute_features(split)
    rows, at = [], [time.perf_counter()]
    for row in loop.train(
        work.loop,
        lambda epoch: work.train_batches(samples["train"], settings.seed, epoch),
        lambda: batching.batches(setup.val_split(samples), recipe.batch_size, backend),
    ):
        rows.append(row)
        at.append(time.perf_counter())
    return rows, at, placement


def seconds_of(step: Callable[[], object], steps: int, backend: Backend) -> float:
    """Seconds that so many steps take."""
    backend.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    backend.synchronize()
    return time.perf_counter() - start


def _fixed_speed(work: setup.TrainingSetup, splits: setup.Splits, passed: int) -> float:
    """Images a second of one fixed batch: the mean over as many steps as `passed` images make, not the fastest."""
    backend = work.loop.backend
    step, size = setup.fixed_step(work, splits)

    seconds_of(step, 2, backend)  # kernels are chosen, launches recorded
    steps = min(math.ceil(passed / size), math.ceil(FIXED_SECONDS / seconds_of(step, 1, backend)))
    return steps * size / seconds_of(step, steps, backend)
