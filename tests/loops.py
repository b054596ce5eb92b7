"""Small training loops that several test modules share."""

import copy
import math
import time
from contextlib import contextmanager

import torch
from torch import nn

from pipeline import config
from pipeline.data import batching
from pipeline.devices.cpu import Cpu
from pipeline.models import classifier
from pipeline.profiling.clock import Clock
from pipeline.training import loop, optimizers, setup

CLASSES = 3
TIMED = ("time/", "speed/", "memory/")


class ScriptedClock(Clock):
    """Its time passes in spans: in each as long as `seconds` says, else 1 s, and `gap` seconds before each."""

    def __init__(self, synchronize, seconds, gap=0.0):
        self.time, self.script, self.gap = 0.0, seconds, gap
        super().__init__(synchronize, lambda: self.time)

    @contextmanager
    def span(self, name):
        self.time += self.gap
        with super().span(name) as span:
            yield span
            self.time += self.script.get(name, 1.0)


def samples(count, features=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, features, generator=generator)
    return batching.Split(inputs, torch.randint(CLASSES, (count,), generator=generator))


def linear(features=4, classes=CLASSES, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(features, classes)


def without_times(rows):
    """Figures of epochs that do not tell the time."""
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]


def make_loop(
    network,
    *,
    backend=None,
    prepare=loop.unchanged,
    set_train_mode=None,
    optimizer="sgd",
    options=None,
    lr=0.1,
    scheduler="constant",
    scheduler_options=None,
    steps=1,
    **loop_options,
):
    """A loop of `steps` an epoch for what is trainable in `network`: by plain SGD on the CPU unless told otherwise. A
    stand-in must be kept busy (`Queued`), as nothing is as fast as no time at all."""
    backend, chosen = backend or Cpu(), loop.LoopOptions(**loop_options)

    def make_optimizer():
        built = optimizers.build_optimizer(
            optimizer,
            [parameter for parameter in network.parameters() if parameter.requires_grad],
            lr=lr,
            options=options or {},
            total_steps=chosen.epochs * steps,
            device_options=backend.optimizer_options,
        )
        schedule = optimizers.build_scheduler(
            scheduler,
            built,
            options=scheduler_options or {},
            lr=lr,
            epochs=chosen.epochs,
            scheduler_steps_per_epoch=steps if chosen.schedule_per_batch else 1,
            warmup_epochs=0,
        )
        return built, schedule

    return loop.TrainLoop(
        network,
        make_optimizer,
        backend,
        Clock(backend.synchronize, getattr(backend, "now", time.perf_counter)),
        chosen,
        prepare=prepare,
        set_train_mode=set_train_mode or network.train,
    )


def train(train_loop, training, validation, batch_size=4, progress=loop.silent):
    """Figures of every epoch, with the samples in their own order."""
    return list(
        loop.train(
            train_loop,
            lambda epoch: batching.batches(training, batch_size, train_loop.backend),
            lambda: batching.batches(validation, batch_size, train_loop.backend),
            progress,
        )
    )


def pictures(count, seed):
    """Coloured noise with the colour for a label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randint(0, 200, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    noise[torch.arange(count), :, :, labels] += 55
    return batching.Split(noise, labels)


def train_resnet(*overrides, cached, seed=0, backend=None, use_cuda_graph=False, on_device=True, batch_size=8):
    """Figures of three epochs of a tiny ResNet, with its features computed once or in every epoch, from samples on the
    device or in host memory."""
    backend = backend or Cpu()
    recipe = config.load(["model=test_resnet.r160_in1k", "weights=random", "image_size=32", *overrides]).work
    backend.set_precision(recipe.precision)
    torch.manual_seed(seed)
    net = classifier.build(recipe, CLASSES, None).to(backend.device)
    beginning = copy.deepcopy(net.state_dict())
    splits = [pictures(22, 1), pictures(10, 2)]
    if on_device:
        splits = [split.to(backend.device) for split in splits]

    def prepare(images):
        return batching.prepare(images, 32)

    if cached:
        net.eval()
        step = loop.make_feature_step(net.features, prepare, backend, recipe.precision)
        splits = [loop.compute_features(step, split, batching.batches(split, 8, backend)) for split in splits]
    training, validation = splits
    train_loop = make_loop(
        net.head if cached else net,
        backend=backend,
        prepare=loop.unchanged if cached else prepare,
        set_train_mode=lambda: classifier.set_train_mode(net, recipe.frozen_batch_norm),
        optimizer="adamw",
        lr=0.05 if recipe.trainable == "head" else 0.001,
        scheduler="cosine",
        steps=math.ceil(22 / batch_size),
        epochs=3,
        precision=recipe.precision,
        on_features=cached,
        use_cuda_graph=use_cuda_graph,
    )
    if use_cuda_graph:
        loop.warm_up(train_loop, *(batching.batches(split, batch_size, backend) for split in splits))
        net.load_state_dict(beginning)
        train_loop.restart()
    rows = loop.train(
        train_loop,
        lambda epoch: batching.shuffled_batches(training, batch_size, backend, seed, epoch, flip=recipe.flip),
        lambda: batching.batches(validation, batch_size, backend),
    )
    return without_times(rows)


def recipe_of(name, *overrides):
    small = ("model=test_resnet.r160_in1k", "image_size=32", "epochs=2", "warmup_epochs=0", "threads=1", "batch_size=8")
    return config.load([f"recipe={name}", "weights=random", *small, *overrides]).work


def images_of(count, seed):
    """Random pictures of 16 x 16 pixels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return batching.Split(images, torch.arange(count) % CLASSES)


def make_setup(recipe, splits, *, backend=None, seed=0, clock=Clock):
    backend = backend or Cpu()
    return setup.TrainingSetup(recipe, seed, CLASSES, None, splits, backend, clock(backend.synchronize))
