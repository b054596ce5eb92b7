"""What taints a run: told from what tools and drivers say, absent where they say nothing, weighed in sentences."""

import math
import subprocess
import sys
import warnings
from types import SimpleNamespace

import psutil
import pytest

from pipeline import conditions, machine

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
        monkeypatch.setattr(conditions, "WINDOW_SECONDS", 0)
        monkeypatch.setattr(conditions, "PLATFORM_PROFILE", tmp_path / "platform_profile")
        monkeypatch.setattr(conditions, "output", lambda *command: (outputs or {}).get(" ".join(command), ""))
        read = conditions.contents
        monkeypatch.setattr(conditions, "contents", lambda path: read(path) if tmp_path in path.parents else "")
        monkeypatch.setattr(conditions, "_cpu_seconds", lambda: (0.0, 0.0, 0.0))
        monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(used=0))
        monkeypatch.setattr(machine, "power_source", lambda: None)

    return put


# --- the machine


@pytest.mark.parametrize("system", ["linux", "darwin", "win32", "freebsd14"])
def test_what_nobody_tells_is_absent(quiet, system):
    quiet(system)
    assert conditions.sample() == {}


def test_a_sample_of_this_machine_is_plain(monkeypatch):
    monkeypatch.setattr(conditions, "WINDOW_SECONDS", 0.05)
    found = conditions.sample()
    assert {type(value) for value in found.values()} <= {float, str, bool}
    assert 0 <= found.get("cpu_load", 0) <= 1
    assert not [key for key in found if key.startswith("gpu_")]


def test_a_mac_tells_its_power_mode_thermal_pressure_and_swap(quiet, monkeypatch):
    said = "com.apple.system.thermalpressurelevel 2\n"
    command = "notifyutil -g com.apple.system.thermalpressurelevel"
    quiet("darwin", {"pmset -g": PMSET_AIR, command: said})
    pages = iter([VM_STAT, VM_STAT.replace("340.", "99340.")])
    run = conditions.output
    monkeypatch.setattr(conditions, "output", lambda *line: next(pages) if line == ("vm_stat",) else run(*line))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(used=3 * 2**29))
    monkeypatch.setattr(machine, "power_source", lambda: "battery")
    times = SimpleNamespace(monotonic=iter([1.0, 1.5]).__next__, sleep=lambda seconds: None)
    monkeypatch.setattr(conditions, "time", times)
    assert conditions.sample() == {
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
    assert conditions.parse_pmset(text) is mode


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
    assert conditions.parse_thermal_pressure(text) == level


@pytest.mark.parametrize(("profile", "mode"), [("low-power\n", True), ("balanced\n", False), ("", None)])
def test_linux_low_power_mode_is_the_firmwares_profile(quiet, profile, mode):
    quiet("linux")
    conditions.PLATFORM_PROFILE.write_text(profile)
    assert conditions.sample().get("low_power_mode") is mode


def test_pages_to_and_from_swap_are_not_those_of_files():
    assert conditions.parse_swapped_pages(VMSTAT, "linux") == 27
    assert conditions.parse_swapped_pages(VM_STAT, "darwin") == 352
    assert conditions.parse_swapped_pages("nr_free_pages 1204\n", "linux") is None


def test_a_single_page_is_no_swapping():
    assert conditions.swaps(0, 4096, 0.5) is False
    assert conditions.swaps(0, 2**20, 0.5) is True
    assert conditions.swaps(None, 2**20, 0.5) is None
    assert conditions.swaps(0, None, 0.5) is None


def test_psutils_warnings_and_errors_about_swap_stay_inside(quiet, monkeypatch):
    quiet("linux")

    def warned():
        warnings.warn("'sin' and 'sout' swap memory stats couldn't be determined", RuntimeWarning, stacklevel=2)
        return SimpleNamespace(used=2**30)

    def failed():
        raise RuntimeError("PdhAddEnglishCounterW failed. Performance counters may be disabled.")

    monkeypatch.setattr(psutil, "swap_memory", warned)
    assert conditions.sample() == {"swap_gib": 1.0}
    monkeypatch.setattr(psutil, "swap_memory", failed)
    assert conditions.sample() == {}


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
    assert conditions.load_of_others(before, after) == load


def test_the_load_in_a_sample_is_between_its_two_ends(quiet, monkeypatch):
    quiet("linux")
    monkeypatch.setattr(conditions, "_cpu_seconds", iter([(100, 10, 2), (104, 13, 3)]).__next__)
    assert conditions.sample() == {"cpu_load": 0.5}


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
    assert conditions._cpu_seconds() == (*expected, 7.0)


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("pmset", 3)])
def test_a_tool_that_is_missing_or_hangs_says_nothing(monkeypatch, error):
    def run(*_, timeout, **__):
        assert timeout <= 3
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert conditions.output("pmset", "-g") == ""


