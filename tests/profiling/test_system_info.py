"""Facts of a machine from recorded outputs of each system's tools; private data that they must not contain."""

import json
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pipeline.profiling import system_info

GIB = 2**30
ROOT = Path(system_info.__file__).parents[2]

DESKTOP = "NVIDIA GeForce GTX 1060 6GB, 560.35.03, GPU-5f0c8f1e-0000-1111-2222-333344445555\n"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n\n"
)
LSPCI = """\
00:00.0 "Host bridge [0600]" "Intel Corporation [8086]" "8th Gen Core Host Bridge [3ec4]" -r07 -p00 "Lenovo [17aa]" "Device [3fd1]"
00:02.0 "VGA compatible controller [0300]" "Intel Corporation [8086]" "CoffeeLake-H GT2 [UHD Graphics 630] [3e9b]" -p00 "Lenovo [17aa]" "Device [3fd1]"
01:00.0 "VGA compatible controller [0300]" "NVIDIA Corporation [10de]" "GP106 [GeForce GTX 1060 6GB] [1c03]" -ra1 -p00 "ASUSTeK Computer Inc. [1043]" "Device [85ac]"
03:00.0 "VGA compatible controller [0300]" "Advanced Micro Devices, Inc. [AMD/ATI] [1002]" "Navi 31 [Radeon RX 7900 XT/7900 XTX/7900M] [744c]" -rc8 -p00 "XFX Limited [1eae]" "Device [7901]"
04:00.0 "VGA compatible controller [0300]" "Intel Corporation [8086]" "Device [7d55]" -r08 -p00 "Dell [1028]" "Device [0c8c]"
"""  # noqa: E501
SYSCTL_M1 = {"sysctl -n hw.model": "MacBookAir10,1\n", "sysctl -n machdep.cpu.brand_string": "Apple M1\n"}
IOREG_M1 = """\
+-o AGXAcceleratorG13G_B0  <class AGXAcceleratorG13G_B0, id 0x1000004b7, registered, matched, active, busy 0>
    {
      "MetalPluginName" = "AGXMetalG13G_B0"
      "gpu-core-count" = 8
      "GPUConfigurationVariable" = {"num_gps"=2,"gpu_gen"=13,"num_cores"=8,"num_mgpus"=1}
    }
"""
IOREG_PRODUCT = """\
+-o product  <class IOPlatformDevice, id 0x100000115, !registered, !matched, active, busy 0, retain 5>
    {
      "product-name" = <"MacBook Air (M1, 2020)">
    }
"""
HARDWARE = {"model": "LENOVO 20XW", "cpu": "Intel(R) Core(TM) i7-8700", "cores": 6, "memory_gib": 15.5}


@pytest.fixture
def fresh():
    """Clear the cached facts before and after the test."""
    caches = (system_info.facts, system_info.gpus, system_info._nvidia_smi)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def pci(root: Path, *devices: tuple[str, str, str]) -> Path:
    """Write Linux's folders for PCI devices with these classes, vendors and ids."""
    for index, (kind, vendor, device) in enumerate(devices):
        files = {"class": f"0x{kind}", "vendor": f"0x{vendor}", "device": f"0x{device}"}
        tree(root, {f"0000:{index:02x}:00.0/{key}": text for key, text in files.items()})
    return root


