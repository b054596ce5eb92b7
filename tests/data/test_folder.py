"""A folder of images: what is found, kept, left out and refused, and what it becomes."""

import dataclasses
import hashlib
import json
import os
import shutil
import unicodedata

import numpy as np
import pytest
from conftest import COLOURS, fails, picture
from PIL import Image, ImageOps

from pipeline.data import datasets, folder, images
from pipeline.errors import StageError, UsageError


@pytest.fixture
def data_of(settings_of):
    """Makes the data settings for `pictures`."""
    return lambda *overrides: settings_of(*overrides).data


def decoded(data, split="train", image_size=16):
    return datasets.decode(data, datasets.resolve(data, image_size), split, image_size)


def digest(data):
    return datasets.resolve(data, 16)["digest"]


def refused(data):
    """The one line with which the data are refused."""
    with pytest.raises(UsageError) as caught:
        datasets.resolve(data, 16)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def add(path, colour=(90, 90, 90), size=(16, 16), **options):
    """Save a picture, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(colour, size).save(path, **options)


@pytest.fixture
def folder_of(tmp_path, data_of):
    """Makes a data set of two classes: train/a holds these (name, image) pairs, the others one grey image each."""

    def make(*entries, test=None):
        root = tmp_path / "mine"
        grey = [("0.png", picture((90, 90, 90)))]
        for inner, pairs in {"train/a": entries, "train/b": grey, "test/a": test or grey, "test/b": grey}.items():
            (root / inner).mkdir(parents=True)
            for name, image in pairs:
                image.save(root / inner / name)
        return data_of(f"data.path={json.dumps(str(root))}"), root

    return make


# --- folder


def test_folder_facts(data_of, pictures):
    facts = datasets.resolve(data_of(), 16)
    assert facts.pop("digest").startswith("sha256:")
    assert facts == {
        "requested": "folder", "source": "folder", "reason": None, "limit": None, "classes": ["blue", "green", "red"],
        "counts": {"train": 60, "test": 30}, "size": [16, 16], "left_out": {},
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
    facts = datasets.resolve(data, 16)
    assert facts["counts"] == {"train": 12, "test": 12}
    images, labels = decoded(data)
    every, all_labels = decoded(data_of())
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert np.array_equal(images, np.concatenate([every[all_labels == label][:4] for label in range(3)]))
    assert datasets.resolve(data_of("data.limit=15"), 16)["counts"] == {"train": 45, "test": 30}
    assert len({digest(data_of(f"data.limit={n}")) for n in (4, 5, "null")}) == 3


def test_names_are_sorted(folder_of):
    greys = {"10.png": 10, "2.png": 20, "B.PNG": 30, "a.Jpeg": 40, "c.JPG": 50}
    data, _ = folder_of(*((name, picture((grey,) * 3)) for name, grey in reversed(greys.items())))
    means = decoded(data)[0][:-1].mean((1, 2, 3))
    assert np.argsort(means).tolist() == list(range(len(greys)))


def test_every_format_is_taken_in_any_case(folder_of):
    data, root = folder_of(("0.png", picture((90, 90, 90))))
    suffixes = {*images.SUFFIXES} - {".png"}
    assert suffixes >= {".jpg", ".jpeg", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif"}
    formats = {".jfif": "JPEG", ".jpe": "JPEG", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM"}
    for index, suffix in enumerate(sorted(suffixes)):
        name = f"1{suffix.upper() if index % 2 else suffix}"
        add(root / "train" / "a" / name, format=formats.get(suffix))
    facts = datasets.resolve(data, 16)
    assert (facts["counts"]["train"], facts["left_out"]) == (2 + len(suffixes), {})
    pixels, _ = decoded(data)
    assert abs(pixels.astype(int).mean((1, 2, 3)) - 90).max() < 6


def test_images_below_a_class_are_taken_as_imagefolder_does(folder_of):
    torchvision = pytest.importorskip("torchvision.datasets")
    greys = {"b.png": 40, "x/a.png": 60, "x/y/c.png": 80, "z.jpg/0.png": 100, "a.png": 20}
    data, root = folder_of(("b.png", picture((40,) * 3)))
    for name, grey in greys.items():
        add(root / "train" / "a" / name, (grey,) * 3)
    images, labels = decoded(data)
    reference = torchvision.ImageFolder(root / "train")
    assert labels.tolist() == [label for _, label in reference.samples] == [0] * 5 + [1]
    for image, (path, _) in zip(images, reference.samples, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(path)))


def test_what_is_left_out_is_counted_by_kind(folder_of, capsys):
    data, root = folder_of(("0.png", picture((90, 90, 90))))
    read = ["a/1.heic", "a/2.HEIC", "a/deep/3.heic", "b/notes.txt", "b/README", "loose.png"]
    junk = ["a/.DS_Store", "a/._0.png", "b/Thumbs.db", "@eaDir/b/0.png", "a/@eaDir/0.png", ".ipynb_checkpoints/0.png"]
    for name in read + junk:
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    (root / "__MACOSX").mkdir()
    facts = datasets.resolve(data, 16)
    assert (facts["classes"], facts["counts"]) == (["a", "b"], {"train": 2, "test": 2})
    assert facts["left_out"] == {
        ".heic": 3, ".png outside the class folders in train/": 1, ".txt": 1, "without an extension": 1,
    }  # fmt: skip
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1
    for name in ("@eaDir", "__MACOSX", ".DS_Store", "Thumbs.db"):
        assert name in said


def test_a_split_that_is_not_used_is_named(pictures, data_of):
    shutil.copytree(pictures / "test", pictures / "val")
    (kind,) = datasets.resolve(data_of(), 16)["left_out"]
    assert "val/" in kind


@pytest.mark.parametrize("both", ["train", "test"])
def test_composed_and_decomposed_names_are_one_class(pictures, data_of, both):
    names = {form: unicodedata.normalize(form, "café") for form in ("NFC", "NFD")}
    (pictures / "train" / "red").rename(pictures / "train" / names["NFC"])
    (pictures / "test" / "red").rename(pictures / "test" / names["NFD"])
    add(pictures / both / names["NFD"] / "more.png")
    add(pictures / both / names["NFC"] / "most.png")
    facts = datasets.resolve(data_of(), 16)
    assert facts["classes"] == ["blue", names["NFC"], "green"]
    assert facts["counts"][both] == {"train": 62, "test": 32}[both]
    images, labels = decoded(data_of(), both)
    assert abs(images[labels == 1][0].mean((0, 1)) - COLOURS["red"]).max() < 4
    # The same data have the same digest, whichever system wrote the names.
    before = facts["digest"]
    for split in ("train", "test"):
        (pictures / split / names["NFC"]).mkdir(exist_ok=True)
        for path in sorted((pictures / split).glob(f"{names['NFD']}/*")):
            path.rename(pictures / split / names["NFC"] / path.name)
    assert digest(data_of()) == before


# --- size and orientation


def test_one_size_is_kept(folder_of, tmp_path):
    wide = picture((90, 90, 90), size=(12, 10))
    data, root = folder_of(("0.png", wide))
    for path in root.rglob("*.png"):
        wide.save(path)
    assert datasets.resolve(data, 16)["size"] == [12, 10]
    images, _ = decoded(data, image_size=32)
    assert images.shape == (2, 10, 12, 3) and np.array_equal(images[0], np.asarray(wide))


def test_many_sizes_are_squashed_as_pil_does_it(folder_of):
    wide, tall = picture((200, 40, 40), (40, 10)), picture((40, 200, 40), (9, 30))
    data, _ = folder_of(("0.png", wide), ("1.png", tall))
    assert datasets.resolve(data, 16)["size"] is None
    images, _ = decoded(data, image_size=24)
    assert images.shape == (3, 24, 24, 3)
    for image, source in zip(images, (wide, tall), strict=False):
        assert np.array_equal(image, np.asarray(source.resize((24, 24), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize(
    ("size", "image_size", "kept"),
    [((256, 256), 32, True), ((257, 256), 32, False), ((400, 400), 400, True), ((401, 400), 400, False)],
)
def test_only_small_images_of_one_size_are_kept_at_it(pictures, data_of, size, image_size, kept):
    for path in pictures.rglob("*.*"):
        path.unlink()
    for path in pictures.glob("*/*"):
        add(path / "0.png", size=size)
    images, _ = decoded(data_of(), image_size=image_size)
    assert datasets.resolve(data_of(), image_size)["size"] == list(size)
    assert images.shape == (3, *(size[::-1] if kept else (image_size, image_size)), 3)
    whole = picture((90, 90, 90), size)
    expected = whole if kept else whole.resize((image_size, image_size), Image.Resampling.BILINEAR)
    assert np.array_equal(images[0], np.asarray(expected))


def test_a_photo_is_decoded_small(folder_of):
    photo = picture((200, 40, 40), (20, 15)).resize((2000, 1500), Image.Resampling.BICUBIC)
    data, root = folder_of(("0.jpg", photo))
    images, _ = decoded(data, image_size=32)
    with Image.open(root / "train" / "a" / "0.jpg") as stored:
        whole = np.asarray(stored.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert abs(images[0] - whole).max() <= 8 and abs(images[0] - whole).mean() < 1


def turned(folder_of, *overrides, orientation=6, mark=True):
    """Data of one photo, 24 x 12 as stored, with an EXIF orientation; and that photo."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = picture((90, 90, 90), (24, 12))
    data, root = folder_of(("0.png", photo))
    for path in root.rglob("*.png"):
        photo.save(path, exif=exif if mark else None)
    return data, photo


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_pillow_does_it(folder_of, orientation):
    data, _ = turned(folder_of, orientation=orientation)
    images, _ = decoded(data, image_size=24)
    with Image.open(data.folder / "train" / "a" / "0.png") as image:
        upright = ImageOps.exif_transpose(image)
    assert datasets.resolve(data, 24)["size"] == list(upright.size)
    assert np.array_equal(images[0], np.asarray(upright))


