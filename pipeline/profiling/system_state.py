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

SystemState = Mapping[str, Any]
"""What `sample` returns."""

MAX_LOAD = 0.10
"""Share of all CPU cores that others may use. An idle desktop's services stay below a tenth."""

MAX_GPU_LOAD = 0.05
"""Share of time that others may keep the GPU busy before the run: drawing a quiet desktop takes a few per cent."""

MAX_SWAP_GROWTH_GIB, MAX_SWAP_MIB_PER_SECOND = 0.25, 1.0
"""Growth and traffic of swap that no shortage of memory explains: single old pages come and go at any time."""

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
    state = card.state() if card else {}  # first: clocks recover as soon as the work ends
    state["power_source"] = system_info.power_source()
    state["low_power_mode"] = _low_power_mode()
    state["thermal_pressure"] = _thermal_pressure()
    state["swap_gib"], swapped = _swap()
    state["cpu_load"] = _other_cpu_load()
    _, swapped_after = _swap()
    if swapped is not None and swapped_after is not None:
        state["swapping"] = swapped_after - swapped > MAX_SWAP_MIB_PER_SECOND * 2**20 * WINDOW_SECONDS
    if card:
        state |= card.usage()
    return {key: value for key, value in state.items() if value is not None}


def taints(before: SystemState, after: SystemState) -> dict[str, str]:
    """Disturbances by others during the run: a sentence for each short word.

    `before` must be sampled when nothing of ours has run on the GPU for a second. The GPU's load in `after` is our own
    and is ignored.
    """
    states = before, after
    cpu_load = max(state.get("cpu_load", 0.0) for state in states)
    gpu_load = before.get("gpu_load", 0.0)
    processes = max(state.get("gpu_processes", 0) for state in states)
    growth = after.get("swap_gib", 0.0) - before.get("swap_gib", 0.0)
    disturbances = [
        ("battery", any(state.get("power_source") == "battery" for state in states), "the machine ran on battery"),
        ("low-power", any(state.get("low_power_mode") for state in states), "the machine was in low-power mode"),
        ("load", cpu_load > MAX_LOAD, f"other processes used {cpu_load:.0%} of the CPU"),
        ("gpu-load", gpu_load > MAX_GPU_LOAD, f"the GPU was {gpu_load:.0%} busy before it started"),
        ("gpu-load", processes > 0, f"other processes ({processes}) were computing on the GPU"),
        ("swap", growth > MAX_SWAP_GROWTH_GIB, f"the used swap grew by {growth:.1f} GiB"),
        ("swap", any(state.get("swapping") for state in states), "the machine was swapping"),
    ]
    sentences: dict[str, str] = {}
    for word, applies, sentence in disturbances:
        if applies:
            sentences[word] = f"{sentences[word]} and {sentence}" if word in sentences else sentence
    return sentences


def behavior(before: SystemState, after: SystemState, seconds: Sequence[float]) -> dict[str, str]:
    """What the machine did by itself: a sentence for each word of BEHAVIORS. `seconds`: of equal work, in order."""
    sentences = {}
    states = before, after
    reasons = {name for state in states for name in state.get("gpu_throttle", "").split(", ")}
    pressures = {state.get("thermal_pressure", "nominal") for state in states} - {"nominal"}
    if slowdowns := sorted(reasons & SLOWDOWNS):
        sentences["throttled"] = f"the GPU was throttled ({', '.join(slowdowns)})"
    if pressures:
        sentences["thermal"] = f"the thermal pressure was {' and '.join(sorted(pressures))}"
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


def _drift(seconds: Sequence[float]) -> str | None:
    if len(seconds) < MIN_DRIFT_VALUES:
        return None
    third = len(seconds) // 3
    change = math.fsum(seconds[-third:]) / math.fsum(seconds[:third]) - 1
    if abs(change) < MIN_DRIFT or (p := trend_p_value(seconds)) >= DRIFT_P:
        return None
    chance = f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
    return f"the last third took {abs(change):.1%} {'more' if change > 0 else 'less'} time than the first ({chance})"


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


def _swap() -> tuple[float | None, int | None]:
    """GiB of swap in use (None without), and bytes moved to and from it since boot where the system counts them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Linux in a sandbox counts nothing
            swap = psutil.swap_memory()
    except (OSError, RuntimeError):  # Windows without performance counters
        return None, None
    moved = swap.sin + swap.sout if sys.platform == "linux" else None
    if sys.platform == "darwin":  # where psutil counts the reading of files
        pages = re.findall(r"^Swap(?:ins|outs):\s+(\d+)", command_output("vm_stat"), re.MULTILINE)
        moved = sum(map(int, pages)) * mmap.PAGESIZE if pages else None
    return round(swap.used / 2**30, 2) or None, moved


def _low_power_mode() -> bool | None:
    if sys.platform == "darwin":
        # Macs that also have a high-power mode (2) call it `powermode`.
        modes = re.findall(r"^\s*(?:low)?powermode\s+(\d+)", command_output("pmset", "-g"), re.MULTILINE)
        return "1" in modes if modes else None
    profile = contents(PLATFORM_PROFILE) if sys.platform == "linux" else ""
    return profile == "low-power" if profile else None


def _thermal_pressure() -> str | None:
    if sys.platform != "darwin":
        return None
    key = "com.apple.system.thermalpressurelevel"
    level = re.search(rf"^{key} ([0-4])\s*$", command_output("notifyutil", "-g", key), re.MULTILINE)
    return THERMAL_PRESSURE[int(level[1])] if level else None
