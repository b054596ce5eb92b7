"""The machine's state from tools and drivers, and the taints and behavior that follow from it."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from nvml import UUID, Nvml, NVMLError
from scipy import stats

from pipeline.profiling import nvidia, system_info, system_state

PMSET = """\
Currently in use:
 standby              1
 sleep                1 (sleep prevented by sharingd, powerd)
 lowpowermode         1
 womp                 0
"""
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                5208.
Pageins:                                5912340.
Pageouts:                                 42210.
Swapins:                                     12.
Swapouts:                                   340.
"""


class CpuTimes(NamedTuple):
    """As psutil.cpu_times returns them on Linux."""

    user: float = 0.0
    idle: float = 0.0
    iowait: float = 0.0
    guest: float = 0.0  # part of `user`


class Process:
    """A stand-in for psutil.Process. `seconds`: user and system time, and those of ended children."""

    def __init__(self, *seconds, children=(), parent=None):
        self.cpu_times, self.parent, self._children = lambda: (*seconds, 0.0), lambda: parent, children

    def children(self, recursive):
        assert recursive
        return self._children


@pytest.fixture
def nvml(monkeypatch):
    """Put a stand-in in the place of pynvml."""

    def put(*args, **answers):
        fake = Nvml(*args, **answers)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return put


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """A machine of `system` that tells nothing but what its tools print, in no time."""

    def put(system, outputs=None):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(system_state, "WINDOW_SECONDS", 0.001)
        monkeypatch.setattr(system_state, "PLATFORM_PROFILE", tmp_path / "platform_profile")
        monkeypatch.setattr(system_state, "command_output", lambda *line: (outputs or {}).get(" ".join(line), ""))
        read = system_state.contents
        monkeypatch.setattr(system_state, "contents", lambda path: read(path) if tmp_path in path.parents else "")
        monkeypatch.setattr(psutil, "cpu_times", CpuTimes)
        monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(used=0, sin=0, sout=0))
        monkeypatch.setattr(system_info, "power_source", lambda: None)

    return put


# --- the machine


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_unknown_values_are_absent(quiet, system):
    quiet(system)
    assert system_state.sample() == ({"swapping": False} if system == "linux" else {})


def test_a_sample_of_this_machine_has_plain_values(monkeypatch):
    monkeypatch.setattr(system_state, "WINDOW_SECONDS", 0.05)
    state = system_state.sample()
    assert {type(value) for value in state.values()} <= {float, str, bool}
    assert 0 <= state.get("cpu_load", 0) <= 1
    assert not [key for key in state if key.startswith("gpu_")]


def test_the_state_of_a_mac(quiet, monkeypatch):
    command = "notifyutil -g com.apple.system.thermalpressurelevel"
    quiet("darwin", {"pmset -g": PMSET, command: "com.apple.system.thermalpressurelevel 2\n"})
    pages = iter([VM_STAT, VM_STAT.replace("340.", "99340.")])
    run = system_state.command_output
    monkeypatch.setattr(
        system_state, "command_output", lambda *line: next(pages) if line == ("vm_stat",) else run(*line)
    )
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(used=3 * 2**29, sin=0, sout=0))
    monkeypatch.setattr(system_info, "power_source", lambda: "battery")
    assert system_state.sample() == {
        "power_source": "battery",
        "low_power_mode": True,
        "thermal_pressure": "heavy",
        "swap_gib": 1.5,
        "swapping": True,
    }


@pytest.mark.parametrize(
    ("text", "mode"),
    [(" sleep 1\n lowpowermode         0\n", False), (" powermode            1\n", True),
     (" powermode            2\n", False)],  # high power
)  # fmt: skip
def test_a_macs_low_power_mode_is_one_of_two_keys(quiet, text, mode):
    quiet("darwin", {"pmset -g": text})
    assert system_state.sample()["low_power_mode"] is mode


