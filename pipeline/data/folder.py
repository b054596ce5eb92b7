"""List, check and decode a folder of images, `PATH/{train,test}/<class>/**` (docs/data.md). Does not import torch."""

import errno
import hashlib
import io
import json
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from pipeline import config, files, terminal
from pipeline.data import images
from pipeline.errors import StageError, UsageError

SPLITS = ("train", "test")

KEPT_PIXELS = 256 * 256
"""Images of one size are kept at it if they have no more pixels than this or than the training's."""

MAX_THREADS = min(4, os.cpu_count() or 1)
SMALL_BYTES = 16 * 1024
SMALL_SIDE = 64
"""One thread reads files of less than this mean size, or pixels a side, faster than several."""
CHUNK = 256
CHUNK_BYTES = 64 * 2**20
"""At most so many images, of so many bytes, are in memory before they are written to the cache."""

FACTS_VERSION = 2
"""Raise it when digests or sizes change, so that old cached ones are not used."""

JUNK_FOLDERS = {
    "@eaDir": "thumbnails of a Synology disk",
    "__MACOSX": "what macOS puts into ZIP files",
    "#recycle": "a network disk's bin",
    "$RECYCLE.BIN": "Windows' bin",
    "System Volume Information": "Windows' own",
    "lost+found": "the file system's own",
}
JUNK_FILES = ("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r")
"""Folders and files (in lower case) that systems leave behind. They are never images of a class."""

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".7z", ".rar")

OTHER_NAMES = {
    "train": ("training", "train_images", "seg_train", "train_set"),
    "test": ("val", "valid", "validation", "testing", "test_images", "seg_test", "test_set", "test1", "dev"),
}
"""What other data sets call a split, in lower case."""

T = TypeVar("T")


@dataclass
class Listing:
    """Split -> class -> paths of its images relative to `data.path`, all sorted; and what is left out, by kind.

    `left_out` counts files that might have been meant for the training, `junk` those that systems leave behind.
    """

    paths: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    junk: Counter[str] = field(default_factory=Counter)


class UnreadableError(UsageError):
    """Images can't be read. `reasons`: why, by relative path."""

    def __init__(self, reasons: dict[str, str]):
        self.reasons = reasons
        shown = [f"{printable(path)} ({reason})" for path, reason in list(reasons.items())[:10]]
        if len(reasons) == 1:
            text = f"{shown[0].replace(' (', ' is not a readable image (', 1)}"
        else:
            text = f"{len(reasons):,} images are not readable: {', '.join(shown)}"
            text += ", ..." if len(reasons) > len(shown) else ""
        super().__init__(f"data.path: {text}")


