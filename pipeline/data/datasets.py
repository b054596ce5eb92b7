"""Find and decode images: the published CIFAR-10, a folder, or generated pictures. Does not import torch."""

import hashlib
import json
import pickle
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import __version__ as PIL_VERSION

from pipeline import config, files, terminal
from pipeline.data import folder
from pipeline.data.folder import SPLITS
from pipeline.data.images import Images
from pipeline.errors import StageError, UsageError

CACHE = config.ROOT / ".cache"
"""A cache of slow results. It may be deleted at any time."""

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SYNTHETIC_CLASSES = [
    "disc", "ring", "square", "frame", "triangle", "cross", "horizontal", "vertical", "diagonal", "checks",
]  # fmt: skip
SYNTHETIC_VERSION = "synthetic-1"
"""Raise the number when the generator draws other pixels. The workload fingerprint includes it."""

DECODED_VERSION = 2
"""Raise it when decoding gives other pixels, so that old cached images are not used."""

Labels = NDArray[np.int64]


def resolve(data: config.Data, image_size: int) -> dict[str, Any]:
    """Find the data, download CIFAR-10 if it is missing, and describe the data without an absolute path.

    Keys: `requested`, `source`, `digest`, `limit`, `classes`, `counts` (images of each split), `size` ([width, height]
    if all images have one size, else null) and `reason` (of a fallback, else null); of a folder also `left_out` (files
    that are not used, by kind). A folder's images are decoded for `image_size`, so that all unreadable ones are found.
    Raises UsageError for data that the user must correct, StageError if CIFAR-10 can't be downloaded.
    """
    from pipeline.data import fetch  # imported here for a fast start-up: decoded images need no requests

    source: str = data.source
    reason = None
    if source == "auto":
        source, reason = _resolve_auto(data)
    elif source == "cifar10":
        fetch.fetch_cifar10(data.folder, data.mirrors, data.timeout_seconds)
    if source == "folder":
        facts = _folder_facts(data, image_size)
    elif source == "cifar10":
        facts = _fixed_facts(f"md5:{fetch.ARCHIVE_MD5}", CIFAR10_CLASSES, (5000, 1000), data.limit)
    else:
        facts = _fixed_facts(SYNTHETIC_VERSION, SYNTHETIC_CLASSES, (500, 100), data.limit)
    return {"requested": data.source, "source": source, "reason": reason, "limit": data.limit} | facts


def decode(data: config.Data, inputs: dict[str, Any], split: str, image_size: int) -> tuple[Images, Labels]:
    """The images of a split, (N, H, W, 3) uint8, and their labels, (N,) int64, in a fixed order.

    `inputs` is the result of `resolve`. Small images of a folder keep their size if all have the same; all others are
    squashed to `image_size` squared. Images are decoded once: later calls map the cached arrays into memory. Raises
    UsageError with the names of unreadable files, StageError if the data changed since `resolve`.
    """
    if inputs["source"] == "folder":
        facts, failures = folder.describe(data, folder.list_folder(data), CACHE)
        if failures:
            raise folder.UnreadableError(failures)
        if facts["digest"] != inputs["digest"]:
            raise StageError("the images changed since `download` looked at them: run it again (`dvc repro`)")
    return _load(data, inputs, split, image_size)


def _load(data: config.Data, inputs: dict[str, Any], split: str, image_size: int) -> tuple[Images, Labels]:
    """A split from the cache. If it is missing, decode it into the cache, or into memory if that can't be written."""
    cached = _cached_folder(inputs, split, image_size)
    try:
        return _open(cached)
    except (OSError, ValueError, EOFError):
        labels, shape, chunks = _decode(data, inputs, split, image_size)
    try:
        _write(cached, labels, shape, chunks)
    except UsageError:
        raise
    except StageError as error:
        terminal.say_error(f"decoded images are not cached: {error}")
        labels, _, chunks = _decode(data, inputs, split, image_size)
        return np.concatenate(list(chunks)), labels
    return _open(cached)


def _open(cached: Path) -> tuple[Images, Labels]:
    images = np.load(cached / "images.npy", mmap_mode="c")  # "c": torch warns about read-only arrays
    return images, np.load(cached / "labels.npy")


def _write(cached: Path, labels: Labels, shape: Sequence[int], chunks: Iterable[Images]) -> None:
    """Write a split into the cache, some images at a time: together they may be larger than the memory."""
    with files.atomic_write(cached / "images.npy") as aside, aside.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(chunk.tobytes())
    with files.atomic_write(cached / "labels.npy") as aside, aside.open("wb") as file:
        np.save(file, labels)


def _cached_folder(inputs: dict[str, Any], split: str, image_size: int) -> Path:
    """The cache folder of a split's decoded images. Its name is a hash of everything that decides their pixels."""
    size = folder.decoded_size(inputs["size"], image_size)
    pixels = [DECODED_VERSION, PIL_VERSION, inputs["digest"], inputs["limit"], split, size]
    return CACHE / "decoded" / hashlib.sha256(json.dumps(pixels).encode()).hexdigest()[:32]


