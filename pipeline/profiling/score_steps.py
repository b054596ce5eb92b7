"""Define the sustained steps of a machine's score, and the names of their metrics. Imports no torch.

The steps are the same whatever the recipe: a convolutional network at fp32, the same network at the device's best
precision, and a vision transformer at that precision.
"""

import hashlib
import json
from dataclasses import dataclass

from pipeline import config


@dataclass(frozen=True)
class Step:
    """A training step on random images that is repeated. It trains all parameters with AdamW.

    `model`: a timm name. `image_size`: pixels a side. `best_precision`: use the device's best precision, not fp32.
    """

    name: str
    title: str
    model: str
    image_size: int
    batch_size: int
    best_precision: bool


STEPS = (
    Step("convnet_fp32", "convnet fp32", "resnet18", 96, 256, best_precision=False),
    Step("convnet_best", "convnet best", "resnet18", 96, 256, best_precision=True),
    Step("transformer_best", "transformer best", "vit_small_patch16_224", 224, 64, best_precision=True),
)


VERSION = 3
"""Raise it when the code runs the same steps faster or slower than before on any backend, beyond noise."""


def metric(step: str, figure: str) -> str:
    """The name of a step's metric: `images_per_second` (median of the last third), `first_third_images_per_second`,
    `seconds`, `batch_size`, `images_per_joule`, `watts`, or `course`, the series of images/s in each slice."""
    return f"sustained/{step}_{figure}"


def tag(step: str, fact: str) -> str:
    """The name of a step's tag: `workload` or `precision`."""
    return f"sustained.{step}.{fact}"


def workload(step: Step, batch_size: int, seconds: float) -> str:
    """The step's fingerprint, ten hex digits. It includes the batch size that fitted, and the duration, since heat
    builds up."""
    work = {
        "model": step.model,
        "image_size": step.image_size,
        "batch_size": batch_size,
        "seconds": seconds,
        "version": config.WORKLOAD_VERSION,
    }
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:10]
