"""Evaluate a trained model on the test split."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import config, terminal
from pipeline.data import batching
from pipeline.devices import Backend
from pipeline.models import classifier
from pipeline.profiling.clock import Clock
from pipeline.training import loop, setup


def measure(
    net: classifier.Classifier,
    images: batching.Split,
    recipe: config.Recipe,
    backend: Backend,
    clock: Clock,
    *,
    channels_last: bool,
    upload: bool,
) -> tuple[NDArray[np.int64], dict[str, float]]:
    """Returns the predicted label of each image, and the test metrics by their MLflow names.

    `upload`: copy all images to the device first, and time this copy too. Else each batch is copied when it is needed.
    """
    net = net.to(backend.device).to(memory_format=setup.memory_format(channels_last))
    prepare = setup.make_prepare(images, recipe.image_size, backend, channels_last=channels_last)
    metrics = loop.RunningMetrics(backend.device)
    eval_step = loop.make_eval_step(net, prepare, backend, recipe.precision, metrics)
    # Run every batch size once, so that autotuning is not timed.
    sizes = setup.batch_sizes(images, recipe.batch_size)
    with setup.limited_tuning(backend):
        loop.evaluate(net, eval_step, metrics, [setup.first_batch(images, size, backend) for size in sizes])
    predictions: list[Tensor] = []
    with terminal.progress("test", len(images)) as advance, clock.span("test") as span:
        samples = images.to(backend.device) if upload else images
        batches = batching.batches(samples, recipe.batch_size, backend)
        means = loop.evaluate(net, eval_step, metrics, batches, predictions, advance)
    figures = {f"test/{name}": mean for name, mean in means.items()}
    figures["speed/test_images_per_second"] = len(images) / span.seconds
    return torch.cat(predictions).cpu().numpy(), figures
