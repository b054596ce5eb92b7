"""Find and decode images: the published CIFAR-10, a folder, or generated pictures. Does not import torch."""

import hashlib
import io
import json
import os
import pickle
import tarfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL import __version__ as PIL_VERSION

from pipeline import config, files, terminal
from pipeline.errors import StageError, UsageError

CACHE = config.ROOT / ".cache"
"""A cache of slow results. It may be deleted at any time."""

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SYNTHETIC_CLASSES = [
    "disc", "ring", "square", "frame", "triangle", "cross", "horizontal", "vertical", "diagonal", "checks",
]  # fmt: skip
SYNTHETIC_VERSION = "synthetic-1"
"""Raise the number when the generator draws other pixels. The workload fingerprint includes it."""

DECODED_VERSION = 1
"""Raise it when decoding gives other pixels, so that old cached images are not used."""

SPLITS = ("train", "test")
MAX_DECODERS = min(4, os.cpu_count() or 1)
"""Threads that decode images of more than SMALL_PIXELS. One thread decodes smaller images faster."""
SMALL_PIXELS = 64 * 64
IMAGES_PER_TASK = 64
SUFFIXES = (".jpg", ".jpeg", ".png")

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Errors that PIL raises for an unreadable file (SyntaxError: for a broken PNG)."""

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def resolve(data: config.Data) -> dict[str, Any]:
    """Find the data, download CIFAR-10 if it is missing, and describe the data without an absolute path.

    Keys: `requested`, `source`, `digest`, `limit`, `classes`, `counts` (images of each split), `size` ([width, height]
    if all images have one size, else null) and `reason` (of a fallback, else null). Raises UsageError for data that
    the user must correct, StageError if CIFAR-10 can't be downloaded.
    """
    from pipeline.data import fetch  # imported here for a fast start-up: decoded images need no requests

    source: str = data.source
    reason = None
    if source == "auto":
        source, reason = _resolve_auto(data)
    elif source == "cifar10":
        fetch.fetch_cifar10(data.folder, data.mirrors, data.timeout_seconds)
    if source == "folder":
        facts = _folder_facts(data)
    elif source == "cifar10":
        facts = _fixed_facts(f"md5:{fetch.ARCHIVE_MD5}", CIFAR10_CLASSES, (5000, 1000), data.limit)
    else:
        facts = _fixed_facts(SYNTHETIC_VERSION, SYNTHETIC_CLASSES, (500, 100), data.limit)
    return {"requested": data.source, "source": source, "reason": reason, "limit": data.limit} | facts


def decode(data: config.Data, inputs: dict[str, Any], split: str, image_size: int) -> tuple[Images, Labels]:
    """The images of a split, (N, H, W, 3) uint8, and their labels, (N,) int64, in a fixed order.

    `inputs` is the result of `resolve`. A folder's images keep their size if all have the same; else each is
    squashed to `image_size` squared. Images are decoded once: later calls map the cached arrays into memory. Raises
    UsageError with the name of an unreadable file, StageError if the data changed since `resolve`.
    """
    if inputs["source"] == "folder" and _folder_facts(data)["digest"] != inputs["digest"]:
        raise StageError("the images changed since `download` looked at them: run it again (`dvc repro`)")
    cached = _cached_folder(inputs, split, image_size)
    try:
        images = np.load(cached / "images.npy", mmap_mode="c")  # "c": torch warns about read-only arrays
        return images, np.load(cached / "labels.npy")
    except (OSError, ValueError, EOFError):
        images, labels = _decode(data, inputs, split, image_size)
    try:
        for name, array in (("images", images), ("labels", labels)):
            with files.atomic_write(cached / f"{name}.npy") as aside, aside.open("wb") as file:
                np.save(file, array)
    except StageError as error:
        terminal.say_error(f"decoded images are not cached: {error}")
    return images, labels


def _cached_folder(inputs: dict[str, Any], split: str, image_size: int) -> Path:
    """The cache folder of a split's decoded images. Its name is a hash of everything that decides their pixels."""
    size = inputs["size"] or [image_size, image_size]
    pixels = [DECODED_VERSION, PIL_VERSION, inputs["digest"], inputs["limit"], split, size]
    return CACHE / "decoded" / hashlib.sha256(json.dumps(pixels).encode()).hexdigest()[:32]


def _decode(data: config.Data, inputs: dict[str, Any], split: str, image_size: int) -> tuple[Images, Labels]:
    if inputs["source"] == "folder":
        return _folder_images(data, inputs["size"], split, image_size)
    if inputs["source"] == "cifar10":
        return _cifar10_images(data, split)
    return _synthetic_images(split, data.limit)


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


