"""Splits, orders and batches lose nothing and repeat, wherever they lie; images are resized as PIL does it."""

import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from standin import Away
from torchvision.transforms import functional as tv

from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.errors import UsageError

CIFAR10 = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg.tar.xz"
"""Real images, on some machines."""


def split_of(count, side=4):
    """`count` images, image i of value i everywhere but for a mark in its left column; labels i % 3."""
    inputs = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, side, side, 3)
    inputs[:, :, 0] = 255
    return batching.Split(inputs, torch.arange(count) % 3)


def values(images):
    """Which images of `split_of` these are."""
    return images[:, 0, 1, 0].tolist()


def drawn(split, seed, epoch, batch_size=4, flip=False, backend=None):
    """An epoch's images, labels and batch sizes."""
    batches = list(batching.shuffled_batches(split, batch_size, backend or Cpu(), seed, epoch, flip=flip))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, labels, [len(part) for _, part in batches]


# --- splits


def test_decoded_images_become_a_split_as_they_lie(tmp_path):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8))
    images = np.load(tmp_path / "images.npy", mmap_mode="c")
    split = batching.as_split(images, np.arange(5))
    assert len(split) == 5
    assert (split.inputs.shape, split.inputs.dtype, split.labels.dtype) == ((5, 4, 6, 3), torch.uint8, torch.int64)
    assert split.inputs.data_ptr() == images.ctypes.data
    assert (split.rows, split.nbytes) == (None, 5 * 4 * 6 * 3)


def test_what_is_taken_is_not_copied_and_keeps_its_order():
    split = split_of(6)
    taken = split.take(np.array([4, 0, 4]))
    assert taken.inputs is split.inputs
    assert taken.labels is split.labels
    assert (taken.rows.tolist(), len(taken), taken.nbytes) == ([4, 0, 4], 3, 3 * 4 * 4 * 3)
    again = taken.take(np.array([1, 2]))
    assert (again.inputs is split.inputs, again.rows.tolist(), len(again)) == (True, [0, 4], 2)
    features = batching.Split(torch.ones(6, 5), split.labels)
    assert features.take(np.array([1])).nbytes == 20


@pytest.mark.parametrize(("rows_at_once", "chunks"), [(3, [3, 3, 1]), (7, [7]), (8192, [7])])
def test_whole_rows_are_gathered_piece_by_piece_on_their_way_to_the_device(monkeypatch, rows_at_once, chunks):
    monkeypatch.setattr(batching, "UPLOAD_ROWS", rows_at_once)
    split = split_of(9)
    taken = split.take(np.array([4, 0, 8, 7, 2, 5, 4]))
    uploaded, to = [], torch.Tensor.to

    def spy(tensor, *args, **options):
        if tensor.dim() == 4:
            uploaded.append(len(tensor))
        return to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    moved = taken.to(torch.device("cpu"))
    assert uploaded == chunks
    assert moved.rows is None
    assert moved.inputs.is_contiguous()
    assert torch.equal(moved.inputs, split.inputs[taken.rows])
    assert moved.labels.tolist() == [1, 0, 2, 1, 2, 2, 1]
    assert (len(moved), moved.nbytes) == (len(taken), taken.nbytes)


def test_a_split_goes_to_the_device_it_is_told():
    for split in (split_of(6), split_of(6).take(np.array([4, 0]))):
        moved = split.to(torch.device("meta"))
        assert (moved.inputs.device.type, moved.labels.device.type) == ("meta", "meta")
        assert (len(moved), moved.inputs.shape[1:]) == (len(split), (4, 4, 3))


def test_a_stratified_tenth():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 50))
    train, validation = batching.stratified_split(labels, 0)
    assert np.bincount(labels[validation]).tolist() == [5] * 10
    assert np.bincount(labels[train]).tolist() == [45] * 10
    assert sorted([*train, *validation]) == list(range(500))  # disjoint, and nothing lost
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()


