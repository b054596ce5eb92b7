"""Splits, orders and batches lose nothing and repeat; images are resized as PIL does it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv

from pipeline import data
from pipeline.errors import UsageError


def split_of(count, side=4):
    """`count` images, image i of value i everywhere but for a mark in its left column; labels i % 3."""
    inputs = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, side, side)
    inputs[:, :, :, 0] = 255
    return data.Split(inputs, torch.arange(count) % 3)


def drawn(split, seed, epoch, batch_size=4, flip=False):
    """An epoch's images, labels and batch sizes."""
    batches = list(data.shuffled(split, batch_size, seed, epoch, flip=flip))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, labels, [len(part) for _, part in batches]


# --- splits


def test_as_split():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    split = data.as_split(images, np.arange(5))
    assert len(split) == 5
    assert (split.inputs.shape, split.inputs.dtype, split.labels.dtype) == (
        (5, 3, 4, 6),
        torch.uint8,
        torch.int64,
    )
    assert split.inputs.is_contiguous()
    assert np.array_equal(split.inputs[2, 1].numpy(), images[2, :, :, 1])


def test_take_and_to():
    split = split_of(6).take(np.array([4, 0, 4]))
    assert split.inputs[:, 0, 0, 1].tolist() == [4, 0, 4]
    assert split.labels.tolist() == [1, 0, 1]
    moved = split.to(torch.device("meta"))
    assert (moved.inputs.device.type, moved.labels.device.type) == ("meta", "meta")


def test_a_stratified_tenth():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 50))
    train, validation = data.stratified(labels, 0)
    assert np.bincount(labels[validation]).tolist() == [5] * 10
    assert np.bincount(labels[train]).tolist() == [45] * 10
    assert sorted([*train, *validation]) == list(range(500))  # disjoint, and nothing lost
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()


def test_the_tenth_goes_by_the_seed():
    labels = np.repeat(np.arange(3), 40)
    validation = [data.stratified(labels, seed)[1].tolist() for seed in (0, 0, 1)]
    assert validation[0] == validation[1]
    assert validation[0] != validation[2]
    within = [[index % 40 for index in validation[0] if labels[index] == label] for label in range(3)]
    assert len({tuple(chosen) for chosen in within}) > 1  # classes are drawn apart


def test_other_classes_do_not_change_a_classs_tenth():
    _, alone = data.stratified(np.zeros(40, np.int64), 7)
    _, beside = data.stratified(np.repeat([0, 1], [40, 25]), 7)
    assert [index for index in beside if index < 40] == alone.tolist()


@pytest.mark.parametrize(
    ("count", "held_out"), [(1, 0), (2, 1), (3, 1), (9, 1), (14, 1), (16, 2), (24, 2), (26, 3), (5000, 500)]
)
def test_the_tenth_is_rounded_and_at_least_one_of_two(count, held_out):
    labels = np.repeat([0, 1], [count, 10])
    train, validation = data.stratified(labels, 0)
    assert np.bincount(labels[validation], minlength=2).tolist() == [held_out, 1]
    assert len(train) == count + 10 - held_out - 1


def test_one_image_a_class_leaves_none_to_hold_out():
    with pytest.raises(UsageError) as caught:
        data.stratified(np.arange(10), 0)
    assert str(caught.value) == "data.limit: 1 image a class leaves none for validation: expected at least 2"


# --- batches


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 8, [3]), (9, 8, [8, 1]), (4, 1, [1] * 4), (0, 4, [])],
)
def test_batches_drop_nothing(count, batch_size, sizes):
    split = split_of(count)
    batches = list(data.batches(split, batch_size))
    assert [len(labels) for _, labels in batches] == sizes
    assert [value for images, _ in batches for value in images[:, 0, 0, 1].tolist()] == list(range(count))
    assert [label for _, labels in batches for label in labels.tolist()] == split.labels.tolist()


def test_batches_in_an_order():
    order = torch.tensor([3, 1, 4, 0, 2])
    batches = list(data.batches(split_of(5), 2, order))
    assert [images[:, 0, 0, 1].tolist() for images, _ in batches] == [[3, 1], [4, 0], [2]]
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [1, 0], [2]]