def test_the_setting_keeps_pixels_as_stored_and_both_have_their_digest(folder_of):
    data, photo = turned(folder_of)
    stored = dataclasses.replace(data, orientation="stored")
    assert np.array_equal(decoded(stored, image_size=24)[0][0], np.asarray(photo))
    assert digest(stored) != digest(data)


def test_the_setting_changes_no_digest_without_photos_to_turn(folder_of):
    data, _ = turned(folder_of, orientation=1)
    assert digest(dataclasses.replace(data, orientation="stored")) == digest(data)


# --- the digest


def test_a_plain_folder_has_the_digest_of_names_and_contents(data_of, pictures):
    # A change of this is a change of every folder's workload.
    expected = hashlib.sha256()
    for path in sorted((path for path in pictures.glob("t*/*/*")), key=lambda path: (path.parts[-3] != "train", path)):
        name = path.relative_to(pictures).as_posix()
        expected.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    assert digest(data_of()) == f"sha256:{expected.hexdigest()}"


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
    first = datasets.resolve(data_of(), 16)
    with monkeypatch.context() as patched:
        patched.setattr(folder, "_digest_and_size", None)
        assert datasets.resolve(data_of(), 16) == first
    shutil.rmtree(cache)
    assert datasets.resolve(data_of(), 16) == first


