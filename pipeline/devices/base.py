"""The interface between the pipeline and a device. No code outside this package knows what kind of device it uses.

To add a backend, write `devices/<kind>.py` with one subclass of `Backend` whose `kind` is the module's name, and
`tests/devices/test_<kind>.py`. Everything else follows from the file: `device: <kind>` is allowed, `device: auto` finds
it, messages list it, and the tests of all backends (tests/devices/test_backends.py) include it.

- It must set `kind` and `name`, and override `count`, `synchronize` and `facts`.
- It may override everything else. The defaults suit a device without any special feature.
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
from torch import Tensor, nn

from pipeline.errors import OutOfMemoryError, UsageError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""Parts of the RuntimeErrors that mps, the CPU's allocator and cuBLAS raise when memory runs out."""

WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes of torch.compile that capture CUDA graphs -> the same modes without. Two compiled functions that both capture
can't pass tensors to each other: "accessing tensor output of CUDAGraphs that has been overwritten"."""


class Backend(ABC):
    """One device. See the module's docstring for what a subclass must override."""

    kind: ClassVar[str]
    """Value of the setting `device`. It equals the module's name and, by default, torch's device type."""

    name: str
    """Value of the tag `backend`: the same as `kind`, except for `rocm`."""

    precisions: tuple[str, ...] = ("fp32", "bf16")
    """Supported values of the setting `precision`."""

    compile_modes: tuple[str, ...] = ("off",)
    """Supported values of the setting `compile`, besides auto."""

    compile_pays_after_images = math.inf
    """`compile: auto` compiles if more images than this pass through the network in the whole training."""

    supports_graphs = False
    """Whether `capture_graph` captures CUDA graphs."""

    optimizer_options: Mapping[str, Any] = {}
    """Options that make torch's own optimizers fastest on the device. Some optimizers accept only some of them."""

    asynchronous = True
    """Whether the device queues operations, so that it must be synchronized before a clock is read."""

    autotunes = False
    """Whether `tune` lets libraries time their kernels at the first use of each shape."""

    sorts_int64 = False
    """Whether the device multiplies, shifts and sorts int64 correctly. If not, the CPU does it."""

    raises_oom = True
    """Whether torch raises an error when memory runs out. A CPU swaps instead until the system kills the process."""

    def __init__(self, index: int = 0):
        self.index = index
        self.capture_error: str | None = None
        """Why a function could not be captured and runs eagerly; None if there was no such function."""

    @property
    def device(self) -> torch.device:
        """The torch device of its tensors."""
        return torch.device(self.kind)

    @classmethod
    @abstractmethod
    def count(cls) -> int:
        """Number of devices of this kind that this build of torch can use."""

    @classmethod
    def why_unused(cls, gpu: Mapping[str, Any]) -> str | None:
        """Why this build of torch can't use `gpu` (one of `system_info.gpus`), and what to do about it. None if the GPU
        belongs to another backend."""
        return None

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Facts for the tags hardware.* and software.*: `name`, where known `memory_gib`, `gpu_cores`,
        `power_limit_watts` and `driver`, and any others. Leave out what is unknown."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""

    def reset_peak_memory(self) -> None:  # noqa: B027
        """Reset the peaks of `memory_mib`, if the backend can."""

    def memory_mib(self) -> dict[str, float]:
        """Memory use in MiB (2**20 bytes). Since the last reset: `peak` of tensors, `peak_reserved` by torch's
        allocator. Now: `current` of tensors, `driver` as the driver counts it. Unknown values are absent."""
        return {}

    def capacity_mib(self) -> float | None:
        """Total memory for tensors in MiB, used or not; None if unknown."""
        return None

    def free_bytes(self) -> int | None:
        """Memory that new tensors can take now, in bytes; None if unknown."""
        return None

    def release_memory(self) -> None:  # noqa: B027
        """Release memory that torch caches, for other programs or larger tensors."""

    def random_state(self) -> Tensor | None:
        """The state of the device's random generator, as a CPU tensor; None if it uses the CPU's generator."""
        return None

    def set_random_state(self, state: Tensor) -> None:  # noqa: B027
        """Set what `random_state` returned."""

    def to_device_async(self, tensors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        """Start copying tensors from host memory to the device. Returns a function that makes the current stream wait
        for the copies, and returns them. The default copies synchronously: an asynchronous copy is safe only from
        pinned memory, which mps lacks."""
        copies = tuple(tensor.to(self.device) for tensor in tensors)
        return lambda: copies

    def capture_graph(
        self,
        function: Callable[..., Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        parameters: Sequence[Tensor] = (),
    ) -> Callable[..., Any]:
        """Wrap `function` so that it captures a CUDA graph for each shape of its tensors and then replays that graph
        (`graphs.GraphedFunction`). The default returns `function` itself. If the function takes an optimizer's step,
        pass that `optimizer`. If it only computes gradients, pass the `parameters` that get them."""
        return function

    def record_event(self) -> object | None:
        """Queue a timing event behind the work queued so far, and return it. None if the device has no events."""
        return None

    def elapsed_seconds(self, first: Any, last: Any) -> float:
        """Seconds between two events of `record_event`. Synchronize first."""
        raise NotImplementedError

    def energy(self) -> tuple[str, float] | None:
        """The energy counter's name (nvml | rapl) and its joules since a fixed moment; None without a counter."""
        return None

    def gpu_uuid(self) -> str | None:
        """NVIDIA's UUID of the card (`GPU-...`); None for other devices. Never record it: it is a serial number."""
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
        """The fastest precision for mixed-precision training that the hardware supports without emulation."""
        return "fp32"

    def tune(self, *, repeated: bool = True) -> None:  # noqa: B027
        """Configure the libraries below torch for speed. `repeated`: shapes recur, so autotuning pays."""

    def channels_last(self, precision: str) -> bool:
        """Whether `channels_last: auto` chooses the channels-last memory layout."""
        return True

    def supports_channels_last(self, network: nn.Module) -> bool:
        """Whether the device trains `network` right in the channels-last memory layout."""
        return True

    def autocast(self, precision: str) -> torch.autocast:
        """The autocast context to run the network in."""
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=precision in ("bf16", "fp16"))

    def compile_mode(self, mode: str, images: int) -> str:
        """The mode of torch.compile for the value `mode` of the setting `compile`. `images`: how many pass through the
        network in the whole training. Raises UsageError for an unsupported mode."""
        if mode == "auto":
            return "default" if images > self.compile_pays_after_images else "off"
        if mode not in self.compile_modes:
            raise UsageError(
                f'compile: "{mode}" is not allowed on {self.kind}: expected auto | {" | ".join(self.compile_modes)}'
            )
        return mode

    def use_cuda_graph(self, graph: str | bool, compile_mode: str) -> bool:
        """Whether to capture steps as CUDA graphs, by the setting `graph`. `auto`: yes if the device can, unless
        torch.compile captures graphs itself. Raises UsageError if `graph: true` is impossible."""
        compile_captures = compile_mode in WITHOUT_GRAPHS
        if graph is True and not self.supports_graphs:
            raise UsageError(f"graph: true is not allowed on {self.kind}: expected auto | false")
        if graph is True and compile_captures:
            raise UsageError(f'graph: true is not allowed with compile: "{compile_mode}", which captures graphs itself')
        return self.supports_graphs and not compile_captures if graph == "auto" else bool(graph)

    @contextmanager
    def memory_errors(self) -> Iterator[None]:
        """Turn any out-of-memory error inside into an OutOfMemoryError that says which settings to lower."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            is_memory_error = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not is_memory_error and not any(words in str(error).lower() for words in OUT_OF_MEMORY):
                raise
            raise OutOfMemoryError(
                f"{self.kind} is out of memory: lower batch_size, image_size or data.limit, or choose a smaller model"
            ) from error


class Accelerator(Backend):
    """A GPU whose torch module (`torch.<kind>`) has the same functions as torch.cuda."""

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
        """The card's memory without the driver's share; for an integrated GPU, the RAM that it may use."""
        return float(self._module.get_device_properties(self.index).total_memory) / 2**20

    def free_bytes(self) -> int | None:
        """Memory that is free on the card, or cached by torch's allocator."""
        free, _ = self._module.mem_get_info(self.device)
        return int(free + self._module.memory_reserved(self.device) - self._module.memory_allocated(self.device))

    def release_memory(self) -> None:
        """Empty the cache of torch's allocator."""
        gc.collect()  # graphs and compiled functions hold tensors in reference cycles
        self._module.empty_cache()

    def random_state(self) -> Tensor | None:
        """The state of the card's default generator."""
        state: Tensor = self._module.get_rng_state(self.device)
        return state

    def set_random_state(self, state: Tensor) -> None:
        """Set what `random_state` returned."""
        self._module.set_rng_state(state, self.device)
