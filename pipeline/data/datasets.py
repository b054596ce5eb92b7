"""Where images come from: the published CIFAR-10, a folder, or generated pictures. No torch until it is needed."""

import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL import __version__ as PIL_VERSION

from pipeline import config, files
from pipeline.data import fetch
from pipeline.errors import StageError, UsageError

CACHE = config.ROOT / ".cache"
"""What can be found out again, but slowly; may be deleted at any time."""

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SYNTHETIC_CLASSES = [
    "disc",
    "ring",
    "square",
    "frame",
    "triangle",
    "cross",
    "horizontal",
    "vertical",
    "diagonal",
    "checks",
]
SYNTHETIC_VERSION = "synthetic-1"
"""Raised when the generator draws other pixels: it stands for the data in the workload."""

DECODED_VERSION = 1
"""Raised when decoding gives other pixels, so that none kept before are taken."""

SPLITS = ("train", "test")
DECODERS = min(4, os.cpu_count() or 1)
"""Threads that decode images larger than SMALL."""
SMALL = 64 * 64
"""Pixels of images that one thread decodes: more get in each other's way in Python. 32 x 32 takes 0.10 ms an image in
one thread and 0.14 to 0.24 in two or four (2 cores)."""
DECODED_AT_ONCE = 64
"""Images that a thread takes."""
SUFFIXES = (".jpg", ".jpeg", ".png")

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises for a file that it can't read; SyntaxError: for a broken PNG."""

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def resolve(data: config.Data) -> dict[str, Any]:
    """Finds (and for cifar10 fetches) the data; says what it is, without an absolute path.

    Keys: `requested`, `source`, `digest`, `limit`, `classes`, `counts` (images of each split), `size` ([width,
    height] where all images have one, else null) and `reason` (of a fallback, else null).
    Raises UsageError for data that the user must put right, StageError where cifar10 can't be had.
    """
    source: str = data.source
    reason = None
    if source == "auto":
        source, reason = _auto(data)
    elif source == "cifar10":
        fetch.cifar10(data.folder, data.mirrors, data.timeout_seconds)
    if source == "folder":
        facts = _folder_facts(data)
    elif source == "cifar10":
        facts = _generated_facts(f"md5:{fetch.ARCHIVE_MD5}", CIFAR10_CLASSES, (5000, 1000), data.limit)
    else:
        facts = _generated_facts(SYNTHETIC_VERSION, SYNTHETIC_CLASSES, (500, 100), data.limit)
    return {"requested": data.source, "source": source, "reason": reason, "limit": data.limit} | facts


def decode(data: config.Data, inputs: dict[str, Any], split: str, image_size: int) -> tuple[Images, Labels]:
    """The images of a split, (N, H, W, 3) uint8, and their labels, (N,) int64, in a fixed order.

    `inputs` is what `resolve` gave. A folder's images keep their size where all have one, else each is squashed
    to `image_size` squared. Decoded once: later calls map what was kept into memory, if the source is unchanged.
    Raises UsageError naming an unreadable file, StageError where the source is no longer what `inputs` says.
    """
    if inputs["source"] == "folder" and _folder_facts(data)["digest"] != inputs["digest"]:
        raise StageError("the images changed since `download` looked at them: run it again (`dvc repro`)")
    if inputs["source"] == "cifar10":
        fetch.cifar10(data.folder, (), data.timeout_seconds)  # pickles: loaded only where their digests match
    kept = _kept_as(inputs, split, image_size)
    try:
        images = np.load(kept / "images.npy", mmap_mode="c")  # "c": torch warns of arrays that can't be written
        return images, np.load(kept / "labels.npy")
    except (OSError, ValueError, EOFError):
        images, labels = _decoded(data, inputs, split, image_size)
    try:
        for name, array in (("images", images), ("labels", labels)):
            with files.atomic_write(kept / f"{name}.npy") as aside, aside.open("wb") as file:
                np.save(file, array)
    except StageError as error:
        print(f"decoded images are not kept: {error}", file=sys.stderr)
    return images, labels


