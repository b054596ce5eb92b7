"""Images from a folder, from the published archive's layout and from the generator; each mistake named."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import requests
from conftest import COLOURS, fails, picture
from PIL import Image

from pipeline import config
from pipeline.data import datasets, fetch
from pipeline.errors import StageError, UsageError


@pytest.fixture
def data_of(settings_of):
    """Makes the data settings for `pictures`."""
    return lambda *overrides: settings_of(*overrides).data


def decoded(data, split="train", image_size=16):
    return datasets.decode(data, datasets.resolve(data), split, image_size)


def digest(data):
    return datasets.resolve(data)["digest"]


@pytest.fixture
def folder_of(tmp_path, data_of):
    """Makes a data set of two classes: train/a holds these (name, image) pairs, the others one grey image each."""

    def make(*entries, test=None):
        root = tmp_path / "mine"
        grey = [("0.png", picture((90, 90, 90)))]
        for folder, pairs in {"train/a": entries, "train/b": grey, "test/a": test or grey, "test/b": grey}.items():
            (root / folder).mkdir(parents=True)
            for name, image in pairs:
                image.save(root / folder / name)
        return data_of(f"data.path={json.dumps(str(root))}"), root

    return make


# --- folder


def test_folder_facts(data_of, pictures):
    facts = datasets.resolve(data_of())
    assert facts.pop("digest").startswith("sha256:")
    assert facts == {
        "requested": "folder", "source": "folder", "reason": None, "limit": None, "classes": ["blue", "green", "red"],
        "counts": {"train": 60, "test": 30}, "size": [16, 16],
    }  # fmt: skip
    assert str(pictures) not in json.dumps(facts)


@pytest.mark.parametrize(("split", "count"), [("train", 20), ("test", 10)])
def test_folder_images_are_in_order_under_their_class(data_of, pictures, split, count):
    images, labels = decoded(data_of(), split)
    assert (images.shape, images.dtype, labels.dtype) == ((3 * count, 16, 16, 3), np.uint8, np.int64)
    assert labels.tolist() == np.repeat([0, 1, 2], count).tolist()
    for label, colour in enumerate(COLOURS.values()):
        assert abs(images[labels == label].mean((0, 1, 2)) - colour).max() < 4
    with Image.open(pictures / split / "green" / "03.png") as third:
        assert np.array_equal(images[count + 3], np.asarray(third))


def test_limit_takes_the_first_of_each_class_and_split(data_of):
    data = data_of("data.limit=4")
    facts = datasets.resolve(data)
    assert facts["counts"] == {"train": 12, "test": 12}
    images, labels = decoded(data)
    every, all_labels = decoded(data_of())
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert np.array_equal(images, np.concatenate([every[all_labels == label][:4] for label in range(3)]))
    assert datasets.resolve(data_of("data.limit=15"))["counts"] == {"train": 45, "test": 30}
    assert len({digest(data_of(f"data.limit={n}")) for n in (4, 5, "null")}) == 3


def test_names_are_sorted_and_other_files_left_alone(folder_of):
    greys = {"10.png": 10, "2.png": 20, "B.PNG": 30, "a.Jpeg": 40, "c.JPG": 50}
    data, root = folder_of(*((name, picture((grey,) * 3)) for name, grey in reversed(greys.items())))
    (root / "train" / "a" / "notes.txt").write_text("no image")
    (root / "train" / "a" / ".hidden.png").write_text("no image")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "Thumbs.db").write_text("no image")
    facts = datasets.resolve(data)
    assert (facts["classes"], facts["counts"]["train"]) == (["a", "b"], len(greys) + 1)
    means = decoded(data)[0][:-1].mean((1, 2, 3))
    assert np.argsort(means).tolist() == list(range(len(greys)))


def test_every_mode_becomes_rgb(folder_of):
    red = Image.new("RGB", (8, 8), (200, 30, 20))
    transparent = red.copy()
    transparent.putalpha(7)
    coloured = [red, transparent, red.quantize(4), transparent.quantize(4)]
    grey = [red.convert(mode) for mode in ("L", "LA", "1")]
    pngs = [(f"{index}.png", image) for index, image in enumerate(coloured + grey)]
    data, _ = folder_of(*pngs, ("7.jpg", red.convert("L")), ("8.jpg", red.convert("CMYK")))
    images, _ = decoded(data, image_size=8)
    assert images.shape == (10, 8, 8, 3)
    assert abs(images[:4].astype(int) - (200, 30, 20)).max() <= 2
    assert abs(images[8].astype(int) - (200, 30, 20)).max() <= 8
    assert (images[4:8] == images[4:8, ..., :1]).all()


def test_one_size_is_kept(folder_of, tmp_path):
    wide = picture((90, 90, 90), size=(12, 10))
    data, root = folder_of(("0.png", wide))
    for path in root.rglob("*.png"):
        wide.save(path)
    assert datasets.resolve(data)["size"] == [12, 10]
    images, _ = decoded(data, image_size=32)
    assert images.shape == (2, 10, 12, 3) and np.array_equal(images[0], np.asarray(wide))


def test_many_sizes_are_squashed_as_pil_does_it(folder_of):
    wide, tall = picture((200, 40, 40), (40, 10)), picture((40, 200, 40), (9, 30))
    data, _ = folder_of(("0.png", wide), ("1.png", tall))
    assert datasets.resolve(data)["size"] is None
    images, _ = decoded(data, image_size=24)
    assert images.shape == (3, 24, 24, 3)
    for image, source in zip(images, (wide, tall), strict=False):
        assert np.array_equal(image, np.asarray(source.resize((24, 24), Image.Resampling.BILINEAR)))


def test_the_digest_is_of_names_and_content_not_of_times_or_the_place(data_of, pictures, tmp_path):
    before = digest(data_of())
    image = pictures / "train" / "red" / "00.jpg"
    os.utime(image, ns=(1, 1))
    assert digest(data_of()) == before
    copied = shutil.copytree(pictures, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert digest(data_of(f"data.path={json.dumps(str(copied))}")) == before
    image.write_bytes(image.read_bytes() + b"\0")
    changed = digest(data_of())
    image.rename(image.with_name("000.jpg"))
    assert len({before, changed, digest(data_of())}) == 3


def test_the_digest_is_cached(data_of, cache, monkeypatch):
    first = datasets.resolve(data_of())
    with monkeypatch.context() as patched:
        patched.setattr(datasets, "_digest_and_size", None)
        assert datasets.resolve(data_of()) == first
    shutil.rmtree(cache)
    assert datasets.resolve(data_of()) == first


def test_images_that_changed_since_they_were_looked_at(data_of, pictures):
    data = data_of()
    facts = datasets.resolve(data)
    picture((1, 2, 3)).save(pictures / "train" / "red" / "99.png")
    assert "dvc repro" in fails(StageError, datasets.decode, data, facts, "train", 16)


# --- unusable folders


def link(path, target):
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("no links on this system")


def save_under(folder, name):
    try:
        picture((1, 2, 3)).save(folder / os.fsdecode(name))
    except (OSError, UnicodeError):
        pytest.skip("no such names on this system")


def without_images(folder):
    for path in folder.iterdir():
        path.rename(path.with_suffix(".gif"))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda root: shutil.rmtree(root / "test"), "no folder test"),
        (lambda root: without_images(root / "test/green"), "test/green"),
        (lambda root: (root / "test/red").rename(root / "test/crimson"), "class red is in train/ but not in test/"),
        (lambda root: [shutil.rmtree(path) for path in root.glob("*/[rb]*")], "1 classes in train/"),
        (lambda root: (root / "train/red/05.png").write_bytes(b""), "train/red/05.png"),
        (lambda root: (root / "train/red/05.png").write_bytes(b"<html>"), "train/red/05.png"),
        (lambda root: (root / "train/red/05.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\1IHDR\0"), "train/red/05.png"),
        (lambda root: (root / "train/red/99.png").mkdir(), "train/red/99.png"),
        (lambda root: link(root / "train/red/99.png", root / "gone.png"), "train/red/99.png"),
        (lambda root: save_under(root / "train/red", b"\xff.png"), r"'train/red/\udcff.png'"),
    ],
)
def test_an_unusable_folder_is_refused_with_what_is_wrong(data_of, pictures, damage, fault):
    damage(pictures)
    message = fails(UsageError, datasets.resolve, data_of())
    assert message.startswith("data.path: ") and fault in message


@pytest.mark.parametrize("damage", ["cut.jpg", "cut.png", "inside.png"])
def test_an_image_that_cannot_be_decoded_is_named_without_its_folder(data_of, pictures, damage):
    path = next((pictures / "test" / "red").glob(f"*{damage[-4:]}"))
    content = bytearray(path.read_bytes())
    if damage.startswith("cut"):
        del content[-40:]
    else:
        content[60:80] = bytes(20)
    path.write_bytes(content)
    data = data_of()
    facts = datasets.resolve(data)  # its first bytes are sound
    assert len(datasets.decode(data, facts, "train", 16)[0]) == 60
    message = fails(UsageError, datasets.decode, data, facts, "test", 16)
    assert f"test/red/{path.name}" in message and str(pictures) not in message


def test_an_image_of_absurd_size(data_of, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "train/blue/00.jpg" in fails(UsageError, datasets.resolve, data_of())


# --- synthetic


def synthetic(*overrides):
    return config.load(["data.source=synthetic", "data.limit=null", *overrides]).data


def test_synthetic_pixels_are_the_same_everywhere():
    # A change of these is a change of the work: raise SYNTHETIC_VERSION with them.
    assert datasets.SYNTHETIC_VERSION == "synthetic-1"
    for split, expected in (
        ("train", "28fad28a972de9f2cd9847efb9333ab1264b91992fd055c48f44fa756c0d05d8"),
        ("test", "b83f29ad7d72f3400a4445a3672a50bb7bc50c63796587ba94d2bf0c5df2f598"),
    ):
        images, labels = decoded(synthetic(), split)
        assert hashlib.sha256(images.tobytes()).hexdigest() == expected
        assert np.bincount(labels).tolist() == [{"train": 500, "test": 100}[split]] * 10


@pytest.mark.parametrize(("limit", "counts"), [("null", (5000, 1000)), (7, (70, 70)), (200, (2000, 1000))])
def test_synthetic_facts(limit, counts):
    assert datasets.resolve(synthetic(f"data.limit={limit}")) == {
        "requested": "synthetic", "source": "synthetic", "digest": "synthetic-1", "reason": None, "size": [32, 32],
        "limit": None if limit == "null" else limit, "classes": datasets.SYNTHETIC_CLASSES,
        "counts": dict(zip(("train", "test"), counts, strict=True)),
    }  # fmt: skip


def test_synthetic_classes_can_be_learnt():
    def spectra(images):
        grey = images.astype(float).mean(3)
        flat = abs(np.fft.rfft2(grey - grey.mean((1, 2), keepdims=True))).reshape(len(images), -1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    train, labels = decoded(synthetic("data.limit=100"))
    test, truth = decoded(synthetic("data.limit=50"), "test")
    predicted = labels[(spectra(test) @ spectra(train).T).argmax(1)]  # the nearest neighbour's
    accuracies = [float((predicted == truth)[truth == label].mean()) for label in range(10)]
    assert min(accuracies) > 0.5  # by chance: 0.1
    assert np.mean(accuracies) > 0.75


# --- cifar10


def batch(first, count):
    """A batch as it was published: `data` (N, 3072) planes of colours, labels in turn; pixel 0 counts."""
    rows = np.zeros((count, 3, 32, 32), np.uint8)
    rows[:, 0, 0, 0] = np.arange(first, first + count)
    rows[:, 1, 2, 3] = 7
    return pickle.dumps({"data": rows.reshape(count, -1), "labels": [(first + n) % 10 for n in range(count)]}, 2)


@pytest.fixture
def published(monkeypatch, tmp_path, data_of):
    """A small archive stands for the published one, without a network; returns (data settings, folder, archive)."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for index, name in enumerate(["test_batch", *(f"data_batch_{number}" for number in (2, 1, 3, 4, 5))]):
            content = batch(20 * index, 20)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(fetch, "ARCHIVE_MD5", hashlib.md5(packed.getvalue()).hexdigest())
    monkeypatch.setattr(fetch, "ARCHIVE_BYTES", len(packed.getvalue()))
    monkeypatch.setattr(fetch, "reachable", lambda urls: [])
    folder = tmp_path / "raw"
    folder.mkdir()

    def data(*overrides):
        return data_of(f"data.path={json.dumps(str(folder))}", "data.source=cifar10", *overrides)

    return data, folder, packed.getvalue()


