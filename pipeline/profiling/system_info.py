"""Describe this machine: hardware, operating system and versions. Needs no torch and takes less than a second."""

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.files import contents
from pipeline.profiling import cgroup

GIB = 2**30
PCI = Path("/sys/bus/pci/devices")
VENDORS = {"10de": "NVIDIA", "1002": "AMD", "8086": "Intel"}


@functools.cache
def facts() -> dict[str, Any]:
    """Facts that stay the same from run to run, as JSON values. Unknown facts are absent.

    They contain no serial numbers, paths, host names or user names. `usable_cores` and `memory_limit_gib` are present
    only if a container, a CPU set or `taskset` allows less than `logical_cores` and `memory_gib`.
    """
    system, limits = _system(), cgroup.limits()
    logical_cores, memory = psutil.cpu_count() or 1, psutil.virtual_memory().total
    usable_memory = min(memory, limits.memory_bytes or memory)
    cpu_set = len(os.sched_getaffinity(0)) if sys.platform == "linux" else logical_cores
    usable_cores = round(min(cpu_set, limits.cores or math.inf), 2)
    usable_cores = int(usable_cores) if usable_cores == int(usable_cores) else usable_cores  # 4, not 4.0
    hardware = {
        "model": system["model"] or None,
        "cpu": cpu_name(system["cpu"]),
        "cores": psutil.cpu_count(logical=False),
        "memory_gib": round(memory / GIB, 1),
        "usable_cores": usable_cores if usable_cores < logical_cores else None,
        "memory_limit_gib": round(usable_memory / GIB, 1) if usable_memory < memory else None,
    }
    known = {
        "machine": fingerprint(hardware, gpus(), pci_displays(PCI), _installation_id()),
        **hardware,
        "logical_cores": logical_cores,
        "architecture": platform.machine(),
        "os": system["os"],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "mlflow")},
    }
    return {key: value for key, value in known.items() if value} | {"gpus": gpus()}


def summary(facts: Mapping[str, Any]) -> str:
    """The machine of `facts` on one line."""
    gpus = ", ".join(gpu["name"] for gpu in facts["gpus"]) or "none"
    return (
        f"{facts['machine']}: {facts.get('model', 'model not known')}, {facts.get('cpu', 'CPU not known')}, "
        f"{facts.get('cores', '?')} cores, {facts.get('memory_gib', '?')} GiB, GPU: {gpus}, {facts.get('os', '')}"
    )


@functools.cache
def gpus() -> list[dict[str, Any]]:
    """Every GPU in the machine, whether torch can use it or not.

    Keys: `vendor`, `name`, `for_training` (False for GPUs that are part of an Intel or AMD processor, and for NVIDIA's
    from before Maxwell), `driver` (only of NVIDIA, and only if it works), `cores` (only of Apple).
    """
    if sys.platform == "darwin":
        chip = _sysctl("machdep.cpu.brand_string")
        cores = parse_ioreg(command_output("ioreg", "-rd1", "-c", "AGXAccelerator"), "gpu-core-count")
        # A virtual machine shows no cores, and torch can't use its GPU.
        return [{"vendor": "Apple", "name": chip, "for_training": True, "cores": int(cores)}] if cores else []
    nvidia: list[dict[str, Any]] = [
        {"vendor": "NVIDIA", "name": name, "for_training": True, "driver": driver} for name, driver, _ in _nvidia_smi()
    ]
    if sys.platform == "win32":
        others = windows_gpus(command_output(
            "powershell", "-NoProfile", "-NonInteractive", "-Command",
            "Get-CimInstance Win32_VideoController | Select-Object Name,PNPDeviceID | ConvertTo-Json",
        ))  # fmt: skip
        return nvidia + [gpu for gpu in others if not nvidia or gpu["vendor"] != "NVIDIA"]
    # In a container nvidia-smi shows only the container's cards, and the bus shows all of the host's.
    devices = [device for device in pci_displays(PCI) if not nvidia or not device["id"].startswith("10de")]
    names = parse_lspci(command_output("lspci", "-mm", "-nn")) if devices else {}
    return nvidia + [pci_gpu(device["id"], names.get(device["id"], ""), device["memory_gib"]) for device in devices]


