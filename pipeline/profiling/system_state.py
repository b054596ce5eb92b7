"""The state of the machine before and after a run, and what it says about the run's figures. Needs no torch.

`taints` are disturbances from outside: with them, figures may not be the machine's own. `behavior` is the machine's own
nature (heat, throttling, drift), and a result. What can't be read is absent.
"""

import math
import mmap
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from pipeline.files import contents
from pipeline.profiling import system_info
from pipeline.profiling.nvidia import NvidiaCard

SystemState = Mapping[str, float | str | bool]
"""What `sample` returns."""

MAX_LOAD = 0.10
"""Share of all CPU cores that others may use. An idle desktop's services stay below a tenth."""

MAX_GPU_LOAD = 0.05
"""Share of time that others may keep the GPU busy before the run: drawing a quiet desktop takes a few per cent."""

MAX_SWAP_GROWTH_GIB = 0.25
"""A few MiB come and go at any time; a quarter of a GiB means that memory ran short. Swap that is merely used is none:
pages put aside long ago cost nothing."""

MAX_SWAP_MIB_PER_SECOND = 1.0
"""Traffic to and from swap: single old pages are read back at any time."""

BEHAVIORS = frozenset({"throttled", "thermal", "drift"})
"""The words of `behavior`. Old runs have them among their taints."""

MIN_DRIFT = 0.03
"""Least change of the mean time from the first third to the last that counts as drift, as a share of the first's."""

DRIFT_P = 0.01
"""A trend is drift only where chance alone shows one like it in one run of a hundred."""

DRIFT_PHI = 0.7
"""Correlation of neighbouring times that the test of a trend allows for: a machine's speed wanders without a trend."""

MIN_DRIFT_VALUES = 6
"""Fewer times are not tested: two in a third, four degrees of freedom."""

SLOWDOWNS = frozenset({"hw slowdown", "sw thermal slowdown", "hw thermal slowdown", "hw power brake slowdown"})
"""Throttling that counts: heat, and a power supply that fails. A card at its own power limit works as it was sold."""

THERMAL_PRESSURE = ("nominal", "moderate", "heavy", "trapping", "sleeping")
"""macOS's levels from 0 on, by its OSThermalNotification.h."""

WINDOW_SECONDS = 0.5
"""How long CPU and swap are watched: at least 25 of the ticks that count CPU time."""

PLATFORM_PROFILE = Path("/sys/firmware/acpi/platform_profile")
SWAP_COUNTERS = {"linux": r"^pswp(?:in|out) (\d+)", "darwin": r"^Swap(?:ins|outs):\s+(\d+)"}

command_output = partial(system_info.command_output, timeout_seconds=3)
"""Shorter than elsewhere: a run waits for it, before and after."""


def sample(gpu_uuid: str | None = None) -> dict[str, Any]:
    """Read the state of the machine, in about half a second. All shares are from 0 to 1.

    Keys: `power_source` (mains | battery), `low_power_mode`, `cpu_load` (of all cores, by other processes), `swap_gib`
    where swap is used, `swapping`, `thermal_pressure` (macOS). Of the NVIDIA card `gpu_uuid`: `gpu_load` (by all
    processes, so ours must be idle), `gpu_processes` (others that compute), `gpu_temperature_celsius`,
    `gpu_sm_clock_mhz`, `gpu_throttle` (names joined by a comma, only where it is throttled), `gpu_power_watts`.
    """
    card = NvidiaCard.open(gpu_uuid)
    state = _known(card.state()) if card else {}  # first: clocks recover as soon as the work ends
    state |= _known({
        "power_source": system_info.power_source(),
        "low_power_mode": _low_power_mode(),
        "thermal_pressure": _thermal_pressure(),
        "swap_gib": _swap_gib(),
    })  # fmt: skip
    swapped = _swapped_bytes()
    state |= _known({"cpu_load": _other_cpu_load()})
    if swapped is not None and (swapped_after := _swapped_bytes()) is not None:
        state["swapping"] = swapped_after - swapped > MAX_SWAP_MIB_PER_SECOND * 2**20 * WINDOW_SECONDS
    if card:
        state |= _known(card.usage())
        card.close()
    return state


def taints(before: SystemState, after: SystemState) -> dict[str, str]:
    """Disturbances by others during the run: a sentence for each short word.

    `before` must be sampled when nothing of ours has run on the GPU for a second. The GPU's load in `after` is our own
    and is ignored.
    """
    sentences = {}
    if "battery" in (before.get("power_source"), after.get("power_source")):
        sentences["battery"] = "the machine ran on battery"
    if before.get("low_power_mode") or after.get("low_power_mode"):
        sentences["low-power"] = "the machine was in low-power mode"
    loads = {"started": _number(before, "cpu_load"), "ended": _number(after, "cpu_load")}
    if parts := [f"{load:.0%} of the CPU when it {when}" for when, load in loads.items() if load > MAX_LOAD]:
        sentences["load"] = f"other processes used {' and '.join(parts)}"

    parts = []
    if (load := _number(before, "gpu_load")) > MAX_GPU_LOAD:
        parts.append(f"the GPU was {load:.0%} busy before it started")
    if others := int(max(_number(before, "gpu_processes"), _number(after, "gpu_processes"))):
        parts.append(f"{others} other process{' was' if others == 1 else 'es were'} computing on the GPU")
    if parts:
        sentences["gpu-load"] = " and ".join(parts)

    parts = []
    if (growth := _number(after, "swap_gib") - _number(before, "swap_gib")) > MAX_SWAP_GROWTH_GIB:
        parts.append(f"the used swap grew by {growth:.1f} GiB")
    if when := [name for name, state in (("start", before), ("end", after)) if state.get("swapping")]:
        parts.append(f"the machine was swapping at the {' and at the '.join(when)}")
    if parts:
        sentences["swap"] = " and ".join(parts)
    return sentences


