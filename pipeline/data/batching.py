"""Images ready to train on: the validation split, the order of each epoch, batches on the device, the resize."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.devices import Backend
from pipeline.errors import UsageError

UPLOAD_ROWS = 8192
"""How many images are gathered in host memory at a time on their way to the device."""

GOLDEN_GAMMA, MIX_1, MIX_2 = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""SplitMix64's constants, as the signed numbers that tensors hold."""


@dataclass(frozen=True)
class Split:
    """Samples in host memory or on the device: `inputs` (N, H, W, 3) uint8 images as they were decoded, perhaps
    mapped from a file, or (N, D) features; `labels` (N,) int64; `rows`, (M,) int64: which of them belong to it, in
    this order, where not all do."""

    inputs: Tensor
    labels: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels if self.rows is None else self.rows)

    @property
    def nbytes(self) -> int:
        """What its inputs take on a device."""
        return len(self) * self.inputs[0].nbytes

    def take(self, indices: NDArray[np.int64]) -> "Split":
        """The samples at `indices`, in that order; nothing is copied."""
        chosen = torch.from_numpy(indices)
        return Split(self.inputs, self.labels, chosen if self.rows is None else self.rows[chosen])

    def to(self, device: torch.device) -> "Split":
        """Its samples alone on `device`, whole rows."""
        if self.rows is None:
            return Split(self.inputs.to(device), self.labels.to(device))
        inputs = torch.empty((len(self), *self.inputs.shape[1:]), dtype=self.inputs.dtype, device=device)
        for start in range(0, len(self), UPLOAD_ROWS):
            chosen = self.rows[start : start + UPLOAD_ROWS]
            inputs[start : start + len(chosen)] = self.inputs[chosen].to(device)
        return Split(inputs, self.labels[self.rows].to(device))


class Taps(NamedTuple):
    """Of S outputs along one axis, the two inputs about each one's centre, (S,) int64, and their weights, (S,) float32,
    which sum to 1; at the edges the second's is 0."""

    first: Tensor
    second: Tensor
    of_first: Tensor
    of_second: Tensor


class ResizeWeights(NamedTuple):
    """What (H, W) is enlarged to (S, S) by: the same weights as matrices, `columns` (W, S) and `rows` (S, H) float32,
    and as `Taps`."""

    columns: Tensor
    rows: Tensor
    across: Taps
    down: Taps


def as_split(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Split:
    """Decoded images (N, H, W, 3) and labels (N,) as a Split in host memory, without a copy."""
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


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


def batches(
    split: Split, batch_size: int, backend: Backend, order: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts `split` into batches on the device, the last one as short as it comes; `order` (N,) int64, where `split`
    is, shuffles it. What is in host memory is sent while the batch before it is worked on."""
    cut = _cut(split, batch_size, order)
    return cut if split.inputs.device.type == backend.device.type else _sent(cut, backend)


def shuffled(
    split: Split, batch_size: int, backend: Backend, seed: int, epoch: int, *, flip: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's batches, in an order drawn from `seed` and `epoch` on the device: the same on every device.

    `flip` mirrors each image left to right with probability one half.
    """
    cut = batches(
        split, batch_size, backend, epoch_permutation(len(split), backend, seed, epoch).to(split.labels.device)
    )
    if not flip:
        yield from cut
        return
    mirror = (_draw(len(split), seed, 2 * epoch + 1, _drawn_on(backend)) < 0).to(backend.device)[:, None, None, None]
    for number, (images, labels) in enumerate(cut):
        chosen = mirror[number * batch_size : number * batch_size + len(labels)]
        yield torch.where(chosen, images.flip(2), images), labels


def epoch_permutation(count: int, backend: Backend, seed: int, epoch: int) -> Tensor:
    """(count,) int64: the order of an epoch's samples, as `shuffled` has them."""
    return torch.argsort(_draw(count, seed, 2 * epoch, _drawn_on(backend)))


def resize_weights(height: int, width: int, image_size: int, device: torch.device) -> ResizeWeights | None:
    """What `prepare` enlarges (height, width) to `image_size` by; None where nothing is to be enlarged."""
    if (height, width) == (image_size, image_size) or max(height, width) > image_size:
        return None
    columns, rows = _taps(width, image_size), _taps(height, image_size)
    return ResizeWeights(
        _product(columns, width).T.contiguous().to(device),
        _product(rows, height).to(device),
        Taps(*(part.to(device) for part in columns)),
        Taps(*(part.to(device) for part in rows)),
    )


def prepare(
    images: Tensor, image_size: int, enlarge: ResizeWeights | None = None, *, channels_last: bool = False
) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, image_size, image_size) float32 from 0 to 1, resized as PIL does it.

    Bilinear, with a widened filter when shrinking, and rounded to 8 bits, as torchvision's Resize does on a PIL image
    (Pillow, src/libImaging/Resample.c). `enlarge`: the `resize_weights`, if any. Enlarging goes by columns
    first and rounds in between, as PIL does: by two matrix products, on an H100 0.5 microseconds an image from 32 to
    96 pixels, where torch's own interpolation takes 1.1; compiled, by one kernel that reads each output's four inputs,
    on an H200 in 0.08. Shrunk by torch, which rounds once, values may differ by one step of 1/255. So may enlarged ones
    where halves are told by PIL's last bit (6 times as large: 5% of values), or by ours and the products are tf32's,
    which drop it (2 or 4 times as large); of both roundings, rarely, by two steps.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    height, width = images.shape[1:3]
    enlarge = enlarge or resize_weights(height, width, image_size, images.device)
    if enlarge is None:
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
        if (height, width) != (image_size, image_size):
            size = (image_size, image_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True).round_()
    elif torch.compiler.is_compiling():
        pixels = _gathered(images, enlarge).permute(0, 3, 1, 2)
    else:
        pixels = _multiplied(images, enlarge, channels_last)
    return pixels.div_(255).contiguous(memory_format=layout)


def _multiplied(images: Tensor, enlarge: ResizeWeights, channels_last: bool) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, S, S) float32 from 0 to 255, enlarged; few kernels, and fast ones."""
    columns, rows = enlarge.columns, enlarge.rows
    size, height = rows.shape
    # (B, 3, H, S): products of three columns, as the images lie, are slow.
    pixels = torch.matmul(images.permute(0, 3, 1, 2).float().contiguous(), columns).round_()
    if channels_last:
        pixels = pixels.permute(0, 2, 3, 1).reshape(len(images), height, size * 3)
        pixels = torch.matmul(rows, pixels).view(len(images), size, size, 3).permute(0, 3, 1, 2)
    else:
        pixels = torch.matmul(rows, pixels)
    return pixels.round_()


def _gathered(images: Tensor, enlarge: ResizeWeights) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, S, S, 3) float32 from 0 to 255, as `_multiplied`; many kernels, but the compiler makes
    one of them."""
    (left, right, of_left, of_right), (upper, lower, of_upper, of_lower) = enlarge.across, enlarge.down

    def widened(rows: Tensor) -> Tensor:
        taken = images[:, rows]
        return (taken[:, :, left] * of_left[:, None] + taken[:, :, right] * of_right[:, None]).round()

    return (widened(upper) * of_upper[:, None, None] + widened(lower) * of_lower[:, None, None]).round()