# folder


def list_folder(data: config.Data) -> dict[str, dict[str, list[str]]]:
    """Split -> class -> paths of its images, relative to `data.path`. Classes and files are sorted by name."""
    listing: dict[str, dict[str, list[str]]] = {}
    for split in SPLITS:
        folder = data.folder / split
        if not folder.is_dir():
            raise UsageError(
                f'data.path: "{data.path}" has no folder {split}: expected PATH/train/<class>/ and PATH/test/<class>/'
            )
        classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
        listing[split] = {name: _list_class(data, f"{split}/{name}") for name in classes}
    for split, other in (("train", "test"), ("test", "train")):
        if missing := [name for name in listing[split] if name not in listing[other]]:
            raise UsageError(f"data.path: class {', '.join(missing)} is in {split}/ but not in {other}/")
    if len(listing["train"]) < 2:
        raise UsageError(f"data.path: {len(listing['train'])} classes in train/: expected at least 2")
    return listing


def _list_class(data: config.Data, folder: str) -> list[str]:
    paths = sorted(
        f"{folder}/{entry.name}"
        for entry in os.scandir(data.folder / folder)
        if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
    )
    if not paths:
        raise UsageError(f"data.path: class {folder} holds no image ({', '.join(SUFFIXES)})")
    return paths[: data.limit]


def _folder_facts(data: config.Data) -> dict[str, Any]:
    """Digest, size, classes and counts. Digest and size are slow, so they are cached by file names, sizes and times."""
    listing, folder = list_folder(data), data.folder
    paths = [path for split in SPLITS for group in listing[split].values() for path in group]
    stats = []
    for path in paths:
        with _image_errors(path):
            status = os.stat(f"{folder}/{path}")  # noqa: PTH116 (as Path objects, 60,000 take a second)
        stats.append((path, status.st_size, status.st_mtime_ns))
    cached = CACHE / "folders" / f"{hashlib.sha256(repr(stats).encode()).hexdigest()[:32]}.json"
    if not cached.exists():
        files.write_json(cached, _digest_and_size(folder, paths))
    facts: dict[str, Any] = json.loads(cached.read_text(encoding="utf-8"))
    return facts | {
        "classes": list(listing["train"]),
        "counts": {split: sum(map(len, listing[split].values())) for split in SPLITS},
    }


def _digest_and_size(folder: Path, paths: list[str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    sizes = set()
    for path in paths:
        with _image_errors(path):
            content = Path(f"{folder}/{path}").read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                sizes.add(image.size)
            digest.update(f"{path}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return {"digest": f"sha256:{digest.hexdigest()}", "size": list(sizes.pop()) if len(sizes) == 1 else None}


@contextmanager
def _image_errors(path: str) -> Iterator[None]:
    """Raise UsageError with the relative `path` if the image inside can't be read."""
    try:
        yield
    except UnicodeEncodeError:
        raise UsageError(f"data.path: {path!a} is no Unicode name: rename it") from None
    except UNREADABLE as error:
        why = getattr(error, "strerror", None) or str(error)  # strerror: without the path
        if isinstance(error, UnidentifiedImageError):
            why = "no image format"
        raise UsageError(f"data.path: {path} is not a readable image ({why})") from None


def _folder_images(data: config.Data, size: list[int] | None, split: str, image_size: int) -> tuple[Images, Labels]:
    groups = list(list_folder(data)[split].values())
    paths = [path for group in groups for path in group]
    labels = np.repeat(np.arange(len(groups), dtype=np.int64), [len(group) for group in groups])
    folder = data.folder
    width, height = size or (image_size, image_size)
    images = np.empty((len(paths), height, width, 3), np.uint8)

    def decode_some(begin: int) -> None:
        for index, path in enumerate(paths[begin : begin + IMAGES_PER_TASK], begin):
            with _image_errors(path), Image.open(f"{folder}/{path}") as image:
                pixels = image.convert("RGB")
            if pixels.size != (width, height):
                pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
            images[index] = np.asarray(pixels)

    threads = 1 if size and width * height <= SMALL_PIXELS else MAX_DECODERS
    # Set once outside the threads: they share the filters, and would restore each other's.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore", UserWarning)  # PIL's, about odd metadata and transparency
        for _ in pool.map(decode_some, range(0, len(paths), IMAGES_PER_TASK)):
            pass
    return images, labels


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
