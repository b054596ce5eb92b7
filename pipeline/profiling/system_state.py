"""Read the machine's state before and after a run, and judge what it means for the run. Needs no torch.

`taints` are disturbances from outside, such as other processes: the run's metrics may then be wrong for this machine.
`behavior` is the machine's own doing (heat, throttling, drift), and a result. What can't be read is absent.
"""

import math
import mmap
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from pipeline.files import contents
from pipeline.profiling import system_info
from pipeline.profiling.nvidia import NvidiaCard

SystemState = Mapping[str, Any]
"""The result of `sample`."""

MAX_LOAD = 0.10
"""The share of all CPU cores that other processes may use. Services of an idle desktop stay below it."""

MAX_GPU_LOAD = 0.05
"""The load of the GPU, from 0 to 1, that is allowed before the run. Drawing a quiet desktop takes a few per cent."""

MAX_SWAP_GROWTH_GIB, MAX_SWAP_MIB_PER_SECOND = 0.25, 1.0
"""Allowed growth and traffic of swap. Single old pages move at any time, without a shortage of memory."""

BEHAVIORS = frozenset({"throttled", "thermal", "drift"})
"""The keys of `behavior`. Old runs have them among their taints."""

MIN_DRIFT = 0.03
"""The smallest drift: the change of the mean time from the first third to the last, relative to the first."""

DRIFT_P = 0.01
"""Significance level for drift: without any trend, one run in a hundred shows drift by chance."""

DRIFT_PHI = 0.7
"""The correlation of neighbouring times that the trend test assumes: a machine's speed wanders without a trend."""

MIN_DRIFT_VALUES = 6
"""Do not test fewer times: this many leave two in each third and four degrees of freedom."""

SLOWDOWNS = frozenset({"hw slowdown", "sw thermal slowdown", "hw thermal slowdown", "hw power brake slowdown"})
"""Throttling that counts: heat, or a failing power supply. A card at its own power limit works as it was sold."""

THERMAL_PRESSURE = ("nominal", "moderate", "heavy", "trapping", "sleeping")
"""Names of macOS's levels 0 to 4 (OSThermalNotification.h)."""

WINDOW_SECONDS = 0.5
"""How long to watch CPU and swap at least. It spans at least 25 of the ticks that CPU time is counted in."""

PLATFORM_PROFILE = Path("/sys/firmware/acpi/platform_profile")

command_output = partial(system_info.command_output, timeout_seconds=3)
"""With a shorter timeout than elsewhere, since each run waits for it twice."""


class LoadWatch:
    """Watches CPU and swap from its creation on."""

    def __init__(self) -> None:
        self._began, self._cpu, self._own_seconds = time.monotonic(), psutil.cpu_times(), _own_cpu_seconds()
        self._swapped = _swap()[1]

    def end(self) -> dict[str, Any]:
        """`cpu_load`, `swapping` and `swap_gib` as in `sample`. Waits until WINDOW_SECONDS have passed."""
        time.sleep(max(0.0, self._began + WINDOW_SECONDS - time.monotonic()))
        elapsed = time.monotonic() - self._began
        cpu, own_seconds = psutil.cpu_times(), _own_cpu_seconds() - self._own_seconds
        total = _total_seconds(cpu) - _total_seconds(self._cpu)
        idle = _idle_seconds(cpu) - _idle_seconds(self._cpu)
        load: dict[str, Any] = {}
        if total > 0:  # 0 in some sandboxes
            load["cpu_load"] = round(min(max((total - idle - own_seconds) / total, 0.0), 1.0), 3)
        load["swap_gib"], swapped = _swap()
        if swapped is not None and self._swapped is not None:
            load["swapping"] = swapped - self._swapped > MAX_SWAP_MIB_PER_SECOND * 2**20 * elapsed
        return load


