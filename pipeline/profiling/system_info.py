"""What this machine is, told without torch, in under a second. A fact that can't be told is absent."""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from pipeline.files import contents
from pipeline.profiling import cgroup

GIB = 2**30
PCI = Path("/sys/bus/pci/devices")
VENDORS = {"10de": "NVIDIA", "1002": "AMD", "8086": "Intel"}
SYSCTL = (
    ["sysctl", "hw.model", "machdep.cpu.brand_string", "kern.osproductversion"]
    + [f"hw.perflevel{level}.{key}" for level in (0, 1) for key in ("name", "physicalcpu")]
)  # fmt: skip
ARM_MAKERS = {"0x48": "HiSilicon", "0x51": "Qualcomm", "0x61": "Apple", "0xc0": "Ampere"}
ARM_PARTS = {
    "0x41:0xd03": "Cortex-A53", "0x41:0xd05": "Cortex-A55", "0x41:0xd07": "Cortex-A57",
    "0x41:0xd08": "Cortex-A72", "0x41:0xd0b": "Cortex-A76", "0x41:0xd0c": "Neoverse-N1",
    "0x41:0xd40": "Neoverse-V1", "0x41:0xd42": "Cortex-A78AE", "0x41:0xd49": "Neoverse-N2",
    "0x41:0xd4f": "Neoverse-V2", "0x41:0xd83": "Neoverse-V3AE", "0x41:0xd84": "Neoverse-V3",
    "0x41:0xd85": "Cortex-X925", "0x41:0xd87": "Cortex-A725", "0xc0:0xac3": "Ampere-1",
}  # fmt: skip
"""Implementer and part of /proc/cpuinfo, which names no ARM CPU."""


@functools.cache
def facts() -> dict[str, Any]:
    """What stays the same from run to run: hardware, operating system, versions. Fit for JSON; without
    serials, paths and the names of host and user.

    `usable_cores` is there only where fewer than `logical_cores`, `memory_limit_gib` only where less than
    `memory_gib`: a container, a CPU set or `taskset` allows no more.
    """
    system = _system()
    cores, memory = _allowed()
    logical, total = psutil.cpu_count(), psutil.virtual_memory().total
    hardware = {
        "model": system.pop("model", None),
        "cpu": system.pop("cpu", None),
        "cores": psutil.cpu_count(logical=False),
        "memory_gib": round(total / GIB, 1),
        "usable_cores": cores if cores and logical and cores < logical else None,
        "memory_limit_gib": round(memory / GIB, 1) if memory and memory < total else None,
    }
    found = {
        "machine": fingerprint(hardware, gpus(), pci_displays(PCI), _installation()),
        **hardware,
        "logical_cores": logical,
        "architecture": platform.machine(),
        **system,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "torchvision", "timm", "mlflow")},
    }
    return {key: value for key, value in found.items() if value} | {"gpus": gpus()}


@functools.cache
def gpus() -> list[dict[str, Any]]:
    """Every GPU that is here, whether torch can use it or not: `vendor`, `name`, `for_training` (False for
    those in Intel's and AMD's processors), and where known `memory_gib`, `cores`, `driver`,
    `default_power_limit_watts`."""
    if sys.platform == "darwin":
        return _mac_gpus()
    nvidia = [nvidia_gpu(row) for row in _cards()]
    if sys.platform == "win32":
        others = windows_gpus(output(
            "powershell", "-NoProfile", "-NonInteractive", "-Command",
            "Get-CimInstance Win32_VideoController | Select-Object Name,PNPDeviceID | ConvertTo-Json",
        ))  # fmt: skip
        return nvidia + [gpu for gpu in others if not nvidia or gpu["vendor"] != "NVIDIA"]
    # In a container nvidia-smi shows the cards that are given to it and the bus shows all of the host's.
    devices = [device for device in pci_displays(PCI) if not nvidia or device["vendor"] != "10de"]
    names = parse_lspci(output("lspci", "-mm", "-nn")) if devices else {}
    return nvidia + [pci_gpu(**device, description=names.get(pci_id(device), "")) for device in devices]


