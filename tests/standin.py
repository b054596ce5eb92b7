"""Devices for tests. One works like Apple's: asynchronous, without pinned memory, its memory's peak scripted; one
captures steps as CUDA does; one has samples sent to it."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.devices import Backend
from pipeline.devices.cpu import Cpu
from pipeline.devices.cuda import Cuda
from pipeline.devices.graphs import WARM_UP_CALLS, GraphedFunction


class Standin(Backend):
    """Tensors are the CPU's, time is its own: what `queue` takes passes when somebody synchronizes.

    `calls` holds in order what was asked of it: `synchronize`, `now`, `reset`, `peak`, and of `EventStandin`, `event`.
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


class EventStandin(Standin):
    """With events in its queue: one is reached when the work queued before it is done."""

    def record_event(self):
        self.calls.append("event")
        return self.time + self.queued

    def elapsed_seconds(self, first, last):
        assert last <= self.time  # after synchronize
        return last - first


class Tape(TorchDispatchMode):
    """Records the operations that run inside, and replays them on the same memory.

    Like a CUDA graph: `replay` repeats tensor work alone. No Python runs again, numbers that Python computed stay as
    they were, and reading a tensor's value while recording fails.
    """

    def __init__(self):
        super().__init__()
        self._operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        outputs = operation(*args, **(kwargs or {}))
        self._operations.append((operation, args, kwargs or {}, outputs))
        return outputs

    def replay(self):
        with torch.no_grad():
            for operation, args, kwargs, outputs in self._operations:
                again = operation(*args, **kwargs)
                for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class TapePool:
    """A `GraphPool` that captures tapes."""

    device = torch.device("cpu")

    def warm_up(self, function):
        for _ in range(WARM_UP_CALLS):
            function()

    def capture(self, function):
        with Tape() as tape:
            result = function()
        return tape.replay, result


class Capturing(Cpu):
    """The CPU with tapes for CUDA graphs, and CUDA's optimizers. `captured` holds in order the name of each function
    that was captured and its batch size, `called` the name of each captured function that was called."""

    supports_graphs = True
    optimizer_options = Cuda.optimizer_options

    def __init__(self):
        super().__init__()
        self.captured, self.called, self._pool = [], [], TapePool()

    def capture_graph(self, function, **state):
        graphed, shapes = GraphedFunction(function, self._pool, self.fail, **state), set()

        def call(*tensors):
            if tensors[0].shape not in shapes:
                shapes.add(tensors[0].shape)
                self.captured.append((function.__name__, len(tensors[0])))
            self.called.append(function.__name__)
            return graphed(*tensors)

        return call

    @staticmethod
    def fail(reason):
        raise AssertionError(f"it could not be captured: {reason}")


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
