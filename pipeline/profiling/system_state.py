"""The machine's state before and after a run, and what it says of the run's figures; without torch.

What somebody else did to the machine taints them (`taints`): the figures may not be its own. That it gets hot,
throttles or drifts is its own nature (`behavior`), and a result. A fact that can't be read is absent.
"""

import math
import mmap
import os
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from pipeline.files import contents
from pipeline.profiling import system_info

Sample = Mapping[str, float | str | bool]
"""What `sample` returns."""

LOAD = 0.10
"""Share of all CPU cores that others may use. An idle desktop's own services stay below a tenth; more takes whole
cores from a training on the CPU, and from the thread that feeds a GPU."""

GPU_LOAD = 0.05
"""Share of time that others may keep the GPU busy before the run: drawing a quiet desktop takes a few per cent."""

SWAP_GROWTH_GIB = 0.25
"""Growth of the used swap that counts. Swap that is merely used doesn't: pages put aside long ago cost nothing, and
most machines have some. A few MiB come and go at any time; a quarter of a GiB means that memory ran short."""

SWAP_RATE_MIB = 1.0
"""MiB a second to and from swap that count as swapping: single old pages are read back at any time."""

OWN_NATURE = frozenset({"throttled", "thermal", "drift"})
"""The words of `behavior`. Runs made before it was told apart have them among their taints."""

DRIFT_CHANGE = 0.03
"""Change of the mean time from the first to the last third that counts as drift, as a share of the first's."""

DRIFT_P = 0.01
"""Only where chance alone shows such a trend in one run of a hundred is it drift."""

DRIFT_PHI = 0.7
"""Correlation of one time's noise with the next one's that the test of a trend allows for: a machine's speed wanders,
and neighbouring times are alike without a trend."""

DRIFT_VALUES = 6
"""Fewer times are not tested: two in a third, four degrees of freedom."""

SLOWDOWNS = frozenset({"hw slowdown", "sw thermal slowdown", "hw thermal slowdown", "hw power brake slowdown"})
"""Throttling that counts: heat, and a power supply that fails. A card at its own power limit works as it was sold,
and most do under full load; that limit stands in the run as `hardware.power_limit_watts`."""

THROTTLING = {
    0x4: "sw power cap", 0x8: "hw slowdown", 0x10: "sync boost", 0x20: "sw thermal slowdown",
    0x40: "hw thermal slowdown", 0x80: "hw power brake slowdown", 0x100: "display clock setting",
    0x200: "board limit", 0x400: "reliability",
}  # fmt: skip
"""Bits of nvml.h's nvmlClocksEventReasons, less an idle GPU (0x1) and clocks that its owner set (0x2)."""

THERMAL_PRESSURE = ("nominal", "moderate", "heavy", "trapping", "sleeping")
"""macOS' levels from 0 on, by its OSThermalNotification.h."""

WINDOW_SECONDS = 0.5
"""How long the CPUs and the swap are watched: twenty-five or more of the ticks that CPU time is counted in."""

output = partial(system_info.output, seconds=3)
"""A run waits for it, before and after."""

NVML_TEMPERATURE_GPU, NVML_CLOCK_SM = 0, 1  # nvml.h
PLATFORM_PROFILE = Path("/sys/firmware/acpi/platform_profile")
PID_NAMESPACE, INITIAL_PID_NAMESPACE = Path("/proc/self/ns/pid"), 0xEFFFFFFC  # linux/proc_ns.h: PROC_PID_INIT_INO
SWAP_COUNTERS = {"linux": r"^pswp(?:in|out) (\d+)", "darwin": r"^Swap(?:ins|outs):\s+(\d+)"}


