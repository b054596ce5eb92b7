"""The blog post's way of training against ours: the same work on the same images, in turns, as a ratio.

python -m benchmarks.blog_baseline [--whole] [-S key=value ...]; the settings are the pipeline's. Without --whole the
job is small and made: little is learnt from so few images, so slowly, and the losses can be compared.

The baseline is what the post's script did, written afresh: images resized by PIL one by one in a DataLoader, float32
whatever `precision` says, every image through the whole network in every epoch, the loss and the accuracy read
(`.item()`) at every step. Model, optimizer and schedule are built by the pipeline's own functions, from the same random
numbers: what differs is how the work is done. Each round takes the baseline, ours (`bare.train`: no MLflow, no files),
and ours on one fixed batch. The baseline has a process of its own, for ours changes how torch and the C library work.

Compared are seconds from images in host memory to the last epoch validated; both have warmed up before. Of the baseline
one epoch is measured and counts as many times as there are epochs, since its cost does not change (--flat shows it);
--accuracy makes it do them all.

It ends with status 1, and without a ratio, where the two disagree: about the first epoch's mean training loss by more
than 2%, or, with --accuracy, the recipe's own learning rate and schedule and 2,000 images or more to validate on, about
the last epoch's validation accuracy by more than 0.5 points, in the mean of the rounds. No speed without parity.
"""

import copy
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor

from benchmarks import bare, results
from pipeline import config, devices
from pipeline.data import batching
from pipeline.models import classifier
from pipeline.training import optimizers

RECIPES = ("blog", "linear-probe", "finetune")
WORKERS = 2
SMALL = (
    "weights=random", "data.source=synthetic", "data.limit=40", "batch_size=100",
    "scheduler=constant", "lr=1.0e-5", "warmup_epochs=0",
)  # fmt: skip
EPOCHS = {"blog": 1, "linear-probe": 10, "finetune": 1}
"""Of the small jobs."""

Pairs = tuple[list[Image.Image], np.ndarray]
"""Images as PIL has them, and their labels, (N,) int64."""


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Images as PIL has them, transformed one by one when they are asked for."""

    def __init__(self, images: Sequence[Image.Image], labels: np.ndarray, transform: Any):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def baseline(
    settings: config.Settings, weights: Path | None, train: Pairs, validation: Pairs, *, epochs: int, workers: int
) -> list[dict[str, float]]:
    """Does `epochs` of the recipe's; gives of each the seconds with its validation, the mean training loss and the
    validation accuracy."""
    recipe, backend = settings.work, devices.select(settings.device)
    device = backend.device
    backend.release_memory()
    backend.set_precision("fp32")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(settings.seed)
    net = classifier.build(recipe, int(train[1].max()) + 1, weights)
    network = net.net.to(device)
    size = (recipe.image_size, recipe.image_size)
    normalize = [Normalize(*net.normalization)] if recipe.normalize else []
    seen = Compose([Resize(size), ToTensor(), *normalize])
    trained = Compose([Resize(size), *([RandomHorizontalFlip()] if recipe.flip else []), ToTensor(), *normalize])
    loader = DataLoader(Pictures(*train, trained), recipe.batch_size, shuffle=True, num_workers=workers)
    val_loader = DataLoader(Pictures(*validation, seen), recipe.batch_size, num_workers=workers)
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer, scheduler = optimizers.build(recipe, trainable, len(loader))
    per_batch = recipe.scheduler_step == "batch"
    _warm_up(copy.deepcopy(network), recipe, min(recipe.batch_size, len(train[0])), device)
    backend.synchronize()
    rows = []
    for _ in range(epochs):
        start = time.perf_counter()
        classifier.set_train_mode(network, recipe.frozen_batch_norm)
        total = 0.0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = network(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if per_batch:
                scheduler.step()
            total += loss.item() * len(labels)
            (logits.argmax(1) == labels).sum().item()  # as the post did: read at every step
        if not per_batch:
            scheduler.step()
        network.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in val_loader:
                labels = labels.to(device)
                logits = network(images.to(device))
                F.cross_entropy(logits, labels).item()
                correct += int((logits.argmax(1) == labels).sum().item())
        rows.append(
            {
                "seconds": time.perf_counter() - start,
                "loss": total / len(train[1]),
                "accuracy": correct / len(validation[1]),
            }
        )
    return rows


def apart(*arguments: Any, **options: Any) -> list[dict[str, float]]:
    """`baseline` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        return processes.submit(baseline, *arguments, **options).result()


