"""Images on the device: the validation split, the order of each epoch, batches ready for the network."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import UsageError


@dataclass(frozen=True)
class Split:
    """Samples on one device: `inputs` (N, 3, H, W) uint8 images, or (N, D) features; `labels` (N,) int64."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """The same samples on `device`."""
        return Split(self.inputs.to(device), self.labels.to(device))

    def take(self, indices: NDArray[np.int64]) -> "Split":
        """The samples at `indices`, in that order."""
        where = torch.from_numpy(indices).to(self.labels.device)
        return Split(self.inputs[where], self.labels[where])


def as_split(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Split:
    """Decoded images (N, H, W, 3) and labels (N,) as a Split in host memory, images (N, 3, H, W) contiguous."""
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def stratified(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (train, validation), each in rising order: of each class a tenth, chosen by `seed`, is held out.

    A tenth is rounded, and at least one image where the class has two. Raises UsageError where nothing is left
    to hold out.
    """
    held_out = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(round(len(members) / 10), min(1, len(members) - 1))
        held_out.append(np.random.default_rng([seed, int(label)]).permutation(members)[:count])
    validation = np.sort(np.concatenate(held_out))
    if not len(validation):
        raise UsageError("data.limit: 1 image a class leaves none for validation: expected at least 2")
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def batches(split: Split, batch_size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts `split` into batches, the last one as short as it comes; `order` (N,) int64 shuffles it."""
    for start in range(0, len(split), batch_size):
        if order is None:
            yield split.inputs[start : start + batch_size], split.labels[start : start + batch_size]
        else:
            chosen = order[start : start + batch_size]
            yield split.inputs[chosen], split.labels[chosen]


def shuffled(
    split: Split, batch_size: int, seed: int, epoch: int, *, flip: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's batches, in an order drawn from `seed` and `epoch` on the CPU: the same on every device.

    `flip` mirrors each image left to right with probability one half.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    mirror = torch.rand(len(split), generator=generator) < 0.5 if flip else None
    device = split.labels.device
    order = order.to(device)
    if mirror is None:
        yield from batches(split, batch_size, order)
        return
    mirror = mirror.to(device)
    for start, (images, labels) in enumerate(batches(split, batch_size, order)):
        chosen = mirror[start * batch_size : start * batch_size + len(labels), None, None, None]
        yield torch.where(chosen, images.flip(3), images), labels


def prepared(
    cut: Iterable[tuple[Tensor, Tensor]], image_size: int, *, channels_last: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of uint8 images as the network takes them (see `prepare`)."""
    for images, labels in cut:
        yield prepare(images, image_size, channels_last=channels_last), labels


def prepare(images: Tensor, image_size: int, *, channels_last: bool = False) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, image_size, image_size) float32 from 0 to 1, resized as PIL does it.

    Bilinear with a widened filter when shrinking, and rounded to 8 bits, as torchvision's Resize does on a PIL
    image (Pillow, src/libImaging/Resample.c); PIL also rounds between its two passes, so values may differ by
    one step of 1/255.
    """
    pixels = images.to(dtype=torch.float32)
    size = (image_size, image_size)
    if pixels.shape[2:] != size:
        # Growing, the filter is not widened: asking for antialiasing would change nothing but be missing on mps.
        shrinking = pixels.shape[2] > image_size or pixels.shape[3] > image_size
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=shrinking)
        pixels = pixels.round_().clamp_(0, 255)
    pixels = pixels.div_(255)
    return pixels.contiguous(memory_format=torch.channels_last) if channels_last else pixels