class NvidiaCard:
    """One card as NVIDIA's NVML tells of it; what it doesn't tell is None."""

    def __init__(self, nvml: Any, handle: Any):
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, uuid: str | None) -> "NvidiaCard | None":
        """The card with this UUID (`GPU-...`); None without one, without NVML, and where the card is cut in slices
        (MIG): what NVML tells is then of all of them."""
        if uuid is None:
            return None
        try:
            import pynvml as nvml  # not there on macOS
        except ImportError:
            return None
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            return None
        try:
            card = cls(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
        except nvml.NVMLError:
            cls(nvml, None).close()
            return None
        mig = card.ask("nvmlDeviceGetMigMode")  # [now, after the next reset]
        if mig and mig[0]:
            card.close()
            return None
        return card

    def ask(self, function: str, *arguments: Any) -> Any:
        """What a function of NVML says of the card; None where card, driver or binding can't tell."""
        asked = getattr(self._nvml, function, None)
        try:
            return asked and asked(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def close(self) -> None:
        """Lets go of NVML, which counts those who hold it."""
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            return

    def state(self) -> dict[str, float | str | bool]:
        """Temperature, clock, power and what holds the clock down, at this moment."""
        celsius = self.ask("nvmlDeviceGetTemperature", NVML_TEMPERATURE_GPU)
        clock = self.ask("nvmlDeviceGetClockInfo", NVML_CLOCK_SM)
        milliwatts = self.ask("nvmlDeviceGetPowerUsage")
        reasons = self.ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # drivers before 535 have the older name
            reasons = self.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        found = {
            "gpu_temperature_celsius": celsius,
            "gpu_sm_clock_mhz": clock,
            "gpu_power_watts": None if milliwatts is None else round(milliwatts / 1000, 1),
            "gpu_throttle": ", ".join(name for bit, name in THROTTLING.items() if (reasons or 0) & bit) or None,
        }
        return {key: value for key, value in found.items() if value is not None}

    def use(self) -> dict[str, float | str | bool]:
        """How busy the card was in NVML's last period of a second or less, and the number of others that compute."""
        rates = self.ask("nvmlDeviceGetUtilizationRates")
        others = self._others()
        found = {"gpu_load": None if rates is None else rates.gpu / 100, "gpu_processes": others}
        return {key: value for key, value in found.items() if value is not None}

    def _others(self) -> int | None:
        running = self.ask("nvmlDeviceGetComputeRunningProcesses")
        if running is None:
            return None
        # On Windows whatever has a window counts as computing too; what drawing takes is in the load.
        drawing = {process.pid for process in self.ask("nvmlDeviceGetGraphicsRunningProcesses") or ()}
        computing = {process.pid for process in running}
        others = len(computing - drawing - {os.getpid()})
        # A container's list is short, or has the host's numbers, among which we don't find ourselves.
        if _sees_all_processes() or (others and os.getpid() in computing):
            return others
        return None


def sample(gpu_uuid: str | None = None) -> dict[str, float | str | bool]:
    """The machine's state at this moment, read in about half a second. All shares are from 0 to 1.

    `power_source` (mains | battery), `low_power_mode`, `cpu_load` (of all cores, by other processes), `swap_gib`
    where swap is used, `swapping`, `thermal_pressure` (macOS), and of the NVIDIA card `gpu_uuid`: `gpu_load` (by
    whomever, so ours should be idle), `gpu_processes` (others that compute), `gpu_temperature_celsius`,
    `gpu_sm_clock_mhz`, `gpu_throttle` (names joined by a comma, only where it is throttled), `gpu_power_watts`.
    """
    card = NvidiaCard.open(gpu_uuid)
    found = card.state() if card else {}  # first: clocks recover as soon as the work ends
    told = {
        "power_source": system_info.power_source(),
        "low_power_mode": _low_power_mode(),
        "thermal_pressure": _thermal_pressure(),
        "swap_gib": _swap_gib(),
    }
    cpu, swap, start = _cpu_seconds(), _swapped_bytes(), time.monotonic()
    time.sleep(WINDOW_SECONDS)
    told["cpu_load"] = load_of_others(cpu, _cpu_seconds())
    told["swapping"] = swaps(swap, _swapped_bytes(), time.monotonic() - start)
    found |= {key: value for key, value in told.items() if value is not None}
    if card:
        found |= card.use()
        card.close()
    return found


def taints(before: Sample, after: Sample) -> dict[str, str]:
    """What others did while the run was measured: a sentence by a short word. `before` must be sampled when nothing of
    ours has run on the GPU for a second; the GPU's load in `after` is our own and is not looked at."""
    found = {}
    if "battery" in (before.get("power_source"), after.get("power_source")):
        found["battery"] = "the machine ran on battery"
    if before.get("low_power_mode") or after.get("low_power_mode"):
        found["low-power"] = "the machine was in low-power mode"
    loads = {when: _figure(state, "cpu_load") for when, state in (("start", before), ("end", after))}
    if parts := [f"{load:.0%} of the CPU when it {when}ed" for when, load in loads.items() if load > LOAD]:
        found["load"] = f"other processes used {' and '.join(parts)}"
    if parts := _gpu_use(before, after):
        found["gpu-load"] = " and ".join(parts)
    if parts := _swap_use(before, after):
        found["swap"] = " and ".join(parts)
    return found


def behavior(before: Sample, after: Sample, seconds: Sequence[float]) -> dict[str, str]:
    """What the machine itself did: a sentence by a word of OWN_NATURE. `seconds`: times of equal work, in order."""
    states = {"start": before, "end": after}
    found = {}
    slowed = {
        when: [name for name in str(state.get("gpu_throttle", "")).split(", ") if name in SLOWDOWNS]
        for when, state in states.items()
    }
    if parts := [f"at the {when} ({', '.join(names)})" for when, names in slowed.items() if names]:
        found["throttled"] = f"the GPU was throttled {' and '.join(parts)}"
    pressures = {when: state.get("thermal_pressure", "nominal") for when, state in states.items()}
    if parts := [f"{level} at the {when}" for when, level in pressures.items() if level != "nominal"]:
        found["thermal"] = f"the thermal pressure was {' and '.join(parts)}"
    if sentence := _drift(seconds):
        found["drift"] = sentence
    return found


def trend_p(values: Sequence[float]) -> float:
    """The two-sided p-value of a linear trend in three or more values that differ, under AR(1) noise with DRIFT_PHI.

    Values and regressors (1, t) are transformed so that this noise becomes independent, the first row by
    sqrt(1 - phi^2), the others by subtracting phi times the row before (S. J. Prais and C. B. Winsten, Cowles
    Commission Discussion Paper 383, 1954). Then least squares and Student's t with n - 2 degrees of freedom: exact for
    Gaussian noise of this correlation, conservative for a lower one.
    """
    import numpy as np  # not above: this module is imported before there is anything to compute
    from scipy import special

    rows = np.column_stack([np.ones(len(values)), np.arange(len(values)), values])
    rows = np.vstack([math.sqrt(1 - DRIFT_PHI**2) * rows[:1], rows[1:] - DRIFT_PHI * rows[:-1]])
    regressors, transformed = rows[:, :2], rows[:, 2]
    inverse = np.linalg.inv(regressors.T @ regressors)
    coefficients = inverse @ regressors.T @ transformed
    residuals = transformed - regressors @ coefficients
    degrees = len(values) - 2
    error = math.sqrt(residuals @ residuals / degrees * inverse[1, 1])
    return 2 * float(special.stdtr(degrees, -abs(coefficients[1]) / error)) if error else 0.0


def load_of_others(before: Sequence[float], after: Sequence[float]) -> float | None:
    """The share of all cores that other processes used between two readings of seconds: all there were, those
    that were not idle, and our own."""
    there, busy, own = (new - old for old, new in zip(before, after, strict=True))
    return round(min(max((busy - own) / there, 0.0), 1.0), 3) if there > 0 else None


def swaps(before: int | None, after: int | None, seconds: float) -> bool | None:
    """Whether the bytes to and from swap grew as they do where memory is short."""
    if before is None or after is None or seconds <= 0:
        return None
    return (after - before) / seconds > SWAP_RATE_MIB * 2**20


def parse_pmset(text: str) -> bool | None:
    """Whether `pmset -g` shows the low-power mode: `lowpowermode 1`, or `powermode 1` on Macs that have a
    high-power mode (2) as well. A Mac that has neither key tells nothing."""
    modes: list[str] = re.findall(r"^\s*(?:low)?powermode\s+(\d+)", text, re.MULTILINE)
    return "1" in modes if modes else None


def parse_thermal_pressure(text: str) -> str | None:
    """The level's name from `notifyutil -g`, which prints errors on stdout too."""
    match = re.search(r"^com\.apple\.system\.thermalpressurelevel (\d+)\s*$", text, re.MULTILINE)
    level = int(match[1]) if match else len(THERMAL_PRESSURE)
    return THERMAL_PRESSURE[level] if level < len(THERMAL_PRESSURE) else None


def parse_swapped_pages(text: str, system: str) -> int | None:
    """Pages to and from swap since the start, together, from Linux' /proc/vmstat or macOS' `vm_stat`. (psutil
    counts a Mac's reading of files as well, and puts 0 where it can't tell.)"""
    found: list[str] = re.findall(SWAP_COUNTERS[system], text, re.MULTILINE)
    return sum(map(int, found)) if len(found) == 2 else None


def _drift(seconds: Sequence[float]) -> str | None:
    if len(seconds) < DRIFT_VALUES:
        return None
    third = len(seconds) // 3
    change = math.fsum(seconds[-third:]) / math.fsum(seconds[:third]) - 1
    if abs(change) < DRIFT_CHANGE or (p := trend_p(seconds)) >= DRIFT_P:
        return None
    chance = f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
    return f"the last third took {abs(change):.1%} {'more' if change > 0 else 'less'} time than the first ({chance})"


def _gpu_use(before: Sample, after: Sample) -> list[str]:
    parts = []
    if (load := _figure(before, "gpu_load")) > GPU_LOAD:
        parts.append(f"the GPU was {load:.0%} busy before it started")
    if others := int(max(_figure(before, "gpu_processes"), _figure(after, "gpu_processes"))):
        parts.append(f"{others} other process{' was' if others == 1 else 'es were'} computing on the GPU")
    return parts


def _swap_use(before: Sample, after: Sample) -> list[str]:
    parts = []
    growth = _figure(after, "swap_gib") - _figure(before, "swap_gib")
    if growth > SWAP_GROWTH_GIB:
        parts.append(f"the used swap grew by {growth:.1f} GiB")
    if when := [name for name, state in (("start", before), ("end", after)) if state.get("swapping")]:
        parts.append(f"the machine was swapping at the {' and at the '.join(when)}")
    return parts


def _figure(state: Sample, key: str) -> float:
    return float(state.get(key, 0.0))


def _cpu_seconds() -> tuple[float, float, float]:
    times = psutil.cpu_times()._asdict()
    # Linux counts a guest's time in `user` (and `nice`) too, Windows that of interrupts in `system`.
    for part in ("guest", "guest_nice", *(("interrupt", "dpc") if sys.platform == "win32" else ())):
        times.pop(part, None)
    there, own = sum(times.values()), psutil.Process().cpu_times()
    return there, there - times["idle"] - times.get("iowait", 0.0), own.user + own.system


def _swapped_bytes() -> int | None:
    if sys.platform not in SWAP_COUNTERS:
        return None
    text = output("vm_stat") if sys.platform == "darwin" else contents(Path("/proc/vmstat"))
    pages = parse_swapped_pages(text, sys.platform)
    return None if pages is None else pages * mmap.PAGESIZE


def _swap_gib() -> float | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rates that aren't asked for
            used = psutil.swap_memory().used
    except (OSError, RuntimeError, psutil.Error):
        return None
    return round(used / 2**30, 2) or None


def _low_power_mode() -> bool | None:
    if sys.platform == "darwin":
        return parse_pmset(output("pmset", "-g"))
    profile = contents(PLATFORM_PROFILE) if sys.platform == "linux" else ""
    return profile == "low-power" if profile else None


def _thermal_pressure() -> str | None:
    if sys.platform != "darwin":
        return None
    return parse_thermal_pressure(output("notifyutil", "-g", "com.apple.system.thermalpressurelevel"))


def _sees_all_processes() -> bool:
    if sys.platform != "linux":
        return True
    try:
        return PID_NAMESPACE.stat().st_ino == INITIAL_PID_NAMESPACE
    except OSError:
        return False
