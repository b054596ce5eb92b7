"""Images from the published archive's layout and from the generator, and the cache of decoded ones."""

import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import requests
from conftest import fails, picture

from pipeline import config
from pipeline.data import datasets, fetch
from pipeline.errors import StageError, UsageError


@pytest.fixture
def data_of(settings_of):
    """Makes the data settings for `pictures`."""
    return lambda *overrides: settings_of(*overrides).data


def decoded(data, split="train", image_size=16):
    return datasets.decode(data, datasets.resolve(data, 16), split, image_size)


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
    assert datasets.resolve(synthetic(f"data.limit={limit}"), 16) == {
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
    facts = datasets.resolve(data, 16)
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
    facts = datasets.resolve(data, 16)
    assert facts["counts"] == {"train": 20, "test": 20}
    images, labels = datasets.decode(data, facts, "train", 96)
    assert labels.tolist() == np.repeat(range(10), 2).tolist()
    assert images[:, 0, 0, 0].tolist() == [40 + n for label in range(10) for n in (label, label + 10)]


def test_an_archive_that_was_changed_is_not_unpickled(published):
    data_of, folder, archive = published
    (folder / fetch.ARCHIVE).write_bytes(archive)
    data = data_of()
    facts = datasets.resolve(data, 16)
    (folder / fetch.ARCHIVE).write_bytes(archive + b"more")
    assert fetch.ARCHIVE in fails(UsageError, datasets.decode, data, facts, "train", 96)
    (folder / fetch.ARCHIVE).unlink()
    assert fetch.ARCHIVE in fails(StageError, datasets.decode, data, facts, "train", 96)


# --- auto


def test_auto_without_a_network_says_why(published):
    data_of, folder, _ = published
    facts = datasets.resolve(data_of("data.source=auto", "data.limit=5"), 16)
    assert (facts["requested"], facts["source"]) == ("auto", "synthetic")
    assert "no mirror" in facts["reason"]
    assert (facts["digest"], facts["counts"]) == (datasets.SYNTHETIC_VERSION, {"train": 50, "test": 50})
    assert list(folder.iterdir()) == []
    images, _ = datasets.decode(data_of("data.source=auto", "data.limit=5"), facts, "train", 96)
    assert images.shape == (50, 32, 32, 3)


def test_auto_uses_the_archive_without_a_network(published):
    data_of, folder, archive = published
    (folder / fetch.ARCHIVE).write_bytes(archive)
    facts = datasets.resolve(data_of("data.source=auto"), 16)
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
    facts = datasets.resolve(data, 16)
    assert facts["source"] == "synthetic"
    assert "mirror.invalid broke the connection (ConnectionError)" in facts["reason"]
    assert "in raw by hand" in facts["reason"]
    assert str(folder) not in facts["reason"]


@pytest.mark.parametrize("online", [False, True])
def test_auto_refuses_a_wrong_archive_put_there_by_hand(published, monkeypatch, online):
    data_of, folder, archive = published
    monkeypatch.setattr(fetch, "reachable", lambda urls: list(urls) if online else [])
    (folder / fetch.ARCHIVE).write_bytes(archive + b"more")
    message = fails(UsageError, datasets.resolve, data_of("data.source=auto"), 16)
    assert "is not the published file" in message
    assert (folder / fetch.ARCHIVE).read_bytes() == archive + b"more"


# --- the cache of decoded images


def test_decoded_once(data_of, cache, monkeypatch):
    data = data_of()
    facts = datasets.resolve(data, 16)
    first = datasets.decode(data, facts, "train", 16)
    monkeypatch.setattr(datasets, "_decode", lambda *_: pytest.fail("decoded again"))
    again = datasets.decode(data, facts, "train", 16)
    for cached, fresh in zip(again, first, strict=True):
        assert cached.dtype == fresh.dtype and (cached == fresh).all()
    assert isinstance(again[0], np.memmap)


@pytest.mark.parametrize("change", ["limit", "pillow", "content"])
def test_what_decides_the_pixels_is_decoded_anew(data_of, pictures, monkeypatch, change):
    data = data_of()
    datasets.decode(data, datasets.resolve(data, 16), "train", 16)
    if change == "limit":
        data = data_of("data.limit=2")
    elif change == "pillow":
        monkeypatch.setattr(datasets, "PIL_VERSION", "0.0")
    else:
        picture((9, 9, 9)).save(pictures / "train" / "blue" / "00.jpg")
    decoded = []
    original = datasets._decode
    monkeypatch.setattr(datasets, "_decode", lambda *args: decoded.append(1) or original(*args))
    images, labels = datasets.decode(data, datasets.resolve(data, 16), "train", 16)
    assert decoded and len(images) == len(labels) == (6 if change == "limit" else 60)
    if change == "content":
        assert images[0].mean() < 40


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
def test_a_damaged_file_is_decoded_anew(data_of, cache, name):
    data = data_of()
    facts = datasets.resolve(data, 16)
    images, labels = (np.array(part) for part in datasets.decode(data, facts, "train", 16))
    for cached in cache.rglob(name):
        cached.write_bytes(cached.read_bytes()[:200])
    again = datasets.decode(data, facts, "train", 16)
    assert (again[0] == images).all() and (again[1] == labels).all()


def test_a_full_disk_costs_the_cache_alone(data_of, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    data = data_of()
    images, labels = decoded(data)
    assert (images.shape, len(labels)) == ((60, 16, 16, 3), 60)
    assert "no disk space" in capsys.readouterr().err
