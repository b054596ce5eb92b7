"""The interface that every backend fills; the rest of the code sees nothing else of a device."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import OutOfMemoryError, UsageError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What mps, the CPU's allocator and cuBLAS say in a plain RuntimeError."""


WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes of torch.compile that record launches, and their like that don't. One recorded function may not take what
another gave: "accessing tensor output of CUDAGraphs that has been overwritten"."""


class Backend:
    """One device and all that is special about it. The defaults here are those of a backend that offers nothing.

    A new backend is one file with a subclass, and a line in `backends/__init__.py`.
    """

    kind: str
    """What `device` calls it: cpu | cuda | mps | xpu."""

    name: str
    """What the tag `backend` calls it: as `kind`, and `rocm` for AMD's GPUs."""

    precisions: tuple[str, ...] = ("fp32", "bf16")
    """The values of `precision` that it can do."""

    compile_modes: tuple[str, ...] = ("off",)
    """The values of `compile`, beside auto, that it can do."""

    compile_pays_after_images: int | None = None
    """How many images a training must pass through the network before `compile: auto` compiles; None: never."""

    records = False
    """Whether `captured` does anything here."""

    optimizer_options: Mapping[str, Any] = {}
    """How torch's own optimizers are fastest here, where they take these options."""

    asynchronous = True
    """Whether work is queued, so that a clock is wrong unless it waits for the device first."""

    sorts_int64 = False
    """Whether 64-bit integers are known to be multiplied, shifted and sorted right here; else the host does it."""

    raises_oom = True
    """Whether it says no when there isn't enough memory. A CPU swaps, and in the end the system kills the process."""

    def __init__(self, index: int = 0):
        self.index = index
        self.capture_error: str | None = None
        """Why something could not be recorded (`captured`) and is launched piece by piece."""

    @property
    def device(self) -> torch.device:
        """The torch device that tensors live on."""
        return torch.device(self.kind, self.index)

    @classmethod
    def count(cls) -> int:
        """How many such devices this build of torch can use here."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Waits until the device has done all the work queued on it."""
        raise NotImplementedError

    def reset_peak_memory(self) -> None:
        """Starts the peaks of `memory_mib` anew, where the backend can."""

    def memory_mib(self) -> dict[str, float]:
        """The device's memory in MiB (2**20 bytes), by these names; what can't be told is absent.

        `peak`: most held since the last reset; `peak_reserved`: most that torch's allocator had taken for it since
        then; `current`: held by tensors now; `driver`: taken now, as the driver tells it. Each backend says of what.
        """
        return {}

    def capacity_mib(self) -> float | None:
        """The memory that there is for tensors, used or not, in MiB; None where it can't be told."""
        return None

    def free_bytes(self) -> int | None:
        """What tensors could still take on the device at this moment, in bytes; None where it can't be told."""
        return None

    def release_memory(self) -> None:
        """Gives back what torch keeps of freed tensors, so that another program, or a larger block, may have it."""

    def to_device_async(self, tensors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        """Starts to copy tensors from host memory to the device. Gives a function that returns the copies in the
        same order, for use on the stream that is current when it is called; it holds them for as long as it is held.

        Here the copy is plain and done when this returns. One that isn't waited for is safe from page-locked memory
        only, which mps hasn't: it may read pageable memory after that was written anew. Tensors that are on the
        device already, as the CPU's are, come back themselves.
        """
        sent = tuple(tensor.to(self.device) for tensor in tensors)
        return lambda: sent

    def capture_graph(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of tensors, so that its launches cost the host next to nothing: they are recorded at the first
        call with each shape, which calls `function` several times, and replayed from then on. Its result then stands
        until the next call of anything captured. Here it is `function` itself."""
        return function

    def record_event(self) -> object | None:
        """A mark in the device's own queue, behind the work queued so far, that will know when it was reached. None:
        there is none that we trust, and who measures must wait for the device and read the clock."""
        return None

    def elapsed_seconds(self, first: Any, last: Any) -> float:
        """Seconds that the device took from one `mark` to another; valid once it was waited for (`synchronize`)."""
        raise NotImplementedError

    def energy(self) -> tuple[str, float] | None:
        """Where the device's energy is read (nvml | rapl), and joules since some moment, the same at every call:
        only differences mean something. None where there is no such source. See `energy.py` for what each
        counts."""
        return None

    def gpu_uuid(self) -> str | None:
        """NVIDIA's name of this very card (`GPU-...`), for other tools to find it by; None for all others. It
        must not be recorded: it is a serial number."""
        return None

    def facts(self) -> dict[str, Any]:
        """What the hardware.* and software.* tags need: `name`, and where known `memory_gib`, `gpu_cores`,
        `power_limit_watts`, `driver`; a fact that is not known is absent. Plus what only torch knows."""
        raise NotImplementedError

    def set_precision(self, precision: str) -> None:
        """Makes float32 mean what `precision` says. Raises UsageError where the backend can't do it."""
        if precision not in self.precisions:
            raise UsageError(
                f'precision: "{precision}" is not allowed on {self.kind}: expected {" | ".join(self.precisions)}'
            )

    def best_precision(self) -> str:
        """The precision of mixed training that the hardware itself computes in: bf16, else fp16, else fp32. One that is
        only emulated does not count."""
        return "fp32"

    def tune(self, *, repeated: bool = True) -> None:
        """Has the libraries below torch take steps fast, from now on. `repeated`: of the same shape again and again, so
        that it pays to try how each is taken fastest."""

    def channels_last(self, precision: str) -> bool:
        """Whether `channels_last: auto` chooses that layout here."""
        return True

    def autocast(self, precision: str) -> torch.autocast:
        """The context in which the network runs."""
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.kind, dtype=dtype, enabled=precision in ("bf16", "fp16"))

    def compile_mode(self, mode: str, images: int) -> str:
        """The mode of torch.compile for a value of `compile` and a training that passes `images` through the
        network. Raises UsageError where the backend can't do it."""
        if mode == "auto":
            pays = self.compile_pays_after_images is not None and images > self.compile_pays_after_images
            return "default" if pays else "off"
        if mode not in self.compile_modes:
            raise UsageError(
                f'compile: "{mode}" is not allowed on {self.kind}: expected auto | {" | ".join(self.compile_modes)}'
            )
        return mode

    def recorded(self, graph: str | bool, compile_mode: str) -> bool:
        """Whether launches are recorded for a value of `graph`; auto: where the backend can, and torch.compile does
        not by itself. Raises UsageError where it can't be."""
        by_itself = compile_mode in WITHOUT_GRAPHS
        if graph is True and not self.records:
            raise UsageError(f"graph: true is not allowed on {self.kind}: expected auto | false")
        if graph is True and by_itself:
            raise UsageError(f'graph: true is not allowed with compile: "{compile_mode}", which records by itself')
        return self.records and not by_itself if graph == "auto" else bool(graph)

    @contextmanager
    def memory_errors(self) -> Iterator[None]:
        """Ends what runs out of memory inside with an OutOfMemoryError that says what to lower."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            text = str(error).lower()
            known = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not known and not any(words in text for words in OUT_OF_MEMORY):
                raise
            raise OutOfMemoryError(
                f"{self.kind} is out of memory: lower batch_size, image_size or data.limit, or choose a smaller model"
            ) from error
