"""CUDA graphs: the launches of a function recorded once, and replayed by a single one.

A small network's kernels are done sooner than Python can launch the next. PyTorch's notes on CUDA ("CUDA Graphs") say
what a recorded function may not do: wait for the device, decide by a tensor's value, change shapes.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

WARM_UPS = 3
"""Calls before recording, as PyTorch's notes have it: libraries set themselves up, optimizers make their state."""


class Recorder:
    """Records functions on one device. Their graphs share one pool of memory, since no two ever run at once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: Any = None
        self._hidden: weakref.WeakKeyDictionary[torch.cuda.CUDAGraph, int] = weakref.WeakKeyDictionary()

    @property
    def hidden_bytes(self) -> int:
        """Most that a replay of the graphs that are still there takes beside what torch's allocator counts: what is
        freed within a graph was counted only while it was recorded."""
        return max(self._hidden.values(), default=0)

    def record(self, function: Callable[..., Result], tensors: tuple[Tensor, ...]) -> Callable[..., Result]:
        """Calls `function` with `tensors` some times, records it, and gives a function of tensors like them, whose
        result is always in the same memory: it stands until any function recorded here is called again."""
        given = [tensor.clone() for tensor in tensors]
        current = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function(*given)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
                result = function(*given)
        except RuntimeError:
            self._end_capture()
            raise
        self._pool = graph.pool()
        within = torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)
        self._hidden[graph] = within

        def replay(*tensors: Tensor) -> Result:
            for here, tensor in zip(given, tensors, strict=True):
                here.copy_(tensor)
            graph.replay()
            return result

        return replay

    def _end_capture(self) -> None:
        """After one that failed: torch's generator takes itself to be recorded still, and refuses to give random
        numbers, until a recording ends well."""
        with torch.cuda.device(self._device), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros((), device=self._device)


class Captured:
    """`function`, recorded for each shape of its arguments when it's first called with it.

    What can't be recorded is called as it is from then on, and `note` is told why.
    """

    def __init__(self, function: Callable[..., Any], recorder: Recorder, note: Callable[[str], None]):
        self._function, self._recorder, self._note = function, recorder, note
        self._replays: dict[tuple[torch.Size, ...], Callable[..., Any]] = {}

    def __call__(self, *tensors: Tensor) -> Any:
        """The function's result; see `Recorder.record` for how long it stands."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._replays:
            try:
                self._replays[shapes] = self._recorder.record(self._function, tensors)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # cudaErrorStreamCapture...
                self._note((str(error).strip() or type(error).__name__).splitlines()[0])
                self._replays[shapes] = self._function
        return self._replays[shapes](*tensors)