# --- the card


def test_a_card_tells_its_state_and_is_let_go(quiet, nvml, monkeypatch):
    quiet("linux")
    monkeypatch.setattr(conditions, "_sees_all_processes", lambda: True)
    fake = nvml(
        Temperature=83,
        ClockInfo=1395,
        PowerUsage=118_420,
        CurrentClocksEventReasons=0x1 | 0x2 | 0x4 | 0x20,
        UtilizationRates=SimpleNamespace(gpu=37, memory=12),
        ComputeRunningProcesses=processes(conditions.os.getpid(), 10**8, 10**8 + 1),
        GraphicsRunningProcesses=processes(10**8 + 1),
        MigMode=[0, 0],
    )
    assert conditions.sample(UUID) == {
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
    monkeypatch.setattr(conditions, "_sees_all_processes", lambda: True)
    nvml(
        CurrentClocksThrottleReasons=0x1,  # a driver of the older name
        CurrentClocksEventReasons=NVMLError("Function Not Found"),
        UtilizationRates=SimpleNamespace(gpu=0),
        ComputeRunningProcesses=[],
    )
    assert conditions.sample(UUID) == {"gpu_load": 0.0, "gpu_processes": 0}


def test_the_older_name_of_throttling_is_understood(quiet, nvml):
    quiet("linux")
    nvml(CurrentClocksThrottleReasons=0x48)
    assert conditions.sample(UUID) == {"gpu_throttle": "hw slowdown, hw thermal slowdown"}


def test_what_a_card_does_not_support_is_absent(quiet, nvml):
    quiet("linux")
    unsupported = NVMLError("Not Supported")
    names = ("Temperature", "ClockInfo", "PowerUsage", "UtilizationRates", "ComputeRunningProcesses", "MigMode")
    fake = nvml(**dict.fromkeys((*names, "CurrentClocksEventReasons", "CurrentClocksThrottleReasons"), unsupported))
    assert conditions.sample(UUID) == {}
    assert fake.opened == 0


def test_without_a_uuid_nvml_is_not_asked(quiet, nvml):
    quiet("linux")
    fake = nvml(Temperature=50)
    fake.nvmlInit = lambda: pytest.fail("asked")
    assert conditions.sample() == {}


def test_no_card_no_driver_and_no_binding_are_no_errors(quiet, nvml, monkeypatch):
    quiet("linux")
    fake = nvml("GPU-another", Temperature=50)
    assert conditions.sample(UUID) == {}
    assert fake.opened == 0
    fake.nvmlInit = lambda: fake.told(NVMLError("Driver Not Loaded"))
    assert conditions.sample(UUID) == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert conditions.sample(UUID) == {}


def test_a_card_in_slices_tells_nothing_of_one(quiet, nvml):
    quiet("linux")
    fake = nvml(Temperature=50, MigMode=[1, 1])
    assert conditions.sample(UUID) == {}
    assert fake.opened == 0


@pytest.mark.parametrize(
    ("pids", "count"),
    [((), None), ((0,), None), ((0, 10**8), 1)],  # 0 is ourselves
    ids=["hidden", "ours alone", "another in the same container"],
)
def test_in_a_container_others_are_told_only_where_we_are_seen(quiet, nvml, monkeypatch, pids, count):
    quiet("linux")
    monkeypatch.setattr(conditions, "_sees_all_processes", lambda: False)
    nvml(ComputeRunningProcesses=processes(*(pid or conditions.os.getpid() for pid in pids)))
    assert conditions.sample(UUID).get("gpu_processes") == count


def test_the_hosts_numbers_in_a_container_are_nobody(quiet, nvml, monkeypatch):
    quiet("linux")
    monkeypatch.setattr(conditions, "_sees_all_processes", lambda: False)
    nvml(ComputeRunningProcesses=processes(10**8))  # may be ourselves
    assert conditions.sample(UUID) == {}


def test_a_container_is_known_by_its_namespace(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(conditions, "PID_NAMESPACE", tmp_path)
    assert conditions._sees_all_processes() is False
    monkeypatch.setattr(conditions, "INITIAL_PID_NAMESPACE", tmp_path.stat().st_ino)
    assert conditions._sees_all_processes() is True
    monkeypatch.setattr(conditions, "PID_NAMESPACE", tmp_path / "none")
    assert conditions._sees_all_processes() is False
    monkeypatch.setattr(sys, "platform", "win32")
    assert conditions._sees_all_processes() is True


# --- the pace


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [  # Student's t, two-sided, from the usual tables
        (12.706, 1, 0.05),
        (4.303, 2, 0.05),
        (5.841, 3, 0.01),
        (2.571, 5, 0.05),
        (3.355, 8, 0.01),
        (2.228, 10, 0.05),
        (4.587, 10, 0.001),
        (2.750, 30, 0.01),
        (1.980, 120, 0.05),
        (0.700, 10, 0.50),
    ],
)
def test_p_values_are_those_of_the_tables(t, degrees, p):
    assert conditions.two_sided_p(t, degrees) == pytest.approx(p, rel=2e-3)


@pytest.mark.parametrize("t", [0.0, 0.01, 0.5, 1.0, 3.0, 40.0])
def test_p_values_are_those_of_the_closed_forms(t):
    assert conditions.two_sided_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-12)
    assert conditions.two_sided_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)