def test_the_tenth_goes_by_the_seed():
    labels = np.repeat(np.arange(3), 40)
    validation = [batching.stratified_split(labels, seed)[1].tolist() for seed in (0, 0, 1)]
    assert validation[0] == validation[1]
    assert validation[0] != validation[2]
    within = [[index % 40 for index in validation[0] if labels[index] == label] for label in range(3)]
    assert len({tuple(chosen) for chosen in within}) > 1  # classes are drawn apart


def test_other_classes_do_not_change_a_classs_tenth():
    _, alone = batching.stratified_split(np.zeros(40, np.int64), 7)
    _, beside = batching.stratified_split(np.repeat([0, 1], [40, 25]), 7)
    assert [index for index in beside if index < 40] == alone.tolist()


@pytest.mark.parametrize(
    ("count", "held_out"), [(1, 0), (2, 1), (3, 1), (9, 1), (14, 1), (16, 2), (24, 2), (26, 3), (5000, 500)]
)
def test_the_tenth_is_rounded_and_at_least_one_of_two(count, held_out):
    labels = np.repeat([0, 1], [count, 10])
    train, validation = batching.stratified_split(labels, 0)
    assert np.bincount(labels[validation], minlength=2).tolist() == [held_out, 1]
    assert len(train) == count + 10 - held_out - 1


def test_one_image_a_class_leaves_none_to_hold_out():
    with pytest.raises(UsageError) as caught:
        batching.stratified_split(np.arange(10), 0)
    assert str(caught.value) == "data.limit: 1 image a class leaves none for validation: expected at least 2"


# --- batches


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 8, [3]), (9, 8, [8, 1]), (4, 1, [1] * 4), (0, 4, [])],
)
def test_batches_drop_nothing(count, batch_size, sizes):
    split = split_of(count)
    for backend in (Cpu(), Away()):
        batches = list(batching.batches(split, batch_size, backend))
        assert [len(labels) for _, labels in batches] == sizes
        assert [value for images, _ in batches for value in values(images)] == list(range(count))
        assert [label for _, labels in batches for label in labels.tolist()] == split.labels.tolist()


@pytest.mark.parametrize("backend", [Cpu(), Away()])
def test_batches_in_an_order(backend):
    order = torch.tensor([3, 1, 4, 0, 2])
    batches = list(batching.batches(split_of(5), 2, backend, order))
    assert [values(images) for images, _ in batches] == [[3, 1], [4, 0], [2]]
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [1, 0], [2]]


@pytest.mark.parametrize("backend", [Cpu(), Away()])
def test_batches_of_what_was_taken(backend):
    split = split_of(9).take(np.array([8, 6, 1, 3, 0]))
    batches = list(batching.batches(split, 2, backend))
    assert [values(images) for images, _ in batches] == [[8, 6], [1, 3], [0]]
    assert [labels.tolist() for _, labels in batches] == [[2, 0], [1, 0], [0]]
    batches = list(batching.batches(split, 3, backend, torch.tensor([4, 0, 1, 3, 2])))
    assert [values(images) for images, _ in batches] == [[0, 8, 6], [3, 1]]
    assert [labels.tolist() for _, labels in batches] == [[0, 2, 0], [0, 1]]


def test_batches_on_the_device_are_not_sent_and_not_copied_in_their_own_order():
    split, backend = split_of(4), Cpu()
    backend.send = None
    (images, labels), _ = batching.batches(split, 2, backend)
    assert (images.data_ptr(), labels.data_ptr()) == (split.inputs.data_ptr(), split.labels.data_ptr())
    assert sum(len(labels) for _, labels in batching.shuffled_batches(split, 2, backend, 0, 1, flip=True)) == 4


@pytest.mark.parametrize("flip", [False, True])
def test_batches_of_host_memory_are_sent_one_ahead_and_not_kept(flip):
    backend = Away()
    cut = batching.shuffled_batches(split_of(18), 4, backend, 0, 1, flip=flip)
    assert backend.sent == []
    sent = []
    for _, labels in cut:
        sent.append((len(backend.sent), backend.arrived, len(labels)))
        # Of those sent, this one and the next one alone are there; the one before is still the last round's.
        alive = [number for number, batch in enumerate(backend.sent) if any(part() is not None for part in batch)]
        assert alive == list(range(len(sent) - 1, min(len(sent) + 1, 5)))
    assert sent == [(2, 1, 4), (3, 2, 4), (4, 3, 4), (5, 4, 4), (5, 5, 2)]
    del cut, labels, _
    assert not any(part() is not None for batch in backend.sent for part in batch)


