"""Apple's GPUs by Metal Performance Shaders."""

import gc
import os
import platform
import re
from typing import Any

import psutil
import torch

from pipeline.devices.base import Backend
from pipeline.profiling import system_info


class Mps(Backend):
    """Asynchronous; no float64, no page-locked memory, one device; channels_last is slower than the default."""

    kind = name = "mps"
    precisions = ("fp32", "bf16", "fp16")

    def __init__(self, index: int = 0):
        super().__init__(index)
        self._peak = 0

    @property
    def device(self) -> torch.device:
        """There is one, without an index."""
        return torch.device("mps")

    @classmethod
    def count(cls) -> int:
        """One, where the build has MPS and macOS offers it."""
        return int(torch.backends.mps.is_available())

    def best_precision(self) -> str:
        """bf16 from the M3 on; the GPUs of M1 and M2 compute it as float32, and fp16 by themselves (transformers' pull
        request 40458). torch's autocast does both here, and its GradScaler fp16 (PyTorch's pull requests 99272 and
        150255)."""
        return "fp16" if re.match(r"Apple M[12]\b", str(self.facts()["name"])) else "bf16"

    def channels_last(self, precision: str) -> bool:
        """Metal's convolutions want their images contiguous."""
        return False

    def synchronize(self) -> None:
        """Waits for all kernels. Metal keeps no peak of its memory, so it is sampled here, with the work's
        buffers still in Metal's heap."""
        torch.mps.synchronize()
        self._peak = max(self._peak, torch.mps.driver_allocated_memory())

    def reset_peak_memory(self) -> None:
        """Of the samples."""
        self._peak = 0

    def memory_mib(self) -> dict[str, float]:
        """`peak`: most of `driver` at any synchronisation, a lower bound of the true peak; `current`: held by tensors;
        `driver`: what Metal has given this process, torch's cached buffers and MPSGraph's own included."""
        held = {
            "current": torch.mps.current_allocated_memory() / 2**20,
            "driver": torch.mps.driver_allocated_memory() / 2**20,
        }
        return {"peak": self._peak / 2**20} | held if self._peak else held

    def capacity_mib(self) -> float | None:
        """What Metal recommends to stay below, two thirds of the RAM or somewhat more; torch refuses only beyond
        1.7 times as much (MPSAllocator.h), where macOS swaps."""
        return torch.mps.recommended_max_memory() / 2**20

    def free_bytes(self) -> int | None:
        """A lower bound: what Metal could still give, and no more than is free of the one memory that all processes
        share. Buffers that torch holds for later use are left out: Metal doesn't tell them from MPSGraph's own, which
        tensors never get."""
        left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return max(0, min(left, int(psutil.virtual_memory().available)))

    def release_memory(self) -> None:
        """Of torch's caching allocator."""
        gc.collect()
        torch.mps.empty_cache()

    def facts(self) -> dict[str, Any]:
        """The chip as Apple names it, from the system: torch only says "mps"."""
        here = system_info.facts()
        apple: dict[str, Any] = next((gpu for gpu in here.get("gpus", []) if gpu["vendor"] == "Apple"), {})
        facts = {
            "name": apple.get("name") or here.get("cpu", "Apple GPU"),
            "memory_gib": here.get("memory_gib"),  # one memory for CPU and GPU
            "gpu_cores": apple.get("cores"),
            "recommended_memory_gib": round(torch.mps.recommended_max_memory() / 2**30, 1),
            "macos": platform.mac_ver()[0],
            "mps_cpu_fallback": os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK", "0") == "1",
        }
        return {key: value for key, value in facts.items() if value is not None}
