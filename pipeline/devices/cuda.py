"""NVIDIA's GPUs through CUDA, and AMD's through ROCm. torch calls both `cuda`."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from pipeline.devices.base import Accelerator
from pipeline.devices.graphs import GraphedFunction, GraphPool
from pipeline.profiling import system_info
from pipeline.profiling.nvidia import NvidiaCard

BF16_ARCHITECTURES = re.compile(r"gfx(908|90a|94|95|11|12)")
"""AMD's GPUs with matrix instructions for bf16 (rocWMMA's API reference, "Supported GPU architectures")."""


class Cuda(Accelerator):
    """Asynchronous. TF32 is off unless `precision: tf32` asks for it."""

    kind = "cuda"
    sorts_int64 = True
    compile_modes = ("off", "default", "reduce-overhead", "max-autotune")
    supports_graphs = True
    optimizer_options: Mapping[str, Any] = {"fused": True, "capturable": True}
    compile_pays_after_images = 15_000_000  # about a minute of compiling, 3 to 4 microseconds saved per image

    def __init__(self, index: int = 0):
        super().__init__(index)
        self._copy_stream: torch.cuda.Stream | None = None
        self._graph_pool = GraphPool(self.device)
        self._capability = torch.cuda.get_device_capability(index)
        self.name = "rocm" if torch.version.hip else "cuda"
        self.autotunes = self.name == "cuda"  # on ROCm it may take minutes
        if self.name == "rocm":
            self.precisions = ("fp32", "bf16", "fp16")
        elif self._capability >= (8, 0):  # Ampere brought TF32 and units for bf16; earlier cards emulate bf16
            self.precisions = ("fp32", "tf32", "bf16", "fp16")
        else:
            self.precisions = ("fp32", "fp16")

    @classmethod
    def count(cls) -> int:
        """Number of GPUs up to the first that this build of torch has no code for, so that indices stay CUDA's."""
        return sum(1 for _ in takewhile(has_code_for, range(torch.cuda.device_count())))

    @classmethod
    def why_unused(cls, gpu: Mapping[str, Any]) -> str | None:
        """Why an NVIDIA or AMD GPU is not used: the driver, or the build of torch."""
        build = f"this torch {torch.__version__}"
        if gpu["vendor"] == "AMD":
            return f"{build} is built without ROCm: make run TORCH=rocm7.2 (Linux only)"
        if gpu["vendor"] != "NVIDIA":
            return None
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        if not re.match(r"\d|GPU-|MIG-", visible):  # CUDA ignores all from the first invalid entry on
            return f'CUDA_VISIBLE_DEVICES="{visible}" hides it: unset CUDA_VISIBLE_DEVICES'
        if "driver" not in gpu:
            return "its driver does not answer: install or repair it; in a container, start that with --gpus all"
        if torch.version.cuda is None:
            return f"{build} is built without CUDA: make run TORCH=cu130 (cards before Turing: TORCH=cu126)"
        if torch.cuda.device_count() == 0:
            needed = f"CUDA {torch.version.cuda}"
            return f"its driver {gpu['driver']} does not support {needed}: update it, or make run TORCH=cu126"
        return f"{build} supports only {' '.join(torch.cuda.get_arch_list())}: make run TORCH=cu126"

    def facts(self) -> dict[str, Any]:
        """The card's facts from torch, its driver, and its current power limit."""
        properties = torch.cuda.get_device_properties(self.index)
        milliwatts = self._nvidia_card and self._nvidia_card.query("nvmlDeviceGetPowerManagementLimit")
        facts = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_cores": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "architectures": torch.cuda.get_arch_list(),
            "driver": self._nvidia_card.driver() if self._nvidia_card else _driver_of(properties.name),
            "power_limit_watts": round(milliwatts / 1000, 2) if milliwatts else None,
        }
        return {key: value for key, value in facts.items() if value is not None}

    def gpu_uuid(self) -> str | None:
        """The UUID from torch, since CUDA_VISIBLE_DEVICES makes torch's indices differ from the driver's."""
        uuid = getattr(torch.cuda.get_device_properties(self.index), "uuid", None)
        return f"GPU-{uuid}" if uuid is not None and self.name == "cuda" else None

    def memory_mib(self) -> dict[str, float]:
        """`peak` includes temporary tensors inside CUDA graphs. `driver` is what all processes use on the card, CUDA's
        own context included."""
        free, total = torch.cuda.mem_get_info(self.device)
        memory = super().memory_mib() | {"driver": (total - free) / 2**20}
        memory["peak"] += self._graph_pool.hidden_bytes / 2**20
        return memory

    def to_device_async(self, tensors: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        """Copy through pinned memory on a separate stream. The caller may overwrite the tensors at once."""
        if self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        # Outside the stream's context, pin_memory would initialise card 0.
        with torch.cuda.stream(self._copy_stream):
            copies = tuple(tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors)
            copied = self._copy_stream.record_event()

        def wait() -> tuple[Tensor, ...]:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for tensor in copies:
                tensor.record_stream(stream)  # or the next copy could reuse the memory while this stream reads it
            return copies

        return wait

    def capture_graph(
        self,
        function: Callable[..., Any],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        parameters: Sequence[Tensor] = (),
    ) -> Callable[..., Any]:
        """Capture a CUDA graph for each shape. A function that can't be captured runs eagerly, and `capture_error` says
        why."""

        def set_error(reason: str) -> None:
            self.capture_error = reason

        return GraphedFunction(function, self._graph_pool, set_error, optimizer, parameters)

    def record_event(self) -> object | None:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def elapsed_seconds(self, first: Any, last: Any) -> float:
        """Seconds by the card's clock, with a resolution of 0.5 µs (CUDA runtime, cudaEventElapsedTime)."""
        return float(first.elapsed_time(last)) / 1000

    @cached_property
    def _nvidia_card(self) -> NvidiaCard | None:
        """The card in NVML, for its power limit and energy."""
        return NvidiaCard.open(self.gpu_uuid())

    def energy(self) -> tuple[str, float] | None:
        """Joules by NVML since the driver was loaded, of GPU, memory and board. Needs Volta or later."""
        millijoules = self._nvidia_card and self._nvidia_card.query("nvmlDeviceGetTotalEnergyConsumption")
        return ("nvml", millijoules / 1000) if millijoules else None

    def set_precision(self, precision: str) -> None:
        """Allow TF32 only for `tf32`. torch's default allows it in cuDNN's convolutions."""
        super().set_precision(precision)
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"

    def best_precision(self) -> str:
        """bf16 on cards with bf16 units, else fp16 on cards where it is at least twice as fast as fp32: NVIDIA's P100
        (6.0), Volta and Turing (CUDA C++ Programming Guide, "Arithmetic Instructions"), and AMD's."""
        if self.name == "rocm":
            architecture = getattr(torch.cuda.get_device_properties(self.index), "gcnArchName", "")
            return "bf16" if BF16_ARCHITECTURES.match(architecture) else "fp16"
        if self._capability >= (8, 0):
            return "bf16"
        return "fp16" if self._capability >= (7, 0) or self._capability == (6, 0) else "fp32"

    def tune(self, *, repeated: bool = True) -> None:
        """Let cuDNN time its kernels for each shape and keep the fastest."""
        torch.backends.cudnn.benchmark = repeated and self.autotunes

    def channels_last(self, precision: str) -> bool:
        """Yes on tensor cores only, so not before 7.0 and not at fp32. Elsewhere this layout is slower."""
        return self.name == "cuda" and self._capability >= (7, 0) and precision != "fp32"


def _driver_of(name: str) -> str | None:
    """The driver of NVIDIA's card `name` by nvidia-smi, which takes a second."""
    return next((gpu.get("driver") for gpu in system_info.gpus() if gpu["name"] == name), None)


def has_code_for(index: int) -> bool:
    """Whether this build of torch has code for card `index`: binary code for the same major version and the same or an
    earlier minor version, or PTX of an earlier version (CUDA C++ Programming Guide, "Binary Compatibility")."""
    if torch.version.hip:
        return True
    card = torch.cuda.get_device_capability(index)
    for architecture in torch.cuda.get_arch_list():
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")  # sm_90a, sm_100f
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= card and (built[0] == card[0] or kind == "compute"):
            return True
    return False
