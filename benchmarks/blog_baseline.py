"""The blog post's way of training against ours: the same work on the same images, in turns, as a ratio.

python -m benchmarks.blog_baseline [-S key=value ...]; the settings are the pipeline's. The baseline is what the post's
script did, written afresh: images resized by PIL one by one in a DataLoader, float32, every image through the whole
network in every epoch, the loss and the accuracy read (`.item()`) at every step. It ends with status 1 where the two
disagree about the loss: no speed without parity.

Compared are seconds of an epoch with its validation (`blog`), and of all epochs of a frozen network with its
BatchNorm in evaluation mode (`linear-probe`), for which the baseline's one measured epoch counts as many times as
there are epochs: its cost does not change.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from pipeline import backends, cli, config, data, download, hardware, model, optim, sources, train

ROUNDS = 3
SMALL = [
    "weights=random", "data.source=synthetic", "data.limit=60", "batch_size=200",
    "scheduler=constant", "lr=1.0e-5", "warmup_epochs=0",  # so little is learnt that the losses can be compared
]  # fmt: skip


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Images as PIL has them, transformed one by one when they are asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Any):
        self.images = [Image.fromarray(image) for image in images]
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def baseline(settings: config.Settings, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Seconds of one epoch with its validation, and the epoch's mean training loss."""
    recipe, device = settings.work, backends.select(settings.device).device
    torch.manual_seed(settings.seed)
    classes = int(splits["train"][1].max()) + 1
    net = model.build(recipe, classes, None)
    transform = Compose([Resize((recipe.image_size, recipe.image_size)), ToTensor(), Normalize(*net.normalization)])
    loaders = {
        name: DataLoader(Pictures(*split, transform), recipe.batch_size, shuffle=name == "train", num_workers=2)
        for name, split in splits.items()
    }
    network = net.net.to(device)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    options = recipe.resolved()["optimizer_options"]
    steps = len(loaders["train"]) * recipe.epochs
    optimizer = optim.build_optimizer(recipe.optimizer, parameters, lr=recipe.lr, options=options, total_steps=steps)
    start = time.perf_counter()
    model.set_mode(network, recipe.frozen_batch_norm)
    total = 0.0
    for images, labels in loaders["train"]:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        logits = network(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.item() * len(labels)
        (logits.argmax(1) == labels).sum().item()  # as the post did: read at every step
    network.eval()
    with torch.no_grad():
        for images, labels in loaders["validation"]:
            logits = network(images.to(device))
            F.cross_entropy(logits, labels.to(device)).item()
            (logits.argmax(1) == labels.to(device)).sum().item()
    return time.perf_counter() - start, total / len(splits["train"][1])


def ours(settings: config.Settings, folder: Path) -> tuple[float, float]:
    """Seconds of training and validation, all epochs, data in host memory to the last one; the first epoch's loss."""
    for stage in (hardware, download):
        stage.run(settings, folder)
    record = train.run(settings, folder)
    return record["metrics"]["time/total_seconds"], record["epochs"][0]["figures"]["train/loss"]


def images_of(settings: config.Settings) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The images that `train` trains on and validates on."""
    found = sources.resolve(settings.data)
    images, labels = sources.decode(settings.data, found, "train", settings.work.image_size)
    if settings.work.validation == "test":
        validation = sources.decode(settings.data, found, "test", settings.work.image_size)
        return {"train": (images, labels), "validation": validation}
    kept, held_out = data.stratified(labels, settings.seed)
    return {"train": (images[kept], labels[kept]), "validation": (images[held_out], labels[held_out])}


def main(arguments: list[str]) -> None:
    """Compares both recipes, ROUNDS times in turns; prints ratios, and all of it as JSON on the last line."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(folder).as_posix()}/bench.db"
        for name, epochs in (("blog", 1), ("linear-probe", 10)):
            chosen = [f"recipe={name}", *SMALL, f"epochs={epochs}"]
            words = [word for setting in chosen for word in ("-S", setting)]
            settings = cli.settings_from([*words, *arguments], __doc__ or "", "")
            splits = images_of(settings)
            ratios = []
            for turn in range(ROUNDS):
                theirs, their_loss = baseline(settings, splits)
                mine, my_loss = ours(settings, Path(folder) / f"{name}-{turn}")
                if abs(their_loss - my_loss) > 0.02 * their_loss:
                    sys.exit(f"{name}: the losses disagree, {their_loss:.4f} and {my_loss:.4f}: not the same work")
                ratios.append(theirs * settings.work.epochs / mine)
                print(f"{name} {turn + 1}: baseline {theirs:.2f} s an epoch, ours {mine:.2f} s in all", flush=True)
            results[name] = {"epochs": settings.work.epochs, "precision": settings.work.precision, "ratios": ratios}
    for name, result in results.items():
        spread = f"{min(result['ratios']):.2f} to {max(result['ratios']):.2f}"
        print(f"{name}: {statistics.median(result['ratios']):.2f} times as fast ({spread}, n = {ROUNDS})")
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
