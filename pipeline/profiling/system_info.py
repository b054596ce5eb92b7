"""What this machine is: hardware, operating system and versions. Needs no torch and takes less than a second."""

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
ARM_VENDORS = {"0x48": "HiSilicon", "0x51": "Qualcomm", "0x61": "Apple", "0xc0": "Ampere"}
ARM_CORES = {
    "0x41:0xd03": "Cortex-A53", "0x41:0xd05": "Cortex-A55", "0x41:0xd07": "Cortex-A57",
    "0x41:0xd08": "Cortex-A72", "0x41:0xd0b": "Cortex-A76", "0x41:0xd0c": "Neoverse-N1",
    "0x41:0xd40": "Neoverse-V1", "0x41:0xd42": "Cortex-A78AE", "0x41:0xd49": "Neoverse-N2",
    "0x41:0xd4f": "Neoverse-V2", "0x41:0xd83": "Neoverse-V3AE", "0x41:0xd84": "Neoverse-V3",
    "0x41:0xd85": "Cortex-X925", "0x41:0xd87": "Cortex-A725", "0xc0:0xac3": "Ampere-1",
}  # fmt: skip
"""Names by implementer and part: /proc/cpuinfo names no ARM CPU."""


@functools.cache
def facts() -> dict[str, Any]:
    """Facts that stay the same from run to run, fit for JSON; what is not known is absent.

    No serial numbers, paths, host names or user names. `usable_cores` and `memory_limit_gib` are present only where a
    container, a CPU set or `taskset` allows less than `logical_cores` and `memory_gib`.
    """
    system = _system()
    usable_cores, memory_limit = _limits()
    logical_cores, memory = psutil.cpu_count(), psutil.virtual_memory().total
    hardware = {
        "model": system.pop("model", None),
        "cpu": system.pop("cpu", None),
        "cores": psutil.cpu_count(logical=False),
        "memory_gib": round(memory / GIB, 1),
        "usable_cores": usable_cores if usable_cores and logical_cores and usable_cores < logical_cores else None,
        "memory_limit_gib": round(memory_limit / GIB, 1) if memory_limit and memory_limit < memory else None,
    }
    known = {
        "machine": fingerprint(hardware, gpus(), pci_displays(PCI), _installation_id()),
        **hardware,
        "logical_cores": logical_cores,
        "architecture": platform.machine(),
        **system,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "mlflow")},
    }
    return {key: value for key, value in known.items() if value} | {"gpus": gpus()}


@functools.cache
def gpus() -> list[dict[str, Any]]:
    """Every GPU in the machine, whether torch can use it or not.

    Keys: `vendor`, `name`, `for_training` (False for GPUs that are part of an Intel or AMD processor), and where known
    `memory_gib`, `cores`, `driver`, `default_power_limit_watts`.
    """
    if sys.platform == "darwin":
        chip = _sysctl().get("machdep.cpu.brand_string", "")
        cores = _number(parse_ioreg(command_output("ioreg", "-rd1", "-c", "AGXAccelerator"), "gpu-core-count"))
        # Virtual machines show no cores, and torch can't use their GPU.
        apple = {"vendor": "Apple", "name": chip, "for_training": True, "cores": int(cores or 0)}
        return [apple] if chip.startswith("Apple") and cores else []
    nvidia = [nvidia_gpu(row) for row in _nvidia_smi_rows()]
    if sys.platform == "win32":
        others = windows_gpus(command_output(
            "powershell", "-NoProfile", "-NonInteractive", "-Command",
            "Get-CimInstance Win32_VideoController | Select-Object Name,PNPDeviceID | ConvertTo-Json",
        ))  # fmt: skip
        return nvidia + [gpu for gpu in others if not nvidia or gpu["vendor"] != "NVIDIA"]
    # In a container nvidia-smi shows only the container's cards, and the bus shows all of the host's.
    devices = [device for device in pci_displays(PCI) if not nvidia or device["vendor"] != "10de"]
    names = parse_lspci(command_output("lspci", "-mm", "-nn")) if devices else {}
    return nvidia + [pci_gpu(**device, description=names.get(pci_id(device), "")) for device in devices]


