"""Devices for tests. One works like Apple's: asynchronous, without pinned memory, its memory's peak scripted; one
records as CUDA does; one has samples sent to it."""

import time
import weakref

import torch

from pipeline.devices import Backend
from pipeline.devices.cpu import Cpu
from pipeline.devices.cuda import Cuda
from pipeline.devices.graphs import WARM_UPS, Captured
from pipeline.profiling.clock import Clock
from pipeline.training import loop, optimizers


class Standin(Backend):
    """Tensors are the CPU's, time is its own: what `queue` takes passes when somebody waits for the device.

    `calls` holds in order what was asked of it: `synchronize`, `now`, `reset`, `peak`, and of `Marked`, `mark`.
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

    def synchronize(self):
        self.calls.append("synchronize")
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


class Marked(Standin):
    """With marks in its queue: a mark is reached when what was queued before it is done."""

    def record_event(self):
        self.calls.append("mark")
        return self.time + self.queued

    def elapsed_seconds(self, first, last):
        assert last <= self.time  # the device was waited for
        return last - first


class Recorder:
    """What `graphs.Recorder` does, in effect: calls before recording, then arguments and results in memory of its own.

    `recorded` holds in order the functions' names and the sizes of the batches, `replayed` the names alone.
    """

    def __init__(self, warm_ups=WARM_UPS):
        self.warm_ups, self.recorded, self.replayed = warm_ups, [], []

    def record(self, function, tensors):
        for _ in range(self.warm_ups):
            function(*tensors)
        self.recorded.append((function.__name__, len(tensors[0])))
        given, kept = [tensor.clone() for tensor in tensors], []

        def replay(*tensors):
            self.replayed.append(function.__name__)
            for here, tensor in zip(given, tensors, strict=True):
                here.copy_(tensor)
            result = function(*given)
            if not kept:
                kept.append(result)
            parts = [each if isinstance(each, tuple) else (each,) for each in (kept[0], result)]
            for here, new in zip(*parts, strict=True):
                if here is not None:
                    here.copy_(new)
            return kept[0]

        return replay


class Recording(Cpu):
    """The CPU with `Recorder` for its graphs, and CUDA's optimizers."""

    records = True
    optimizer_options = Cuda.optimizer_options

    def __init__(self, warm_ups=WARM_UPS):
        super().__init__()
        self.recorder = Recorder(warm_ups)

    def capture_graph(self, function):
        return Captured(function, self.recorder, self.fails)

    @staticmethod
    def fails(reason):
        raise AssertionError(f"could not be recorded: {reason}")


class Elsewhere(str):
    """Where torch makes tensors on the CPU, though it says that it is a GPU."""

    type = "mps"


class Away(Cpu):
    """The CPU as a device that samples must be sent to. `sent` holds the copies, each batch's inputs and labels,
    weakly; `arrived` says how many batches were asked for."""

    def __init__(self):
        super().__init__()
        self.sent, self.arrived = [], 0

    @property
    def device(self):
        return Elsewhere("cpu")

    def to_device_async(self, tensors):
        copies = tuple(tensor.clone() for tensor in tensors)
        self.sent.append([weakref.ref(copy) for copy in copies])

        def arrived():
            self.arrived += 1
            return copies

        return arrived


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
    ready=lambda inputs: inputs,
    set_mode=None,
    optimizer="sgd",
    options=None,
    lr=0.1,
    scheduler="constant",
    scheduler_options=None,
    epochs=1,
    steps=1,
    batch_size=256,
    per_batch=True,
    precision="fp32",
    on_features=False,
    recorded=False,
):
    """A job of `epochs` of `steps` for what is trainable in `network`: by plain SGD on the CPU unless told
    otherwise. A stand-in must be kept busy (`Queued`), as nothing is as fast as no time at all."""
    backend = backend or Cpu()

    def build():
        built = optimizers.build_optimizer(
            optimizer,
            [parameter for parameter in network.parameters() if parameter.requires_grad],
            lr=lr,
            options=options or {},
            total_steps=epochs * steps,
            fastest=backend.optimizer_options,
        )
        schedule = optimizers.build_scheduler(
            scheduler,
            built,
            options=scheduler_options or {},
            lr=lr,
            epochs=epochs,
            moves_per_epoch=steps if per_batch else 1,
            warmup_epochs=0,
        )
        return built, schedule

    return loop.TrainLoop(
        network=network,
        build=build,
        backend=backend,
        clock=Clock(backend.synchronize, getattr(backend, "now", time.perf_counter)),
        ready=ready,
        set_mode=set_mode or network.train,
        epochs=epochs,
        batch_size=batch_size,
        per_batch=per_batch,
        precision=precision,
        on_features=on_features,
        recorded=recorded,
    )
