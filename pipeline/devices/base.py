"""The interface between the pipeline and a device: no other code knows what kind of device it runs on.

To add a backend, write `devices/<kind>.py` with one subclass of `Backend` whose `kind` is the module's name, and
`tests/devices/test_<kind>.py`. Everything else follows from the file: `device: <kind>` is allowed, `device: auto` finds
it, messages list it, and the tests of all backends (tests/devices/test_backends.py) include it.

- It must set `kind` and `name`, and override `count`, `synchronize` and `facts`.
- It may override everything else. The defaults are those of a device that offers nothing.
- A GPU whose torch module works like torch.cuda (torch.xpu, for example) should subclass `Accelerator`: it then needs
  only the attributes and `facts`.
"""

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.errors import OutOfMemoryError, UsageError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What the RuntimeErrors of mps, the CPU's allocator and cuBLAS say."""

WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes of torch.compile that capture CUDA graphs, and the same modes without. The graphs of two compiled functions
can't feed each other: "accessing tensor output of CUDAGraphs that has been overwritten"."""


class Backend(ABC):
    """One device. The module's docstring says what a subclass must override."""

    kind: ClassVar[str]
    """The setting `device`: the name of the module, and usually torch's name for the type of device."""

    name: str
    """The tag `backend`: the same as `kind`, except for `rocm`."""

    precisions: tuple[str, ...] = ("fp32", "bf16")
    """Supported values of the setting `precision`."""

    compile_modes: tuple[str, ...] = ("off",)
    """Supported values of the setting `compile`, besides auto."""

    compile_pays_after_images = math.inf
    """`compile: auto` compiles if more images than this pass through the network."""

    supports_graphs = False
    """Whether `capture_graph` captures anything."""

    optimizer_options: Mapping[str, Any] = {}
    """The options with which torch's own optimizers are fastest, where they take them."""

    asynchronous = True
    """Whether operations are queued: a clock must then synchronize before it is read."""

    sorts_int64 = False
    """Whether int64 products, shifts and sorts are right on the device; if not, the CPU computes them."""

    raises_oom = True
    """Whether it raises an error when memory runs out. A CPU swaps until the system kills the process."""

    def __init__(self, index: int = 0):
        self.index = index
        self.capture_error: str | None = None  # why a function could not be captured and runs eagerly

    @property
    def device(self) -> torch.device:
        """The torch device of its tensors."""
        return torch.device(self.kind)

    @classmethod
    @abstractmethod
    def count(cls) -> int:
        """Number of such devices that this build of torch can use."""

    @classmethod
    def why_unused(cls, gpu: Mapping[str, Any]) -> str | None:
        """Why this build of torch cannot use `gpu` (one of `system_info.gpus`), and what to do about it. None for
        other backends' GPUs."""
        return None

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Facts for the tags hardware.* and software.*: `name`, and where known `memory_gib`, `gpu_cores`,
        `power_limit_watts`, `driver`; others are recorded too. Unknown facts are absent."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""

    def reset_peak_memory(self) -> None:  # noqa: B027
        """Start a new measurement of the peaks in `memory_mib`, where the backend can."""

    def memory_mib(self) -> dict[str, float]:
        """Memory use in MiB (2**20 bytes): `peak` and `peak_reserved` (by torch's allocator) since the last reset,
        `current` (of tensors) and `driver` (as it counts) now. What is unknown is absent."""
        return {}

    def capacity_mib(self) -> float | None:
        """The memory that exists for tensors, used or not, in MiB; None if unknown."""
        return None

    def free_bytes(self) -> int | None:
        """The memory that tensors could still take now, in bytes; None if unknown."""
        return None

    def release_memory(self) -> None:  # noqa: B027
        """Return the memory that torch caches, for other programs or for larger blocks."""

    def to_device_async(self, tensors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        """Start copying tensors from host memory to the device. Returns a function that returns the copies, ready for
        use on the stream that is current when it is called. The default is a synchronous copy: an asynchronous one is
        safe from pinned memory only, and mps has none."""
        copies = tuple(tensor.to(self.device) for tensor in tensors)
        return lambda: copies

    def capture_graph(
        self,
        function: Callable[..., Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        parameters: Sequence[Tensor] = (),
    ) -> Callable[..., Any]:
        """`function` of tensors, captured at the first call with each shape and replayed from then on, see
        `graphs.GraphedFunction`; here `function` itself. Pass the `optimizer` whose step is part of it, or else the
        `parameters` whose gradients it leaves."""
        return function

    def record_event(self) -> object | None:
        """A timing event on the device's queue, behind the work queued so far; None if there are no such events."""
        return None

    def elapsed_seconds(self, first: Any, last: Any) -> float:
        """Seconds on the device between two of `record_event`'s events; valid after `synchronize`."""
        raise NotImplementedError

    def energy(self) -> tuple[str, float] | None:
        """The energy counter's name (nvml | rapl) and its joules since some fixed moment; None without a counter."""
        return None

    def gpu_uuid(self) -> str | None:
        """NVIDIA's UUID of this card (`GPU-...`). None for others. Never recorded: it is a serial number."""
        return None

    def check(self, *, precision: str, compile_mode: str, graph: str | bool) -> None:
        """Raise UsageError for a value of these settings that the device does not support."""
        self._check_precision(precision)
        self.use_cuda_graph(graph, self.compile_mode(compile_mode, images=0))

    def _check_precision(self, precision: str) -> None:
        if precision not in self.precisions:
            raise UsageError(
                f'precision: "{precision}" is not allowed on {self.kind}: expected {" | ".join(self.precisions)}'
            )

    def set_precision(self, precision: str) -> None:
        """Set how float32 operations compute: in full float32, or in TF32 for `tf32`. Raises UsageError for a precision
        that the device does not support."""
        self._check_precision(precision)
        torch.set_float32_matmul_precision("highest")

    def best_precision(self) -> str:
        """The fastest precision for mixed-precision training that the hardware computes in, rather than emulates."""
        return "fp32"

    def tune(self, *, repeated: bool = True) -> None:  # noqa: B027
        """Configure the libraries below torch for speed. `repeated`: shapes recur, so that autotuning pays."""

    def channels_last(self, precision: str) -> bool:
        """Whether `channels_last: auto` chooses the channels-last memory layout."""
        return True

    def autocast(self, precision: str) -> torch.autocast:
        """The context in which the network runs."""
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=precision in ("bf16", "fp16"))

    def compile_mode(self, mode: str, images: int) -> str:
        """The mode of torch.compile for the setting `compile`, when `images` images pass through the network in total.
        Raises UsageError for a mode that is not supported."""
        if mode == "auto":
            return "default" if images > self.compile_pays_after_images else "off"
        if mode not in self.compile_modes:
            raise UsageError(
                f'compile: "{mode}" is not allowed on {self.kind}: expected auto | {" | ".join(self.compile_modes)}'
            )
        return mode

    def use_cuda_graph(self, graph: str | bool, compile_mode: str) -> bool:
        """Whether steps are captured for a value of `graph`; auto: where the backend can, unless torch.compile does so
        itself. Raises UsageError where `graph: true` can't be."""
        compile_captures = compile_mode in WITHOUT_GRAPHS
        if graph is True and not self.supports_graphs:
            raise UsageError(f"graph: true is not allowed on {self.kind}: expected auto | false")
        if graph is True and compile_captures:
            raise UsageError(f'graph: true is not allowed with compile: "{compile_mode}", which captures graphs itself')
        return self.supports_graphs and not compile_captures if graph == "auto" else bool(graph)

    @contextmanager
    def memory_errors(self) -> Iterator[None]:
        """Turn the errors of a device that runs out of memory into an OutOfMemoryError that says what to lower."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not typed and not any(words in str(error).lower() for words in OUT_OF_MEMORY):
                raise
            raise OutOfMemoryError(
                f"{self.kind} is out of memory: lower batch_size, image_size or data.limit, or choose a smaller model"
            ) from error


class Accelerator(Backend):
    """A GPU whose torch module (`torch.<kind>`) has the functions of torch.cuda, with an allocator like CUDA's."""

    @property
    def device(self) -> torch.device:
        """The torch device of its tensors."""
        return torch.device(self.kind, self.index)

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.kind)

    @classmethod
    def count(cls) -> int:
        """Number of devices that the driver shows to torch."""
        return int(torch.get_device_module(cls.kind).device_count())

    def synchronize(self) -> None:
        """Wait for all streams of this device."""
        self._module.synchronize(self.device)

    def reset_peak_memory(self) -> None:
        """Reset the peaks of torch's allocator."""
        self._module.reset_peak_memory_stats(self.device)

    def memory_mib(self) -> dict[str, float]:
        """`peak`: of tensors; `peak_reserved`: of torch's allocator."""
        return {
            "peak": self._module.max_memory_allocated(self.device) / 2**20,
            "peak_reserved": self._module.max_memory_reserved(self.device) / 2**20,
        }

    def capacity_mib(self) -> float | None:
        """The card's memory without the driver's part; for an integrated GPU, the part of the RAM that it may use."""
        return float(self._module.get_device_properties(self.index).total_memory) / 2**20

    def free_bytes(self) -> int | None:
        """Free on the card, or reserved by torch's allocator and not used by a tensor."""
        free, _ = self._module.mem_get_info(self.device)
        return int(free + self._module.memory_reserved(self.device) - self._module.memory_allocated(self.device))

    def release_memory(self) -> None:
        """Empty the cache of torch's allocator."""
        gc.collect()  # graphs and compiled functions hold tensors in reference cycles
        self._module.empty_cache()
