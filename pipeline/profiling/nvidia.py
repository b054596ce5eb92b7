"""Read the state of an NVIDIA card through NVIDIA's management library (NVML). Needs no torch."""

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

THROTTLE_REASONS = {
    0x4: "sw power cap", 0x8: "hw slowdown", 0x10: "sync boost", 0x20: "sw thermal slowdown",
    0x40: "hw thermal slowdown", 0x80: "hw power brake slowdown", 0x100: "display clock setting",
    0x200: "board limit", 0x400: "reliability",
}  # fmt: skip
"""Bits of nvml.h's nvmlClocksEventReasons, except for an idle GPU (0x1) and clocks set by the user (0x2)."""

NVML_TEMPERATURE_GPU, NVML_CLOCK_SM = 0, 1  # nvml.h
PID_NAMESPACE, INITIAL_PID_NAMESPACE = Path("/proc/self/ns/pid"), 0xEFFFFFFC  # linux/proc_ns.h: PROC_PID_INIT_INO


class NvidiaCard:
    """One card in NVML."""

    def __init__(self, nvml: Any, handle: Any):
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, uuid: str | None) -> "NvidiaCard | None":
        """The card with this UUID (`GPU-...`). None without a UUID or NVML, and for a card split by MIG, since NVML's
        figures cover all its parts. NVML is never closed: that might unload the driver and reset its counters."""
        if uuid is None:
            return None
        try:
            import pynvml as nvml  # not there on macOS

            nvml.nvmlInit()
            card = cls(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
        except ImportError:
            return None
        except nvml.NVMLError:
            return None
        mig_mode = card.query("nvmlDeviceGetMigMode")  # [now, after the next reset]
        return None if mig_mode and mig_mode[0] else card

    def query(self, function: str, *arguments: Any) -> Any:
        """Call a function of NVML for this card. None if the card, the driver or pynvml does not support it."""
        call = getattr(self._nvml, function, None)
        try:
            return call and call(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def driver(self) -> str | None:
        """The driver's version, as nvidia-smi prints it."""
        try:
            return str(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError:
            return None

    def state(self) -> dict[str, Any]:
        """Temperature, clock, power and throttling of the card now; None for what is unknown."""
        milliwatts = self.query("nvmlDeviceGetPowerUsage")
        reasons = self.query("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # the name before driver 535
            reasons = self.query("nvmlDeviceGetCurrentClocksThrottleReasons")
        return {
            "gpu_temperature_celsius": self.query("nvmlDeviceGetTemperature", NVML_TEMPERATURE_GPU),
            "gpu_sm_clock_mhz": self.query("nvmlDeviceGetClockInfo", NVML_CLOCK_SM),
            "gpu_power_watts": None if milliwatts is None else round(milliwatts / 1000, 1),
            "gpu_throttle": ", ".join(name for bit, name in THROTTLE_REASONS.items() if (reasons or 0) & bit) or None,
        }

    def usage(self) -> dict[str, Any]:
        """The card's load from 0 to 1 over the last second or less, and the number of other computing processes."""
        rates = self.query("nvmlDeviceGetUtilizationRates")
        return {"gpu_load": None if rates is None else rates.gpu / 100, "gpu_processes": self._other_processes()}

    def load(self) -> dict[str, float]:
        """Memory, load and power, under the names of MLflow's system metrics. Without those that are unknown."""
        figures = {}
        if memory := self.query("nvmlDeviceGetMemoryInfo"):
            figures["memory_usage_percentage"] = memory.used / memory.total * 100
            figures["memory_usage_megabytes"] = memory.used / 1e6
        if rates := self.query("nvmlDeviceGetUtilizationRates"):
            figures["utilization_percentage"] = rates.gpu
        if milliwatts := self.query("nvmlDeviceGetPowerUsage"):
            figures["power_usage_watts"] = milliwatts / 1000
            if limit := self.query("nvmlDeviceGetEnforcedPowerLimit"):
                figures["power_usage_percentage"] = milliwatts / limit * 100
        return figures

    def _other_processes(self) -> int | None:
        running = self.query("nvmlDeviceGetComputeRunningProcesses")
        if running is None:
            return None
        # On Windows, NVML lists each process with a window as computing too. Its drawing is part of the load.
        drawing = {process.pid for process in self.query("nvmlDeviceGetGraphicsRunningProcesses") or ()}
        computing = {process.pid for process in running}
        others = len(computing - drawing - {os.getpid()})
        # In a container the list may be incomplete, or have the host's process ids instead of ours.
        return others if _sees_all_processes() or (others and os.getpid() in computing) else None


@cache
def all_cards() -> tuple[NvidiaCard, ...]:
    """Every card that NVML lists, in its order; none without NVML."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        return tuple(NvidiaCard(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount()))
    except ImportError:
        return ()
    except nvml.NVMLError:
        return ()


def _sees_all_processes() -> bool:
    if sys.platform != "linux":
        return True
    try:
        return PID_NAMESPACE.stat().st_ino == INITIAL_PID_NAMESPACE
    except OSError:
        return False
