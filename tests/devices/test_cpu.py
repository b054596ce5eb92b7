"""The CPU: the process's memory within a container's limit, precision, and tuning."""

import mmap
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import config
from pipeline.devices import cpu
from pipeline.devices.cpu import Cpu
from pipeline.profiling import cgroup, system_info

MIB = 2**20


def test_it_is_one_synchronous_device_without_an_index(monkeypatch):
    monkeypatch.setattr(system_info, "facts", lambda: {"cpu": "AMD EPYC", "memory_gib": 23.5})
    chosen = Cpu()
    assert chosen.device == torch.zeros(1).device == torch.device("cpu")
    assert Cpu.count() == 1 and not chosen.asynchronous and not chosen.raises_oom
    facts = chosen.facts()
    assert (facts["name"], facts["memory_gib"]) == ("AMD EPYC", 23.5)


@pytest.mark.parametrize(
    ("flags", "has_onednn", "best"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, True, "fp32"),
        ({"avx512_bf16": True}, True, "bf16"),
        ({"neon": True, "bf16": True}, True, "bf16"),
        ({"neon": True, "bf16": True}, False, "fp32"),  # a Mac's CPU: torch does not use the instructions there
    ],
)
def test_its_best_precision_is_bf16_if_torch_uses_its_bf16_instructions(monkeypatch, flags, has_onednn, best):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    assert Cpu().best_precision() == best


def test_its_peak_grows_with_the_process_and_can_be_reset_on_linux():
    chosen = Cpu()
    chosen.reset_peak_memory()
    before = chosen.memory_mib()["peak"]
    values = mmap.mmap(-1, 200 * MIB)  # given back when it is closed, unlike what torch frees
    torch.frombuffer(values, dtype=torch.uint8).fill_(1)
    high = chosen.memory_mib()["peak"]
    assert before > 50 and high >= before  # torch alone takes more than 50
    if sys.platform != "linux":
        return  # an earlier peak may hide this one
    assert high > before + 150
    values.close()
    assert chosen.memory_mib()["peak"] >= high - 1
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("a sandbox without clear_refs")
    chosen.reset_peak_memory()
    assert chosen.memory_mib()["peak"] < high - 150


@pytest.mark.parametrize(
    ("limit", "left", "capacity", "free"),
    [(None, None, 16, 8), (4, 1, 4, 1), (64, 60, 16, 8)],
    ids=["no limit", "limit", "high limit"],
)
def test_its_memory_is_limited_by_the_container(monkeypatch, limit, left, capacity, free):
    monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * MIB, available=8 * MIB))
    limits = cgroup.Limits(None, limit and limit * MIB, left and left * MIB)
    monkeypatch.setattr(cgroup, "limits", lambda: limits)
    assert (Cpu().capacity_mib(), Cpu().free_bytes()) == (capacity, free * MIB)


PAGE_FAULTS = """
import resource, torch
from pipeline.devices.cpu import Cpu

def faults():
    for _ in range(12):  # an aligned block needs some more, so that the first ones do not fit where one was freed
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
Cpu().tune()
print(plain, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_tuned_cpu_keeps_freed_memory():
    command = [sys.executable, "-c", PAGE_FAULTS]
    output = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True, check=True).stdout
    plain, tuned = map(int, output.split())
    assert tuned < 10
    assert plain > 30  # 16,384 pages of 4 KiB, or fewer huge ones