def test_drift_is_the_slope_over_the_mean_and_its_p_value():
    # By hand: Sxx = 10, Sxy = 0.9, Syy = 0.1, so r^2 = 0.81 and t = sqrt(3 * 0.81 / 0.19) = 3.576.
    slope, p = conditions.drift([9.8, 9.9, 10.0, 10.2, 10.1])
    assert slope == pytest.approx(0.009)
    assert p == pytest.approx(0.0374, abs=1e-4)  # as scipy.stats.linregress has it
    assert conditions.drift([10.1, 10.2, 10.0, 9.9, 9.8]) == pytest.approx((-slope, p))


def test_no_drift_is_told_of_few_epochs_or_equal_ones():
    assert conditions.drift([]) is None
    assert conditions.drift([1.0, 2.0, 3.0, 4.0]) is None
    assert conditions.drift([0.1] * 50) is None


def test_a_straight_line_is_no_chance():
    slope, p = conditions.drift([1.0, 2.0, 3.0, 4.0, 5.0])
    assert slope == pytest.approx(1 / 3)
    assert p < 1e-9


# --- the verdict


def test_a_quiet_machine_has_no_taints():
    calm = {
        "power_source": "mains", "low_power_mode": False, "thermal_pressure": "nominal", "cpu_load": 0.10,
        "swap_gib": 4.0, "swapping": False, "gpu_load": 0.05, "gpu_processes": 0, "gpu_throttle": "sw power cap",
        "gpu_temperature_celsius": 83.0,
    }  # fmt: skip
    assert conditions.taints(calm, calm | {"gpu_load": 1.0, "swap_gib": 4.2}, [1.0, 1.01, 0.99, 1.0, 1.0]) == {}
    assert conditions.taints({}, {}, []) == {}


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
def test_a_taint_is_a_sentence_with_its_figures(before, after, expected):
    assert conditions.taints(before, after, []) == expected


def test_epochs_that_slow_down_are_a_taint():
    told = conditions.taints({}, {}, [1.0, 1.021, 1.035, 1.06, 1.07, 1.095])
    assert told == {"drift": "epochs got 1.8% slower each (p < 0.001)"}
    noisy = conditions.taints({}, {}, [1.0, 0.97, 0.98, 0.96, 0.95, 0.93])["drift"]
    assert noisy == "epochs got 1.3% faster each (p = 0.004)"


def test_a_slope_that_is_small_or_by_chance_is_none():
    assert conditions.taints({}, {}, [1.0, 1.001, 1.002, 1.003, 1.004, 1.005]) == {}  # certain, and nothing
    assert conditions.taints({}, {}, [1.0, 1.2, 0.9, 1.3, 1.0, 1.2]) == {}
