"""What is measured of a model on a split, and when the clock runs."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import config
from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.profiling.clock import Clock
from pipeline.training import evaluation

IMAGES, SIDE, CLASSES = 60, 8, 10


class Watched(batching.Split):
    """A split that counts how often it is copied to a device."""

    copies = 0

    def to(self, device):
        Watched.copies += 1
        return super().to(device)


class Net(nn.Module):
    """A linear classifier that notes the size of each batch and what its clock was doing."""

    def __init__(self, clock):
        super().__init__()
        self.linear, self.clock, self.batches = nn.Linear(3 * SIDE * SIDE, CLASSES), clock, []

    def forward(self, images):
        self.batches.append((len(images), "test" in self.clock.spans))
        return self.linear(images.flatten(1))


class Spans(Clock):
    """A clock whose readings are scripted, and that tells which spans were entered."""

    def __init__(self):
        readings = iter([10.0, 12.5])
        super().__init__(lambda: None, lambda: next(readings))
        self.spans = []

    def span(self, name):
        self.spans.append(name)
        return super().span(name)


@pytest.fixture
def images():
    Watched.copies = 0
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return Watched(inputs, torch.randint(CLASSES, (IMAGES,), generator=generator))


@pytest.mark.parametrize("upload", [True, False])
def test_every_image_counts_once_and_only_that_is_timed(images, upload):
    torch.manual_seed(0)
    clock = Spans()
    net = Net(clock)
    recipe = dataclasses.replace(config.load().recipes["finetune"], image_size=SIDE, batch_size=7, precision="fp32")
    predictions, metrics = evaluation.measure(net, images, recipe, Cpu(), clock, channels_last=False, upload=upload)
    assert net.batches == [(7, False), (4, False), *[(7, True)] * 8, (4, True)]
    assert Watched.copies == upload

    with torch.no_grad():
        logits = net(batching.prepare(images.inputs, SIDE)).double().numpy()
    labels = images.labels.numpy()
    assert np.array_equal(predictions, logits.argmax(1))
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(IMAGES), labels]
    assert metrics == {
        "test/accuracy": (predictions == labels).mean(),
        "test/loss": pytest.approx(losses.mean(), rel=1e-4),
        "speed/test_images_per_second": IMAGES / 2.5,
    }