def test_cifar10_from_an_archive_put_there_by_hand(published):
    data_of, folder, archive = published
    (folder / fetch.ARCHIVE).write_bytes(archive)
    data = data_of()
    facts = datasets.resolve(data)
    assert (facts["source"], facts["digest"]) == ("cifar10", f"md5:{fetch.ARCHIVE_MD5}")
    assert facts["classes"] == datasets.CIFAR10_CLASSES
    assert (facts["counts"], facts["size"]) == ({"train": 50_000, "test": 10_000}, [32, 32])
    images, labels = datasets.decode(data, facts, "train", 96)
    assert (images.shape, images.dtype, labels.dtype) == ((100, 32, 32, 3), np.uint8, np.int64)
    assert images[:, 0, 0, 0].tolist() == [*range(40, 60), *range(20, 40), *range(60, 120)]  # by the batches' numbers
    assert (images[:, 2, 3] == (0, 7, 0)).all()
    assert labels.tolist() == list(range(10)) * 10
    test, _ = datasets.decode(data, facts, "test", 96)
    assert test[:, 0, 0, 0].tolist() == list(range(20))


def test_cifar10_limit_takes_the_first_of_each_class(published):
    data_of, folder, archive = published
    (folder / fetch.ARCHIVE).write_bytes(archive)
    data = data_of("data.limit=2")
    facts = datasets.resolve(data)
    assert facts["counts"] == {"train": 20, "test": 20}
    images, labels = datasets.decode(data, facts, "train", 96)
    assert labels.tolist() == np.repeat(range(10), 2).tolist()
    assert images[:, 0, 0, 0].tolist() == [40 + n for label in range(10) for n in (label, label + 10)]


