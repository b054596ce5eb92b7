"""Apple's GPUs by Metal Performance Shaders."""

import os
import platform
from typing import Any

import torch

from pipeline import machine
from pipeline.backends.base import Backend


class Mps(Backend):
    """Asynchronous; no float64, no page-locked memory, one device; channels_last is slower than the default."""

    kind = name = "mps"
    precisions = ("fp32", "bf16")

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

    def channels_last(self, precision: str) -> bool:
        """Metal's convolutions want their images contiguous."""
        return False

    def synchronise(self) -> None:
        """Waits for all kernels. Metal keeps no peak of its memory, so it is sampled here, with the work's
        buffers still in Metal's heap."""
        torch.mps.synchronize()
        self._peak = max(self._peak, torch.mps.driver_allocated_memory())

    def reset_peak_memory(self) -> None:
        """Of the samples."""
        self._peak = 0

    def peak_memory_mib(self) -> float | None:
        """Most memory of Metal's driver at any synchronisation: a lower bound of the true peak."""
        return self._peak / 2**20 if self._peak else None

    def facts(self) -> dict[str, Any]:
        """The chip as Apple names it, from the system: torch only says "mps"."""
        here = machine.facts()
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
