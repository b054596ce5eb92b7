"""NVIDIA's GPUs by CUDA and AMD's by ROCm, which torch drives by the same calls."""

import gc
import re
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from pipeline.devices.base import Backend
from pipeline.devices.energy import NvmlEnergy
from pipeline.devices.graphs import Captured, Recorder
from pipeline.profiling import system_info

BF16_ARCHITECTURES = re.compile(r"gfx(908|90a|94|95|11|12)")
"""AMD's GPUs with matrix instructions for bf16: CDNA, and RDNA from its third generation on (rocWMMA's API reference,
"Supported GPU architectures")."""


class Cuda(Backend):
    """Asynchronous; TF32 is off for products and convolutions unless `precision: tf32` asks for it."""

    kind = "cuda"
    sorts_int64 = True
    compile_modes = ("off", "default", "reduce-overhead", "max-autotune")
    records = True
    optimizer_options: Mapping[str, Any] = {"fused": True, "capturable": True}
    # Measured on an H200 in bf16, steps recorded: finetune saves 3.6 microseconds an image for 55 s of compiling, blog
    # 2.7 for 46 s, so that it pays after 15 and 17 million images.
    compile_pays_after_images = 15_000_000

    def __init__(self, index: int = 0):
        super().__init__(index)
        self._meter: NvmlEnergy | None = None
        self._copies: torch.cuda.Stream | None = None
        self._recorder = Recorder(self.device)
        self.name = "rocm" if torch.version.hip else "cuda"
        capability = torch.cuda.get_device_capability(index)
        # TF32 came with Ampere (8.0), and bf16 units with it; earlier cards only emulate bf16.
        ampere = self.name == "cuda" and capability >= (8, 0)
        self.precisions = ("fp32", "tf32", "bf16", "fp16") if ampere else ("fp32", "fp16")
        if self.name == "rocm":
            self.precisions = ("fp32", "bf16", "fp16")
        self._capability = capability
        self._tensor_cores = self.name == "cuda" and capability >= (7, 0)

    @classmethod
    def count(cls) -> int:
        """The GPUs up to the first whose architecture this build of torch has no code for: `device` counts them as
        CUDA does, so that one behind it can't be named. CUDA_VISIBLE_DEVICES puts another one first."""
        return sum(1 for _ in takewhile(runs_on, range(torch.cuda.device_count())))

    def tune(self, *, repeated: bool = True) -> None:
        """Has cuDNN try its kernels on each new shape and take the fastest, in place of its own guess, which on an H200
        takes 2.1 of the 6.0 ms that `blog` needs for 1,024 images in bf16 for the first convolution alone; so chosen,
        the step takes 4.8. Not on ROCm, where MIOpen may try for minutes."""
        torch.backends.cudnn.benchmark = repeated and self.name == "cuda"

    def best_precision(self) -> str:
        """NVIDIA: bf16 from Ampere (8.0) on; fp16 on Pascal's P100 (6.0) and from Volta (7.0) on, which do at least
        twice as many operations in it as in fp32, where the other Pascals do a 64th (CUDA C++ Programming Guide,
        "Arithmetic Instructions", table of throughput). AMD: bf16 where there are matrix instructions for it, else
        fp16, which Vega and later compute two at a time."""
        if self.name == "rocm":
            architecture = getattr(torch.cuda.get_device_properties(self.index), "gcnArchName", "")
            return "bf16" if BF16_ARCHITECTURES.match(architecture) else "fp16"
        if self._capability >= (8, 0):
            return "bf16"
        return "fp16" if self._capability >= (7, 0) or self._capability == (6, 0) else "fp32"

    def channels_last(self, precision: str) -> bool:
        """The layout of tensor cores. Without them, and so at fp32, it is slower: 21,900 images/s against 23,000 on
        an H100, where bf16 does 98,400 with it and 55,000 without (benchmarks/execution.py, blog)."""
        return self._tensor_cores and precision != "fp32"

    def synchronize(self) -> None:
        """Waits for every stream of the device."""
        torch.cuda.synchronize(self.device)

    def reset_peak_memory(self) -> None:
        """Of torch's allocator."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def memory_mib(self) -> dict[str, float]:
        """`peak`: held by tensors; `peak_reserved`: by torch's allocator; `driver`: in use on the whole card, other
        processes, CUDA's own context and graphs included."""
        free, total = torch.cuda.mem_get_info(self.device)
        held = {
            "peak": torch.cuda.max_memory_allocated(self.device) + self._recorder.hidden_bytes,
            "peak_reserved": torch.cuda.max_memory_reserved(self.device),
            "driver": total - free,
        }
        return {name: count / 2**20 for name, count in held.items()}

    def capacity_mib(self) -> float | None:
        """The card's memory, less what its driver keeps back."""
        return float(torch.cuda.get_device_properties(self.index).total_memory) / 2**20

    def free_bytes(self) -> int | None:
        """Free on the card, or reserved by torch's allocator without a tensor in it."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def release_memory(self) -> None:
        """Of torch's caching allocator."""
        gc.collect()  # graphs and compiled functions hold tensors in cycles
        torch.cuda.empty_cache()

    def to_device_async(self, tensors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        """By way of page-locked memory and on a stream of its own, beside the work that is queued. The tensors given
        may be written anew at once, unless they are page-locked themselves."""
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        # The stream's context makes its card the current one, too: pinning would start another up for nothing.
        with torch.cuda.stream(self._copies):
            # torch keeps a page-locked block for as long as a copy on this stream reads it.
            sent = tuple(tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors)
            copied = self._copies.record_event()

        def arrived() -> tuple[Tensor, ...]:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for tensor in sent:
                # Freed, its memory would go to the next copy while work queued here may still read it.
                tensor.record_stream(stream)
            return sent

        return arrived

    def capture_graph(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """By a CUDA graph for each shape; what can't be recorded is left as it is, and `capture_error` says why."""

        def note(reason: str) -> None:
            self.capture_error = reason

        return Captured(function, self._recorder, note)

    def record_event(self) -> object | None:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def elapsed_seconds(self, first: Any, last: Any) -> float:
        """By the card's clock, to half a microsecond (CUDA runtime, cudaEventElapsedTime)."""
        return float(first.elapsed_time(last)) / 1000

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
        drivers = {gpu.get("driver") for gpu in system_info.gpus() if gpu["name"] == name}
        found = {
            "driver": drivers.pop() if len(drivers) == 1 else None,
            "power_limit_watts": system_info.power_limit_watts(name),
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