def process_age() -> float:
    """Seconds since this process started."""
    if sys.platform == "linux":
        # psutil's start is as coarse as the kernel's time of booting, a whole second, and moves when the clock is set.
        # Field 22 of /proc/self/stat: ticks from booting to the start (proc(5)); the name before may hold blanks.
        ticks = int(contents(Path("/proc/self/stat")).rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - psutil.Process().create_time()


def power_source() -> str | None:
    """`mains` or `battery` at this moment; None for a machine that doesn't tell, as one without a battery."""
    if sys.platform == "linux":
        return linux_power_source(Path("/sys/class/power_supply"))
    battery = psutil.sensors_battery()
    if battery is None or battery.power_plugged is None:
        return None
    return "mains" if battery.power_plugged else "battery"


def power_limit_watts(name: str) -> float | None:
    """The power limit set at this moment on NVIDIA's cards called `name`, where all of them have the same."""
    rows = _smi("name", "power.limit")
    limits = {_number(row.get("power.limit")) for row in rows if row["name"] == name}
    return limits.pop() if len(limits) == 1 else None


def fingerprint(
    hardware: dict[str, Any], cards: list[dict[str, Any]], devices: list[dict[str, Any]], installation: str
) -> str:
    """Twelve hex digits, the same for all runs of one machine; with fewer usable cores or a memory limit it is another.

    No update of a driver or kernel changes them: a card counts by its id on the bus, which is known without its driver,
    and memory by the size that was probably installed. The installation's id goes in hashed with a text of our own, as
    machine-id(5) asks.
    """
    bus = sorted(pci_id(device) for device in devices)
    named = sorted(
        [card["name"].removeprefix("NVIDIA "), card.get("cores", 0)] for card in cards if card["for_training"]
    )
    whole = hardware | {"memory_gib": installed_gib(hardware["memory_gib"])}
    text = json.dumps(["trainmark machine", whole, bus or named, installation], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def installed_gib(reported: float) -> float:
    """The next size in which memory is sold: a power of two, or one and a half times one.

    Firmware, kernel and an integrated GPU keep some of what is installed. How much they keep changes with their
    versions, so the reported total moves a little below the installed size.
    """
    power = 2.0 ** math.floor(math.log2(reported))
    return next(size for size in (power, 1.5 * power, 2 * power) if reported <= size)


def parse_smi(text: str, fields: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of `nvidia-smi --query-gpu`, less what a card doesn't tell and lines that are none (errors go to
    stdout too)."""
    lines = ([value.strip() for value in line.split(",")] for line in text.splitlines())
    rows = [dict(zip(fields, line, strict=True)) for line in lines if len(line) == len(fields)]
    told = [{key: value for key, value in row.items() if value[:1] != "[" and value != "N/A"} for row in rows]
    return [row for row in told if row.get("name")]


def nvidia_gpu(row: dict[str, str]) -> dict[str, Any]:
    """A GPU from a row of nvidia-smi; its uuid stays out."""
    memory_mib = _number(row.get("memory.total"))
    found = {
        "memory_gib": round(memory_mib / 2**10, 1) if memory_mib else None,
        "driver": row.get("driver_version"),
        "default_power_limit_watts": _number(row.get("power.default_limit")),
    }
    told = {key: value for key, value in found.items() if value}
    return {"vendor": "NVIDIA", "name": row["name"], "for_training": True} | told


def pci_displays(root: Path) -> list[dict[str, Any]]:
    """Display controllers by the makers of GPUs that train, in Linux' view of the bus. Those of virtual
    machines and of servers' consoles are other makers'."""
    found = []
    for folder in sorted(root.glob("*")):
        kind, vendor, device = (contents(folder / key).removeprefix("0x") for key in ("class", "vendor", "device"))
        # 03 is a display controller; 12 an accelerator: AMD's Instinct, but an NPU of Intel's.
        if vendor in VENDORS and (kind.startswith("03") or (kind.startswith("12") and vendor == "1002")):
            memory = _number(contents(folder / "mem_info_vram_total"))  # by the driver amdgpu alone
            found.append({"vendor": vendor, "device": device, "memory_gib": round((memory or 0) / GIB, 1)})
    return found


def pci_id(device: dict[str, Any]) -> str:
    """As the makers' lists have it: `10de:1c03`."""
    return f"{device['vendor']}:{device['device']}"


def parse_lspci(text: str) -> dict[str, str]:
    """Descriptions by id from `lspci -mm -nn`; a device that its list doesn't know is absent."""
    line = re.compile(r'"[^"]*" "[^"]* \[([0-9a-f]{4})\]" "([^"]*) \[([0-9a-f]{4})\]"')
    found = (match.groups() for match in line.finditer(text))
    return {f"{vendor}:{device}": description for vendor, description, device in found if description != "Device"}


def pci_gpu(vendor: str, device: str, memory_gib: float = 0, description: str = "") -> dict[str, Any]:
    """A GPU by its ids and the description that lspci or Windows has of it."""
    maker = VENDORS[vendor]
    name = " ".join(re.sub(r"\((R|TM|C)\)", " ", description, flags=re.IGNORECASE).split())
    if bracketed := re.search(r"\[(.+)\]$", name):
        name = bracketed[1]  # lspci: the chip, then [what the card is sold as]
    if maker == "NVIDIA":
        # Chips before Maxwell, still in many machines: no torch for Python 3.11 has code for them.
        trains = not re.match(r"(NV\d|G\d\d|GT2|GF1|GK[12]|C[67]\d|MCP)", description)
    elif maker == "AMD":
        sold = r"Instinct|Radeon (RX (Vega( 56| 64|$)|\d{4})|VII|Pro (VII|[WV]\d)|AI Pro|Vega Frontier)"
        trains = bool(re.search(sold, name, re.IGNORECASE)) if name else memory_gib >= 4
    else:
        # In a processor Arc is called "Arc Graphics", "Arc 140V", "Arc B390".
        sold = r"Arc (Pro )?(A\d|B[5-9])\d|Data Center GPU (Max|Flex)"
        trains = bool(re.search(sold, name) if name else re.match(r"56[9abc]|e2[0-2]|0bd", device))
    name = name or f"GPU {vendor}:{device}"
    name = name if name.lower().startswith(maker.lower()) else f"{maker} {name}"
    return {"vendor": maker, "name": name, "for_training": trains} | (
        {"memory_gib": memory_gib} if memory_gib and trains else {}
    )


def windows_gpus(text: str) -> list[dict[str, Any]]:
    """GPUs from Win32_VideoController: one object, or an array of several. (Its AdapterRAM ends at 4 GiB.)"""
    try:
        adapters = json.loads(text)
    except ValueError:
        return []
    found = []
    for adapter in adapters if isinstance(adapters, list) else [adapters]:
        ids = re.match(r"PCI\\VEN_(\w{4})&DEV_(\w{4})", adapter.get("PNPDeviceID") or "")
        if ids and ids[1].lower() in VENDORS:
            found.append(pci_gpu(ids[1].lower(), ids[2].lower(), description=adapter.get("Name") or ""))
    return found


def parse_displays(text: str) -> list[dict[str, Any]]:
    """GPUs from `system_profiler SPDisplaysDataType -json`. On a Mac torch uses Apple's own, and not in
    a virtual machine, which shows no cores."""
    try:
        displays = json.loads(text)["SPDisplaysDataType"]
    except (ValueError, KeyError):
        return []
    found = []
    for display in displays:
        name = display.get("sppci_model") or display.get("_name") or ""
        vendor = next((vendor for vendor in ("Apple", *VENDORS.values()) if name.startswith(vendor)), None)
        if vendor:
            cores = _number(display.get("sppci_cores"))
            trains = vendor == "Apple" and cores is not None
            gpu = {"vendor": vendor, "name": name, "for_training": trains}
            found.append(gpu | ({"cores": int(cores)} if cores else {}))
    return found


def parse_sysctl(text: str) -> dict[str, str]:
    """Values by name from `sysctl NAME...`, which leaves out the names that it doesn't know."""
    lines = (line.partition(": ") for line in text.splitlines())
    return {key: value.strip() for key, _, value in lines if value.strip()}


def parse_ioreg(text: str, key: str) -> str | None:
    """The first value of `key` that `ioreg` prints: `"key" = 8`, `"key" = "text"` or `"key" = <"text">`."""
    match = re.search(rf'"{re.escape(key)}" = <?"?([^"<>\n]+)', text)
    return match[1] if match else None


def parse_cpuinfo(text: str) -> str | None:
    """The CPU's name in /proc/cpuinfo; on ARM the names of its kinds of core."""
    values = re.findall(r"^(model name|CPU implementer|CPU part|cpu|uarch)\s*: (.*)$", text, re.MULTILINE)
    for key in ("model name", "cpu", "uarch"):  # x86, POWER, RISC-V
        if name := next((value for found, value in values if found == key), None):
            return " ".join(name.split())
    makers = [value for key, value in values if key == "CPU implementer"]
    parts = [value for key, value in values if key == "CPU part"]
    kinds = dict.fromkeys(f"{maker}:{part}" for maker, part in zip(makers, parts, strict=False))
    return " + ".join(ARM_PARTS.get(kind, f"{ARM_MAKERS.get(kind[:4], 'ARM')} {kind}") for kind in kinds) or None


def linux_model(root: Path) -> str | None:
    """Maker and product of the machine, or of its board where it was put together by its owner."""
    dmi = root / "sys/class/dmi/id"
    for maker, product in (("sys_vendor", "product_name"), ("board_vendor", "board_name")):
        if model := joined(contents(dmi / maker), contents(dmi / product)):
            return model
    return contents(root / "proc/device-tree/model").rstrip("\0") or None


def joined(maker: str, product: str) -> str | None:
    """`LENOVO 20XW` and `HP EliteBook`; None for the texts that makers forget to fill in."""
    forgotten = r"(to be filled|system |default string|not |o\.e\.m|none|unknown|invalid|\W*$)"
    maker, product = ("" if re.match(forgotten, text, re.IGNORECASE) else text for text in (maker, product))
    return (product if product.startswith(maker) else f"{maker} {product}") if product else None


def windows_name(product: str, version: str, build: int) -> str:
    """`Windows 11 Pro 23H2`: the registry's product name stayed at 10."""
    return f"{product.replace('Windows 10', 'Windows 11') if build >= 22000 else product} {version}".strip()


def linux_power_source(root: Path) -> str | None:
    """By the kernel's power supplies, less a mouse's or keyboard's, which psutil takes for the machine's."""
    supplies = [folder for folder in root.glob("*") if contents(folder / "scope") != "Device"]
    if any(contents(folder / "type") == "Mains" and contents(folder / "online") == "1" for folder in supplies):
        return "mains"
    states = {contents(folder / "status") for folder in supplies if contents(folder / "type") == "Battery"}
    if "Discharging" in states:
        return "battery"
    return "mains" if states & {"Charging", "Full", "Not charging"} else None


def _allowed() -> tuple[float | None, int | None]:
    """The cores and the bytes of memory that this process may use; None where that is not known to be less than all."""
    if sys.platform != "linux":
        return None, None
    limits = cgroup.limits()
    cores = min(len(os.sched_getaffinity(0)), limits.cores or math.inf)
    return round(cores, 2) if cores % 1 else int(cores), limits.memory_bytes


def _system() -> dict[str, Any]:
    if sys.platform == "darwin":
        here = _sysctl()
        product = parse_ioreg(output("ioreg", "-rd1", "-c", "IOPlatformDevice", "-k", "product-name"), "product-name")
        found: dict[str, Any] = {
            "model": ", ".join(filter(None, (product, here.get("hw.model")))),
            "cpu": here.get("machdep.cpu.brand_string"),
            "os": f"macOS {here.get('kern.osproductversion') or platform.mac_ver()[0]}",
        }
        for level, kind in enumerate(("Performance", "Efficiency")):
            kind = here.get(f"hw.perflevel{level}.name", kind).lower()
            found[f"{kind}_cores"] = int(_number(here.get(f"hw.perflevel{level}.physicalcpu")) or 0)
        return found
    if sys.platform == "win32":
        bios, version = r"HARDWARE\DESCRIPTION\System\BIOS", r"SOFTWARE\Microsoft\Windows NT\CurrentVersion"
        cpu = _registry(r"HARDWARE\DESCRIPTION\System\CentralProcessor\0", "ProcessorNameString")
        name, release = _registry(version, "ProductName"), _registry(version, "DisplayVersion")
        return {
            "model": joined(_registry(bios, "SystemManufacturer"), _registry(bios, "SystemProductName"))
            or joined(_registry(bios, "BaseBoardManufacturer"), _registry(bios, "BaseBoardProduct")),
            "cpu": " ".join(cpu.split()),
            "os": windows_name(name or "Windows", release, sys.getwindowsversion().build),
        }
    try:
        release = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        release = platform.system()
    wsl = " on WSL" if "microsoft" in platform.release().lower() else ""
    return {
        "model": linux_model(Path("/")),
        "cpu": parse_cpuinfo(contents(Path("/proc/cpuinfo"))),
        "os": re.sub(r" \([^)]*\)$", "", release) + wsl,
    }


def _installation() -> str:
    if sys.platform == "darwin":
        return parse_ioreg(output("ioreg", "-rd1", "-c", "IOPlatformExpertDevice"), "IOPlatformUUID") or ""
    if sys.platform == "win32":
        return _registry(r"SOFTWARE\Microsoft\Cryptography", "MachineGuid")
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        if re.fullmatch(r"[0-9a-f]{32}", identity := contents(Path(path))):
            return identity
    # Containers often have none. The cards' ids don't join one that is there: they are away with the driver.
    return " ".join(sorted(row.get("uuid", "") for row in _cards()))


def _mac_gpus() -> list[dict[str, Any]]:
    chip = _sysctl().get("machdep.cpu.brand_string", "")
    cores = _number(parse_ioreg(output("ioreg", "-rd1", "-c", "AGXAccelerator"), "gpu-core-count"))
    if chip.startswith("Apple") and cores:
        return [{"vendor": "Apple", "name": chip, "for_training": True, "cores": int(cores)}]
    return parse_displays(output("system_profiler", "SPDisplaysDataType", "-json"))  # slower


@functools.cache
def _sysctl() -> dict[str, str]:
    found = parse_sysctl(output(*SYSCTL))
    if "VirtualApple" in found.get("machdep.cpu.brand_string", ""):  # under Rosetta, for a Python for x86_64
        found = parse_sysctl(output("arch", "-arm64", *SYSCTL)) or found
    return found


@functools.cache
def _cards() -> list[dict[str, str]]:
    return _smi("name", "memory.total", "driver_version", "power.default_limit", "uuid")


def _smi(*fields: str) -> list[dict[str, str]]:
    query = f"--query-gpu={','.join(fields)}"
    return parse_smi(output("nvidia-smi", query, "--format=csv,noheader,nounits"), fields)


def output(*command: str, seconds: float = 5) -> str:
    """What the command prints, whatever its status: sysctl prints what it knows and fails for the rest."""
    env = os.environ | {"LC_ALL": "C"}
    if os.name == "posix":  # cron, sudo and WSL leave these out
        env["PATH"] = os.pathsep.join([env.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/lib/wsl/lib"])
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=env, timeout=seconds, check=False,
            encoding="utf-8", errors="replace",
        ).stdout  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _registry(key: str, value: str) -> str:
    if sys.platform == "win32":
        import winreg  # not there elsewhere

        try:
            access = winreg.KEY_READ | winreg.KEY_WOW64_64KEY
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key, access=access) as handle:
                return str(winreg.QueryValueEx(handle, value)[0])
        except OSError:
            return ""
    return ""


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