@pytest.mark.parametrize(("profile", "mode"), [("low-power\n", True), ("balanced\n", False), ("", None)])
def test_linux_low_power_mode_is_the_firmwares_profile(quiet, profile, mode):
    quiet("linux")
    system_state.PLATFORM_PROFILE.write_text(profile)
    assert system_state.sample().get("low_power_mode") is mode


@pytest.mark.parametrize(("mebibytes", "swapping"), [(0.1, False), (2, True)])
def test_moving_single_pages_is_no_swapping(quiet, monkeypatch, mebibytes, swapping):
    quiet("linux")
    monkeypatch.setattr(system_state, "WINDOW_SECONDS", 0.5)
    swaps = iter([SimpleNamespace(used=2**30, sin=7, sout=20 + moved * 2**20) for moved in (0, mebibytes)])
    monkeypatch.setattr(psutil, "swap_memory", lambda: next(swaps))
    assert system_state.sample() == {"swapping": swapping, "swap_gib": 1.0}


def test_psutils_errors_about_swap_are_ignored(quiet, monkeypatch):
    quiet("win32")

    def fail():
        raise RuntimeError("PdhAddEnglishCounterW failed. Performance counters may be disabled.")

    monkeypatch.setattr(psutil, "swap_memory", fail)
    assert system_state.sample() == {}


@pytest.mark.parametrize(("child", "parent", "load"), [(1.0, 0.0, 0.35), (50.0, 0.0, 0.0), (1.0, 10.0, 0.25)])
def test_the_load_of_others_excludes_iowait_and_our_own(quiet, monkeypatch, child, parent, load):
    quiet("linux")
    times = iter([CpuTimes(100.0, 50.0, 7.0, 9.0), CpuTimes(160.0, 80.0, 17.0, 10.0)])  # 100 s, of them 60 s busy
    family = {"children": [Process(child, 0.0, 0.0, 0.0)], "parent": Process(parent, 0.0, 0.0, 0.0)}
    processes = iter([Process(9.0, 2.0, 0.0, 0.0), Process(19.0, 4.0, 10.0, 2.0, **family)])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(times))
    monkeypatch.setattr(psutil, "Process", lambda: next(processes))
    assert system_state.sample()["cpu_load"] == pytest.approx(load)


def test_a_watch_that_began_earlier_is_not_waited_for(quiet, monkeypatch):
    quiet("linux")
    watch = system_state.LoadWatch()
    monkeypatch.setattr(system_state, "WINDOW_SECONDS", 0.0)
    monkeypatch.setattr(psutil, "cpu_times", lambda: CpuTimes(10.0, 10.0))
    monkeypatch.setattr(system_state, "LoadWatch", lambda: pytest.fail("it began another one"))
    assert system_state.sample(None, watch)["cpu_load"] == pytest.approx(0.5, abs=0.1)


def test_a_hanging_tool_gives_no_output(monkeypatch):
    def run(*_, timeout, **__):
        assert timeout <= 3
        raise subprocess.TimeoutExpired("pmset", timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert system_state.command_output("pmset", "-g") == ""


# --- the card


def processes(*pids):
    return [SimpleNamespace(pid=pid) for pid in pids]


def test_the_state_of_a_card(quiet, nvml):
    quiet("win32")
    nvml(
        Temperature=83,
        ClockInfo=1395,
        PowerUsage=118_420,
        CurrentClocksEventReasons=0x1 | 0x2 | 0x4 | 0x20,
        UtilizationRates=SimpleNamespace(gpu=37, memory=12),
        ComputeRunningProcesses=processes(os.getpid(), 10**8, 10**8 + 1),
        GraphicsRunningProcesses=processes(10**8 + 1),
        MigMode=[0, 0],
    )
    assert system_state.sample(UUID) == {
        "gpu_temperature_celsius": 83,
        "gpu_sm_clock_mhz": 1395,
        "gpu_power_watts": 118.4,
        "gpu_throttle": "sw power cap, sw thermal slowdown",
        "gpu_load": 0.37,
        "gpu_processes": 1,
    }


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        # An idle card is not throttled, and 0 is told where it is known.
        ({"UtilizationRates": SimpleNamespace(gpu=0), "ComputeRunningProcesses": [], "CurrentClocksEventReasons": 1},
         {"gpu_load": 0.0, "gpu_processes": 0}),
        # The name before driver 535.
        ({"CurrentClocksThrottleReasons": 0x48, "CurrentClocksEventReasons": NVMLError("Function Not Found")},
         {"gpu_throttle": "hw slowdown, hw thermal slowdown"}),
        (dict.fromkeys(["Temperature", "ClockInfo", "PowerUsage", "UtilizationRates", "ComputeRunningProcesses",
                        "MigMode", "CurrentClocksEventReasons"], NVMLError("Not Supported")), {}),
        # What NVML tells is of all slices.
        ({"Temperature": 50, "MigMode": [1, 1]}, {}),
        ({"uuid": "GPU-another", "Temperature": 50}, {}),
    ],
    ids=["idle", "old driver", "unsupported", "slices", "another card"],
)  # fmt: skip
def test_unknown_values_of_a_card_are_absent(quiet, nvml, answers, expected):
    quiet("win32")
    nvml(**answers)
    assert system_state.sample(UUID) == expected