def test_images_that_changed_since_they_were_looked_at(data_of, pictures):
    data = data_of()
    facts = datasets.resolve(data, 16)
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


def save_empty(path):
    try:
        path.write_bytes(b"")
    except OSError:
        pytest.skip("no such names on this system")


def without_images(path):
    for file in path.iterdir():
        file.rename(file.with_suffix(".heic"))


def unreadable(path):
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("permissions do not bind this user")


@pytest.mark.parametrize(
    ("damage", "faults"),
    [
        (lambda root: shutil.rmtree(root), ["No such file"]),
        (lambda root: shutil.rmtree(root / "test"), ["no folder test", "expected PATH/train/<class>/", "found train"]),
        (lambda root: [shutil.rmtree(root / "test"), save_empty(root / "test.zip")], ["unpack test.zip"]),
        (lambda root: (root / "test").rename(root / "val"), ["no folder test", "rename val/ to test/"]),
        (lambda root: (root / "train").rename(root / "seg_train"), ["no folder train", "rename seg_train/ to train/"]),
        (lambda root: wrap(root, "pets"), ["no folder train", "in pets/"]),
        (lambda root: wrap(root / "train", "train"), ["1 classes in train/", "train/train/ holds folders"]),
        (lambda root: flatten(root / "train"), ["0 classes in train/", "60 images lie in train/ itself"]),
        (lambda root: flatten(root / "test"), ["0 classes in test/", "30 images lie in test/ itself"]),
        (lambda root: without_images(root / "test/green"), ["test/green", ".webp"]),
        (lambda root: (root / "test/red").rename(root / "test/crimson"), ["class red is in train/ but not in test/"]),
        (lambda root: [shutil.rmtree(path) for path in root.glob("*/[rb]*")], ["1 classes in train/"]),
        (lambda root: link(root / "train/red/99.png", root / "gone.png"), ["train/red/99.png", "No such file"]),
        (lambda root: link(root / "train/red/99.png", root / "train/red/99.png"), ["train/red/99.png"]),
        (lambda root: link(root / "train/loop", root / "train/loop"), ["train/loop"]),
        (lambda root: link(root / "train/gone", root / "nowhere"), ["train/gone"]),
        (lambda root: link(root / "train/red/up", root / "train"), ["train/red/up"]),
        (lambda root: unreadable(root / "train/red"), ["train/red", "Permission denied"]),
        (lambda root: unreadable(root / "train/red/05.png"), ["train/red/05.png", "Permission denied"]),
        (lambda root: unreadable(root / "test"), ["test", "Permission denied"]),
        (lambda root: unreadable(root), ["Permission denied"]),
        (lambda root: save_under(root / "train/red", b"\xff.png"), [r"'train/red/\udcff.png'"]),
        (lambda root: save_empty(root / "train/red/a\nb.png"), [r"'train/red/a\nb.png'"]),
    ],
)
def test_an_unusable_folder_is_refused_with_what_is_wrong(data_of, pictures, damage, faults):
    damage(pictures)
    try:
        message = refused(data_of())
    finally:
        for path in (pictures, pictures / "test", pictures / "train/red"):
            if path.exists():
                path.chmod(0o755)
    assert message.startswith("data.path: ")
    for fault in faults:
        assert fault in message