def behavior(before: SystemState, after: SystemState, seconds: Sequence[float]) -> dict[str, str]:
    """What the machine did by itself: a sentence for each word of BEHAVIORS. `seconds`: of equal work, in order."""
    sentences = {}
    throttled, pressures = [], []
    for when, state in (("start", before), ("end", after)):
        reasons = [name for name in str(state.get("gpu_throttle", "")).split(", ") if name in SLOWDOWNS]
        if reasons:
            throttled.append(f"at the {when} ({', '.join(reasons)})")
        if (pressure := state.get("thermal_pressure", "nominal")) != "nominal":
            pressures.append(f"{pressure} at the {when}")
    if throttled:
        sentences["throttled"] = f"the GPU was throttled {' and '.join(throttled)}"
    if pressures:
        sentences["thermal"] = f"the thermal pressure was {' and '.join(pressures)}"
    if drift := _drift(seconds):
        sentences["drift"] = drift
    return sentences


def trend_p_value(values: Sequence[float], phi: float = DRIFT_PHI) -> float:
    """The two-sided p-value of a linear trend in three or more values that differ, under AR(1) noise with `phi`.

    Values and regressors (1, t) are transformed so that this noise becomes independent, the first row by
    sqrt(1 - phi^2), the others by subtracting phi times the row before (S. J. Prais and C. B. Winsten, Cowles
    Commission Discussion Paper 383, 1954). Then least squares and Student's t with n - 2 degrees of freedom: exact for
    Gaussian noise of this correlation, conservative for a lower one.
    """
    import numpy as np  # not above: start-up does not need them
    from scipy import special

    rows = np.column_stack([np.ones(len(values)), np.arange(len(values)), values])
    rows = np.vstack([math.sqrt(1 - phi**2) * rows[:1], rows[1:] - phi * rows[:-1]])
    regressors, transformed = rows[:, :2], rows[:, 2]
    inverse = np.linalg.inv(regressors.T @ regressors)
    coefficients = inverse @ regressors.T @ transformed
    residuals = transformed - regressors @ coefficients
    degrees = len(values) - 2
    error = math.sqrt(residuals @ residuals / degrees * inverse[1, 1])
    return 2 * float(special.stdtr(degrees, -abs(coefficients[1]) / error)) if error else 0.0


def parse_pmset(text: str) -> bool | None:
    """Whether `pmset -g` shows the low-power mode: `lowpowermode 1`, or `powermode 1` on Macs that also have a
    high-power mode (2). None where it shows neither key."""
    modes: list[str] = re.findall(r"^\s*(?:low)?powermode\s+(\d+)", text, re.MULTILINE)
    return "1" in modes if modes else None


def parse_thermal_pressure(text: str) -> str | None:
    """The level's name from `notifyutil -g`, which prints errors on stdout too."""
    match = re.search(r"^com\.apple\.system\.thermalpressurelevel (\d+)\s*$", text, re.MULTILINE)
    level = int(match[1]) if match else len(THERMAL_PRESSURE)
    return THERMAL_PRESSURE[level] if level < len(THERMAL_PRESSURE) else None


def parse_swapped_pages(text: str, system: str) -> int | None:
    """Pages moved to and from swap since boot, from Linux's /proc/vmstat or macOS's `vm_stat`.

    psutil also counts a Mac's reading of files, and returns 0 where it can't tell.
    """
    counts: list[str] = re.findall(SWAP_COUNTERS[system], text, re.MULTILINE)
    return sum(map(int, counts)) if len(counts) == 2 else None


def _drift(seconds: Sequence[float]) -> str | None:
    if len(seconds) < MIN_DRIFT_VALUES:
        return None
    third = len(seconds) // 3
    change = math.fsum(seconds[-third:]) / math.fsum(seconds[:third]) - 1
    if abs(change) < MIN_DRIFT or (p := trend_p_value(seconds)) >= DRIFT_P:
        return None
    chance = f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
    return f"the last third took {abs(change):.1%} {'more' if change > 0 else 'less'} time than the first ({chance})"


def _number(state: SystemState, key: str) -> float:
    return float(state.get(key, 0.0))


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _other_cpu_load() -> float | None:
    """Share of all cores that other processes use, watched for WINDOW_SECONDS."""
    process = psutil.Process()
    process.cpu_percent()  # starts the interval that its next call reports
    times = psutil.cpu_times_percent(WINDOW_SECONDS)
    our_load = process.cpu_percent() / 100 / (psutil.cpu_count() or 1)
    if not any(times):  # as in sandboxes
        return None
    busy = 1 - (times.idle + getattr(times, "iowait", 0.0)) / 100
    return round(min(max(busy - our_load, 0.0), 1.0), 3)


def _swapped_bytes() -> int | None:
    if sys.platform not in SWAP_COUNTERS:
        return None
    text = command_output("vm_stat") if sys.platform == "darwin" else contents(Path("/proc/vmstat"))
    pages = parse_swapped_pages(text, sys.platform)
    return None if pages is None else pages * mmap.PAGESIZE


def _swap_gib() -> float | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about rates that we don't use
            return round(psutil.swap_memory().used / 2**30, 2) or None
    except (OSError, RuntimeError, psutil.Error):
        return None


def _low_power_mode() -> bool | None:
    if sys.platform == "darwin":
        return parse_pmset(command_output("pmset", "-g"))
    profile = contents(PLATFORM_PROFILE) if sys.platform == "linux" else ""
    return profile == "low-power" if profile else None


def _thermal_pressure() -> str | None:
    if sys.platform != "darwin":
        return None
    return parse_thermal_pressure(command_output("notifyutil", "-g", "com.apple.system.thermalpressurelevel"))