def recorded(monkeypatch, system: str, outputs: dict[str, str]) -> None:
    """Replace each tool by its recorded output. Tools without an output are not installed."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(system_info, "command_output", lambda *command: next(
        (text for start, text in outputs.items() if " ".join(command).startswith(start)), ""
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "outputs", "expected"),
    [
        # A card whose driver does not answer is there, without a driver.
        (
            [("030000", "8086", "3e9b"), ("030000", "10de", "1c03"), ("060000", "8086", "3ec4")],
            {"nvidia-smi": NO_DRIVER, "lspci": LSPCI},
            [("Intel UHD Graphics 630", False, None), ("NVIDIA GeForce GTX 1060 6GB", True, None)],
        ),
        # A card that its driver and the bus both show counts once.
        (
            [("030000", "10de", "1c03"), ("030200", "10de", "1c03")],
            {"nvidia-smi": DESKTOP, "lspci": LSPCI},
            [("NVIDIA GeForce GTX 1060 6GB", True, "560.35.03")],
        ),
        # Without lspci a card goes by its id; the consoles of servers are no GPUs.
        (
            [("030200", "10de", "1c60"), ("030000", "1a03", "2000"), ("030000", "102b", "0536")],
            {},
            [("NVIDIA GPU 10de:1c60", True, None)],
        ),
    ],
    ids=["no driver", "once", "no lspci"],
)
def test_linux_finds_gpus_on_the_bus_and_by_nvidia_smi(monkeypatch, tmp_path, fresh, devices, outputs, expected):
    monkeypatch.setattr(system_info, "PCI", pci(tmp_path, *devices))
    recorded(monkeypatch, "linux", outputs)
    assert [(gpu["name"], gpu["for_training"], gpu.get("driver")) for gpu in system_info.gpus()] == expected


@pytest.mark.parametrize(
    ("vendor", "device", "description", "name", "for_training"),
    [
        ("1002", "744c", "Navi 31 [Radeon RX 7900 XT/7900 XTX]", "AMD Radeon RX 7900 XT/7900 XTX", True),
        ("1002", "1636", "Renoir [Radeon RX Vega 6 (Ryzen 4000/5000 Mobile Series)]", None, False),
        ("8086", "56a0", "Intel(R) Arc(TM) A770 Graphics", "Intel Arc A770 Graphics", True),  # Windows
        ("8086", "56a0", "", "Intel GPU 8086:56a0", True),
        ("8086", "7d55", "Meteor Lake-P [Intel Arc Graphics]", "Intel Arc Graphics", False),
        ("10de", "2684", "AD102 [GeForce RTX 4090]", "NVIDIA GeForce RTX 4090", True),
        ("10de", "0df4", "GF108M [GeForce GT 540M]", "NVIDIA GeForce GT 540M", False),  # of 2011
    ],
)
def test_gpus_in_processors_are_not_for_training(vendor, device, description, name, for_training):
    gpu = system_info.pci_gpu(f"{vendor}:{device}", description)
    assert gpu["for_training"] is for_training
    assert name is None or gpu["name"] == name


def test_windows_lists_one_gpu_or_several(monkeypatch, fresh):
    intel = {
        "Name": "Intel(R) UHD Graphics 770",
        "PNPDeviceID": r"PCI\VEN_8086&DEV_4680&SUBSYS_86941043&REV_0C\3&1",
    }
    nvidia = {
        "Name": "NVIDIA GeForce GTX 1060 6GB",
        "PNPDeviceID": r"PCI\VEN_10DE&DEV_1C03&SUBSYS_37261462\4&2",
    }
    remote = {"Name": "Microsoft Remote Display Adapter", "PNPDeviceID": r"SWD\REMOTEDISPLAYENUM\RDPIDD"}
    assert system_info.windows_gpus(json.dumps(intel))[0]["name"] == "Intel UHD Graphics 770"
    recorded(monkeypatch, "win32", {"nvidia-smi": DESKTOP, "powershell": json.dumps([intel, nvidia, remote])})
    assert [(gpu["vendor"], gpu["for_training"]) for gpu in system_info.gpus()] == [
        ("NVIDIA", True),
        ("Intel", False),
    ]
    assert system_info.windows_name("Windows 10 Pro", "23H2", 22631) == "Windows 11 Pro 23H2"
    assert system_info.windows_name("Windows 10 Pro", "22H2", 19045) == "Windows 10 Pro 22H2"


def test_facts_of_a_mac(monkeypatch, fresh):
    outputs = SYSCTL_M1 | {
        "ioreg -rd1 -c AGXAccelerator": IOREG_M1,
        "ioreg -rd1 -c IOPlatformDevice": IOREG_PRODUCT,
        "ioreg -rd1 -c IOPlatformExpertDevice": '"IOPlatformUUID" = "00000000-1111-2222-3333-444455556666"',
    }
    recorded(monkeypatch, "darwin", outputs)
    facts = system_info.facts()
    assert facts["gpus"] == [{"vendor": "Apple", "name": "Apple M1", "for_training": True, "cores": 8}]
    assert (facts["model"], facts["cpu"]) == ("MacBook Air (M1, 2020), MacBookAir10,1", "Apple M1")
    assert "00000000-1111" not in json.dumps(facts)


def test_a_virtual_mac_has_no_gpu(monkeypatch, fresh):
    recorded(monkeypatch, "darwin", SYSCTL_M1)
    assert system_info.gpus() == []


def test_the_cpu_is_named_by_linux_or_by_lscpu_on_arm(monkeypatch):
    big_little = (
        "Vendor ID: ARM\n  Model name:   Cortex-A55\n    Model: 0\n  Model name:   Cortex-A76\nBIOS Model name: x\n"
    )
    recorded(monkeypatch, "linux", {"lscpu": big_little})
    x86 = "processor\t: 0\nmodel\t\t: 158\nmodel name\t: Intel(R) Core(TM) i7-8700  CPU @ 3.20GHz\n"
    assert system_info.linux_cpu(2 * x86) == "Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz"
    assert (
        system_info.linux_cpu("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd05\n")
        == "Cortex-A55 + Cortex-A76"
    )


@pytest.mark.parametrize(
    ("name", "architecture", "expected"),
    [
        ("AMD EPYC 7B13", "x86_64", "AMD EPYC 7B13"),
        ("", "aarch64", "aarch64"),
        ("unknown", "x86_64", "x86_64"),
        ("Unknown", "riscv64", "riscv64"),
        ("0000", "x86_64", "0000"),
        ("-", "armv7l", "armv7l"),
        ("", "", None),
    ],
)
def test_a_cpu_without_a_name_is_named_by_its_architecture(monkeypatch, name, architecture, expected):
    monkeypatch.setattr(system_info.platform, "machine", lambda: architecture)
    assert system_info.cpu_name(name) == expected


def test_the_model_is_the_mainboard_if_the_maker_left_it_out(tmp_path):
    names = {"sys_vendor": "HP", "product_name": "HP EliteBook 840 G8 Notebook PC"}
    bought = tree(tmp_path / "a", {f"sys/class/dmi/id/{key}": text for key, text in names.items()})
    assert system_info.linux_model(bought) == "HP EliteBook 840 G8 Notebook PC"
    names = {"sys_vendor": "System manufacturer", "product_name": "System Product Name"}
    names |= {"board_vendor": "ASUSTeK COMPUTER INC.", "board_name": "PRIME B450-PLUS"}
    built = tree(tmp_path / "b", {f"sys/class/dmi/id/{key}": text for key, text in names.items()})
    assert system_info.linux_model(built) == "ASUSTeK COMPUTER INC. PRIME B450-PLUS"
    board = tree(tmp_path / "c", {"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})
    assert system_info.linux_model(board) == "Raspberry Pi 5 Model B Rev 1.0"
    assert system_info.linux_model(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("cpus", "limits", "expected"),
    [
        (8, (None, None, None), {}),
        (2, (None, None, None), {"usable_cores": 2}),
        (8, (4.0, 2 * GIB, GIB), {"usable_cores": 4, "memory_limit_gib": 2.0}),
        (2, (0.25, None, None), {"usable_cores": 0.25}),
        (8, (64.0, 64 * GIB, GIB), {}),  # more than there is
    ],
)
def test_limits_are_present_only_if_they_are_below_the_machines_size(monkeypatch, fresh, cpus, limits, expected):
    recorded(monkeypatch, "linux", {})
    monkeypatch.setattr(system_info.os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
    monkeypatch.setattr(system_info.cgroup, "limits", lambda: system_info.cgroup.Limits(*limits))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GIB))
    facts = system_info.facts()
    limited = {key: facts[key] for key in ("usable_cores", "memory_limit_gib") if key in facts}
    assert json.dumps(limited) == json.dumps(expected)  # 4.0 cores would be another fingerprint than 4
    assert facts["logical_cores"] == 8


def test_the_battery_of_a_mouse_is_ignored(tmp_path):
    mouse = {"hidpp_battery_0/type": "Battery", "hidpp_battery_0/scope": "Device"}
    desktop = tree(tmp_path / "a", mouse | {"hidpp_battery_0/status": "Discharging"})
    assert system_info.linux_power_source(desktop) is None
    laptop = {"AC/type": "Mains", "AC/online": "0", "BAT0/type": "Battery", "BAT0/status": "Discharging"}
    assert system_info.linux_power_source(tree(tmp_path / "b", laptop)) == "battery"
    # A weak charger: on the mains, and the battery still gives some.
    assert system_info.linux_power_source(tree(tmp_path / "b", {"AC/online": "1"})) == "mains"


def test_the_fingerprint_survives_updates_and_differs_between_machines():
    gpu = {"vendor": "NVIDIA", "name": "NVIDIA GeForce GTX 1060 6GB", "for_training": True, "driver": "560.35.03"}
    bus = [{"id": "10de:1c03", "memory_gib": 0.0}]
    machine = system_info.fingerprint(HARDWARE, [gpu], bus, "a" * 32)
    assert machine == system_info.fingerprint(HARDWARE, [gpu | {"driver": "570.1"}], bus, "a" * 32)
    assert machine == system_info.fingerprint(HARDWARE, [], bus, "a" * 32)
    assert machine == system_info.fingerprint(HARDWARE | {"memory_gib": 15.4}, [gpu], bus, "a" * 32)
    others = {
        system_info.fingerprint(HARDWARE, [gpu], bus, "b" * 32),
        system_info.fingerprint(HARDWARE, [gpu], bus * 2, "a" * 32),
        system_info.fingerprint(HARDWARE | {"memory_gib": 31.3}, [gpu], bus, "a" * 32),
        system_info.fingerprint(HARDWARE | {"usable_cores": 3}, [gpu], bus, "a" * 32),
        system_info.fingerprint(HARDWARE | {"memory_limit_gib": 8.0}, [gpu], bus, "a" * 32),
    }
    assert len(others | {machine}) == 6
    assert machine == "f7cf833571fd"  # the runs of earlier releases stay those of this machine


@pytest.mark.parametrize(
    ("reported", "installed"),
    [(0.5, 0.5), (11.4, 12), (13.9, 16), (36.0, 48), (503.5, 512)],
)
def test_memory_is_rounded_up_to_a_size_that_is_sold(reported, installed):
    assert system_info.installed_gib(reported) == installed


def test_facts_need_no_torch_never_change_and_name_nobody():
    script = (
        "import json, sys; from pipeline.profiling import system_info; facts = system_info.facts(); "
        "print(json.dumps([facts, 'torch' in sys.modules], allow_nan=False))"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    first, second = (
        json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    )
    assert first == second
    facts, imports_torch = first
    assert not imports_torch
    assert len(facts["machine"]) == 12 and int(facts["machine"], 16) >= 0
    assert facts["memory_gib"] > 0 and facts["python"] == platform.python_version()
    assert not [key for key, value in facts.items() if value in (None, "", 0, "unknown")]

    text = json.dumps({key: value for key, value in facts.items() if key != "machine"})
    assert str(Path.home()) not in text
    names = [socket.gethostname(), psutil.Process().username().split("\\")[-1]]
    # A name such as "vm" or "root" is part of many words; as a value of its own it would be a leak.
    assert not [name for name in names if f'"{name}"' in text or (len(name) > 6 and name in text)]


def test_a_process_is_as_old_as_the_clock_says():
    first, passed = system_info.process_age(), time.perf_counter()
    time.sleep(0.05)
    second, passed = system_info.process_age(), time.perf_counter() - passed
    assert second - first == pytest.approx(passed, abs=0.03)
    assert first == pytest.approx(time.time() - psutil.Process().create_time(), abs=2)
