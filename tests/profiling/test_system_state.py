"""What taints a run and how its machine behaved: from what tools and drivers say, absent where they say nothing."""

import math
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from scipy import stats

from pipeline.profiling import system_info, system_state

UUID = "GPU-5f0c8f1e-0000-1111-2222-333344445555"
PMSET_AIR = """\
System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                1 (sleep prevented by sharingd, powerd)
 hibernatemode        3
 ttyskeepawake        1
 displaysleep         2
 tcpkeepalive         1
 lowpowermode         1
 womp                 0
"""
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                5208.
Pages active:                            195610.
"Translation faults":                 287120399.
Pageins:                                5912340.
Pageouts:                                 42210.
Swapins:                                     12.
Swapouts:                                   340.
"""
VMSTAT = "nr_free_pages 1204\npgpgin 99123\npgpgout 45\npswpin 7\npswpout 20\npgalloc_dma 0\n"


class NVMLError(Exception):
    pass


class Nvml:
    """As pynvml: one card. A function that is not in `answers` is one that the driver doesn't have; `opened`
    counts those who hold it."""

    NVMLError = NVMLError

    def __init__(self, uuid=UUID, **answers):
        self.uuid, self.opened = uuid, 0
        for name, answer in answers.items():
            setattr(self, f"nvmlDeviceGet{name}", lambda handle, *_, answer=answer: self.told(answer))

    def told(self, answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    def nvmlInit(self):  # noqa: N802
        self.opened += 1

    def nvmlShutdown(self):  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        if uuid != self.uuid:
            raise NVMLError("Not Found")
        return uuid


def processes(*pids):
    return [SimpleNamespace(pid=pid) for pid in pids]


@pytest.fixture
def nvml(monkeypatch):
    """Puts a made-up pynvml in the place of the installed one."""

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
        monkeypatch.setattr(system_state, "WINDOW_SECONDS", 0)
        monkeypatch.setattr(system_state, "PLATFORM_PROFILE", tmp_path / "platform_profile")
        monkeypatch.setattr(system_state, "output", lambda *command: (outputs or {}).get(" ".join(command), ""))
        read = system_state.contents
        monkeypatch.setattr(system_state, "contents", lambda path: read(path) if tmp_path in path.parents else "")
        monkeypatch.setattr(system_state, "_cpu_seconds", lambda: (0.0, 0.0, 0.0))
        monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(used=0))
        monkeypatch.setattr(system_info, "power_source", lambda: None)

    return put


# --- the machine


@pytest.mark.parametrize("system", ["linux", "darwin", "win32", "freebsd14"])
def test_what_nobody_tells_is_absent(quiet, system):
    quiet(system)
    assert system_state.sample() == {}


def test_a_sample_of_this_machine_is_plain(monkeypatch):
    monkeypatch.setattr(system_state, "WINDOW_SECONDS", 0.05)
    found = system_state.sample()
    assert {type(value) for value in found.values()} <= {float, str, bool}
    assert 0 <= found.get("cpu_load", 0) <= 1
    assert not [key for key in found if key.startswith("gpu_")]


def test_a_mac_tells_its_power_mode_thermal_pressure_and_swap(quiet, monkeypatch):
    said = "com.apple.system.thermalpressurelevel 2\n"
    command = "notifyutil -g com.apple.system.thermalpressurelevel"
    quiet("darwin", {"pmset -g": PMSET_AIR, command: said})
    pages = iter([VM_STAT, VM_STAT.replace("340.", "99340.")])
    run = system_state.output
    monkeypatch.setattr(system_state, "output", lambda *line: next(pages) if line == ("vm_stat",) else run(*line))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(used=3 * 2**29))
    monkeypatch.setattr(system_info, "power_source", lambda: "battery")
    times = SimpleNamespace(monotonic=iter([1.0, 1.5]).__next__, sleep=lambda seconds: None)
    monkeypatch.setattr(system_state, "time", times)
    assert system_state.sample() == {
        "power_source": "battery",
        "low_power_mode": True,
        "thermal_pressure": "heavy",
        "swap_gib": 1.5,
        "swapping": True,
    }


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (PMSET_AIR, True),
        (PMSET_AIR.replace("lowpowermode         1", "lowpowermode         0"), False),
        (PMSET_AIR.replace("lowpowermode  ", "powermode     "), True),
        (PMSET_AIR.replace("lowpowermode         1", "powermode            2"), False),
        (PMSET_AIR.replace(" lowpowermode         1\n", ""), None),
        ("", None),
    ],
)
def test_a_macs_low_power_mode_is_one_of_two_keys(text, mode):
    assert system_state.parse_pmset(text) is mode


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("com.apple.system.thermalpressurelevel 0\n", "nominal"),
        ("com.apple.system.thermalpressurelevel 4\n", "sleeping"),
        ("com.apple.system.thermalpressurelevel 20\n", None),  # iOS' scale
        ("com.apple.system.thermalpressurelevel: Failed with code 1\n", None),
        ("", None),
    ],
)
def test_thermal_pressure_is_named_as_apple_does(text, level):
    assert system_state.parse_thermal_pressure(text) == level


@pytest.mark.parametrize(("profile", "mode"), [("low-power\n", True), ("balanced\n", False), ("", None)])
def test_linux_low_power_mode_is_the_firmwares_profile(quiet, profile, mode):
    quiet("linux")
    system_state.PLATFORM_PROFILE.write_text(profile)
    assert system_state.sample().get("low_power_mode") is mode


def test_pages_to_and_from_swap_are_not_those_of_files():
    assert system_state.parse_swapped_pages(VMSTAT, "linux") == 27
    assert system_state.parse_swapped_pages(VM_STAT, "darwin") == 352
    assert system_state.parse_swapped_pages("nr_free_pages 1204\n", "linux") is None


def test_a_single_page_is_no_swapping():
    assert system_state.swaps(0, 4096, 0.5) is False
    assert system_state.swaps(0, 2**20, 0.5) is True
    assert system_state.swaps(None, 2**20, 0.5) is None
    assert system_state.swaps(0, None, 0.5) is None


def test_psutils_warnings_and_errors_about_swap_stay_inside(quiet, monkeypatch):
    quiet("linux")

    def warned():
        warnings.warn("'sin' and 'sout' swap memory stats couldn't be determined", RuntimeWarning, stacklevel=2)
        return SimpleNamespace(used=2**30)

    def failed():
        raise RuntimeError("PdhAddEnglishCounterW failed. Performance counters may be disabled.")

    monkeypatch.setattr(psutil, "swap_memory", warned)
    assert system_state.sample() == {"swap_gib": 1.0}
    monkeypatch.setattr(psutil, "swap_memory", failed)
    assert system_state.sample() == {}


@pytest.mark.parametrize(
    ("before", "after", "load"),
    [
        ((100, 10, 2), (104, 13, 3), 0.5),  # 4 s of cores, 3 busy, 1 of them ours
        ((100, 10, 2), (104, 11, 3.2), 0.0),  # the two are counted at different ticks
        ((100, 10, 2), (104, 15, 2), 1.0),
        ((100, 10, 2), (100, 10, 2), None),
    ],
)
def test_the_load_of_others_is_less_our_own(before, after, load):
    assert system_state.load_of_others(before, after) == load


def test_the_load_in_a_sample_is_between_its_two_ends(quiet, monkeypatch):
    quiet("linux")
    monkeypatch.setattr(system_state, "_cpu_seconds", iter([(100, 10, 2), (104, 13, 3)]).__next__)
    assert system_state.sample() == {"cpu_load": 0.5}


@pytest.mark.parametrize(
    ("system", "times", "expected"),
    [
        ("linux", {"user": 30, "nice": 5, "system": 10, "idle": 50, "iowait": 3, "steal": 2, "guest": 20,
                   "guest_nice": 4}, (100, 47)),
        ("win32", {"user": 30, "system": 20, "idle": 50, "interrupt": 4, "dpc": 3}, (100, 50)),
        ("darwin", {"user": 30, "nice": 5, "system": 15, "idle": 50}, (100, 50)),
    ],
)  # fmt: skip
def test_no_cpu_time_counts_twice(monkeypatch, system, times, expected):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(_asdict=lambda: dict(times)))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(
        cpu_times=lambda: SimpleNamespace(user=6.0, system=1.0)
    ))  # fmt: skip
    assert system_state._cpu_seconds() == (*expected, 7.0)


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("pmset", 3)])
def test_a_tool_that_is_missing_or_hangs_says_nothing(monkeypatch, error):
    def run(*_, timeout, **__):
        assert timeout <= 3
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert system_state.output("pmset", "-g") == ""


# --- the card


def test_a_card_tells_its_state_and_is_let_go(quiet, nvml, monkeypatch):
    quiet("linux")
    monkeypatch.setattr(system_state, "_sees_all_processes", lambda: True)
    fake = nvml(
        Temperature=83,
        ClockInfo=1395,
        PowerUsage=118_420,
        CurrentClocksEventReasons=0x1 | 0x2 | 0x4 | 0x20,
        UtilizationRates=SimpleNamespace(gpu=37, memory=12),
        ComputeRunningProcesses=processes(system_state.os.getpid(), 10**8, 10**8 + 1),
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
    assert fake.opened == 0


def test_an_idle_card_is_not_throttled_and_zero_is_told_where_it_is_known(quiet, nvml, monkeypatch):
    quiet("linux")
    monkeypatch.setattr(system_state, "_sees_all_processes", lambda: True)
    nvml(
        CurrentClocksThrottleReasons=0x1,  # a driver of the older name
        CurrentClocksEventReasons=NVMLError("Function Not Found"),
        UtilizationRates=SimpleNamespace(gpu=0),
        ComputeRunningProcesses=[],
    )
    assert system_state.sample(UUID) == {"gpu_load": 0.0, "gpu_processes": 0}


def test_the_older_name_of_throttling_is_understood(quiet, nvml):
    quiet("linux")
    nvml(CurrentClocksThrottleReasons=0x48)
    assert system_state.sample(UUID) == {"gpu_throttle": "hw slowdown, hw thermal slowdown"}


def test_what_a_card_does_not_support_is_absent(quiet, nvml):
    quiet("linux")
    unsupported = NVMLError("Not Supported")
    names = ("Temperature", "ClockInfo", "PowerUsage", "UtilizationRates", "ComputeRunningProcesses", "MigMode")
    fake = nvml(**dict.fromkeys((*names, "CurrentClocksEventReasons", "CurrentClocksThrottleReasons"), unsupported))
    assert system_state.sample(UUID) == {}
    assert fake.opened == 0


def test_without_a_uuid_nvml_is_not_asked(quiet, nvml):
    quiet("linux")
    fake = nvml(Temperature=50)
    fake.nvmlInit = lambda: pytest.fail("asked")
    assert system_state.sample() == {}


def test_no_card_no_driver_and_no_binding_are_no_errors(quiet, nvml, monkeypatch):
    quiet("linux")
    fake = nvml("GPU-another", Temperature=50)
    assert system_state.sample(UUID) == {}
    assert fake.opened == 0
    fake.nvmlInit = lambda: fake.told(NVMLError("Driver Not Loaded"))
    assert system_state.sample(UUID) == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert system_state.sample(UUID) == {}


def test_a_card_in_slices_tells_nothing_of_one(quiet, nvml):
    quiet("linux")
    fake = nvml(Temperature=50, MigMode=[1, 1])
    assert system_state.sample(UUID) == {}
    assert fake.opened == 0


@pytest.mark.parametrize(
    ("pids", "count"),
    [((), None), ((0,), None), ((0, 10**8), 1)],  # 0 is ourselves
    ids=["hidden", "ours alone", "another in the same container"],
)
def test_in_a_container_others_are_told_only_where_we_are_seen(quiet, nvml, monkeypatch, pids, count):
    quiet("linux")
    monkeypatch.setattr(system_state, "_sees_all_processes", lambda: False)
    nvml(ComputeRunningProcesses=processes(*(pid or system_state.os.getpid() for pid in pids)))
    assert system_state.sample(UUID).get("gpu_processes") == count


def test_the_hosts_numbers_in_a_container_are_nobody(quiet, nvml, monkeypatch):
    quiet("linux")
    monkeypatch.setattr(system_state, "_sees_all_processes", lambda: False)
    nvml(ComputeRunningProcesses=processes(10**8))  # may be ourselves
    assert system_state.sample(UUID) == {}


def test_a_container_is_known_by_its_namespace(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(system_state, "PID_NAMESPACE", tmp_path)
    assert system_state._sees_all_processes() is False
    monkeypatch.setattr(system_state, "INITIAL_PID_NAMESPACE", tmp_path.stat().st_ino)
    assert system_state._sees_all_processes() is True
    monkeypatch.setattr(system_state, "PID_NAMESPACE", tmp_path / "none")
    assert system_state._sees_all_processes() is False
    monkeypatch.setattr(sys, "platform", "win32")
    assert system_state._sees_all_processes() is True


# --- the pace


def noise(rng, phi, count, shape):
    """`shape` series of `count` values of stationary AR(1) noise with a standard deviation of 1."""
    values = rng.normal(size=(shape, count))
    for step in range(1, count):
        values[:, step] = phi * values[:, step - 1] + math.sqrt(1 - phi**2) * values[:, step]
    return values


@pytest.mark.parametrize("count", [6, 10, 20, 60])
@pytest.mark.parametrize("phi", [0.0, 0.4, 0.7])
def test_a_trend_is_rarely_seen_where_there_is_none(phi, count):
    series = noise(np.random.default_rng([count, int(phi * 10)]), phi, count, 2000)
    called = np.mean([system_state.trend_p(values) < system_state.DRIFT_P for values in series])
    assert called <= 0.015
    if phi == system_state.DRIFT_PHI:
        assert called >= 0.005  # at its level, and not just blind


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_a_drift_of_a_tenth_is_found(phi):
    slower = np.linspace(1.0, 1.1, 60) + 0.01 * noise(np.random.default_rng(0), phi, 60, 200)
    found = [system_state.behavior({}, {}, list(seconds)) for seconds in slower]
    assert np.mean(["drift" in words for words in found]) >= 0.95


def test_a_trend_in_independent_differences_is_students_t():
    # By hand, for phi = 0: Sxx = 10, Sxy = 0.9, Syy = 0.1, so r^2 = 0.81 and t = sqrt(3 * 0.81 / 0.19) = 3.576.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system_state, "DRIFT_PHI", 0.0)
        assert system_state.trend_p([9.8, 9.9, 10.0, 10.2, 10.1]) == pytest.approx(0.0374, abs=1e-4)


def test_a_trend_is_that_of_generalised_least_squares():
    values = np.array([9.8, 9.9, 10.0, 10.2, 10.1, 10.4, 10.3])
    times = np.arange(7)
    inverse = np.linalg.inv(0.7 ** np.abs(np.subtract.outer(times, times)))  # of the noise's correlations
    regressors = np.column_stack([np.ones(7), times])
    precision = regressors.T @ inverse @ regressors
    fitted = np.linalg.solve(precision, regressors.T @ inverse @ values)
    residuals = values - regressors @ fitted
    error = math.sqrt(residuals @ inverse @ residuals / 5 * np.linalg.inv(precision)[1, 1])
    expected = 2 * stats.t.sf(abs(fitted[1]) / error, 5)
    assert system_state.trend_p(list(values)) == pytest.approx(expected)
    assert system_state.trend_p(list(values[::-1])) == pytest.approx(expected)


def test_a_straight_line_is_no_chance():
    assert system_state.trend_p([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) < 1e-9


# --- the verdict


def test_a_quiet_machine_has_no_taints_and_nothing_to_say():
    calm = {
        "power_source": "mains", "low_power_mode": False, "thermal_pressure": "nominal", "cpu_load": 0.10,
        "swap_gib": 4.0, "swapping": False, "gpu_load": 0.05, "gpu_processes": 0, "gpu_throttle": "sw power cap",
        "gpu_temperature_celsius": 83.0,
    }  # fmt: skip
    later = calm | {"gpu_load": 1.0, "swap_gib": 4.2}
    assert system_state.taints(calm, later) == system_state.taints({}, {}) == {}
    assert (
        system_state.behavior(calm, later, [1.0, 1.01, 0.99, 1.0, 1.0, 1.0]) == system_state.behavior({}, {}, []) == {}
    )


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"power_source": "battery"}, {"power_source": "mains"}, {"battery": "the machine ran on battery"}),
        ({}, {"power_source": "battery"}, {"battery": "the machine ran on battery"}),
        ({"low_power_mode": True}, {}, {"low-power": "the machine was in low-power mode"}),
        ({"cpu_load": 0.35}, {}, {"load": "other processes used 35% of the CPU when it started"}),
        (
            {"cpu_load": 0.35},
            {"cpu_load": 0.12},
            {"load": "other processes used 35% of the CPU when it started and 12% of the CPU when it ended"},
        ),
        ({"gpu_load": 0.4}, {"gpu_load": 1.0}, {"gpu-load": "the GPU was 40% busy before it started"}),
        ({"gpu_processes": 1}, {}, {"gpu-load": "1 other process was computing on the GPU"}),
        (
            {"gpu_load": 0.4},
            {"gpu_processes": 2},
            {"gpu-load": "the GPU was 40% busy before it started and 2 other processes were computing on the GPU"},
        ),
        ({}, {"swap_gib": 1.5}, {"swap": "the used swap grew by 1.5 GiB"}),
        ({"swapping": True}, {"swapping": False}, {"swap": "the machine was swapping at the start"}),
        (
            {"swapping": True, "swap_gib": 1.0},
            {"swapping": True, "swap_gib": 2.0},
            {"swap": "the used swap grew by 1.0 GiB and the machine was swapping at the start and at the end"},
        ),
    ],
)
def test_a_taint_is_what_others_did_in_a_sentence_with_its_figures(before, after, expected):
    assert system_state.taints(before, after) == expected
    assert system_state.behavior(before, after, []) == {}
    assert not system_state.OWN_NATURE & expected.keys()


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            {"gpu_throttle": "sw power cap"},
            {"gpu_throttle": "sw power cap, sw thermal slowdown"},
            {"throttled": "the GPU was throttled at the end (sw thermal slowdown)"},
        ),
        (
            {"gpu_throttle": "hw slowdown"},
            {"gpu_throttle": "hw slowdown, hw power brake slowdown"},
            {
                "throttled": "the GPU was throttled at the start (hw slowdown) "
                "and at the end (hw slowdown, hw power brake slowdown)"
            },
        ),
        (
            {"thermal_pressure": "nominal"},
            {"thermal_pressure": "moderate"},
            {"thermal": "the thermal pressure was moderate at the end"},
        ),
    ],
)
def test_what_the_machine_does_by_itself_is_no_taint(before, after, expected):
    assert system_state.behavior(before, after, []) == expected
    assert system_state.taints(before, after) == {}
    assert expected.keys() <= system_state.OWN_NATURE


def test_drift_is_a_change_from_the_first_third_to_the_last():
    seconds = [0.98, 1.02, 1.08, 1.12, 1.17, 1.22, 1.28]  # thirds of two: 1.0 and 1.25
    slower = system_state.behavior({}, {}, seconds)
    assert slower.keys() == {"drift"}
    assert "25.0% more time" in slower["drift"]
    assert "20.0% less time" in system_state.behavior({}, {}, seconds[::-1])["drift"]


@pytest.mark.parametrize(
    "seconds",
    [
        [1.0 + 0.006 * step / 59 for step in range(60)],  # a lost 0.6%, without any noise
        [1.0 + 0.029 * step / 5 for step in range(6)],
        [1.0, 1.2, 0.9, 1.3, 1.0, 1.2],
        [1.0, 1.1, 1.2, 1.3, 1.4],
        [0.1] * 50,
        [],
    ],
    ids=["0.6%", "below 3%", "chance", "too few", "equal", "none"],
)
def test_what_is_small_by_chance_or_of_few_values_is_no_drift(seconds):
    assert system_state.behavior({}, {}, seconds) == {}