def sample(gpu_uuid: str | None = None, watch: LoadWatch | None = None) -> dict[str, Any]:
    """Read the state of the machine. Unknown values are absent. Without a `watch` that began earlier, it takes about
    half a second.

    - `power_source`: mains | battery
    - `low_power_mode`: bool
    - `thermal_pressure`: one of THERMAL_PRESSURE, on macOS
    - `swap_gib`: swap in use, if any
    - `swapping`: bool
    - `cpu_load`: share of all cores that processes other than this one and its children use, from 0 to 1

    For an NVIDIA card, given by `gpu_uuid`, also:

    - `gpu_load`: from 0 to 1, by all processes, ours included
    - `gpu_processes`: number of other processes that compute
    - `gpu_temperature_celsius`, `gpu_sm_clock_mhz`, `gpu_power_watts`
    - `gpu_throttle`: names of THROTTLE_REASONS, joined by commas, if it is throttled
    """
    card = NvidiaCard.open(gpu_uuid)
    state = card.state() if card else {}  # first: clocks recover as soon as the work ends
    state["power_source"] = system_info.power_source()
    state["low_power_mode"] = _low_power_mode()
    state["thermal_pressure"] = _thermal_pressure()
    state |= (watch or LoadWatch()).end()
    if card:
        state |= card.usage()
    return {key: value for key, value in state.items() if value is not None}


def taints(before: SystemState, after: SystemState) -> dict[str, str]:
    """Disturbances during the run by others: short word -> sentence.

    Sample `before` when our process has not used the GPU for a second. The GPU's load in `after` is our own, and is
    ignored.
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
    """What the machine did by itself: word of BEHAVIORS -> sentence. `seconds`: times of equal work, in order."""
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
    """The two-sided p-value of a linear trend in at least three values under AR(1) noise with correlation `phi`.

    This is Prais and Winsten's regression (Cowles Commission Discussion Paper 383, 1954). Values and regressors (1, t)
    are transformed so that the noise becomes independent: the first row is multiplied by sqrt(1 - phi^2), and phi times
    the previous row is subtracted from each other row. Then follow least squares and Student's t with n - 2 degrees of
    freedom. The test is exact for Gaussian noise of this correlation, and conservative for a lower one.
    """
    import numpy as np  # imported here for a fast start-up
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


def _own_cpu_seconds() -> float:
    """CPU time of this process, its children, and the driver, which may be importing MLflow. Ended children count if
    their parent has waited for them."""
    process = psutil.Process()
    seconds = 0.0
    parent = process.parent()
    # On Windows, python.exe of a virtual environment is a launcher, so that the driver is the parent's parent.
    grandparent = parent.parent() if parent and sys.platform == "win32" else None
    for member in filter(None, (grandparent, parent, process, *process.children(recursive=True))):
        with suppress(psutil.Error):  # it may have ended, or belong to another user
            seconds += sum(member.cpu_times()[:4])  # its user and system time, and those of its ended children
    return seconds


def _total_seconds(times: Any) -> float:
    """All seconds of `psutil.cpu_times`. Linux counts those of virtual machines twice."""
    return float(sum(times)) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)


def _idle_seconds(times: Any) -> float:
    return float(times.idle) + getattr(times, "iowait", 0.0)


def _swap() -> tuple[float | None, int | None]:
    """GiB of swap in use (None for 0), and bytes moved to and from it since boot (None if unknown)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # psutil warns if a Linux sandbox counts nothing
            swap = psutil.swap_memory()
    except (OSError, RuntimeError):  # Windows without performance counters
        return None, None
    moved = swap.sin + swap.sout if sys.platform == "linux" else None
    if sys.platform == "darwin":  # psutil includes the reading of files there
        pages = re.findall(r"^Swap(?:ins|outs):\s+(\d+)", command_output("vm_stat"), re.MULTILINE)
        moved = sum(map(int, pages)) * mmap.PAGESIZE if pages else None
    return round(swap.used / 2**30, 2) or None, moved


def _low_power_mode() -> bool | None:
    if sys.platform == "darwin":
        # On Macs with a high-power mode (2), the key is `powermode`.
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
