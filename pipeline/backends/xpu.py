"""Intel's GPUs by SYCL."""

from typing import Any

import torch

from pipeline.backends.base import Backend


class Xpu(Backend):
    """Asynchronous, with an allocator like CUDA's."""

    kind = name = "xpu"
    pinned_memory = True
    compile_modes = ("off", "default")

    @classmethod
    def count(cls) -> int:
        """GPUs that Intel's driver shows to torch."""
        return torch.xpu.device_count()

    def synchronise(self) -> None:
        """Waits for every queue of the device."""
        torch.xpu.synchronize(self.device)

    def reset_peak_memory(self) -> None:
        """Of torch's allocator."""
        torch.xpu.reset_peak_memory_stats(self.device)

    def peak_memory_mib(self) -> float | None:
        """Most memory that tensors held."""
        return float(torch.xpu.max_memory_allocated(self.device)) / 2**20

    def facts(self) -> dict[str, Any]:
        """The card as Intel names it."""
        properties = torch.xpu.get_device_properties(self.index)
        return {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_cores": properties.gpu_eu_count,
            "driver": properties.driver_version,
        }

    def set_precision(self, precision: str) -> None:
        """oneDNN may use TF32 inside float32 products where allowed; fp32 means it is not."""
        super().set_precision(precision)
        torch.set_float32_matmul_precision("highest")
