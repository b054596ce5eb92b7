"""Splits, orders and batches lose nothing and repeat, wherever they lie; images are resized as PIL does it."""

import itertools

import numpy as np
import pytest
import torch
from conftest import fails
from PIL import Image
from standin import Away
from torchvision.transforms import functional as tv

from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.errors import UsageError


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


@pytest.mark.parametrize(("rows_at_once", "chunks"), [(3, [3, 3, 1]), (8192, [7])])
def test_samples_are_gathered_piece_by_piece_on_their_way_to_the_device(monkeypatch, rows_at_once, chunks):
    monkeypatch.setattr(batching, "UPLOAD_ROWS", rows_at_once)
    split = split_of(9)
    part = split.take(np.array([4, 0, 8, 7, 2, 5, 4]))
    uploaded, to = [], torch.Tensor.to

    def spy(tensor, *args, **options):
        if tensor.dim() == 4:
            uploaded.append(len(tensor))
        return to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    moved = part.to(torch.device("cpu"))
    assert uploaded == chunks
    assert moved.rows is None and moved.inputs.is_contiguous()
    assert torch.equal(moved.inputs, split.inputs[part.rows])
    assert moved.labels.tolist() == [1, 0, 2, 1, 2, 2, 1]
    meta = part.to(torch.device("meta"))
    assert (meta.inputs.device.type, meta.labels.device.type, len(meta)) == ("meta", "meta", len(part))


def test_a_stratified_tenth_is_drawn_by_the_seed_for_each_class_apart():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 50))
    train, validation = batching.stratified_split(labels, 0)
    assert np.bincount(labels[validation]).tolist() == [5] * 10
    assert sorted([*train, *validation]) == list(range(500))
    assert (np.diff(train) > 0).all() and (np.diff(validation) > 0).all()
    assert np.array_equal(batching.stratified_split(labels, 0)[1], validation)
    assert not np.array_equal(batching.stratified_split(labels, 1)[1], validation)
    # Other classes do not change a class's tenth.
    _, alone = batching.stratified_split(np.zeros(40, np.int64), 7)
    _, beside = batching.stratified_split(np.repeat([0, 1], [40, 25]), 7)
    assert [index for index in beside if index < 40] == alone.tolist()


@pytest.mark.parametrize(
    ("count", "held_out"), [(1, 0), (2, 1), (3, 1), (14, 1), (16, 2), (24, 2), (26, 3), (5000, 500)]
)
def test_the_tenth_is_rounded_and_at_least_one_of_two(count, held_out):
    labels = np.repeat([0, 1], [count, 10])
    train, validation = batching.stratified_split(labels, 0)
    assert np.bincount(labels[validation], minlength=2).tolist() == [held_out, 1]
    assert len(train) == count + 10 - held_out - 1


def test_one_image_a_class_leaves_none_to_hold_out():
    assert fails(UsageError, batching.stratified_split, np.arange(10), 0).startswith("data.limit: 1 ")


# --- batches


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 8, [3]), (4, 1, [1] * 4), (0, 4, [])]
)
@pytest.mark.parametrize("backend", [Cpu(), Away()])
def test_batches_drop_nothing(count, batch_size, sizes, backend):
    split = split_of(count)
    batches = list(batching.batches(split, batch_size, backend))
    assert [len(labels) for _, labels in batches] == sizes
    assert [value for images, _ in batches for value in values(images)] == list(range(count))
    assert [label for _, labels in batches for label in labels.tolist()] == split.labels.tolist()