def process_age() -> float:
    """Seconds since this process started."""
    if sys.platform == "linux":
        # psutil rounds the start to a second, and changes of the system's clock move it. Field 22 of /proc/self/stat is
        # the start in ticks since boot (proc(5)). Skip the process name before it, which may contain blanks.
        ticks = int(contents(Path("/proc/self/stat")).rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - psutil.Process().create_time()


def power_source() -> str | None:
    """`mains` or `battery`, as of now; None if unknown, as on a machine without a battery."""
    if sys.platform == "linux":
        return linux_power_source(Path("/sys/class/power_supply"))
    battery = psutil.sensors_battery()
    if battery is None or battery.power_plugged is None:
        return None
    return "mains" if battery.power_plugged else "battery"


def fingerprint(
    hardware: dict[str, Any], cards: list[dict[str, Any]], devices: list[dict[str, Any]], installation: str
) -> str:
    """Twelve hex digits that identify a machine. A limit on cores or memory makes it another machine.

    Updates of drivers and kernel don't change the fingerprint: it includes a card's PCI id, which is known without a
    driver, and the memory size that was probably installed. The installation's id is hashed with a text of our own, as
    machine-id(5) demands.
    """
    pci_ids = sorted(device["id"] for device in devices)
    names = sorted(
        [card["name"].removeprefix("NVIDIA "), card.get("cores", 0)] for card in cards if card["for_training"]
    )
    installed = hardware | {"memory_gib": installed_gib(hardware["memory_gib"])}
    text = json.dumps(["trainmark machine", installed, pci_ids or names, installation], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def installed_gib(reported: float) -> float:
    """Round up to a size in which memory is sold: a power of two, or 1.5 times one.

    Firmware, kernel and an integrated GPU reserve some of the installed memory, and updates change how much.
    """
    power = 2.0 ** math.floor(math.log2(reported))
    return next(size for size in (power, 1.5 * power, 2 * power) if reported <= size)


def pci_displays(root: Path) -> list[dict[str, Any]]:
    """The GPUs of VENDORS on Linux's PCI bus: `id`, such as `10de:1c03`, and `memory_gib`, which only AMD's driver
    tells (else 0)."""
    displays = []
    for folder in sorted(root.glob("*")):
        kind, vendor, device = (contents(folder / key).removeprefix("0x") for key in ("class", "vendor", "device"))
        # Class 03 is a display controller. Class 12 is an accelerator: a GPU of AMD (Instinct), but an NPU of Intel.
        if vendor in VENDORS and (kind.startswith("03") or (kind.startswith("12") and vendor == "1002")):
            memory_gib = int(contents(folder / "mem_info_vram_total") or 0) / GIB
            displays.append({"id": f"{vendor}:{device}", "memory_gib": memory_gib})
    return displays


def parse_lspci(text: str) -> dict[str, str]:
    """PCI id -> description from `lspci -mm -nn`, for the devices that lspci can name."""
    line = re.compile(r'"[^"]*" "[^"]* \[([0-9a-f]{4})\]" "([^"]*) \[([0-9a-f]{4})\]"')
    matches = (match.groups() for match in line.finditer(text))
    return {f"{vendor}:{device}": description for vendor, description, device in matches if description != "Device"}


def pci_gpu(pci_id: str, description: str, memory_gib: float = 0) -> dict[str, Any]:
    """A GPU, as in `gpus`, from its PCI id and its description by lspci or Windows ('' if unknown)."""
    vendor, device = pci_id.split(":")
    brand = VENDORS[vendor]
    name = " ".join(re.sub(r"\((R|TM|C)\)", " ", description, flags=re.IGNORECASE).split())
    if product := re.search(r"\[(.+)\]$", name):
        name = product[1]  # lspci prints: chip [product name]
    if brand == "NVIDIA":
        # Chips older than Maxwell: no torch for Python 3.11 supports them.
        trains = not re.match(r"(NV\d|G\d\d|GT2|GF1|GK[12]|C[67]\d|MCP)", description)
    elif brand == "AMD":
        cards = r"Instinct|Radeon (RX (Vega( 56| 64|$)|\d{4})|VII|Pro (VII|[WV]\d)|AI Pro|Vega Frontier)"
        trains = bool(re.search(cards, name, re.IGNORECASE)) if name else memory_gib >= 4
    else:
        # The names of Arc GPUs in processors are "Arc Graphics", "Arc 140V", "Arc B390", and don't match.
        cards = r"Arc (Pro )?(A\d|B[5-9])\d|Data Center GPU (Max|Flex)"
        trains = bool(re.search(cards, name) if name else re.match(r"56[9abc]|e2[0-2]|0bd", device))
    name = name or f"GPU {pci_id}"
    name = name if name.lower().startswith(brand.lower()) else f"{brand} {name}"
    return {"vendor": brand, "name": name, "for_training": trains}


def windows_gpus(text: str) -> list[dict[str, Any]]:
    """The GPUs in the JSON of Win32_VideoController: an empty text, one object, or an array."""
    adapters = json.loads(text or "[]")
    displays = []
    for adapter in adapters if isinstance(adapters, list) else [adapters]:
        ids = re.match(r"PCI\\VEN_(\w{4})&DEV_(\w{4})", adapter["PNPDeviceID"] or "")
        if ids and ids[1].lower() in VENDORS:
            displays.append(pci_gpu(f"{ids[1]}:{ids[2]}".lower(), adapter["Name"] or ""))
    return displays


def parse_ioreg(text: str, key: str) -> str | None:
    """The first value of `key` that `ioreg` prints: `"key" = 8`, `"key" = "text"` or `"key" = <"text">`."""
    match = re.search(rf'"{re.escape(key)}" = <?"?([^"<>\n]+)', text)
    return match[1] if match else None


def linux_cpu(cpuinfo: str) -> str:
    """The CPU's name from the text of /proc/cpuinfo. On ARM, the names of all kinds of core from lscpu."""
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)[:1]
    names = names or re.findall(r"^\s*Model name: +(.+)$", command_output("lscpu"), re.MULTILINE)
    return " + ".join(" ".join(name.split()) for name in dict.fromkeys(names))


def cpu_name(name: str) -> str | None:
    """The CPU's name; its architecture where the system tells none, or `unknown`; None if that is unknown too."""
    is_name = re.search(r"\w", name) and not re.fullmatch(
        r"[\W\d]*(unknown|n/?a|none|null)[\W\d]*", name, re.IGNORECASE
    )
    return name if is_name else platform.machine() or None


def linux_model(root: Path) -> str:
    """Vendor and product of the machine, or of its mainboard if the machine has none."""
    dmi = root / "sys/class/dmi/id"
    return (
        model_name(contents(dmi / "sys_vendor"), contents(dmi / "product_name"))
        or model_name(contents(dmi / "board_vendor"), contents(dmi / "board_name"))
        or contents(root / "proc/device-tree/model").rstrip("\0")
    )


def model_name(vendor: str, product: str) -> str:
    """A name such as `LENOVO 20XW`, with the vendor only once; '' if the vendor left placeholders."""
    placeholder = r"(to be filled|system |default string|not |o\.e\.m|none|unknown|invalid|\W*$)"
    vendor, product = ("" if re.match(placeholder, text, re.IGNORECASE) else text for text in (vendor, product))
    return product if not product or product.startswith(vendor) else f"{vendor} {product}"


def windows_name(product: str, version: str, build: int) -> str:
    """A name such as `Windows 11 Pro 23H2`. The product name in the registry still says 10."""
    return f"{product.replace('Windows 10', 'Windows 11') if build >= 22000 else product} {version}".strip()


def linux_power_source(root: Path) -> str | None:
    """`power_source` from the kernel's list of power supplies. Unlike psutil, ignores those of mice and keyboards."""
    supplies = [folder for folder in root.glob("*") if contents(folder / "scope") != "Device"]
    if any(contents(folder / "type") == "Mains" and contents(folder / "online") == "1" for folder in supplies):
        return "mains"
    states = {contents(folder / "status") for folder in supplies if contents(folder / "type") == "Battery"}
    if "Discharging" in states:
        return "battery"
    return "mains" if states & {"Charging", "Full", "Not charging"} else None


def command_output(*command: str, timeout_seconds: float = 5) -> str:
    """What a command prints; '' if it is missing or hangs. Its exit status is ignored: sysctl prints what it knows."""
    env = os.environ | {"LC_ALL": "C"}
    if os.name == "posix":  # under cron, sudo and WSL, PATH lacks these folders
        env["PATH"] = os.pathsep.join([env.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/lib/wsl/lib"])
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=env, timeout=timeout_seconds, check=False,
            encoding="utf-8", errors="replace",
        ).stdout  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _system() -> dict[str, str]:
    """`model`, `cpu` and `os` by the operating system; '' for what is unknown."""
    if sys.platform == "darwin":
        ioreg = command_output("ioreg", "-rd1", "-c", "IOPlatformDevice", "-k", "product-name")
        names = parse_ioreg(ioreg, "product-name"), _sysctl("hw.model")
        return {
            "model": ", ".join(filter(None, names)),
            "cpu": _sysctl("machdep.cpu.brand_string"),
            "os": f"macOS {platform.mac_ver()[0]}",
        }
    if sys.platform == "win32":
        bios, version = r"HARDWARE\DESCRIPTION\System\BIOS", r"SOFTWARE\Microsoft\Windows NT\CurrentVersion"
        cpu = _registry(r"HARDWARE\DESCRIPTION\System\CentralProcessor\0", "ProcessorNameString")
        product, release = _registry(version, "ProductName"), _registry(version, "DisplayVersion")
        return {
            "model": model_name(_registry(bios, "SystemManufacturer"), _registry(bios, "SystemProductName"))
            or model_name(_registry(bios, "BaseBoardManufacturer"), _registry(bios, "BaseBoardProduct")),
            "cpu": " ".join(cpu.split()),
            "os": windows_name(product, release, sys.getwindowsversion().build),
        }
    release = platform.freedesktop_os_release()["PRETTY_NAME"]
    wsl = " on WSL" if "microsoft" in platform.release().lower() else ""
    return {
        "model": linux_model(Path("/")),
        "cpu": linux_cpu(contents(Path("/proc/cpuinfo"))),
        "os": re.sub(r" \([^)]*\)$", "", release) + wsl,
    }


def _installation_id() -> str:
    if sys.platform == "darwin":
        return parse_ioreg(command_output("ioreg", "-rd1", "-c", "IOPlatformExpertDevice"), "IOPlatformUUID") or ""
    if sys.platform == "win32":
        return _registry(r"SOFTWARE\Microsoft\Cryptography", "MachineGuid")
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        if re.fullmatch(r"[0-9a-f]{32}", identity := contents(Path(path))):
            return identity
    # Containers often have none. Use the cards' ids only then: they are unknown while the driver is broken.
    return " ".join(sorted(uuid for *_, uuid in _nvidia_smi()))


def _sysctl(name: str) -> str:
    return command_output("sysctl", "-n", name).strip()


@functools.cache
def _nvidia_smi() -> list[list[str]]:
    """Name, driver version and UUID of each card with a working driver."""
    output = command_output("nvidia-smi", "--query-gpu=name,driver_version,uuid", "--format=csv,noheader")
    rows = [line.split(", ") for line in output.splitlines()]
    return [row for row in rows if len(row) == 3]  # skips error messages


def _registry(key: str, value: str) -> str:
    if sys.platform != "win32":
        return ""
    import winreg  # exists on Windows only

    try:
        access = winreg.KEY_READ | winreg.KEY_WOW64_64KEY
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key, access=access) as handle:
            return str(winreg.QueryValueEx(handle, value)[0])
    except OSError:
        return ""
