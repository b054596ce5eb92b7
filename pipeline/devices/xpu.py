"""Intel's GPUs by SYCL."""

import gc
from typing import Any

import torch

from pipeline.devices.base import Backend


class Xpu(Backend):
    """Asynchronous, with an allocator like CUDA's."""

    kind = name = "xpu"
    compile_modes = ("off", "default")

    @classmethod
    def count(cls) -> int:
        """GPUs that Intel's driver shows to torch."""
        return torch.xpu.device_count()

    def synchronize(self) -> None:
        """Waits for every queue of the device."""
        torch.xpu.synchronize(self.device)

    def reset_peak_memory(self) -> None:
        """Of torch's allocator."""
        torch.xpu.reset_peak_memory_stats(self.device)

    def memory_mib(self) -> dict[str, float]:
        """`peak`: held by tensors; `peak_reserved`: by torch's allocator."""
        return {
            "peak": torch.xpu.max_memory_allocated(self.device) / 2**20,
            "peak_reserved": torch.xpu.max_memory_reserved(self.device) / 2**20,
        }

    def capacity_mib(self) -> float | None:
        """The card's memory; of a processor's own GPU, the part of the RAM that it may use."""
        return float(torch.xpu.get_device_properties(self.index).total_memory) / 2**20

    def free_bytes(self) -> int | None:
        """Free on the card, or reserved by torch's allocator without a tensor in it. Where the driver doesn't tell
        what is free, an upper bound: other processes' memory is taken for free."""
        reserved = torch.xpu.memory_reserved(self.device)
        try:
            free, _ = torch.xpu.mem_get_info(self.device)
        except RuntimeError:  # "The device (...) doesn't support querying the available free memory"
            free = torch.xpu.get_device_properties(self.index).total_memory - reserved
        return int(free + reserved - torch.xpu.memory_allocated(self.device))

    def release_memory(self) -> None:
        """Of torch's caching allocator."""
        gc.collect()
        torch.xpu.empty_cache()

    def facts(self) -> dict[str, Any]:
        """The card as Intel names it."""
        properties = torch.xpu.get_device_properties(self.index)
        return {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_cores": properties.gpu_eu_count,
            "driver": properties.driver_version,
        }

    def best_precision(self) -> str:
        """bf16 where the GPU has matrix units (XMX), which take it (SYCL's joint_matrix extension); others convert."""
        properties = torch.xpu.get_device_properties(self.index)
        return "bf16" if properties.has_subgroup_matrix_multiply_accumulate else "fp32"

    def set_precision(self, precision: str) -> None:
        """oneDNN may use TF32 inside float32 products where allowed; fp32 means it is not."""
        super().set_precision(precision)
        torch.set_float32_matmul_precision("highest")