@pytest.mark.parametrize(
    ("count", "batch_size", "expected"),
    [
        (9, 4, [(0, 4), (4, 9)]),
        (10, 4, [(0, 4), (4, 8), (8, 10)]),
        (5, 4, [(0, 5)]),
        (1, 4, [(0, 1)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
        (0, 4, []),
    ],
)
def test_a_single_last_sample_joins_the_batch_before(count, batch_size, expected):
    assert batching.bounds(count, batch_size, join_single=True) == expected


@pytest.mark.parametrize(
    ("rows", "order", "expected"),
    [
        (None, [3, 1, 4, 0, 2], [[3, 1], [4, 0], [2]]),
        ([8, 6, 1, 3, 0], None, [[8, 6], [1, 3], [0]]),
        ([8, 6, 1, 3, 0], [4, 0, 1, 3, 2], [[0, 8], [6, 3], [1]]),
    ],
)
@pytest.mark.parametrize("backend", [Cpu(), Away()])
def test_batches_follow_the_order_of_what_was_taken(rows, order, expected, backend):
    split = split_of(5) if rows is None else split_of(9).take(np.array(rows))
    batches = list(batching.batches(split, 2, backend, order and torch.tensor(order)))
    assert [values(images) for images, _ in batches] == expected
    assert [labels.tolist() for _, labels in batches] == [[value % 3 for value in batch] for batch in expected]


@pytest.mark.parametrize("flip", [False, True])
def test_batches_of_host_memory_are_sent_one_ahead_and_not_kept(flip):
    backend = Away()
    batches = batching.shuffled_batches(split_of(18), 4, backend, 0, 1, flip=flip)
    assert backend.sent == []
    progress = []
    for _, labels in batches:
        progress.append((len(backend.sent), backend.arrived, len(labels)))
        # Of those sent, only this one and the next are alive; the one before is still the last round's.
        alive = [number for number, batch in enumerate(backend.sent) if any(part() is not None for part in batch)]
        assert alive == list(range(len(progress) - 1, min(len(progress) + 1, 5)))
    assert progress == [(2, 1, 4), (3, 2, 4), (4, 3, 4), (5, 4, 4), (5, 5, 2)]
    del batches, labels, _
    assert not any(part() is not None for batch in backend.sent for part in batch)


@pytest.mark.parametrize("flip", [False, True])
def test_an_epoch_holds_each_image_once_with_its_label_in_an_order_by_seed_and_epoch(flip):
    def order(seed, epoch, batch_size=16):
        images, labels, sizes = drawn(split_of(50), seed, epoch, batch_size, flip)
        assert sum(sizes) == 50 and set(sizes[:-1]) == {batch_size}
        assert sorted(values(images)) == list(range(50))
        assert labels.tolist() == [value % 3 for value in values(images)]
        return values(images)

    assert order(3, 1) == order(3, 1, batch_size=7)
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(1, 5)}) == 16


def test_the_order_leaves_other_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = drawn(split_of(20), 0, 1, flip=True)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(drawn(split_of(20), 0, 1, flip=True)[0], first)


def test_half_of_the_images_are_mirrored_each_epoch_anew():
    split = split_of(200)
    flipped = []
    for epoch in (1, 2):
        images = drawn(split, 0, epoch, batch_size=64, flip=True)[0]
        in_order = images[images[:, 0, 1, 0].argsort()]
        mirrored = in_order[:, 0, 3, 0] == 255  # the mark has moved from left to right
        assert torch.equal(in_order, torch.where(mirrored[:, None, None, None], split.inputs.flip(2), split.inputs))
        assert 70 < int(mirrored.sum()) < 130
        flipped.append(mirrored)
    assert not torch.equal(*flipped)
    assert torch.equal(split.inputs, split_of(200).inputs)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rows", [None, np.random.default_rng(0).permutation(40)[:30]])
def test_the_samples_are_the_same_wherever_they_lie(flip, rows):
    split = split_of(40) if rows is None else split_of(40).take(rows)
    expected = drawn(split.to(torch.device("cpu")), 3, 2, 7, flip)
    for backend in (Cpu(), Away()):
        images, labels, sizes = drawn(split, 3, 2, 7, flip, backend)
        assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1]) and sizes == expected[2]


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
    assert list(itertools.islice(splitmix64(1234567), 2)) == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize("seed", [0, 42, 2**31 - 1, 2**63 - 1])
@pytest.mark.parametrize("stream", [0, 3, 2001])
def test_numbers_are_drawn_by_splitmix64(seed, stream):
    numbers = batching._splitmix64(50, seed, stream, torch.device("cpu"))
    assert numbers.dtype == torch.int64
    start = mixed(mixed(seed) ^ stream)
    assert [number % 2**64 for number in numbers.tolist()] == list(itertools.islice(splitmix64(start), 50))


@pytest.mark.parametrize(("sorts", "where"), [(True, "mps"), (False, "cpu")])
def test_numbers_are_drawn_on_a_device_that_sorts_them_right(monkeypatch, sorts, where):
    backend, places, splitmix = Away(), [], batching._splitmix64
    backend.sorts_int64 = sorts
    monkeypatch.setattr(batching, "_splitmix64", lambda *args: places.append(args[-1].type) or splitmix(*args))
    images = drawn(split_of(20), 0, 1, flip=True, backend=backend)[0]
    assert places == [where] * 2  # order and flips
    assert torch.equal(images, drawn(split_of(20), 0, 1, flip=True)[0])


