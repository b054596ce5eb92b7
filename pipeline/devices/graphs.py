"""CUDA graphs: capture the kernel launches of a function once, then replay all of them with a single launch.

This helps small networks, whose kernels finish faster than Python launches them. A replay runs no Python. So a captured
function must not synchronize, branch on a tensor's value or change shapes (PyTorch's CUDA semantics, "CUDA Graphs").
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.startup import first_line

WARM_UP_CALLS = 3
"""Calls before a capture, as PyTorch's notes advise: in them libraries initialise and optimizers create their state."""


class GraphPool:
    """Captures functions on one device. All graphs share one memory pool, since no two of them run at the same time."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool: Any = None
        self._hidden: weakref.WeakKeyDictionary[torch.cuda.CUDAGraph, int] = weakref.WeakKeyDictionary()

    @property
    def hidden_bytes(self) -> int:
        """The largest size of a graph's temporary tensors. torch's allocator counts them during capture only, although
        each replay uses them again."""
        return max(self._hidden.values(), default=0)

    def warm_up(self, function: Callable[[], object]) -> None:
        """Call `function` WARM_UP_CALLS times on a side stream, as a capture requires."""
        current = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                function()
        current.wait_stream(side)

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture one call of `function`. Returns a function that replays it, and the result, which it overwrites."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self._pool):
                result = function()
        except RuntimeError:
            # After a failed capture, torch's generator draws no numbers until a capture succeeds.
            with torch.cuda.device(self.device), torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros((), device=self.device)
            raise
        self._pool = graph.pool()
        peak = torch.cuda.max_memory_allocated(self.device)
        self._hidden[graph] = peak - torch.cuda.memory_allocated(self.device)
        return graph.replay, result


class Graph(NamedTuple):
    """A captured call: the function that replays it, and the tensors that it reads and writes."""

    replay: Callable[[], None]
    inputs: tuple[Tensor, ...]
    result: Any
    gradients: list[Tensor | None]


class GraphedFunction:
    """Wraps a function of tensors. The first call with new shapes runs it WARM_UP_CALLS times and captures it; later
    calls replay the graph. The result is valid until the next call of any captured function.

    - `optimizer`: its step is part of the function. The step then reads the learning rate from the device, and each
      replay first copies the schedule's current rate there.
    - `parameters`: the function computes their gradients. Each replay sets their `.grad` to those of its graph.
    - `on_failure` receives the reason if the function can't be captured. It then runs eagerly.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        pool: GraphPool,
        on_failure: Callable[[str], None],
        optimizer: torch.optim.Optimizer | None = None,
        parameters: Sequence[Tensor] = (),
    ):
        self._function, self._pool, self._on_failure = function, pool, on_failure
        self._groups = optimizer.param_groups if optimizer else []
        self._rates = [torch.zeros((), device=pool.device) for _ in self._groups]
        self._parameters = parameters
        self._graphs: dict[tuple[torch.Size, ...], Graph | None] = {}

    def __call__(self, *tensors: Tensor) -> Any:
        """Replay the graph for these shapes; capture it first if there is none."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._graphs:
            try:
                self._graphs[shapes] = self._capture(tensors)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # cudaErrorStreamCapture...
                self._on_failure(first_line(error))
                self._graphs[shapes] = None
        graph = self._graphs[shapes]
        if graph is None:
            return self._function(*tensors)
        for static, tensor in zip(graph.inputs, tensors, strict=True):
            static.copy_(tensor)
        self._copy_rates()
        graph.replay()
        for parameter, gradient in zip(self._parameters, graph.gradients, strict=True):
            parameter.grad = gradient
        return graph.result

    def _capture(self, tensors: tuple[Tensor, ...]) -> Graph:
        inputs = tuple(tensor.clone() for tensor in tensors)
        self._copy_rates()
        with self._rates_on_device():
            self._pool.warm_up(lambda: self._function(*inputs))
            replay, result = self._pool.capture(lambda: self._function(*inputs))
        return Graph(replay, inputs, result, [parameter.grad for parameter in self._parameters])

    def _copy_rates(self) -> None:
        for rate, group in zip(self._rates, self._groups, strict=True):
            rate.fill_(group["lr"])

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Let the optimizer read its learning rates from device tensors, as a replay must."""
        scheduled = [group["lr"] for group in self._groups]
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, lr in zip(self._groups, scheduled, strict=True):
                group["lr"] = lr