@pytest.mark.parametrize("flip", [False, True])
def test_an_epoch_holds_each_image_once_with_its_label(flip):
    images, labels, sizes = drawn(split_of(50), 0, 1, batch_size=16, flip=flip)
    seen = images[:, 0, 0, 1].tolist()
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
    orders = {tuple(epoch(seed, number)[:, 0, 0, 1].tolist()) for seed in range(4) for number in range(1, 5)}
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
    features = data.Split(torch.arange(20.0).view(-1, 1), images.labels)
    assert drawn(features, 0, 1)[0][:, 0].tolist() == drawn(images, 0, 1)[0][:, 0, 0, 1].tolist()


def test_half_of_the_images_are_mirrored_each_epoch_anew():
    split = split_of(200)
    flipped = []
    for epoch in (1, 2):
        images = drawn(split, 0, epoch, batch_size=64, flip=True)[0]
        in_order = images[images[:, 0, 0, 1].argsort()]
        mirrored = in_order[:, 0, 0, 3] == 255  # the mark has moved from left to right
        expected = torch.where(mirrored[:, None, None, None], split.inputs.flip(3), split.inputs)
        assert torch.equal(in_order, expected)
        assert 70 < int(mirrored.sum()) < 130
        flipped.append(mirrored)
    assert not torch.equal(*flipped)
    assert torch.equal(split.inputs, split_of(200).inputs)


# --- what the network gets


def noise(*shape):
    return np.random.default_rng(list(shape)).integers(0, 256, (*shape, 3), np.uint8)


def ramps(height, width):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 2 * 255], axis=2).astype(np.uint8)[None]


@pytest.mark.parametrize(
    "images", [noise(4, 32, 32), ramps(32, 32), noise(2, 40, 24), ramps(64, 48), noise(2, 150, 130)]
)
@pytest.mark.parametrize("size", [16, 32, 96, 97])
def test_images_are_resized_as_pil_does_it(images, size):
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    found = data.prepare(batch, size)
    assert (found.shape, found.dtype) == ((len(images), 3, size, size), torch.float32)
    for image, pixels in zip(images, found, strict=True):
        pil = Image.fromarray(image)
        resized = tv.resize(pil, [size, size])
        assert np.array_equal(np.asarray(resized), np.asarray(pil.resize((size, size), Image.Resampling.BILINEAR)))
        off = (pixels - tv.to_tensor(resized)).abs() * 255
        assert off.max() < 1.001
        assert off.mean() < 0.3


def test_plain_bilinear_would_not_pass_when_shrinking():
    # What the comparison above is worth: without the widened filter it is far off.
    batch = torch.from_numpy(noise(1, 96, 96)).permute(0, 3, 1, 2)
    narrow = torch.nn.functional.interpolate(batch.float(), (32, 32), mode="bilinear") / 255
    assert ((data.prepare(batch, 32) - narrow).abs() * 255).mean() > 10


def test_an_image_of_that_size_is_only_scaled():
    batch = torch.from_numpy(noise(2, 32, 32)).permute(0, 3, 1, 2).contiguous()
    assert torch.equal(data.prepare(batch, 32), batch.float() / 255)


@pytest.mark.parametrize("size", [8, 32, 96])
def test_values_are_steps_of_a_255th_from_0_to_1(size):
    extremes = torch.tensor([0, 255], dtype=torch.uint8)[torch.randint(2, (4, 3, 32, 32))]
    found = data.prepare(extremes, size)
    assert 0 <= found.min() <= found.max() <= 1
    steps = found * 255
    assert torch.allclose(steps, steps.round(), atol=1e-4)


@pytest.mark.parametrize("size", [32, 48])
def test_memory_layout_changes_no_pixel(size):
    batch = torch.from_numpy(noise(2, 32, 32)).permute(0, 3, 1, 2).contiguous()
    before = batch.clone()
    plain, last = data.prepare(batch, size), data.prepare(batch, size, channels_last=True)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    assert torch.equal(plain, last)
    assert torch.equal(batch, before)
