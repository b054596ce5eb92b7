"""Intel's GPUs, through SYCL."""

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.devices.base import Accelerator


class Xpu(Accelerator):
    """Asynchronous."""

    kind = name = "xpu"
    compile_modes = ("off", "default")

    @classmethod
    def why_unused(cls, gpu: Mapping[str, Any]) -> str | None:
        """Why an Intel GPU is not used: the build of torch."""
        if gpu["vendor"] != "Intel":
            return None
        return f"this torch {torch.__version__} does not see it: make run TORCH=xpu"

    def facts(self) -> dict[str, Any]:
        """The card's facts from torch."""
        properties = torch.xpu.get_device_properties(self.index)
        return {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_cores": properties.gpu_eu_count,
            "driver": properties.driver_version,
        }

    def free_bytes(self) -> int | None:
        """If the driver does not tell, an upper bound that counts other processes' memory as free."""
        try:
            return super().free_bytes()
        except RuntimeError:  # "The device (...) doesn't support querying the available free memory"
            total = torch.xpu.get_device_properties(self.index).total_memory
            return int(total - torch.xpu.memory_allocated(self.device))

    def best_precision(self) -> str:
        """bf16 on GPUs with matrix units (XMX), which support it (SYCL's joint_matrix extension), else fp32."""
        properties = torch.xpu.get_device_properties(self.index)
        return "bf16" if properties.has_subgroup_matrix_multiply_accumulate else "fp32"