def _kept_as(inputs: dict[str, Any], split: str, image_size: int) -> Path:
    """The folder of a split's decoded images: by all that decides their pixels, the decoder's version included."""
    size = inputs["size"] or [image_size, image_size]
    pixels = [DECODED_VERSION, PIL_VERSION, inputs["digest"], inputs["limit"], split, size]
    return CACHE / "decoded" / hashlib.sha256(json.dumps(pixels).encode()).hexdigest()[:32]


def _decoded(data: config.Data, inputs: dict[str, Any], split: str, image_size: int) -> tuple[Images, Labels]:
    if inputs["source"] == "folder":
        return _folder_images(data, inputs, split, image_size)
    if inputs["source"] == "cifar10":
        return _cifar10_images(data, split)
    return _synthetic_images(split, data.limit)


def _auto(data: config.Data) -> tuple[str, str | None]:
    there = (data.folder / fetch.ARCHIVE).exists() or fetch.cifar10_present(data.folder)
    if not there and not fetch.any_reachable(data.mirrors):
        return "synthetic", "no mirror of CIFAR-10 answers"
    try:
        fetch.cifar10(data.folder, data.mirrors, data.timeout_seconds)
    except UsageError:
        raise  # an archive put there by hand is wrong: for its owner to put right
    except StageError as error:
        return "synthetic", str(error).replace(str(data.folder), config.shareable(data.path))
    return "cifar10", None


def _generated_facts(digest: str, classes: list[str], each: tuple[int, int], limit: int | None) -> dict[str, Any]:
    counts = {split: len(classes) * min(n, limit or n) for split, n in zip(SPLITS, each, strict=True)}
    return {"digest": digest, "classes": classes, "counts": counts, "size": [32, 32]}


# folder


def _folder_listing(data: config.Data) -> dict[str, list[list[str]]]:
    """For each split, the paths below `data.path` of each class's images, classes and files in order of name."""
    listing: dict[str, list[list[str]]] = {}
    names: dict[str, list[str]] = {}
    for split in SPLITS:
        folder = data.folder / split
        if not folder.is_dir():
            raise UsageError(
                f'data.path: "{data.path}" has no folder {split}: expected PATH/train/<class>/ and PATH/test/<class>/'
            )
        names[split] = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
        listing[split] = []
        for name in names[split]:
            found = sorted(
                f"{split}/{name}/{entry.name}"
                for entry in os.scandir(folder / name)
                if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
            )
            if not found:
                raise UsageError(f"data.path: class {split}/{name} holds no image ({', '.join(SUFFIXES)})")
            for path in found:
                if not path.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in path):
                    raise UsageError(f"data.path: {path!a} is no Unicode name: rename it")
            listing[split].append(found[: data.limit])
    for here, there in (("train", "test"), ("test", "train")):
        missing = [name for name in names[here] if name not in names[there]]
        if missing:
            raise UsageError(f"data.path: class {', '.join(missing)} is in {here}/ but not in {there}/")
    if len(names["train"]) < 2:
        raise UsageError(f"data.path: {len(names['train'])} classes in train/: expected at least 2")
    return listing


def _folder_facts(data: config.Data) -> dict[str, Any]:
    """Digest and size take seconds for many files, so they are kept under a hash of names, sizes and times."""
    listing, folder = _folder_listing(data), data.folder
    paths = [path for split in SPLITS for group in listing[split] for path in group]
    stats = [(path, _stat(folder, path)) for path in paths]
    signature = hashlib.sha256(repr([(p, s.st_size, s.st_mtime_ns) for p, s in stats]).encode()).hexdigest()
    kept = CACHE / "folders" / f"{signature[:32]}.json"
    if not kept.exists():
        files.write_json(kept, _digest_and_size(folder, paths))
    known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return known | {
        "classes": [Path(group[0]).parent.name for group in listing["train"]],
        "counts": {split: sum(map(len, listing[split])) for split in SPLITS},
    }


