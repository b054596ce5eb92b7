"""NVIDIA's GPUs by CUDA and AMD's by ROCm, which torch drives by the same calls."""

from itertools import takewhile
from typing import Any

import torch

from pipeline import machine
from pipeline.backends.base import Backend
from pipeline.backends.energy import NvmlEnergy


class Cuda(Backend):
    """Asynchronous; TF32 is off for products and convolutions unless `precision: tf32` asks for it."""

    kind = "cuda"
    pinned_memory = True
    compile_modes = ("off", "default", "reduce-overhead", "max-autotune")
    # Measured on an H100 (benchmarks/execution.py, blog, bf16): 3.1 microseconds saved an image, for 14 s of
    # compiling one of the four shapes that a run has (training and validation, full and last batch).
    compile_pays_after_images = 18_000_000

    def __init__(self, index: int = 0):
        super().__init__(index)
        self._meter: NvmlEnergy | None = None
        self.name = "rocm" if torch.version.hip else "cuda"
        capability = torch.cuda.get_device_capability(index)
        # TF32 came with Ampere (8.0), and bf16 units with it; earlier cards only emulate bf16.
        ampere = self.name == "cuda" and capability >= (8, 0)
        self.precisions = ("fp32", "tf32", "bf16", "fp16") if ampere else ("fp32", "fp16")
        if self.name == "rocm":
            self.precisions = ("fp32", "bf16", "fp16")
        self._tensor_cores = self.name == "cuda" and capability >= (7, 0)

    @classmethod
    def count(cls) -> int:
        """The GPUs up to the first whose architecture this build of torch has no code for: `device` counts them as
        CUDA does, so that one behind it can't be named. CUDA_VISIBLE_DEVICES puts another one first."""
        return sum(1 for _ in takewhile(runs_on, range(torch.cuda.device_count())))

    def channels_last(self, precision: str) -> bool:
        """The layout of tensor cores. Without them, and so at fp32, it is slower: 21,900 images/s against 23,000 on
        an H100, where bf16 does 98,400 with it and 55,000 without (benchmarks/execution.py, blog)."""
        return self._tensor_cores and precision != "fp32"

    def synchronise(self) -> None:
        """Waits for every stream of the device."""
        torch.cuda.synchronize(self.device)

    def reset_peak_memory(self) -> None:
        """Of torch's allocator."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory_mib(self) -> float | None:
        """Most memory that tensors held (torch's allocator may have reserved more)."""
        return float(torch.cuda.max_memory_allocated(self.device)) / 2**20

    def energy(self) -> tuple[str, float] | None:
        """Of the card, by NVML; AMD's cards tell none."""
        if self.name == "rocm":
            return None
        if self._meter is None:
            self._meter = NvmlEnergy(self.gpu_uuid())
        joules = self._meter.joules()
        return None if joules is None else ("nvml", joules)

    def gpu_uuid(self) -> str | None:
        """By torch's index, which CUDA_VISIBLE_DEVICES makes another one than the driver's."""
        uuid = getattr(torch.cuda.get_device_properties(self.index), "uuid", None)
        return f"GPU-{uuid}" if uuid is not None and self.name == "cuda" else None

    def facts(self) -> dict[str, Any]:
        """The card as its vendor names it; its power limit and driver from the vendor's tool."""
        properties = torch.cuda.get_device_properties(self.index)
        facts = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_cores": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "architectures": torch.cuda.get_arch_list(),
        }
        return {key: value for key, value in facts.items() if value is not None} | self._from_vendor()

    def _from_vendor(self) -> dict[str, Any]:
        # Laptop GPUs of one name differ by power limit; torch doesn't know it. CUDA_VISIBLE_DEVICES may
        # reorder the cards, so a fact is taken only where every card of this name agrees on it.
        name = torch.cuda.get_device_name(self.index)
        drivers = {gpu.get("driver") for gpu in machine.gpus() if gpu["name"] == name}
        found = {
            "driver": drivers.pop() if len(drivers) == 1 else None,
            "power_limit_watts": machine.power_limit_watts(name),
        }
        return {key: value for key, value in found.items() if value is not None}

    def set_precision(self, precision: str) -> None:
        """torch leaves TF32 on for cuDNN's convolutions by default; here fp32 is fp32."""
        super().set_precision(precision)
        tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32


def runs_on(index: int) -> bool:
    """Whether this build of torch has code for the card: the same major version, a minor not above the card's,
    or PTX that the driver can compile for a newer one (CUDA C++ guide, "Binary compatibility")."""
    if torch.version.hip:
        return True
    card = torch.cuda.get_device_capability(index)
    for architecture in torch.cuda.get_arch_list():
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")  # sm_90a is for that card alone, sm_100f for later minors of it too
        built = (int(digits[:-1]), int(digits[-1]))
        later_minor = built[0] == card[0] and built < card and not number.endswith("a")
        if built == card or later_minor or (kind == "compute" and number == digits and built < card):
            return True
    return False