def test_order_and_flips_are_those_of_the_numbers_drawn():
    numbers = batching._splitmix64(30, 5, 2 * 3, torch.device("cpu")).tolist()
    flips = batching._splitmix64(30, 5, 2 * 3 + 1, torch.device("cpu")).tolist()
    images = drawn(split_of(30), 5, 3, flip=True)[0]
    assert values(images) == sorted(range(30), key=numbers.__getitem__)
    assert (images[:, 0, 3, 0] == 255).tolist() == [number < 0 for number in flips]


# --- the resize


def noise(*shape):
    return np.random.default_rng(list(shape)).integers(0, 256, (*shape, 3), np.uint8)


def ramps(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 2 * 255], axis=2).astype(np.uint8)[None]


@pytest.fixture(params=["matmul", "gather"])
def implementation(request, monkeypatch):
    """How images are enlarged: by gather under torch.compile."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param == "gather")


def assert_resized_like_pil(images, size):
    batch = torch.from_numpy(images)
    before = batch.clone()
    expected = torch.stack([tv.to_tensor(tv.resize(Image.fromarray(image), [size, size])) for image in images])
    for channels_last in (False, True):
        resized = batching.prepare(batch, size, channels_last=channels_last)
        assert (resized.shape, resized.dtype) == ((len(images), 3, size, size), torch.float32)
        assert resized.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        difference = (resized - expected).abs() * 255
        assert difference.max() < 1.001
        assert (difference.mean(dim=(1, 2, 3)) < 0.3).all()
        assert 0 <= resized.min() <= resized.max() <= 1
        assert torch.allclose(resized * 255, (resized * 255).round(), atol=1e-4)
    assert torch.equal(batch, before)


@pytest.mark.parametrize(
    "images", [noise(4, 32, 32), ramps(32, 32), noise(2, 40, 24), noise(2, 11, 32), noise(2, 150, 130)]
)
@pytest.mark.parametrize("size", [16, 32, 96, 97])
@pytest.mark.usefixtures("implementation")
def test_images_are_resized_as_pil_does_it(images, size):
    assert_resized_like_pil(images, size)


@pytest.mark.parametrize(("side", "size"), [(32, 64), (32, 96), (32, 128), (32, 160), (32, 224), (96, 192), (28, 224)])
@pytest.mark.usefixtures("implementation")
def test_images_are_enlarged_as_pil_does_it_to_the_last_bit(side, size):
    images = noise(8, side, side)
    expected = torch.stack([tv.to_tensor(tv.resize(Image.fromarray(image), [size, size])) for image in images])
    for channels_last in (False, True):
        assert torch.equal(batching.prepare(torch.from_numpy(images), size, channels_last=channels_last), expected)


@pytest.mark.parametrize(("height", "width", "size"), [(30, 20, 40), (32, 32, 96), (1, 3, 97), (11, 32, 64)])
def test_weights_are_of_two_neighbours_and_both_implementations_agree(height, width, size):
    weights = batching.resize_weights(height, width, size, torch.device("cpu"))
    assert (weights.columns.shape, weights.rows.shape) == ((width, size), (size, height))
    for matrix, neighbours in ((weights.columns.T, weights.across), (weights.rows, weights.down)):
        assert matrix.sum(1) == pytest.approx(1, abs=2e-6)
        assert ((matrix > 0).sum(1) <= 2).all()
        assert (neighbours.first <= neighbours.second).all() and (neighbours.second - neighbours.first <= 1).all()
    batch = torch.from_numpy(noise(4, height, width))
    gathered = batching._enlarge_by_gather(batch, weights).permute(0, 3, 1, 2)
    for channels_last in (False, True):
        assert torch.equal(batching._enlarge_by_matmul(batch, weights, channels_last), gathered)


@pytest.mark.parametrize("size", [20, 32, 48])
def test_memory_layout_changes_no_pixel(size):
    batch = torch.from_numpy(noise(2, 32, 32))
    plain, last = batching.prepare(batch, size), batching.prepare(batch, size, channels_last=True)
    assert torch.equal(plain, last)
    assert size != 32 or torch.equal(plain, batch.permute(0, 3, 1, 2).float() / 255)