def _digest_and_size(folder: Path, paths: list[str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    sizes = set()
    for path in paths:
        content = _content(folder, path)
        with _opened(io.BytesIO(content), path) as image:
            sizes.add(image.size)
        digest.update(f"{path}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return {"digest": f"sha256:{digest.hexdigest()}", "size": list(sizes.pop()) if len(sizes) == 1 else None}


def _stat(folder: Path, path: str) -> os.stat_result:
    try:
        return os.stat(f"{folder}/{path}")  # noqa: PTH116 (as Path objects, 60,000 take a second)
    except OSError as error:
        raise _unreadable(path, error) from None


def _content(folder: Path, path: str) -> bytes:
    try:
        return Path(f"{folder}/{path}").read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _opened(file: io.BytesIO, shown: str) -> Image.Image:
    try:
        return Image.open(file)
    except UNREADABLE as error:
        raise _unreadable(shown, error) from None


def _unreadable(shown: str, error: Exception) -> UsageError:
    why = getattr(error, "strerror", None) or str(error)  # without the absolute path
    if isinstance(error, UnidentifiedImageError):
        why = "no image format"
    return UsageError(f"data.path: {shown} is not a readable image ({why})")


def _folder_images(data: config.Data, inputs: dict[str, Any], split: str, image_size: int) -> tuple[Images, Labels]:
    groups, folder = _folder_listing(data)[split], data.folder
    width, height = inputs["size"] or (image_size, image_size)
    paths = [path for group in groups for path in group]
    images = np.empty((len(paths), height, width, 3), np.uint8)
    labels = np.repeat(np.arange(len(groups), dtype=np.int64), [len(group) for group in groups])

    def fill(begin: int) -> None:
        for index, path in enumerate(paths[begin : begin + DECODED_AT_ONCE], begin):
            with _opened(io.BytesIO(_content(folder, path)), path) as image:
                try:
                    pixels = image.convert("RGB")
                except UNREADABLE as error:
                    raise _unreadable(path, error) from None
            if pixels.size != (width, height):
                pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
            images[index] = np.asarray(pixels)

    threads = 1 if inputs["size"] and width * height <= SMALL else DECODERS
    # around all threads, which share the filters: left by one of them, these would be put back wrong
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore", UserWarning)  # PIL's on odd metadata and transparency: pixels count
        for _ in pool.map(fill, range(0, len(paths), DECODED_AT_ONCE)):
            pass
    return images, labels


# cifar10


def _cifar10_images(data: config.Data, split: str) -> tuple[Images, Labels]:
    from torchvision.datasets import CIFAR10  # takes seconds: not before it is needed

    published = CIFAR10(data.folder, train=split == "train")
    labels = np.asarray(published.targets, np.int64)
    if data.limit is not None:
        taken = [np.flatnonzero(labels == label)[: data.limit] for label in range(len(CIFAR10_CLASSES))]
        keep = np.concatenate(taken)
        return published.data[keep], labels[keep]
    return published.data, labels


# synthetic


def _synthetic_images(split: str, limit: int | None) -> tuple[Images, Labels]:
    """Ten shapes and patterns at random places, sizes and colours, in noise. Integers alone, so the same pixels
    everywhere: NumPy promises PCG64's stream, not that of floating-point functions."""
    each = (500, 100)[SPLITS.index(split)]
    each = min(each, limit or each)
    images = np.empty((len(SYNTHETIC_CLASSES) * each, 32, 32, 3), np.uint8)
    for label in range(len(SYNTHETIC_CLASSES)):
        images[label * each : (label + 1) * each] = np.stack(list(islice(_pictures(label, split), each)))
    return images, np.repeat(np.arange(len(SYNTHETIC_CLASSES), dtype=np.int64), each)


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
        while abs(front - back).max() < 96:  # a shape that can be told from its ground
            front = random.integers(0, 256, 3)
        picture = np.where(mask[..., None], front, back) + random.integers(-40, 41, (32, 32, 3))
        yield picture.clip(0, 255).astype(np.uint8)