@pytest.mark.parametrize("flip", [False, True])
def test_an_epoch_holds_each_image_once_with_its_label(flip):
    images, labels, sizes = drawn(split_of(50), 0, 1, batch_size=16, flip=flip)
    seen = values(images)
    assert sizes == [16, 16, 16, 2]
    assert sorted(seen) == list(range(50))
    assert seen != list(range(50))
    assert labels.tolist() == [value % 3 for value in seen]


@pytest.mark.parametrize("flip", [False, True])
def test_the_order_goes_by_seed_and_epoch(flip):
    def epoch(seed, number, batch_size=4):
        return drawn(split_of(60), seed, number, batch_size, flip)[0]

    assert torch.equal(epoch(3, 1), epoch(3, 1))
    assert torch.equal(epoch(3, 1), epoch(3, 1, batch_size=7))
    orders = {tuple(values(epoch(seed, number))) for seed in range(4) for number in range(1, 5)}
    assert len(orders) == 16


def test_the_order_leaves_other_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = drawn(split_of(20), 0, 1, flip=True)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(drawn(split_of(20), 0, 1, flip=True)[0], first)


def test_features_are_shuffled_like_images():
    images = split_of(20)
    features = batching.Split(torch.arange(20.0).view(-1, 1), images.labels)
    assert drawn(features, 0, 1)[0][:, 0].tolist() == values(drawn(images, 0, 1)[0])


def test_half_of_the_images_are_mirrored_each_epoch_anew():
    split = split_of(200)
    flipped = []
    for epoch in (1, 2):
        images = drawn(split, 0, epoch, batch_size=64, flip=True)[0]
        in_order = images[images[:, 0, 1, 0].argsort()]
        mirrored = in_order[:, 0, 3, 0] == 255  # the mark has moved from left to right
        expected = torch.where(mirrored[:, None, None, None], split.inputs.flip(2), split.inputs)
        assert torch.equal(in_order, expected)
        assert 70 < int(mirrored.sum()) < 130
        flipped.append(mirrored)
    assert not torch.equal(*flipped)
    assert torch.equal(split.inputs, split_of(200).inputs)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rows", [None, np.random.default_rng(0).permutation(40)[:30]])
def test_the_samples_are_the_same_wherever_they_lie(flip, rows):
    split = split_of(40)
    taken = split if rows is None else split.take(rows)
    there = drawn(taken.to(torch.device("cpu")), 3, 2, 7, flip)
    for backend in (Cpu(), Away()):
        images, labels, sizes = drawn(taken, 3, 2, 7, flip, backend)
        assert torch.equal(images, there[0])
        assert torch.equal(labels, there[1])
        assert sizes == there[2]


# --- random numbers


def mixed(bits):
    """`mix64variant13`, the finaliser that SplitMix64 is known by (Steele, Lea and Flood, 2014)."""
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