def alone(settings: config.Settings, epochs: int, workers: int) -> None:
    """The baseline by itself, from a folder of images that PIL reads one by one; prints what it found as JSON on the
    last line. What `overheads` starts as a process."""
    recipe = settings.work
    images, labels = _read(settings, "train")
    if recipe.validation == "test":
        train, validation = (images, labels), _read(settings, "test")
    else:
        train, validation = (
            ([images[index] for index in some], labels[some])
            for some in batching.stratified_split(labels, settings.seed)
        )
    weights = bare.weights_of(recipe)
    print(json.dumps(baseline(settings, weights, train, validation, epochs=epochs, workers=workers)))


def compared(name: str, arguments: Any) -> tuple[dict[str, Any], str | None]:
    """All rounds of one recipe; gives the result, and why its ratios don't count where they don't."""
    small = () if arguments.whole else (*SMALL, f"epochs={EPOCHS.get(name, 1)}")
    settings = results.settings_of([*small, *arguments.overrides, f"recipe={name}"])
    recipe = settings.work
    splits = bare.splits_of(settings)
    weights = bare.weights_of(recipe)
    fewer = _fewer(splits, arguments.baseline_limit, recipe.batch_size)
    train, validation = (_pairs(split) for split in fewer.values())
    epochs = recipe.epochs if arguments.accuracy else min(recipe.epochs, arguments.baseline_epochs)
    if arguments.flat:
        epochs = max(epochs, 2)
    scale = len(splits["train"]) / len(fewer["train"])
    theirs, mine, checked = [], [], []
    for turn in range(arguments.rounds):
        seeded = dataclasses.replace(settings, seed=settings.seed + turn)
        rows = apart(seeded, weights, train, validation, epochs=epochs, workers=arguments.workers)
        trained = bare.train(seeded, splits, fixed=True)
        theirs.append(rows)
        mine.append(trained)
        # What was timed must be the same work: of fewer images, ours does those as well.
        checked.append(trained if fewer is splits else bare.train(seeded, fewer))
        seconds = ", ".join(f"{row['seconds'] * scale:.2f}" for row in rows)
        said = "scaled from fewer images" if fewer is not splits else f"{epochs} of {recipe.epochs} measured"
        print(
            f"{name} {turn + 1}: baseline {seconds} s an epoch ({said}), ours {trained['seconds']:.2f} s in all, "
            f"{trained['speed']:,.0f} images/s, {trained['fixed_speed']:,.0f} of one fixed batch",
            flush=True,
        )
    losses = [rows[0]["loss"] for rows in theirs], [each["epochs"][0]["train/loss"] for each in checked]
    accuracies = None
    if epochs == recipe.epochs:
        accuracies = [rows[-1]["accuracy"] for rows in theirs], [each["epochs"][-1]["val/accuracy"] for each in checked]
    judged = accuracies if arguments.accuracy and results.judges(settings, len(validation[1])) else None
    per_epoch = [sum(row["seconds"] for row in rows) / epochs * scale for rows in theirs]
    result: dict[str, Any] = {
        "recipe": name,
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "data": "cifar10" if settings.data.source == "auto" else settings.data.source,
        "images": {split: len(images) for split, images in splits.items()},
        "weights": recipe.weights if weights is None else weights.name,
        "precision": {"baseline": "fp32", "ours": recipe.precision},
        "how": mine[0]["how"],
        "workers": arguments.workers,
        "baseline epochs measured": epochs,
        "baseline images": {split: len(images) for split, images in fewer.items()},
        "baseline seconds by epoch": [[row["seconds"] for row in rows] for rows in theirs],
        "baseline seconds": [seconds * recipe.epochs for seconds in per_epoch],
        "ours seconds": [each["seconds"] for each in mine],
        "ours setup seconds": [each["setup"] for each in mine],
        "ours images/s": [each["speed"] for each in mine],
        "fixed batch images/s": [each["fixed_speed"] for each in mine],
        "first epoch's loss": dict(zip(("baseline", "ours"), losses, strict=True)),
        "accuracy": accuracies and dict(zip(("baseline", "ours"), accuracies, strict=True)),
        "accuracy judged": judged is not None,
        "baseline / ours": results.ratios(
            [seconds * recipe.epochs / each["seconds"] for seconds, each in zip(per_epoch, mine, strict=True)]
        ),
        "real / fixed batch": results.ratios([each["speed"] / each["fixed_speed"] for each in mine]),
    }
    if epochs > 1:
        result["second epoch / first, baseline"] = results.ratios(
            [rows[1]["seconds"] / rows[0]["seconds"] for rows in theirs]
        )
    return result, results.disagreement(losses, judged)


