"""Prepare images for training: hold out a validation split, shuffle each epoch, cut batches, resize."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.devices import Backend
from pipeline.errors import UsageError

UPLOAD_ROWS = 8192
"""The number of images that are gathered in host memory at a time and copied to the device."""

GOLDEN_GAMMA, MIX_1, MIX_2 = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""SplitMix64's constants as signed int64."""


@dataclass(frozen=True)
class Split:
    """Samples in host memory or on the device.

    `inputs`: decoded images (N, H, W, 3) uint8, perhaps mapped from a file, or features (N, D). `labels`: (N,) int64.
    `rows`: (M,) int64, the samples that belong to the split, in this order; None: all of them.
    """

    inputs: Tensor
    labels: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels if self.rows is None else self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes that the split's inputs need on a device."""
        return len(self) * self.inputs[0].nbytes

    def take(self, indices: NDArray[np.int64]) -> "Split":
        """The samples at `indices`, in that order, without a copy."""
        rows = torch.from_numpy(indices)
        return Split(self.inputs, self.labels, rows if self.rows is None else self.rows[rows])

    def to(self, device: torch.device) -> "Split":
        """A copy on `device` of only the samples that belong to the split."""
        if self.rows is None:
            return Split(self.inputs.to(device), self.labels.to(device))
        inputs = torch.empty((len(self), *self.inputs.shape[1:]), dtype=self.inputs.dtype, device=device)
        for start in range(0, len(self), UPLOAD_ROWS):
            rows = self.rows[start : start + UPLOAD_ROWS]
            inputs[start : start + len(rows)] = self.inputs[rows].to(device)
        return Split(inputs, self.labels[self.rows].to(device))


class Neighbours(NamedTuple):
    """For each of S outputs along one axis: the two nearest inputs, (S,) int64, and their weights, (S,) float32, which
    sum to 1. At the edges the second weight is 0."""

    first: Tensor
    second: Tensor
    first_weight: Tensor
    second_weight: Tensor


class ResizeWeights(NamedTuple):
    """The weights that enlarge (H, W) to (S, S): as matrices, `columns` (W, S) and `rows` (S, H) float32, and as the
    two neighbours of each output, `across` and `down`."""

    columns: Tensor
    rows: Tensor
    across: Neighbours
    down: Neighbours


