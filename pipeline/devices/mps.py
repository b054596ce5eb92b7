"""Apple's GPUs, through Metal Performance Shaders."""

import gc
import os
import platform
import re
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import Tensor

from pipeline.devices.base import Backend
from pipeline.profiling import system_info


class Mps(Backend):
    """Asynchronous. It has no float64, no pinned memory and no second device."""

    kind = name = "mps"
    precisions = ("fp32", "bf16", "fp16")

    def __init__(self, index: int = 0):
        super().__init__(index)
        self._peak_bytes = 0

    @classmethod
    def count(cls) -> int:
        """One, if torch was built with MPS and macOS offers it."""
        return int(torch.backends.mps.is_available())

    @classmethod
    def why_unused(cls, gpu: Mapping[str, Any]) -> str | None:
        """Why an Apple GPU is not used: macOS is too old."""
        return "torch needs macOS 14 or newer for MPS" if gpu["vendor"] == "Apple" else None

    def facts(self) -> dict[str, Any]:
        """Facts of the chip from the operating system: torch knows no name but "mps"."""
        machine = system_info.facts()
        facts = {
            "name": machine["cpu"],
            "memory_gib": machine["memory_gib"],  # CPU and GPU share one memory
            "gpu_cores": next((gpu["cores"] for gpu in machine["gpus"]), None),
            "recommended_memory_gib": round(torch.mps.recommended_max_memory() / 2**30, 1),
            "macos": platform.mac_ver()[0],
            "mps_cpu_fallback": os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK", "0") == "1",
        }
        return {key: value for key, value in facts.items() if value is not None}

    def synchronize(self) -> None:
        """Wait for all kernels, then sample the memory, since Metal tracks no peak but still holds the buffers now."""
        torch.mps.synchronize()
        self._peak_bytes = max(self._peak_bytes, torch.mps.driver_allocated_memory())

    def reset_peak_memory(self) -> None:
        """Reset the sampled peak."""
        self._peak_bytes = 0

    def memory_mib(self) -> dict[str, float]:
        """`driver`: all memory that Metal gave this process. `peak`: the highest `driver` at any `synchronize`, so a
        lower bound of the true peak."""
        current, driver = torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
        peak = {"peak": self._peak_bytes / 2**20} if self._peak_bytes else {}
        return peak | {"current": current / 2**20, "driver": driver / 2**20}

    def capacity_mib(self) -> float | None:
        """The limit that Metal recommends, about two thirds of the RAM. Beyond it macOS swaps."""
        return torch.mps.recommended_max_memory() / 2**20

    def free_bytes(self) -> int | None:
        """The rest of Metal's limit, or the free RAM if that is less. A lower bound: torch's cache is not counted."""
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return max(0, min(free, int(psutil.virtual_memory().available)))

    def release_memory(self) -> None:
        """Empty the cache of torch's allocator."""
        gc.collect()
        torch.mps.empty_cache()

    def random_state(self) -> Tensor | None:
        """The state of Metal's default generator."""
        return torch.mps.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        """Set what `random_state` returned."""
        torch.mps.set_rng_state(state)

    def best_precision(self) -> str:
        """bf16 from the M3 on, fp16 on M1 and M2, which emulate bf16 (transformers' pull request 40458)."""
        return "fp16" if re.match(r"Apple M[12]\b", str(self.facts()["name"])) else "bf16"

    def channels_last(self, precision: str) -> bool:
        """No: Metal's convolutions are slower in this layout."""
        return False