def main(words: Sequence[str]) -> None:
    """Compares the recipes, and prints and writes ratios."""
    parser = results.parser(__doc__)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="which, comma between them (all three)")
    parser.add_argument("--whole", action="store_true", help="the recipes as params.yaml has them, on its data")
    parser.add_argument("--accuracy", action="store_true", help="the baseline does all epochs; accuracies are compared")
    parser.add_argument("--flat", action="store_true", help="the baseline does at least two epochs, to be compared")
    parser.add_argument("--baseline-epochs", type=results.whole, default=1, metavar="N", help="it does at most (1)")
    parser.add_argument("--baseline-limit", type=results.whole, metavar="N", help="images it trains on; time is scaled")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes of its DataLoader ({WORKERS})")
    parser.add_argument("--alone", action="store_true", help="only the baseline, from a folder of images")
    arguments = parser.parse_args(words)
    if arguments.alone:
        alone(results.settings_of(arguments.overrides), arguments.baseline_epochs, arguments.workers)
        return
    conditions = results.conditions_of(results.settings_of(arguments.overrides), arguments.overrides)
    found: dict[str, Any] = {}
    for name in arguments.recipes.split(","):
        found[name], reason = compared(name, arguments)
        if reason:
            sys.exit(f"{name}: {reason}")
    for name, result in found.items():
        epochs = result["epochs"]
        work = f"baseline / ours, {epochs} epoch{'s' * (epochs > 1)}, fp32 / {result['precision']['ours']}"
        if result["baseline images"] != result["images"]:
            work += f", scaled from {result['baseline images']['train']:,} images"
        results.row(name, work, result["baseline / ours"])
        passed = "features of all images" if result["how"]["features"] == "cache" else "training on all images"
        results.row(name, f"images/s, {passed} / one fixed batch", result["real / fixed batch"])
        if "second epoch / first, baseline" in result:
            results.row(name, "the baseline's second epoch / its first", result["second epoch / first, baseline"])
        if result["accuracy"]:
            each = {who: f"{sum(values) / len(values):.2%}" for who, values in result["accuracy"].items()}
            judged = "" if result["accuracy judged"] else " (not judged)"
            print(f"{name:13} validation accuracy: baseline {each['baseline']}, ours {each['ours']}{judged}")
    results.write("blog_baseline", conditions, {"rounds": arguments.rounds, "recipes": found})


def _warm_up(network: torch.nn.Module, recipe: config.Recipe, size: int, device: torch.device) -> None:
    """A step and a validation of a copy, so that no epoch pays for what is done once: libraries loaded, kernels
    chosen."""
    images = torch.zeros(size, 3, recipe.image_size, recipe.image_size, device=device)
    classifier.set_train_mode(network, recipe.frozen_batch_norm)
    loss = F.cross_entropy(network(images), torch.zeros(size, dtype=torch.int64, device=device))
    loss.backward()  # type: ignore[no-untyped-call]
    network.eval()
    with torch.no_grad():
        network(images)


def _pairs(split: batching.Split) -> Pairs:
    """A split as torchvision's CIFAR10 has it."""
    rows = np.arange(len(split.labels)) if split.rows is None else split.rows.numpy()
    return [Image.fromarray(split.inputs[int(row)].numpy()) for row in rows], split.labels.numpy()[rows]


def _fewer(splits: dict[str, batching.Split], limit: int | None, batch_size: int) -> dict[str, batching.Split]:
    """`limit` images of train and as large a share of what is validated on, at random."""
    if limit is None or limit >= len(splits["train"]):
        return splits
    if limit < batch_size:
        sys.exit(f"--baseline-limit: {limit} is less than a batch, whose cost would be another: at least {batch_size}")
    share = limit / len(splits["train"])
    random = np.random.default_rng(0)
    return {
        name: split.take(np.sort(random.permutation(len(split))[: max(1, round(share * len(split)))]))
        for name, split in splits.items()
    }


def _read(settings: config.Settings, split: str) -> Pairs:
    """The images of PATH/split/<class>/, read and decoded one by one; classes and files in order of name."""
    images, labels = [], []
    classes = sorted(path for path in (settings.data.folder / split).iterdir() if path.is_dir())
    for label, folder in enumerate(classes):
        for path in sorted(folder.iterdir())[: settings.data.limit]:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
            labels.append(label)
    return images, np.array(labels)


if __name__ == "__main__":
    main(sys.argv[1:])