def test_no_uuid_no_driver_and_no_binding_are_no_errors(quiet, nvml, monkeypatch):
    quiet("win32")
    fake = nvml(Temperature=50)
    fake.nvmlInit = lambda: fake.answer(NVMLError("Driver Not Loaded"))
    assert system_state.sample(UUID) == {}
    fake.nvmlInit = lambda: pytest.fail("asked")
    assert system_state.sample() == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert system_state.sample(UUID) == {}


@pytest.mark.parametrize(
    ("pids", "count"),
    [((), None), ((0,), None), ((0, 10**8), 1), ((10**8,), None)],  # 0 is ourselves
    ids=["hidden", "ours alone", "another in the same container", "the host's numbers"],
)
def test_in_a_container_others_count_only_if_our_process_is_listed(quiet, nvml, monkeypatch, tmp_path, pids, count):
    quiet("linux")
    monkeypatch.setattr(nvidia, "PID_NAMESPACE", tmp_path)
    nvml(ComputeRunningProcesses=processes(*(pid or os.getpid() for pid in pids)))
    assert system_state.sample(UUID).get("gpu_processes") == count


def test_outside_a_container_others_are_always_counted(quiet, nvml, monkeypatch, tmp_path):
    quiet("linux")
    nvml(ComputeRunningProcesses=processes(10**8))
    monkeypatch.setattr(nvidia, "PID_NAMESPACE", tmp_path)
    monkeypatch.setattr(nvidia, "INITIAL_PID_NAMESPACE", tmp_path.stat().st_ino)
    assert system_state.sample(UUID)["gpu_processes"] == 1


# --- drift


def noise(rng, phi, count, shape):
    """`shape` series of `count` values of stationary AR(1) noise with a standard deviation of 1."""
    values = rng.normal(size=(shape, count))
    for step in range(1, count):
        values[:, step] = phi * values[:, step - 1] + math.sqrt(1 - phi**2) * values[:, step]
    return values


@pytest.mark.parametrize(("phi", "count"), [(0.0, 6), (0.7, 60)])
def test_a_trend_is_rarely_seen_where_there_is_none(phi, count):
    series = noise(np.random.default_rng([count, int(phi * 10)]), phi, count, 2000)
    rate = np.mean([system_state.trend_p_value(values) < system_state.DRIFT_P for values in series])
    assert rate <= 0.015
    if phi == system_state.DRIFT_PHI:
        assert rate >= 0.005  # at its level, and not just blind