def test_an_archive_that_was_changed_is_not_unpickled(published):
    data_of, folder, archive = published
    (folder / fetch.ARCHIVE).write_bytes(archive)
    data = data_of()
    facts = datasets.resolve(data)
    (folder / fetch.ARCHIVE).write_bytes(archive + b"more")
    assert fetch.ARCHIVE in fails(UsageError, datasets.decode, data, facts, "train", 96)
    (folder / fetch.ARCHIVE).unlink()
    assert fetch.ARCHIVE in fails(StageError, datasets.decode, data, facts, "train", 96)


# --- auto


def test_auto_without_a_network_says_why(published):
    data_of, folder, _ = published
    facts = datasets.resolve(data_of("data.source=auto", "data.limit=5"))
    assert (facts["requested"], facts["source"]) == ("auto", "synthetic")
    assert "no mirror" in facts["reason"]
    assert (facts["digest"], facts["counts"]) == (datasets.SYNTHETIC_VERSION, {"train": 50, "test": 50})
    assert list(folder.iterdir()) == []
    images, _ = datasets.decode(data_of("data.source=auto", "data.limit=5"), facts, "train", 96)
    assert images.shape == (50, 32, 32, 3)


def test_auto_uses_the_archive_without_a_network(published):
    data_of, folder, archive = published
    (folder / fetch.ARCHIVE).write_bytes(archive)
    facts = datasets.resolve(data_of("data.source=auto"))
    assert (facts["requested"], facts["source"], facts["reason"]) == ("auto", "cifar10", None)