def as_split(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Split:
    """Decoded images (N, H, W, 3) and labels (N,) as a Split in host memory, without a copy."""
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def stratified_split(labels: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hold out a tenth of each class, chosen by `seed`, for validation. Returns ascending indices (train, validation).

    The tenth is rounded, but at least one image of a class that has two. Raises UsageError if no class has two.
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


def bounds(count: int, batch_size: int, *, join_single: bool = False) -> list[tuple[int, int]]:
    """Start and end of each batch of `count` samples. The last batch may be short; if it has one sample and
    `join_single`, this sample joins the batch before."""
    starts = list(range(0, count, batch_size))
    if join_single and count > batch_size > 1 and count % batch_size == 1:
        starts.pop()
    return list(pairwise([*starts, count]))


def batches(
    split: Split, batch_size: int, backend: Backend, order: Tensor | None = None, *, join_single: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut `split` by `bounds` into batches on the device.

    `order`: (N,) int64, on the device of the labels, is the order of the samples. Batches in host memory are copied
    to the device one ahead, while the device works on the previous one.
    """
    sliced = _slice(split, bounds(len(split), batch_size, join_single=join_single), order)
    return sliced if split.inputs.device.type == backend.device.type else _prefetch(sliced, backend)


def shuffled_batches(
    split: Split,
    batch_size: int,
    backend: Backend,
    seed: int,
    epoch: int,
    *,
    flip: bool = False,
    join_single: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:  # each argument says which batches these are
    """An epoch's batches, shuffled by `epoch_permutation`: the same on every device.

    `flip` mirrors each image left to right with probability one half.
    """
    order = epoch_permutation(len(split), backend, seed, epoch).to(split.labels.device)
    shuffled = batches(split, batch_size, backend, order, join_single=join_single)
    if not flip:
        yield from shuffled
        return
    bits = _splitmix64(len(split), seed, 2 * epoch + 1, _random_device(backend))
    mirror = (bits < 0).to(backend.device)[:, None, None, None]
    for number, (images, labels) in enumerate(shuffled):
        mirrored = mirror[number * batch_size : number * batch_size + len(labels)]
        yield torch.where(mirrored, images.flip(2), images), labels


def epoch_permutation(count: int, backend: Backend, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's samples, (count,) int64, which depends only on `count`, `seed` and `epoch`."""
    return torch.argsort(_splitmix64(count, seed, 2 * epoch, _random_device(backend)))


def resize_weights(height: int, width: int, image_size: int, device: torch.device) -> ResizeWeights | None:
    """The weights with which `prepare` enlarges (height, width) to `image_size`; None if it does not enlarge."""
    if (height, width) == (image_size, image_size) or max(height, width) > image_size:
        return None
    across, down = _neighbours(width, image_size), _neighbours(height, image_size)
    return ResizeWeights(
        _matrix(across, width).T.contiguous().to(device),
        _matrix(down, height).to(device),
        Neighbours(*(part.to(device) for part in across)),
        Neighbours(*(part.to(device) for part in down)),
    )


def prepare(
    images: Tensor, image_size: int, weights: ResizeWeights | None = None, *, channels_last: bool = False
) -> Tensor:
    """Resize (B, H, W, 3) uint8 to (B, 3, image_size, image_size) float32 from 0 to 1, as PIL does.

    Bilinear, rounded to 8 bits, with a widened filter when shrinking (Pillow, src/libImaging/Resample.c). `weights`:
    the result of `resize_weights`, computed here if absent. Like PIL, enlarging interpolates across columns, rounds,
    then interpolates down rows. It uses two matrix products, or, when compiled, one kernel that reads the four inputs
    of each output. Both are faster than torch's interpolation.

    Values may differ from PIL's by one step of 1/255, rarely by two. When shrinking, torch rounds only once. When
    enlarging, the last bit decides about values halfway between two steps: 5% of all values at 6 times the size, more
    with TF32, which drops this bit, at 2 or 4 times the size.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    height, width = images.shape[1:3]
    weights = weights or resize_weights(height, width, image_size, images.device)
    if weights is None:
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
        if (height, width) != (image_size, image_size):
            size = (image_size, image_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True).round_()
    elif torch.compiler.is_compiling():
        pixels = _enlarge_by_gather(images, weights).permute(0, 3, 1, 2)
    else:
        pixels = _enlarge_by_matmul(images, weights, channels_last)
    return pixels.div_(255).contiguous(memory_format=layout)


def _enlarge_by_matmul(images: Tensor, weights: ResizeWeights, channels_last: bool) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, S, S) float32 from 0 to 255, with a few fast kernels."""
    size, height = weights.rows.shape
    # (B, 3, H, S). Products in the images' own layout would have only three columns, which is slow.
    pixels = torch.matmul(images.permute(0, 3, 1, 2).float().contiguous(), weights.columns).round_()
    if channels_last:
        pixels = pixels.permute(0, 2, 3, 1).reshape(len(images), height, size * 3)
        pixels = torch.matmul(weights.rows, pixels).view(len(images), size, size, 3).permute(0, 3, 1, 2)
    else:
        pixels = torch.matmul(weights.rows, pixels)
    return pixels.round_()


def _enlarge_by_gather(images: Tensor, weights: ResizeWeights) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, S, S, 3) float32 from 0 to 255, with the same values as `_enlarge_by_matmul`. Only for
    compiled code: the compiler fuses its many kernels into one."""
    across, down = weights.across, weights.down

    def interpolate_columns(rows: Tensor) -> Tensor:
        selected = images[:, rows]
        left = selected[:, :, across.first] * across.first_weight[:, None]
        return (left + selected[:, :, across.second] * across.second_weight[:, None]).round()

    upper = interpolate_columns(down.first) * down.first_weight[:, None, None]
    return (upper + interpolate_columns(down.second) * down.second_weight[:, None, None]).round()


def _neighbours(inputs: int, outputs: int) -> Neighbours:
    centres = ((torch.arange(outputs, dtype=torch.float64) + 0.5) * (inputs / outputs) - 0.5).clamp(0, inputs - 1)
    first = centres.floor()
    fraction = centres - first
    # Increase by a millionth, so that halves are rounded up, as in PIL; torch rounds halves to even.
    first_weight, second_weight = ((weight * (1 + 2**-20)).float() for weight in (1 - fraction, fraction))
    return Neighbours(first.long(), (first.long() + 1).clamp(max=inputs - 1), first_weight, second_weight)


def _matrix(neighbours: Neighbours, inputs: int) -> Tensor:
    """(S, inputs) float32: the matrix that maps the inputs to the outputs."""
    matrix = torch.zeros(len(neighbours.first), inputs)
    matrix.scatter_add_(1, neighbours.first[:, None], neighbours.first_weight[:, None])
    return matrix.scatter_add_(1, neighbours.second[:, None], neighbours.second_weight[:, None])


def _slice(split: Split, bounds: list[tuple[int, int]], order: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    for start, stop in bounds:
        if order is None and split.rows is None:
            yield split.inputs[start:stop], split.labels[start:stop]
            continue
        rows = torch.arange(start, stop) if order is None else order[start:stop]
        if split.rows is not None:
            rows = split.rows[rows]
        # inputs[rows] takes the host twice as long to launch.
        yield torch.index_select(split.inputs, 0, rows), torch.index_select(split.labels, 0, rows)


def _prefetch(sliced: Iterator[tuple[Tensor, Tensor]], backend: Backend) -> Iterator[tuple[Tensor, Tensor]]:
    """Copy batches from host memory to the device. Starts each copy before it yields the previous batch."""
    previous = None
    for batch in sliced:
        current = backend.to_device_async(batch)
        if previous is not None:
            images, labels = previous()
            yield images, labels
        previous = current
    if previous is not None:
        images, labels = previous()
        yield images, labels


def _random_device(backend: Backend) -> torch.device:
    return backend.device if backend.sorts_int64 else torch.device("cpu")


def _splitmix64(count: int, seed: int, stream: int, device: torch.device) -> Tensor:
    """SplitMix64's outputs, (count,) int64, all different, from the start that `seed` and `stream` give (Steele, Lea
    and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).

    Not torch's generators: they give different numbers on each kind of device, but machines that are compared must use
    the same batches. Products wrap around on every device.
    """
    start = int(_mix(_mix(torch.tensor(seed)) ^ stream))
    return _mix(torch.arange(1, count + 1, device=device) * GOLDEN_GAMMA + start)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection. The masks turn torch's arithmetic shifts into logical ones."""
    bits = (bits ^ bits >> 30 & 0x3_FFFF_FFFF) * MIX_1
    bits = (bits ^ bits >> 27 & 0x1F_FFFF_FFFF) * MIX_2
    return bits ^ bits >> 31 & 0x1_FFFF_FFFF