def _decode(
    data: config.Data, inputs: dict[str, Any], split: str, image_size: int
) -> tuple[Labels, tuple[int, ...], Iterable[Images]]:
    """The labels of a split, the shape of one image, and the images, some at a time."""
    if inputs["source"] == "folder":
        groups = folder.list_folder(data).paths[split]
        labels = np.repeat(np.arange(len(groups), dtype=np.int64), [len(group) for group in groups.values()])
        width, height = folder.decoded_size(inputs["size"], image_size)
        return labels, (height, width, 3), folder.decode(data, groups, inputs["size"], (width, height))
    if inputs["source"] == "cifar10":
        images, labels = _cifar10_images(data, split)
    else:
        images, labels = _synthetic_images(split, data.limit)
    return labels, images.shape[1:], [images]


def _folder_facts(data: config.Data, image_size: int) -> dict[str, Any]:
    """Describe a folder and decode all its images. Raises UnreadableError with all that can't be read."""
    listing = folder.list_folder(data)
    if listing.junk:
        terminal.say(f"ignored  {folder.in_words(listing.junk)}")
    facts, failures = folder.describe(data, listing, CACHE)
    for split in SPLITS:
        try:
            if failures:  # there is no digest to cache the others by
                size = (image_size, image_size)
                deque(folder.decode(data, listing.paths[split], None, size), maxlen=0)
            else:
                _load(data, {"source": "folder", "limit": data.limit} | facts, split, image_size)
        except folder.UnreadableError as error:
            failures = failures | error.reasons
    if failures:
        raise folder.UnreadableError(failures)
    return facts


def _resolve_auto(data: config.Data) -> tuple[str, str | None]:
    """The source that `auto` means, and why it is a fallback."""
    from pipeline.data import fetch

    if not (data.folder / fetch.ARCHIVE).exists() and not fetch.reachable(data.mirrors):
        return "synthetic", "no mirror of CIFAR-10 answers"
    try:
        fetch.fetch_cifar10(data.folder, data.mirrors, data.timeout_seconds)
    except UsageError:
        raise  # the user put a wrong archive there, and must correct it
    except StageError as error:
        return "synthetic", str(error).replace(str(data.folder), config.public_path(data.path))
    return "cifar10", None


def _fixed_facts(
    digest: str, classes: list[str], images_per_class: tuple[int, int], limit: int | None
) -> dict[str, Any]:
    counts = {split: len(classes) * min(n, limit or n) for split, n in zip(SPLITS, images_per_class, strict=True)}
    return {"digest": digest, "classes": classes, "counts": counts, "size": [32, 32]}


# cifar10


def _cifar10_images(data: config.Data, split: str) -> tuple[Images, Labels]:
    from pipeline.data import fetch

    # The archive holds pickles, which are safe to load only with the published digest.
    archive = fetch.fetch_cifar10(data.folder, (), data.timeout_seconds)
    names = [f"data_batch_{number}" for number in range(1, 6)] if split == "train" else ["test_batch"]
    batches = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            if name in names and (file := tar.extractfile(member)):
                batches[name] = pickle.load(file, encoding="latin1")
    images = np.concatenate([batches[name]["data"] for name in names]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = np.concatenate([np.asarray(batches[name]["labels"], np.int64) for name in names])
    if data.limit is not None:
        rows = np.concatenate([np.flatnonzero(labels == label)[: data.limit] for label in range(len(CIFAR10_CLASSES))])
        images, labels = images[rows], labels[rows]
    return images, labels


# synthetic


def _synthetic_images(split: str, limit: int | None) -> tuple[Images, Labels]:
    """Draw ten shapes and patterns with random positions, sizes, colours and noise.

    Uses only integers, so that the pixels are the same everywhere: NumPy guarantees PCG64's stream, but not that of
    floating-point functions.
    """
    count = (500, 100)[SPLITS.index(split)]
    count = min(count, limit or count)
    labels = np.arange(len(SYNTHETIC_CLASSES), dtype=np.int64)
    images = np.stack([picture for label in labels for picture in islice(_pictures(int(label), split), count)])
    return images, np.repeat(labels, count)


def _pictures(label: int, split: str) -> Iterator[Images]:
    stream = np.random.PCG64([label, SPLITS.index(split)])
    random = np.random.Generator(stream)
    y, x = np.mgrid[0:32, 0:32]
    while True:
        radius, cx, cy, period, phase = (int(v) for v in random.integers((7, 10, 10, 4, 0), (12, 22, 22, 8, 8)))
        dx, dy = x - cx, y - cy
        square = np.maximum(abs(dx), abs(dy))
        circle = dx * dx + dy * dy
        mask = (
            circle <= radius**2,
            (circle <= radius**2) & (circle >= (radius - 3) ** 2),
            square <= radius - 1,
            (square <= radius - 1) & (square >= radius - 3),
            (abs(dy) <= radius) & (2 * abs(dx) <= dy + radius),
            (np.minimum(abs(dx), abs(dy)) <= 1) & (square <= radius),
            (y + phase) // period % 2 == 0,
            (x + phase) // period % 2 == 0,
            (x + y + phase) // period % 2 == 0,
            ((x + phase) // period + (y + phase) // period) % 2 == 0,
        )[label]
        front, back = random.integers(0, 256, (2, 3))
        while abs(front - back).max() < 96:  # until the shape contrasts with its background
            front = random.integers(0, 256, 3)
        picture = np.where(mask[..., None], front, back) + random.integers(-40, 41, (32, 32, 3))
        yield picture.clip(0, 255).astype(np.uint8)