def test_auto_with_mirrors_that_fail_says_why_without_our_path(published, monkeypatch):
    data_of, folder, _ = published

    def get(*_, **__):
        raise requests.ConnectionError("reset")

    monkeypatch.setattr(fetch, "reachable", list)
    monkeypatch.setattr(requests, "get", get)
    # A path below the project's folder, as `data.path` mostly is.
    monkeypatch.setattr(config, "ROOT", folder.parent)
    data = data_of("data.source=auto", "data.path=raw", "data.mirrors=[https://mirror.invalid/a]")
    facts = datasets.resolve(data)
    assert facts["source"] == "synthetic"
    assert "mirror.invalid broke the connection (ConnectionError)" in facts["reason"]
    assert "in raw by hand" in facts["reason"]
    assert str(folder) not in facts["reason"]


@pytest.mark.parametrize("online", [False, True])
def test_auto_refuses_a_wrong_archive_put_there_by_hand(published, monkeypatch, online):
    data_of, folder, archive = published
    monkeypatch.setattr(fetch, "reachable", lambda urls: list(urls) if online else [])
    (folder / fetch.ARCHIVE).write_bytes(archive + b"more")
    message = fails(UsageError, datasets.resolve, data_of("data.source=auto"))
    assert "is not the published file" in message
    assert (folder / fetch.ARCHIVE).read_bytes() == archive + b"more"


