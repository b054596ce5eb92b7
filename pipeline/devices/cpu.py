"""The processor itself."""

import ctypes
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from pipeline.devices.base import Backend
from pipeline.devices.rapl import RaplEnergy
from pipeline.profiling import cgroup, system_info

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


class Cpu(Backend):
    """Synchronous. Its peak memory is that of the whole process."""

    kind = name = "cpu"
    asynchronous = False
    raises_oom = False
    sorts_int64 = True
    compile_modes = ("off", "default")
    optimizer_options: Mapping[str, Any] = {"fused": True}

    def __init__(self, index: int = 0):
        super().__init__(index)
        self._rapl = RaplEnergy()

    @classmethod
    def count(cls) -> int:
        """Always one."""
        return 1

    def facts(self) -> dict[str, Any]:
        """The CPU's brand and the machine's memory."""
        machine = system_info.facts()
        return {
            "name": machine.get("cpu", "CPU"),
            "memory_gib": machine.get("memory_gib"),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }

    def synchronize(self) -> None:
        """Nothing to wait for: torch's CPU operators return when they are done."""

    def reset_peak_memory(self) -> None:
        """Reset the process's peak. Only Linux can (proc(5), clear_refs), and not in every sandbox."""
        if sys.platform == "linux":
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def memory_mib(self) -> dict[str, float]:
        """`peak`: highest resident memory of the process since the last reset or, where that failed, its start."""
        peak = _peak_mib()
        return {} if peak is None else {"peak": peak}

    def capacity_mib(self) -> float | None:
        """The machine's RAM, or the container's limit if that is lower."""
        total, limit = psutil.virtual_memory().total, cgroup.limits().memory_bytes
        return (total if limit is None else min(total, limit)) / 2**20

    def free_bytes(self) -> int | None:
        """RAM that is free or can be freed, within the container's limit."""
        available, free = int(psutil.virtual_memory().available), cgroup.limits().free_bytes
        return available if free is None else min(available, free)

    def energy(self) -> tuple[str, float] | None:
        """The sum of Linux's RAPL counters, if this user may read them."""
        joules = self._rapl.joules()
        return None if joules is None else ("rapl", joules)

    def best_precision(self) -> str:
        """bf16 if the CPU has instructions for it and torch has oneDNN to use them, else fp32."""
        flags = torch.cpu.get_capabilities()
        native = any(flags.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return "bf16" if native and has_onednn else "fp32"

    def supports_channels_last(self, network: nn.Module) -> bool:
        """False for a 1x1 convolution that strides over fewer than 16 channels, as in FastViT, MobileOne and RepVGG:
        oneDNN's backward pass writes beyond its memory there."""
        return not any(
            isinstance(layer, nn.Conv2d)
            and layer.kernel_size == (1, 1)
            and layer.stride != (1, 1)
            and layer.in_channels < 16
            for layer in network.modules()
        )

    def tune(self, *, repeated: bool = True) -> None:
        """Make glibc keep freed memory (mallopt(3)). It would return large blocks to Linux at once, and Linux zeroes
        each page again in the next step."""
        if platform.libc_ver()[0] == "glibc":
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, -1)


def _peak_mib() -> float | None:
    """Highest resident memory of this process, in MiB."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) / 2**10 for line in status if line.startswith("VmHWM:")), None)
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere
