"""The processor itself."""

import ctypes
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.devices.base import Backend
from pipeline.devices.energy import RaplEnergy
from pipeline.profiling import cgroup, system_info

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


class Cpu(Backend):
    """Work on it is synchronous; its memory is the process's."""

    kind = name = "cpu"
    asynchronous = False
    raises_oom = False
    sorts_int64 = True
    compile_modes = ("off", "default")
    # Of ResNet-18's 62 tensors: 6 ms a step with AdamW, 26 with foreach (2 cores).
    optimizer_options: Mapping[str, Any] = {"fused": True}

    def __init__(self, index: int = 0):
        super().__init__(index)
        self._meter = RaplEnergy()

    @property
    def device(self) -> torch.device:
        """The CPU has no index: tensors made on it say just `cpu`."""
        return torch.device("cpu")

    @classmethod
    def count(cls) -> int:
        """There is always one."""
        return 1

    def synchronize(self) -> None:
        """Nothing is queued: torch's CPU operators return when they are done."""

    def tune(self, *, repeated: bool = True) -> None:
        """Keeps what a step frees. glibc gives blocks of 32 MiB and more back to Linux at once, and the next step has
        each of their pages zeroed again: a million page faults a step of `blog`, which did 148 to 169 images/s with
        them and 214 to 245 without (bf16: 265 to 314, and 538 to 594; 2 cores, n = 3), for 2.6 to 2.9 GB of memory
        instead of 2.2. By mallopt(3); other libraries' allocators are left as they are."""
        if platform.libc_ver()[0] == "glibc":
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, -1)

    def reset_peak_memory(self) -> None:
        """Linux forgets its high-water mark on request (proc(5), clear_refs); elsewhere it is the process's."""
        if sys.platform == "linux":
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                return  # a sandbox without it: the peak since the process started stands

    def memory_mib(self) -> dict[str, float]:
        """`peak`: most resident memory of this process, since the reset on Linux, since its start elsewhere."""
        peak = self._peak_mib()
        return {} if peak is None else {"peak": peak}

    def _peak_mib(self) -> float | None:
        if sys.platform == "linux":
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**10
            return None
        if sys.platform == "win32":
            return float(psutil.Process().memory_info().peak_wset) / 2**20
        import resource  # not there on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak) / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere

    def capacity_mib(self) -> float | None:
        """The machine's RAM, or what a container may have of it."""
        total, limit = psutil.virtual_memory().total, cgroup.limits().memory_bytes
        return (total if limit is None else min(total, limit)) / 2**20

    def free_bytes(self) -> int | None:
        """RAM that is free or holds what can be dropped, and no more of it than a container has left."""
        available, left = int(psutil.virtual_memory().available), cgroup.limits().free_bytes
        return available if left is None else min(available, left)

    def energy(self) -> tuple[str, float] | None:
        """Of all packages, by Linux' RAPL, where we may read it."""
        joules = self._meter.joules()
        return None if joules is None else ("rapl", joules)

    def facts(self) -> dict[str, Any]:
        """The CPU's brand and the machine's memory."""
        here = system_info.facts()
        return {
            "name": here.get("cpu", "CPU"),
            "memory_gib": here.get("memory_gib"),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }

    def best_precision(self) -> str:
        """bf16 where the processor has instructions for its products (AVX512-BF16, AMX-BF16, Arm's BF16, by
        `torch.cpu.get_capabilities`) and torch has oneDNN, which uses them. Elsewhere oneDNN emulates it."""
        flags = torch.cpu.get_capabilities()
        native = any(flags.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return "bf16" if native and available else "fp32"

    def set_precision(self, precision: str) -> None:
        """oneDNN may use bf16 inside float32 products on some CPUs when asked to; fp32 means it is not."""
        super().set_precision(precision)
        torch.set_float32_matmul_precision("highest")