def splitmix64(state):
    """The generator from its paper: the state moves by the golden gamma, and is mixed."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        yield mixed(state)


def test_the_reference_is_splitmix64():
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert list(itertools.islice(splitmix64(1234567), 4)) == known


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31 - 1, 2**63 - 1])
@pytest.mark.parametrize("stream", [0, 2, 3, 2001])
def test_numbers_are_drawn_by_splitmix64(seed, stream):
    found = batching._splitmix64(50, seed, stream, torch.device("cpu"))
    assert found.dtype == torch.int64
    start = mixed(mixed(seed) ^ stream)
    assert [number % 2**64 for number in found.tolist()] == list(itertools.islice(splitmix64(start), 50))


def test_drawn_numbers_are_all_different_and_lie_everywhere():
    found = batching._splitmix64(100_000, 0, 2, torch.device("cpu"))
    assert len(found.unique()) == 100_000
    parts = torch.bincount((found >> 60) + 8, minlength=16)  # 16 equal parts of 6250
    assert ((parts - 6250).abs() < 5 * 6250**0.5).all()
    assert len(batching._splitmix64(0, 0, 2, torch.device("cpu"))) == 0


@pytest.mark.parametrize(("sorts", "where"), [(True, "mps"), (False, "cpu")])
def test_numbers_are_drawn_on_a_device_that_is_known_to_sort_them(monkeypatch, sorts, where):
    backend, places, draw = Away(), [], batching._splitmix64
    backend.sorts_int64 = sorts
    monkeypatch.setattr(batching, "_splitmix64", lambda *args: places.append(args[-1].type) or draw(*args))
    found = drawn(split_of(20), 0, 1, flip=True, backend=backend)[0]
    assert places == [where] * 2  # order and flips
    assert torch.equal(found, drawn(split_of(20), 0, 1, flip=True)[0])


def test_the_order_is_that_of_the_numbers_drawn():
    numbers = batching._splitmix64(30, 5, 2 * 3, torch.device("cpu")).tolist()
    flips = batching._splitmix64(30, 5, 2 * 3 + 1, torch.device("cpu")).tolist()
    images = drawn(split_of(30), 5, 3, flip=True)[0]
    assert values(images) == sorted(range(30), key=numbers.__getitem__)
    assert (images[:, 0, 3, 0] == 255).tolist() == [number < 0 for number in flips]


# --- what the network gets


def noise(*shape):
    return np.random.default_rng(list(shape)).integers(0, 256, (*shape, 3), np.uint8)


def ramps(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 2 * 255], axis=2).astype(np.uint8)[None]


@pytest.fixture(params=["products", "gathered"])
def way(request, monkeypatch):
    """How images are enlarged: one way is for the compiler, and the same without it."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param == "gathered")


def is_resized_as_pil_does_it(images, size):
    batch = torch.from_numpy(images)
    before = batch.clone()
    pils = [Image.fromarray(image) for image in images]
    expected = [tv.resize(pil, [size, size]) for pil in pils]
    bilinear = [pil.resize((size, size), Image.Resampling.BILINEAR) for pil in pils]
    assert all(np.array_equal(*map(np.asarray, pair)) for pair in zip(expected, bilinear, strict=True))
    expected = torch.stack([tv.to_tensor(image) for image in expected])
    for channels_last in (False, True):
        found = batching.prepare(batch, size, channels_last=channels_last)
        assert (found.shape, found.dtype) == ((len(images), 3, size, size), torch.float32)
        assert found.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        off = (found - expected).abs() * 255
        assert off.max() < 1.001
        assert (off.mean(dim=(1, 2, 3)) < 0.3).all()
        assert 0 <= found.min() <= found.max() <= 1
        assert torch.equal(batch, before)


@pytest.mark.parametrize(
    "images", [noise(4, 32, 32), ramps(32, 32), noise(2, 40, 24), ramps(64, 48), noise(2, 150, 130)]
)
@pytest.mark.parametrize("size", [16, 32, 96, 97])
@pytest.mark.usefixtures("way")
def test_images_are_resized_as_pil_does_it(images, size):
    is_resized_as_pil_does_it(images, size)


@pytest.fixture(scope="module")
def photographs():
    """Real images (N, 32, 32, 3), the first ones of the archive: unpacking all of it takes many seconds."""
    if not CIFAR10.exists():
        pytest.skip(f"no {CIFAR10}")
    found = []
    with tarfile.open(CIFAR10, "r|xz") as archive:
        for member in archive:
            if member.isfile():
                found.append(np.asarray(Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")))
            if len(found) == 24:
                return np.stack(found)
    raise AssertionError(f"{CIFAR10} holds {len(found)} images")


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 16), (32, 32, 24), (32, 32, 64), (32, 32, 224), (32, 20, 24), (11, 32, 64)]
)
@pytest.mark.usefixtures("way")
def test_photographs_are_resized_as_pil_does_it(photographs, height, width, size):
    is_resized_as_pil_does_it(np.ascontiguousarray(photographs[:, :height, :width]), size)