def in_words(kinds: dict[str, int]) -> str:
    """Counts by kind in words: `12 .heic, 3 .txt`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())


# --- listing


def list_folder(data: config.Data) -> Listing:
    """Find the images. Class names are in Unicode's composed form (NFC), so that macOS's and others' are one.

    Raises UsageError, in one line with the path, for a layout that is not usable and for what can't be read.
    """
    try:
        top = sorted(entry.name for entry in os.scandir(data.folder) if os.path.isdir(entry))  # noqa: PTH112
    except OSError as error:
        raise _path_error(json.dumps(data.path), error) from None
    for split in SPLITS:
        if split not in top:
            _refuse_split(data, split, top)
    listing = Listing()
    for split in SPLITS:
        listing.paths[split] = _list_split(data, split, listing)
    for name in top:
        if name.lower() in OTHER_NAMES["test"]:
            listing.left_out[f"folder {printable(name)}/ (only train/ and test/ are used)"] += 1
        elif name in JUNK_FOLDERS:
            listing.junk[f"folder {name} ({JUNK_FOLDERS[name]})"] += 1
    for split, other in (("train", "test"), ("test", "train")):
        if missing := [name for name in listing.paths[split] if name not in listing.paths[other]]:
            names = ", ".join(map(printable, missing[:10])) + (", ..." if len(missing) > 10 else "")
            raise UsageError(f"data.path: class {names} is in {split}/ but not in {other}/")
    return listing


def _refuse_split(data: config.Data, split: str, folders: Sequence[str]) -> NoReturn:
    """Say what there is in place of `split`, and what to do."""
    other = [name for name in folders if name.lower() in (split, *OTHER_NAMES[split])]
    inside = [name for name in folders if all(os.path.isdir(data.folder / name / part) for part in SPLITS)]  # noqa: PTH112
    packed = sorted(entry.name for entry in os.scandir(data.folder) if entry.name.lower().endswith(ARCHIVES))
    if other:
        do = f"rename {printable(other[0])}/ to {split}/"
    elif inside:
        do = f"train/ and test/ are in {printable(inside[0])}/: give that folder as data.path"
    elif packed:
        do = f"unpack {printable(packed[0])} there"
    else:
        do = "expected PATH/train/<class>/ and PATH/test/<class>/"
        do += f", found {', '.join(map(printable, folders[:5]))}" if folders else ""
    raise UsageError(f"data.path: {json.dumps(data.path)} has no folder {split}: {do}")


def _list_split(data: config.Data, split: str, listing: Listing) -> dict[str, list[str]]:
    """Class -> paths of its images. Adds what is left out to `listing`."""
    classes: dict[str, list[str]] = {}
    loose: Counter[str] = Counter()
    for entry in _scan(data.folder, split):
        path = f"{split}/{entry.name}"
        if junk := _junk(entry.name):
            listing.junk[junk] += 1
        elif _is_folder(entry, path):
            classes.setdefault(unicodedata.normalize("NFC", entry.name), []).append(path)
        elif entry.is_symlink() and not (data.folder / path).exists():
            raise UsageError(f"data.path: {printable(path)} is a link to what is not there")
        else:
            loose[_suffix(entry.name)] += 1
    taken = sum(loose[suffix] for suffix in images.SUFFIXES)
    if len(classes) < 2:
        _refuse_classes(data, split, list(classes), taken)
    listing.left_out.update({f"{kind} outside the class folders in {split}/": loose[kind] for kind in loose})
    paths: dict[str, list[str]] = {}
    for name in sorted(classes):
        found = [path for folder in classes[name] for path in _walk(data.folder, folder, listing)]
        if not found:
            suffixes = ", ".join(images.SUFFIXES)
            raise UsageError(f"data.path: class {printable(f'{split}/{name}')} holds no image ({suffixes})")
        paths[name] = sorted(found, key=_order)[: data.limit]
    return paths


def _refuse_classes(data: config.Data, split: str, classes: list[str], loose: int) -> NoReturn:
    message = f"data.path: {len(classes)} classes in {split}/: expected at least 2"
    if loose:
        message += f"; {loose:,} images lie in {split}/ itself: move each to {split}/<class>/"
        if split == "test":
            message += ", or, where its class is not known, put some of train/ there"
    elif classes and sum(_is_folder(entry, entry.name) for entry in _scan(data.folder, f"{split}/{classes[0]}")) > 1:
        message += f"; {split}/{printable(classes[0])}/ holds folders: move these up, to {split}/<class>/"
    raise UsageError(message)


def _walk(root: Path, folder: str, listing: Listing, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """The paths of all images in and below a class's folder. Follows links. Counts in `listing` what is left out."""
    try:
        status = os.stat(f"{root}/{folder}")  # noqa: PTH116
    except OSError as error:
        raise _path_error(folder, error) from None
    identity = (status.st_dev, status.st_ino)
    if identity in above and status.st_ino:
        raise UsageError(f"data.path: {printable(folder)} is a link to a folder above it")
    for entry in _scan(root, folder):
        path = f"{folder}/{entry.name}"
        if junk := _junk(entry.name):
            listing.junk[junk] += 1
        elif _is_folder(entry, path):
            yield from _walk(root, path, listing, (*above, identity))
        elif entry.name.lower().endswith(images.SUFFIXES) and (entry.is_file() or entry.is_symlink()):
            yield path
        else:
            listing.left_out[_suffix(entry.name)] += 1


def _scan(root: Path, folder: str) -> list["os.DirEntry[str]"]:
    """The entries of a folder, sorted by name. Raises UsageError for a name that is no Unicode."""
    try:
        entries = sorted(os.scandir(f"{root}/{folder}"), key=lambda entry: entry.name)
    except OSError as error:
        raise _path_error(folder, error) from None
    for entry in entries:
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise UsageError(f"data.path: {f'{folder}/{entry.name}'!a} is no Unicode name: rename it") from None
    return entries


def _is_folder(entry: "os.DirEntry[str]", path: str) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise _path_error(path, error) from None


def _junk(name: str) -> str:
    """What a name is that systems leave behind, in words; '' for other names."""
    if name in JUNK_FOLDERS:
        return f"folder {name} ({JUNK_FOLDERS[name]})"
    if name.startswith("."):
        return ".DS_Store" if name == ".DS_Store" else "hidden (a name that begins with a dot)"
    return name.strip() if name.lower() in JUNK_FILES else ""


def _suffix(name: str) -> str:
    """The extension of a file's name in lower case, as a kind of files."""
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
    return printable(suffix[:16]) if len(suffix) > 1 else "without an extension"


def _order(path: str) -> tuple[str, str]:
    """The key by which images of a class are sorted: as torchvision's ImageFolder does it, folder by folder."""
    folder, _, name = unicodedata.normalize("NFC", path).rpartition("/")
    return folder, name


def printable(path: str) -> str:
    """A path for a message of one line."""
    return path if path.isprintable() else ascii(path)


def _path_error(path: str, error: OSError) -> UsageError:
    why = "a link that leads to itself" if error.errno == errno.ELOOP else images.reason(error)
    return UsageError(f"data.path: {printable(path)} can't be read ({why})")


