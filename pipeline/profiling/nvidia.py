"""What NVIDIA's management library (NVML) knows about a card. Needs no torch."""

import os
import sys
from pathlib import Path
from typing import Any

THROTTLE_REASONS = {
    0x4: "sw power cap", 0x8: "hw slowdown", 0x10: "sync boost", 0x20: "sw thermal slowdown",
    0x40: "hw thermal slowdown", 0x80: "hw power brake slowdown", 0x100: "display clock setting",
    0x200: "board limit", 0x400: "reliability",
}  # fmt: skip
"""Bits of nvml.h's nvmlClocksEventReasons, without an idle GPU (0x1) and clocks that its owner set (0x2)."""

NVML_TEMPERATURE_GPU, NVML_CLOCK_SM = 0, 1  # nvml.h
PID_NAMESPACE, INITIAL_PID_NAMESPACE = Path("/proc/self/ns/pid"), 0xEFFFFFFC  # linux/proc_ns.h: PROC_PID_INIT_INO


class NvidiaCard:
    """One card as NVIDIA's management library (NVML) sees it."""

    def __init__(self, nvml: Any, handle: Any):
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, uuid: str | None) -> "NvidiaCard | None":
        """The card with this UUID (`GPU-...`); None without a UUID, without NVML, and for a card cut into MIG slices,
        since NVML's figures are of all slices. NVML stays open: unloading the driver would reset its counters."""
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
        """Call a function of NVML for this card; None where card, driver or binding does not support it."""
        call = getattr(self._nvml, function, None)
        try:
            return call and call(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def state(self) -> dict[str, Any]:
        """Temperature, clock, power and what throttles the card at this moment; None for what is unknown."""
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
        """How busy the card was in NVML's last period of at most a second, and how many other processes compute."""
        rates = self.query("nvmlDeviceGetUtilizationRates")
        return {"gpu_load": None if rates is None else rates.gpu / 100, "gpu_processes": self._others()}

    def _others(self) -> int | None:
        running = self.query("nvmlDeviceGetComputeRunningProcesses")
        if running is None:
            return None
        # On Windows every process with a window counts as computing too; its drawing is part of the load.
        drawing = {process.pid for process in self.query("nvmlDeviceGetGraphicsRunningProcesses") or ()}
        computing = {process.pid for process in running}
        others = len(computing - drawing - {os.getpid()})
        # In a container the list is short, or has the host's numbers, among which we can't find ourselves.
        return others if _sees_all_processes() or (others and os.getpid() in computing) else None


def _sees_all_processes() -> bool:
    if sys.platform != "linux":
        return True
    try:
        return PID_NAMESPACE.stat().st_ino == INITIAL_PID_NAMESPACE
    except OSError:
        return False