def wrap(path, name):
    """Move all that is in a folder one folder deeper."""
    aside = path.with_name("aside")
    path.rename(aside)
    path.mkdir()
    aside.rename(path / name)


def flatten(path):
    """Move the images of all classes into the split's folder, as Kaggle's cat.0.jpg."""
    for file in list(path.glob("*/*")):
        file.rename(path / f"{file.parent.name}.{file.name}")
    for inner in list(path.iterdir()):
        if inner.is_dir():
            inner.rmdir()


def test_all_unreadable_images_are_found_at_once(data_of, pictures, cache):
    cut, empty = pictures / "test/red/04.jpg", pictures / "train/blue/01.png"
    cut.write_bytes(cut.read_bytes()[:-40])  # its first bytes are sound
    empty.write_bytes(b"")
    message = refused(data_of())
    assert "2 images" in message and "train/blue/01.png" in message and "test/red/04.jpg" in message
    assert str(pictures) not in message
    assert not list(cache.rglob("*.npy"))
    empty.unlink()
    for number in range(10):
        (pictures / f"train/red/{number:02}.{'png' if number % 2 else 'jpg'}").write_bytes(b"<html>")
    message = refused(data_of())
    assert "11 images" in message and "train/red/09.png" in message and "test/red" not in message
    for path in pictures.glob("train/red/0*"):
        path.unlink()
    assert "test/red/04.jpg" in refused(data_of())
    cut.unlink()
    assert datasets.resolve(data_of(), 16)["counts"] == {"train": 49, "test": 29}


def test_a_file_that_vanishes_after_it_was_listed(data_of, pictures, monkeypatch):
    listing = folder.list_folder(data_of())
    (pictures / "train/red/05.png").unlink()
    monkeypatch.setattr(folder, "list_folder", lambda data: listing)
    assert "train/red/05.png" in refused(data_of())


def test_an_image_of_absurd_size(data_of, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "train/blue/00.jpg" in refused(data_of())


def test_links_to_classes_and_images_are_followed(data_of, pictures, tmp_path):
    before = digest(data_of())
    (pictures / "train/red").rename(tmp_path / "red")
    link(pictures / "train/red", tmp_path / "red")
    (tmp_path / "red/00.jpg").rename(tmp_path / "0.jpg")
    link(tmp_path / "red/00.jpg", tmp_path / "0.jpg")
    assert digest(data_of()) == before


def test_what_is_no_file_is_not_read(data_of, pictures):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with a name on this system")
    os.mkfifo(pictures / "train/red/99.png")
    facts = datasets.resolve(data_of(), 16)  # reading it would wait for ever
    assert (facts["counts"]["train"], facts["left_out"]) == (60, {".png": 1})


def test_damaged_facts_in_the_cache_are_found_anew(data_of, cache):
    before = datasets.resolve(data_of(), 16)
    (facts,) = (cache / "folders").iterdir()
    facts.write_text("{")
    assert datasets.resolve(data_of(), 16) == before