# --- reading


def describe(data: config.Data, listing: Listing, cache: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Digest, size, classes, counts and what is left out, without an absolute path; and, by path, why images can't be
    read. Digest and size are slow, so they are cached by file names, sizes and times."""
    paths = [path for split in SPLITS for group in listing.paths[split].values() for path in group]
    stats = [(path, *_status(f"{data.folder}/{path}")) for path in paths]
    key = hashlib.sha256(repr((FACTS_VERSION, data.orientation, stats)).encode()).hexdigest()[:32]
    cached = cache / "folders" / f"{key}.json"
    failures: dict[str, str] = {}
    try:
        described = json.loads(cached.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        small = sum(size for _, size, _ in stats) < SMALL_BYTES * len(stats)
        described, failures = _digest_and_size(data, paths, 1 if small else MAX_THREADS)
        if not failures:
            with suppress(StageError):  # that the cache can't be written is said when images are decoded
                files.write_json(cached, described)
    described |= {
        "classes": list(listing.paths["train"]),
        "counts": {split: sum(map(len, listing.paths[split].values())) for split in SPLITS},
        "left_out": dict(sorted(listing.left_out.items(), key=lambda item: (-item[1], item[0]))),
    }
    return described, failures


def decoded_size(size: Sequence[int] | None, image_size: int) -> tuple[int, int]:
    """Width and height of decoded images. `size`: that of all images, None if they have several."""
    if size and size[0] * size[1] <= max(KEPT_PIXELS, image_size**2):
        return size[0], size[1]
    return image_size, image_size


def decode(
    data: config.Data, groups: dict[str, list[str]], own_size: Sequence[int] | None, size: tuple[int, int]
) -> Iterator[images.Images]:
    """The images of all classes of a split in turn, (n, height, width, 3) uint8, some at a time.

    `groups`: class -> paths; `own_size`: width and height of all files, None if they differ; `size`: that of the
    result. Tries every image, then raises UnreadableError if some can't be read.
    """
    paths = [path for group in groups.values() for path in group]
    failures: dict[str, str] = {}
    blank = np.zeros((size[1], size[0], 3), np.uint8)

    def read(path: str) -> images.Images:
        try:
            return images.read(Path(f"{data.folder}/{path}"), size, upright=data.orientation == "exif")
        except Exception as error:  # whatever a decoder raises is the file's fault
            failures[path] = images.reason(error)
            return blank

    small = own_size is not None and max(own_size) <= SMALL_SIDE
    step = min(CHUNK, max(MAX_THREADS, CHUNK_BYTES // blank.nbytes))
    with terminal.progress("decoding images", len(paths)) as advance:
        for begin in range(0, len(paths), step):
            some = _map(read, paths[begin : begin + step], 1 if small else MAX_THREADS)
            advance(len(some))
            yield np.stack(some)
    if failures:
        raise UnreadableError({path: failures[path] for path in paths if path in failures})


def _digest_and_size(data: config.Data, paths: list[str], threads: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The digest and the one size of the images, and why some can't be read.

    The digest is of names, in NFC, and content, and of those rules beyond plain decoding that decide some pixels.
    """

    def inspect(path: str) -> tuple[str, tuple[int, int], list[str]] | Exception:
        try:
            content = Path(f"{data.folder}/{path}").read_bytes()
            found = images.inspect(io.BytesIO(content), content, upright=data.orientation == "exif")
        except Exception as error:
            return error
        return (hashlib.sha256(content).hexdigest(), *found)

    digest = hashlib.sha256()
    sizes, rules = set(), set()
    failures: dict[str, str] = {}
    with terminal.progress("checking images", len(paths)) as advance:
        for begin in range(0, len(paths), CHUNK):
            some = paths[begin : begin + CHUNK]
            for path, result in zip(some, _map(inspect, some, threads), strict=True):
                if isinstance(result, Exception):
                    failures[path] = images.reason(result)
                    continue
                digest.update(f"{unicodedata.normalize('NFC', path)}\0{result[0]}\n".encode())
                sizes.add(result[1])
                rules.update(result[2])
            advance(len(some))
    for rule in sorted(rules):
        digest.update(f"{rule}\n".encode())
    size = list(sizes.pop()) if len(sizes) == 1 else None
    return {"digest": f"sha256:{digest.hexdigest()}", "size": size}, failures


def _map(function: Callable[[str], T], paths: Sequence[str], threads: int) -> list[T]:
    """Call `function` with each path, on several threads."""
    # Set once outside the threads: they share the filters, and would restore each other's.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata and large images
        return list(map(function, paths) if threads == 1 else pool.map(function, paths))


def _status(path: str) -> tuple[int, int]:
    """Size and time of a file; zeros if it can't be reached: reading it will say why."""
    try:
        status = os.stat(path)  # noqa: PTH116 (as Path objects, 60,000 take a second)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
