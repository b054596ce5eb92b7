"""The interface that every backend fills; the rest of the code sees nothing else of a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.errors import StageError, UsageError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What mps, the CPU's allocator and cuBLAS say in a plain RuntimeError."""


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

    pinned_memory = False
    """Whether copies from page-locked host memory are faster and safe here."""

    def __init__(self, index: int = 0):
        self.index = index

    @property
    def device(self) -> torch.device:
        """The torch device that tensors live on."""
        return torch.device(self.kind, self.index)

    @classmethod
    def count(cls) -> int:
        """How many such devices this build of torch can use here."""
        raise NotImplementedError

    def synchronise(self) -> None:
        """Waits until the device has done all the work queued on it."""
        raise NotImplementedError

    def reset_peak_memory(self) -> None:
        """Starts the peak of `peak_memory_mib` anew, where the backend can."""

    def peak_memory_mib(self) -> float | None:
        """Most memory held since the last reset, in MiB (2**20 bytes); None where it can't be told."""
        return None

    def energy(self) -> tuple[str, float] | None:
        """Where the device's energy is read (nvml | rapl), and joules since some moment, the same at every call:
        only differences mean something. None where there is no such source. See `energy.py` for what each counts
        and, of rapl, how often it must be read."""
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

    @contextmanager
    def memory_errors(self) -> Iterator[None]:
        """Ends what runs out of memory inside with a StageError that says what to lower."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            text = str(error).lower()
            known = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not known and not any(words in text for words in OUT_OF_MEMORY):
                raise
            raise StageError(
                f"{self.kind} is out of memory: lower batch_size, image_size or data.limit, or choose a smaller model"
            ) from error