def test_the_trend_test_agrees_with_generalised_least_squares():
    values = np.array([9.8, 9.9, 10.0, 10.2, 10.1, 10.4, 10.3])
    times = np.arange(7)
    inverse = np.linalg.inv(0.7 ** np.abs(np.subtract.outer(times, times)))  # of the noise's correlations
    regressors = np.column_stack([np.ones(7), times])
    precision = regressors.T @ inverse @ regressors
    fitted = np.linalg.solve(precision, regressors.T @ inverse @ values)
    residuals = values - regressors @ fitted
    error = math.sqrt(residuals @ inverse @ residuals / 5 * np.linalg.inv(precision)[1, 1])
    expected = 2 * stats.t.sf(abs(fitted[1]) / error, 5)
    assert system_state.trend_p_value(list(values)) == pytest.approx(expected)
    assert system_state.trend_p_value(list(values[::-1])) == pytest.approx(expected)


def test_drift_is_a_change_from_the_first_third_to_the_last():
    seconds = [0.98, 1.02, 1.08, 1.12, 1.17, 1.22, 1.28]  # thirds of two: 1.0 and 1.25
    slower = system_state.behavior({}, {}, seconds)
    assert slower.keys() == {"drift"} and "25.0%" in slower["drift"]
    assert "20.0%" in system_state.behavior({}, {}, seconds[::-1])["drift"]


@pytest.mark.parametrize(
    "seconds",
    [
        [1.0 + 0.029 * step / 5 for step in range(6)],
        [1.0, 1.2, 0.9, 1.3, 1.0, 1.2],
        [1.0, 1.1, 1.2, 1.3, 1.4],
        [0.1] * 50,
    ],
    ids=["below 3%", "chance", "too few", "equal"],
)
def test_small_random_or_untestable_changes_are_no_drift(seconds):
    assert system_state.behavior({}, {}, seconds) == {}


# --- taints and behavior


def test_a_quiet_machine_has_no_taints_and_no_behavior():
    before = {
        "power_source": "mains", "low_power_mode": False, "thermal_pressure": "nominal", "cpu_load": 0.10,
        "swap_gib": 4.0, "swapping": False, "gpu_load": 0.05, "gpu_processes": 0, "gpu_throttle": "sw power cap",
        "gpu_temperature_celsius": 83.0,
    }  # fmt: skip
    after = before | {"gpu_load": 1.0, "swap_gib": 4.2}
    for states in ((before, after), ({}, {})):
        assert system_state.taints(*states) == system_state.behavior(*states, [1.0] * 6) == {}


@pytest.mark.parametrize(
    ("before", "after", "word", "figures"),
    [
        ({}, {"power_source": "battery"}, "battery", []),
        ({"low_power_mode": True}, {}, "low-power", []),
        ({"cpu_load": 0.35}, {"cpu_load": 0.12}, "load", ["35%"]),
        ({"gpu_load": 0.4}, {"gpu_processes": 2, "gpu_load": 1.0}, "gpu-load", ["40%", "(2)"]),
        ({}, {"swap_gib": 1.5}, "swap", ["1.5 GiB"]),
        ({"swapping": True}, {"swap_gib": 2.0}, "swap", ["2.0 GiB", "swapping"]),
    ],
)
def test_taints_are_disturbances_by_others(before, after, word, figures):
    sentences = system_state.taints(before, after)
    assert sentences.keys() == {word} and all(figure in sentences[word] for figure in figures)
    assert system_state.behavior(before, after, []) == {}
    assert word not in system_state.BEHAVIORS


@pytest.mark.parametrize(
    ("before", "after", "word", "figures"),
    [
        ({"gpu_throttle": "hw slowdown"}, {"gpu_throttle": "sw power cap, sw thermal slowdown"}, "throttled",
         ["(hw slowdown, sw thermal slowdown)"]),
        ({"thermal_pressure": "nominal"}, {"thermal_pressure": "moderate"}, "thermal", ["moderate"]),
    ],
)  # fmt: skip
def test_behavior_is_no_taint(before, after, word, figures):
    sentences = system_state.behavior(before, after, [])
    assert sentences.keys() == {word} and all(figure in sentences[word] for figure in figures)
    assert system_state.taints(before, after) == {}
    assert word in system_state.BEHAVIORS