def process_age() -> float:
    """Seconds since this process started."""
    if sys.platform == "linux":
        # psutil rounds the start to a second and follows changes of the clock. Field 22 of /proc/self/stat counts
        # ticks from boot to the start (proc(5)); the process name before it may hold blanks.
        ticks = int(contents(Path("/proc/self/stat")).rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - psutil.Process().create_time()


def power_source() -> str | None:
    """`mains` or `battery` at this moment; None where the machine does not tell, as one without a battery."""
    if sys.platform == "linux":
        return linux_power_source(Path("/sys/class/power_supply"))
    battery = psutil.sensors_battery()
    if battery is None or battery.power_plugged is None:
        return None
    return "mains" if battery.power_plugged else "battery"


def power_limit_watts(name: str) -> float | None:
    """The power limit now set on the NVIDIA cards called `name`; None where they differ."""
    rows = _query_nvidia_smi("name", "power.limit")
    limits = {_number(row.get("power.limit")) for row in rows if row["name"] == name}
    return limits.pop() if len(limits) == 1 else None


def fingerprint(
    hardware: dict[str, Any], cards: list[dict[str, Any]], devices: list[dict[str, Any]], installation: str
) -> str:
    """Twelve hex digits that identify a machine; fewer usable cores or a memory limit make it another machine.

    An update of a driver or kernel does not change them: a card counts by its PCI id, which is known without its
    driver, and memory by the size that was probably installed. The installation's id is hashed together with a text of
    our own, as machine-id(5) asks.
    """
    pci_ids = sorted(pci_id(device) for device in devices)
    names = sorted(
        [card["name"].removeprefix("NVIDIA "), card.get("cores", 0)] for card in cards if card["for_training"]
    )
    installed = hardware | {"memory_gib": installed_gib(hardware["memory_gib"])}
    text = json.dumps(["trainmark machine", installed, pci_ids or names, installation], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def installed_gib(reported: float) -> float:
    """The next size in which memory is sold: a power of two, or one and a half times one.

    Firmware, kernel and an integrated GPU keep some of the installed memory, and updates change how much.
    """
    power = 2.0 ** math.floor(math.log2(reported))
    return next(size for size in (power, 1.5 * power, 2 * power) if reported <= size)


def parse_smi(text: str, fields: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of `nvidia-smi --query-gpu` without the values that a card does not tell. Skips error messages."""
    lines = ([value.strip() for value in line.split(",")] for line in text.splitlines())
    rows = [dict(zip(fields, line, strict=True)) for line in lines if len(line) == len(fields)]
    known = [{key: value for key, value in row.items() if value[:1] != "[" and value != "N/A"} for row in rows]
    return [row for row in known if row.get("name")]


def nvidia_gpu(row: dict[str, str]) -> dict[str, Any]:
    """A GPU from a row of nvidia-smi, without its UUID."""
    memory_mib = _number(row.get("memory.total"))
    optional = {
        "memory_gib": round(memory_mib / 2**10, 1) if memory_mib else None,
        "driver": row.get("driver_version"),
        "default_power_limit_watts": _number(row.get("power.default_limit")),
    }
    known = {key: value for key, value in optional.items() if value}
    return {"vendor": "NVIDIA", "name": row["name"], "for_training": True} | known


def pci_displays(root: Path) -> list[dict[str, Any]]:
    """Display controllers of the vendors in VENDORS on Linux's PCI bus. Virtual and server consoles are others'."""
    displays = []
    for folder in sorted(root.glob("*")):
        kind, vendor, device = (contents(folder / key).removeprefix("0x") for key in ("class", "vendor", "device"))
        # 03 is a display controller, 12 an accelerator: an Instinct of AMD, but an NPU of Intel.
        if vendor in VENDORS and (kind.startswith("03") or (kind.startswith("12") and vendor == "1002")):
            memory = _number(contents(folder / "mem_info_vram_total"))  # only from the driver amdgpu
            displays.append({"vendor": vendor, "device": device, "memory_gib": round((memory or 0) / GIB, 1)})
    return displays


def pci_id(device: dict[str, Any]) -> str:
    """Vendor and device as in `10de:1c03`."""
    return f"{device['vendor']}:{device['device']}"


def parse_lspci(text: str) -> dict[str, str]:
    """Descriptions by PCI id from `lspci -mm -nn`; devices that are not in its list are absent."""
    line = re.compile(r'"[^"]*" "[^"]* \[([0-9a-f]{4})\]" "([^"]*) \[([0-9a-f]{4})\]"')
    matches = (match.groups() for match in line.finditer(text))
    return {f"{vendor}:{device}": description for vendor, description, device in matches if description != "Device"}


def pci_gpu(vendor: str, device: str, memory_gib: float = 0, description: str = "") -> dict[str, Any]:
    """A GPU from its PCI ids and the description that lspci or Windows gives it."""
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
        # As part of a processor Arc is called "Arc Graphics", "Arc 140V", "Arc B390".
        cards = r"Arc (Pro )?(A\d|B[5-9])\d|Data Center GPU (Max|Flex)"
        trains = bool(re.search(cards, name) if name else re.match(r"56[9abc]|e2[0-2]|0bd", device))
    name = name or f"GPU {vendor}:{device}"
    name = name if name.lower().startswith(brand.lower()) else f"{brand} {name}"
    memory = {"memory_gib": memory_gib} if memory_gib and trains else {}
    return {"vendor": brand, "name": name, "for_training": trains} | memory


def windows_gpus(text: str) -> list[dict[str, Any]]:
    """GPUs from the JSON of Win32_VideoController: one object, or an array. (Its AdapterRAM ends at 4 GiB.)"""
    try:
        adapters = json.loads(text)
    except ValueError:
        return []
    displays = []
    for adapter in adapters if isinstance(adapters, list) else [adapters]:
        ids = re.match(r"PCI\\VEN_(\w{4})&DEV_(\w{4})", adapter.get("PNPDeviceID") or "")
        if ids and ids[1].lower() in VENDORS:
            displays.append(pci_gpu(ids[1].lower(), ids[2].lower(), description=adapter.get("Name") or ""))
    return displays


def parse_ioreg(text: str, key: str) -> str | None:
    """The first value of `key` that `ioreg` prints: `"key" = 8`, `"key" = "text"` or `"key" = <"text">`."""
    match = re.search(rf'"{re.escape(key)}" = <?"?([^"<>\n]+)', text)
    return match[1] if match else None


def parse_cpuinfo(text: str) -> str | None:
    """The CPU's name from /proc/cpuinfo; on ARM the names of all kinds of core."""
    values = re.findall(r"^(model name|CPU implementer|CPU part|cpu|uarch)\s*: (.*)$", text, re.MULTILINE)
    for name_key in ("model name", "cpu", "uarch"):  # x86, POWER, RISC-V
        if name := next((value for key, value in values if key == name_key), None):
            return " ".join(name.split())
    vendors = [value for key, value in values if key == "CPU implementer"]
    parts = [value for key, value in values if key == "CPU part"]
    kinds = dict.fromkeys(f"{vendor}:{part}" for vendor, part in zip(vendors, parts, strict=False))
    return " + ".join(ARM_CORES.get(kind, f"{ARM_VENDORS.get(kind[:4], 'ARM')} {kind}") for kind in kinds) or None


def linux_model(root: Path) -> str | None:
    """Vendor and product of the machine, or of its board where the machine was assembled by its owner."""
    dmi = root / "sys/class/dmi/id"
    return (
        model_name(contents(dmi / "sys_vendor"), contents(dmi / "product_name"))
        or model_name(contents(dmi / "board_vendor"), contents(dmi / "board_name"))
        or contents(root / "proc/device-tree/model").rstrip("\0")
        or None
    )


def model_name(vendor: str, product: str) -> str | None:
    """`LENOVO 20XW` or `HP EliteBook`; None for the placeholders that vendors forget to fill in."""
    placeholder = r"(to be filled|system |default string|not |o\.e\.m|none|unknown|invalid|\W*$)"
    vendor, product = ("" if re.match(placeholder, text, re.IGNORECASE) else text for text in (vendor, product))
    return (product if product.startswith(vendor) else f"{vendor} {product}") if product else None


def windows_name(product: str, version: str, build: int) -> str:
    """`Windows 11 Pro 23H2`: the registry's product name still says 10."""
    return f"{product.replace('Windows 10', 'Windows 11') if build >= 22000 else product} {version}".strip()


def linux_power_source(root: Path) -> str | None:
    """`mains` or `battery` by the kernel's power supplies, without those of mice and keyboards, which psutil counts."""
    supplies = [folder for folder in root.glob("*") if contents(folder / "scope") != "Device"]
    if any(contents(folder / "type") == "Mains" and contents(folder / "online") == "1" for folder in supplies):
        return "mains"
    states = {contents(folder / "status") for folder in supplies if contents(folder / "type") == "Battery"}
    if "Discharging" in states:
        return "battery"
    return "mains" if states & {"Charging", "Full", "Not charging"} else None


def command_output(*command: str, timeout_seconds: float = 5) -> str:
    """What a command prints; empty where it is missing or hangs. Its status is ignored: sysctl prints what it knows."""
    env = os.environ | {"LC_ALL": "C"}
    if os.name == "posix":  # cron, sudo and WSL leave these folders out
        env["PATH"] = os.pathsep.join([env.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/lib/wsl/lib"])
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=env, timeout=timeout_seconds, check=False,
            encoding="utf-8", errors="replace",
        ).stdout  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _limits() -> tuple[float | None, int | None]:
    """The cores and the bytes of memory that this process may use; None where no limit is known."""
    if sys.platform != "linux":
        return None, None
    limits = cgroup.limits()
    cores = min(len(os.sched_getaffinity(0)), limits.cores or math.inf)
    return round(cores, 2) if cores % 1 else int(cores), limits.memory_bytes


def _system() -> dict[str, Any]:
    """`model`, `cpu` and `os`, as each operating system tells them."""
    if sys.platform == "darwin":
        return _mac_system()
    if sys.platform == "win32":
        bios, version = r"HARDWARE\DESCRIPTION\System\BIOS", r"SOFTWARE\Microsoft\Windows NT\CurrentVersion"
        cpu = _registry(r"HARDWARE\DESCRIPTION\System\CentralProcessor\0", "ProcessorNameString")
        name, release = _registry(version, "ProductName"), _registry(version, "DisplayVersion")
        return {
            "model": model_name(_registry(bios, "SystemManufacturer"), _registry(bios, "SystemProductName"))
            or model_name(_registry(bios, "BaseBoardManufacturer"), _registry(bios, "BaseBoardProduct")),
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


def _mac_system() -> dict[str, Any]:
    sysctl = _sysctl()
    ioreg = command_output("ioreg", "-rd1", "-c", "IOPlatformDevice", "-k", "product-name")
    system: dict[str, Any] = {
        "model": ", ".join(filter(None, (parse_ioreg(ioreg, "product-name"), sysctl.get("hw.model")))),
        "cpu": sysctl.get("machdep.cpu.brand_string"),
        "os": f"macOS {sysctl.get('kern.osproductversion') or platform.mac_ver()[0]}",
    }
    for level, kind in enumerate(("Performance", "Efficiency")):
        kind = sysctl.get(f"hw.perflevel{level}.name", kind).lower()
        system[f"{kind}_cores"] = int(_number(sysctl.get(f"hw.perflevel{level}.physicalcpu")) or 0)
    return system


def _installation_id() -> str:
    if sys.platform == "darwin":
        return parse_ioreg(command_output("ioreg", "-rd1", "-c", "IOPlatformExpertDevice"), "IOPlatformUUID") or ""
    if sys.platform == "win32":
        return _registry(r"SOFTWARE\Microsoft\Cryptography", "MachineGuid")
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        if re.fullmatch(r"[0-9a-f]{32}", identity := contents(Path(path))):
            return identity
    # Containers often have none. Only then do the cards' ids count: they are unknown while the driver is broken.
    return " ".join(sorted(row.get("uuid", "") for row in _nvidia_smi_rows()))


@functools.cache
def _sysctl() -> dict[str, str]:
    """Values of SYSCTL by name; those that this Mac does not know are absent."""

    def values(*command: str) -> dict[str, str]:
        lines = (line.partition(": ") for line in command_output(*command).splitlines())
        return {key: value.strip() for key, _, value in lines if value.strip()}

    native = values(*SYSCTL)
    if "VirtualApple" in native.get("machdep.cpu.brand_string", ""):  # a Python for x86_64, under Rosetta
        return values("arch", "-arm64", *SYSCTL) or native
    return native


@functools.cache
def _nvidia_smi_rows() -> list[dict[str, str]]:
    return _query_nvidia_smi("name", "memory.total", "driver_version", "power.default_limit", "uuid")


def _query_nvidia_smi(*fields: str) -> list[dict[str, str]]:
    query = f"--query-gpu={','.join(fields)}"
    return parse_smi(command_output("nvidia-smi", query, "--format=csv,noheader,nounits"), fields)


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


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
