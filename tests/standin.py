"""A device for tests that works like Apple's: asynchronous, without pinned memory, its memory's peak scripted."""

import time

import torch

from pipeline import engine, optim
from pipeline.backends import Backend
from pipeline.backends.cpu import Cpu
from pipeline.clock import Clock


class Standin(Backend):
    """Tensors are the CPU's, time is its own: what `queue` takes passes when somebody waits for the device.

    `calls` holds in order what was asked of it: `synchronise`, `now`, `reset`, `peak`.
    """

    kind = name = "mps"
    precisions = ("fp32",)

    def __init__(self, index=0, peaks=()):
        super().__init__(index)
        self.calls, self.time, self.queued, self.peaks = [], 100.0, 0.0, list(peaks)

    @property
    def device(self):
        return torch.device("cpu")

    @classmethod
    def count(cls):
        return 1

    def queue(self, seconds):
        self.queued += seconds

    def synchronise(self):
        self.calls.append("synchronise")
        self.time += self.queued
        self.queued = 0.0

    def now(self):
        self.calls.append("now")
        return self.time

    def reset_peak_memory(self):
        self.calls.append("reset")

    def memory_mib(self):
        self.calls.append("peak")
        return {"peak": self.peaks.pop(0)} if self.peaks else {}

    def facts(self):
        return {"name": "Stand-in"}


class Queued(torch.nn.Module):
    """A network whose every pass keeps `backend` busy for `seconds`."""

    def __init__(self, network, backend, seconds):
        super().__init__()
        self.network, self._backend, self._seconds = network, backend, seconds

    def forward(self, inputs):
        self._backend.queue(self._seconds)
        return self.network(inputs)


def job_of(
    network,
    *,
    backend=None,
    set_mode=None,
    optimizer="sgd",
    options=None,
    lr=0.1,
    scheduler="constant",
    scheduler_options=None,
    epochs=1,
    steps=1,
    per_batch=True,
    precision="fp32",
    on_features=False,
):
    """A job of `epochs` of `steps` for what is trainable in `network`: by plain SGD on the CPU unless told
    otherwise. A stand-in must be kept busy (`Queued`), as nothing is as fast as no time at all."""
    backend = backend or Cpu()
    built = optim.build_optimizer(
        optimizer,
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=lr,
        options=options or {},
        total_steps=epochs * steps,
    )
    schedule = optim.build_scheduler(
        scheduler,
        built,
        options=scheduler_options or {},
        lr=lr,
        epochs=epochs,
        steps_per_epoch=steps,
        per_batch=per_batch,
        warmup_epochs=0,
    )
    return engine.Job(
        network=network,
        optimizer=built,
        scheduler=schedule,
        set_mode=set_mode or network.train,
        epochs=epochs,
        per_batch=per_batch,
        precision=precision,
        backend=backend,
        clock=Clock(backend.synchronise, getattr(backend, "now", time.perf_counter)),
        on_features=on_features,
    )