def _taps(inputs: int, outputs: int) -> Taps:
    centres = ((torch.arange(outputs, dtype=torch.float64) + 0.5) * (inputs / outputs) - 0.5).clamp(0, inputs - 1)
    first = centres.floor()
    nearness = centres - first
    # A millionth more: halves are rounded upwards, as PIL does, where torch takes the even neighbour.
    weights = ((part * (1 + 2**-20)).float() for part in (1 - nearness, nearness))
    return Taps(first.long(), (first.long() + 1).clamp(max=inputs - 1), *weights)


def _product(taps: Taps, inputs: int) -> Tensor:
    """(S, inputs) float32: what multiplies the inputs to the outputs."""
    matrix = torch.zeros(len(taps.first), inputs)
    for index, weight in ((taps.first, taps.of_first), (taps.second, taps.of_second)):
        matrix.scatter_add_(1, index[:, None], weight[:, None])
    return matrix


def _cut(split: Split, batch_size: int, order: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(split), batch_size):
        stop = start + batch_size
        if order is None and split.rows is None:
            yield split.inputs[start:stop], split.labels[start:stop]
            continue
        chosen = torch.arange(start, min(stop, len(split))) if order is None else order[start:stop]
        if split.rows is not None:
            chosen = split.rows[chosen]
        # Not by inputs[chosen], which takes the host twice as long to launch.
        yield torch.index_select(split.inputs, 0, chosen), torch.index_select(split.labels, 0, chosen)


def _sent(cut: Iterator[tuple[Tensor, Tensor]], backend: Backend) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of host memory on the device, each sent before the one ahead of it is asked for."""
    ahead = None
    for batch in cut:
        coming = backend.to_device_async(batch)
        if ahead is not None:
            images, labels = ahead()
            yield images, labels
        ahead = coming
    if ahead is not None:
        images, labels = ahead()
        yield images, labels


def _drawn_on(backend: Backend) -> torch.device:
    return backend.device if backend.sorts_int64 else torch.device("cpu")


def _draw(count: int, seed: int, stream: int, device: torch.device) -> Tensor:
    """(count,) int64, all different and as good as random: SplitMix64's outputs from a start that `seed` and `stream`
    give (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).

    torch's own generators give other numbers on each kind of device; machines that are compared shall take the very
    same steps. Products wrap, as they do on every device.
    """
    start = int(_mix(_mix(torch.tensor(seed)) ^ stream))
    return _mix(torch.arange(1, count + 1, device=device) * GOLDEN_GAMMA + start)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser, one to one; the masks make torch's shifts of signed numbers logical ones."""
    bits = (bits ^ bits >> 30 & 0x3_FFFF_FFFF) * MIX_1
    bits = (bits ^ bits >> 27 & 0x1F_FFFF_FFFF) * MIX_2
    return bits ^ bits >> 31 & 0x1_FFFF_FFFF