# --- the cache of decoded images


def test_decoded_once(data_of, cache, monkeypatch):
    data = data_of()
    facts = datasets.resolve(data)
    first = datasets.decode(data, facts, "train", 16)
    monkeypatch.setattr(datasets, "_decode", lambda *_: pytest.fail("decoded again"))
    again = datasets.decode(data, facts, "train", 16)
    for cached, fresh in zip(again, first, strict=True):
        assert cached.dtype == fresh.dtype and (cached == fresh).all()
    assert isinstance(again[0], np.memmap)


@pytest.mark.parametrize("change", ["limit", "pillow", "content"])
def test_what_decides_the_pixels_is_decoded_anew(data_of, pictures, monkeypatch, change):
    data = data_of()
    datasets.decode(data, datasets.resolve(data), "train", 16)
    if change == "limit":
        data = data_of("data.limit=2")
    elif change == "pillow":
        monkeypatch.setattr(datasets, "PIL_VERSION", "0.0")
    else:
        picture((9, 9, 9)).save(pictures / "train" / "blue" / "00.jpg")
    decoded = []
    original = datasets._decode
    monkeypatch.setattr(datasets, "_decode", lambda *args: decoded.append(1) or original(*args))
    images, labels = datasets.decode(data, datasets.resolve(data), "train", 16)
    assert decoded and len(images) == len(labels) == (6 if change == "limit" else 60)
    if change == "content":
        assert images[0].mean() < 40


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
def test_a_damaged_file_is_decoded_anew(data_of, cache, name):
    data = data_of()
    facts = datasets.resolve(data)
    images, labels = datasets.decode(data, facts, "train", 16)
    (cached,) = cache.rglob(name)
    cached.write_bytes(cached.read_bytes()[:200])
    again = datasets.decode(data, facts, "train", 16)
    assert (again[0] == images).all() and (again[1] == labels).all()


def test_a_full_disk_costs_the_cache_alone(data_of, monkeypatch, capsys):
    data = data_of()
    facts = datasets.resolve(data)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert len(datasets.decode(data, facts, "train", 16)[0]) == 60
    assert "no disk space" in capsys.readouterr().err