@pytest.mark.parametrize(("side", "size"), [(32, 64), (32, 96), (32, 128), (32, 160), (32, 224), (96, 192), (28, 224)])
@pytest.mark.usefixtures("way")
def test_images_are_enlarged_as_pil_does_it_to_the_last_bit(side, size):
    images = noise(8, side, side)
    expected = [tv.to_tensor(tv.resize(Image.fromarray(image), [size, size])) for image in images]
    for channels_last in (False, True):
        found = batching.prepare(torch.from_numpy(images), size, channels_last=channels_last)
        assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize(("height", "width", "size"), [(30, 20, 40), (32, 32, 96), (1, 3, 97)])
def test_filters_are_weights_of_two_neighbours(height, width, size):
    found = batching.resize_weights(height, width, size, torch.device("cpu"))
    assert (found.columns.shape, found.rows.shape) == ((width, size), (size, height))
    for weights, taps in ((found.columns.T, found.across), (found.rows, found.down)):
        assert weights.sum(1) == pytest.approx(1, abs=2e-6)
        assert ((weights > 0).sum(1) <= 2).all()
        assert (taps.first <= taps.second).all() and (taps.second - taps.first <= 1).all()
        for row, first, second, of_first, of_second in zip(weights, *taps, strict=True):
            assert row[first] == (of_first if first != second else of_first + of_second)
            assert of_second == 0 or row[second] == of_second


def test_filters_at_hand_are_used(way):
    batch = torch.from_numpy(noise(2, 30, 20))
    found = batching.resize_weights(30, 20, 40, torch.device("cpu"))
    dimmed = found._replace(
        columns=found.columns / 2, across=found.across._replace(first_weight=found.across.first_weight / 2)
    )
    for channels_last in (False, True):
        at_hand = batching.prepare(batch, 40, found, channels_last=channels_last)
        assert torch.equal(at_hand, batching.prepare(batch, 40, channels_last=channels_last))
        assert not torch.equal(batching.prepare(batch, 40, dimmed, channels_last=channels_last), at_hand)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 96), (30, 20, 40), (11, 32, 64)])
def test_both_ways_to_enlarge_give_the_same_pixels(height, width, size):
    batch = torch.from_numpy(noise(4, height, width))
    found = batching.resize_weights(height, width, size, torch.device("cpu"))
    for channels_last in (False, True):
        products = batching._enlarge_by_matmul(batch, found, channels_last)
        assert torch.equal(products, batching._enlarge_by_gather(batch, found).permute(0, 3, 1, 2))


@pytest.mark.parametrize(("height", "width"), [(40, 40), (41, 20), (20, 41), (80, 80)])
def test_there_are_no_filters_where_nothing_is_enlarged_or_something_shrunk(height, width):
    assert batching.resize_weights(height, width, 40, torch.device("cpu")) is None


def test_plain_bilinear_would_not_pass_when_shrinking():
    # What the comparison above is worth: without the widened filter it is far off.
    batch = torch.from_numpy(noise(1, 96, 96))
    narrow = torch.nn.functional.interpolate(batch.permute(0, 3, 1, 2).float(), (32, 32), mode="bilinear") / 255
    assert ((batching.prepare(batch, 32) - narrow).abs() * 255).mean() > 10


def test_an_image_of_that_size_is_only_scaled():
    batch = torch.from_numpy(noise(2, 32, 32))
    assert torch.equal(batching.prepare(batch, 32), batch.permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize("size", [8, 32, 96])
def test_values_are_steps_of_a_255th_from_0_to_1(size):
    extremes = torch.tensor([0, 255], dtype=torch.uint8)[torch.randint(2, (4, 32, 32, 3))]
    found = batching.prepare(extremes, size)
    assert 0 <= found.min() <= found.max() <= 1
    steps = found * 255
    assert torch.allclose(steps, steps.round(), atol=1e-4)


@pytest.mark.parametrize("size", [20, 32, 48])
def test_memory_layout_changes_no_pixel(size):
    batch = torch.from_numpy(noise(2, 32, 32))
    plain, last = batching.prepare(batch, size), batching.prepare(batch, size, channels_last=True)
    assert torch.equal(plain, last)
