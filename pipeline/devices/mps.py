"""Apple's GPUs, through Metal Performance Shaders."""

import gc
import os
import platform
import re
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from pipeline.devices.base import Backend
from pipeline.profiling import system_info


class Mps(Backend):
    """Asynchronous. No float64, no pinned memory, one device; channels_last is slower than the default layout."""

    kind = name = "mps"
    precisions = ("fp32", "bf16", "fp16")

    def __init__(self, index: int = 0):
        super().__init__(index)
        self._peak_bytes = 0

    @property
    def device(self) -> torch.device:
        """The only one, without an index."""
        return torch.device("mps")

    @classmethod
    def count(cls) -> int:
        """One, if torch was built with MPS and macOS offers it."""
        return int(torch.backends.mps.is_available())

    @classmethod
    def why_unused(cls, gpu: Mapping[str, Any]) -> str | None:
        """For Apple's GPUs: another Python, or a newer macOS."""
        if gpu["vendor"] != "Apple":
            return None
        if not torch.backends.mps.is_built():
            return f"this torch {torch.__version__} has no MPS: use Python for arm64, not x86_64"
        return "macOS does not offer it to torch: MPS needs macOS 14 or newer"

    def facts(self) -> dict[str, Any]:
        """The chip as Apple names it, from the system: torch only says "mps"."""
        machine = system_info.facts()
        gpu: dict[str, Any] = next((gpu for gpu in machine.get("gpus", []) if gpu["vendor"] == "Apple"), {})
        facts = {
            "name": gpu.get("name") or machine.get("cpu", "Apple GPU"),
            "memory_gib": machine.get("memory_gib"),  # CPU and GPU share one memory
            "gpu_cores": gpu.get("cores"),
            "recommended_memory_gib": round(torch.mps.recommended_max_memory() / 2**30, 1),
            "macos": platform.mac_ver()[0],
            "mps_cpu_fallback": os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK", "0") == "1",
        }
        return {key: value for key, value in facts.items() if value is not None}

    def synchronize(self) -> None:
        """Wait for all kernels, and sample the memory: Metal keeps no peak, but now still holds the work's buffers."""
        torch.mps.synchronize()
        self._peak_bytes = max(self._peak_bytes, torch.mps.driver_allocated_memory())

    def reset_peak_memory(self) -> None:
        """Forget the samples."""
        self._peak_bytes = 0

    def memory_mib(self) -> dict[str, float]:
        """`peak`: highest `driver` at any `synchronize`, a lower bound; `current`: of tensors; `driver`: all that Metal
        gave this process, with torch's cache and MPSGraph's buffers."""
        memory = {"peak": self._peak_bytes} if self._peak_bytes else {}
        memory["current"] = torch.mps.current_allocated_memory()
        memory["driver"] = torch.mps.driver_allocated_memory()
        return {name: count / 2**20 for name, count in memory.items()}

    def capacity_mib(self) -> float | None:
        """The limit that Metal recommends, about two thirds of the RAM. torch refuses only beyond 1.7 times as much
        (MPSAllocator.h), where macOS swaps."""
        return torch.mps.recommended_max_memory() / 2**20

    def free_bytes(self) -> int | None:
        """A lower bound: the rest of Metal's limit, but no more than the free RAM. torch's cached buffers do not count,
        since Metal does not tell them from MPSGraph's own."""
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return max(0, min(free, int(psutil.virtual_memory().available)))

    def release_memory(self) -> None:
        """Empty the cache of torch's allocator."""
        gc.collect()
        torch.mps.empty_cache()

    def best_precision(self) -> str:
        """bf16 from the M3 on; M1 and M2 emulate it, and compute in fp16 (transformers' pull request 40458)."""
        return "fp16" if re.match(r"Apple M[12]\b", str(self.facts()["name"])) else "bf16"

    def channels_last(self, precision: str) -> bool:
        """No: Metal's convolutions want contiguous images."""
        return False
