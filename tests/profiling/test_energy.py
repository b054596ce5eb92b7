"""Joules: of an NVIDIA card by its UUID, of a processor's packages by Linux' RAPL, and of nothing else."""

import gc
import math
import os
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from standin import Standin
from nvml import UUID, Nvml, NVMLError

from pipeline.devices import energy
from pipeline.devices.cpu import Cpu
from pipeline.devices.cuda import Cuda
from pipeline.devices.energy import NvmlEnergy, RaplEnergy
from pipeline.devices.mps import Mps
from pipeline.devices.xpu import Xpu

BARE = UUID.removeprefix("GPU-")  # as torch has it
INTEL_UJ, AMD_UJ = 262_143_328_850, 65_532_610_987  # max_energy_range_uj
needs_colons = pytest.mark.skipif(sys.platform == "win32", reason="its files can't be called intel-rapl:0")


def powercap(root, domains, ranges=INTEL_UJ):
    """Linux' folder with domains of these folder names: their `name` and counter."""
    for folder, (name, counter) in domains.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "name").write_text(f"{name}\n")
        (root / folder / "energy_uj").write_text(f"{counter}\n")
        (root / folder / "max_energy_range_uj").write_text(f"{ranges}\n")


class Time:
    """A clock that is set by hand, and a timer that calls nothing by itself."""

    now = 1000.0

    def __init__(self):
        self.timers = []

    def __call__(self):
        return self.now

    def repeat(self, seconds, method):
        self.timers.append((seconds, method))


def meter_of(root, clock=None):
    """A meter that reads only when it is told to."""
    clock = clock or Time()
    return RaplEnergy(root, clock, clock.repeat)


class Calls:
    """Counts its calls, of which the `last` says so."""

    def __init__(self, last):
        self.last, self.count, self.threads, self.third = last, 0, set(), threading.Event()

    def call(self):
        self.count += 1
        self.threads.add(threading.current_thread())
        if self.count == 3:
            self.third.set()
        return self.count < self.last


@pytest.fixture
def card(monkeypatch):
    """torch sees one card, NVIDIA's unless `hip` says otherwise, and pynvml answers as told."""

    def put(uuid=BARE, hip=None, **answers):
        properties = SimpleNamespace(name="card") if uuid is None else SimpleNamespace(name="card", uuid=uuid)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        fake = Nvml(**answers)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return put


# --- NVML


def test_a_card_tells_joules_and_keeps_nvml_open(card):
    counter = iter([5_000_000, 5_250_500])
    fake = card()
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(counter)
    backend = Cuda()
    assert fake.opened == 0  # only once it is asked for
    assert backend.energy() == ("nvml", 5000.0)
    assert backend.energy() == ("nvml", 5250.5)
    assert fake.opened == 1


@pytest.mark.parametrize("answer", [NVMLError("Not Supported"), 0])
def test_a_card_before_volta_tells_none(card, answer):
    card(TotalEnergyConsumption=answer)
    assert Cuda().energy() is None


def test_an_error_is_none_and_passes(card):
    fake = card()
    answers = iter([NVMLError("Unknown Error"), 2000])
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: fake.answer(next(answers))
    backend = Cuda()
    assert backend.energy() is None
    assert backend.energy() == ("nvml", 2.0)


def test_a_card_that_nvml_does_not_find_is_asked_for_once(card):
    fake = card(uuid="another", TotalEnergyConsumption=1000)
    backend = Cuda()
    assert backend.energy() is None
    fake.nvmlInit = lambda: pytest.fail("asked again")
    assert backend.energy() is None
    assert fake.opened == 0


def test_without_nvml_or_a_uuid_there_is_none(card, monkeypatch):
    card(uuid=None, TotalEnergyConsumption=1000)
    assert (Cuda().gpu_uuid(), Cuda().energy()) == (None, None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert NvmlEnergy(UUID).joules() is None


def test_amds_cards_have_neither(card):
    fake = card(hip="7.2", TotalEnergyConsumption=1000)
    assert (Cuda().gpu_uuid(), Cuda().energy()) == (None, None)
    assert fake.opened == 0


def test_a_card_is_found_by_its_uuid_whatever_its_index(card):
    card()
    assert Cuda(0).gpu_uuid() == UUID


# --- RAPL


@needs_colons
def test_packages_are_added_up_and_their_parts_are_not(tmp_path):
    domains = {
        "intel-rapl:0": ("package-0", 1_000_000),
        "intel-rapl:0:0": ("core", 7),
        "intel-rapl:1": ("package-1", 5_000_000),
        "intel-rapl:2": ("psys", 9_000_000),
        "intel-rapl-mmio:0": ("package-0", 1_000_000),
    }
    powercap(tmp_path, domains)
    (tmp_path / "intel-rapl").mkdir()
    meter = meter_of(tmp_path)
    assert meter.joules() == 0.0
    powercap(tmp_path, {folder: (name, counter + 2_500_000) for folder, (name, counter) in domains.items()})
    assert meter.joules() == 5.0
    assert meter.joules() == 5.0


@needs_colons
@pytest.mark.parametrize("span", [INTEL_UJ, AMD_UJ], ids=["intel", "amd"])
def test_a_counter_that_goes_round_goes_on(tmp_path, span):
    powercap(tmp_path, {"intel-rapl:0": ("package-0", span - 1_000_000)}, span)
    meter = meter_of(tmp_path)
    meter.joules()
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 3_000_000)}, span)
    assert meter.joules() == 4.0
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 4_000_000)}, span)
    assert meter.joules() == 5.0


@needs_colons
def test_after_a_pause_in_which_a_round_may_have_gone_unseen_nothing_is_told(tmp_path):
    clock = Time()
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 1_000_000)}, AMD_UJ)
    meter = meter_of(tmp_path, clock)
    meter.joules()
    clock.now += 130
    assert meter.joules() == 0.0
    clock.now += 132
    assert meter.joules() is None
    assert meter.joules() is None  # a difference to the readings before would be wrong as well


@needs_colons
def test_a_counter_that_goes_round_between_two_readings_of_ours_is_read_by_the_timer(tmp_path):
    clock = Time()
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 0), "intel-rapl:1": ("package-1", 0)}, AMD_UJ)
    meter = meter_of(tmp_path, clock)
    assert meter.joules() == 0.0
    ((seconds, method),) = clock.timers
    assert seconds == pytest.approx(AMD_UJ / 1e6 / 500 / 3)
    for step in range(1, 10):  # three rounds of 131 s, of half a counter in 65 s
        clock.now += seconds
        powercap(tmp_path, {"intel-rapl:0": ("package-0", step * AMD_UJ // 3 % AMD_UJ)}, AMD_UJ)
        assert method()() is True
    assert meter.joules() == pytest.approx(3 * AMD_UJ / 1e6)
    assert len(clock.timers) == 1


@needs_colons
def test_the_timer_ends_with_the_meter_or_when_its_readings_are_of_no_use(tmp_path):
    clock = Time()
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 1)}, AMD_UJ)
    meter = meter_of(tmp_path, clock)
    meter.joules()
    ((_, method),) = clock.timers
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.write_text("gone\n")
    assert method()() is True  # the next one may be read
    counter.write_text("1\n")
    clock.now += 132
    assert method()() is False
    del meter
    gc.collect()
    assert method() is None


@needs_colons
def test_no_timer_starts_where_nothing_can_be_read(tmp_path):
    clock = Time()
    meter = meter_of(tmp_path, clock)
    assert meter.joules() is None
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 1)})
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("gone\n")
    assert meter.joules() is None
    assert clock.timers == []


def test_the_background_calls_until_it_is_told_to_stop_and_keeps_no_process_alive():
    calls = Calls(last=3)
    energy.in_background(0, weakref.WeakMethod(calls.call))
    assert calls.third.wait(60)
    (thread,) = calls.threads
    thread.join(60)
    assert (thread.daemon, thread.is_alive(), calls.count) == (True, False, 3)


def test_the_background_keeps_no_object_alive():
    calls, gone = Calls(last=math.inf), threading.Event()
    weakref.finalize(calls, gone.set)
    called = calls.third
    energy.in_background(0, weakref.WeakMethod(calls.call))
    assert called.wait(60)
    del calls
    assert gone.wait(60)


@needs_colons
def test_a_package_that_cannot_be_read_makes_the_sum_none(tmp_path):
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 1), "intel-rapl:1": ("package-1", 1)})
    counter = tmp_path / "intel-rapl:1" / "energy_uj"
    meter = meter_of(tmp_path)
    counter.chmod(0)
    if os.access(counter, os.R_OK):  # root reads everything
        counter.unlink()
    assert meter.joules() is None
    counter.unlink(missing_ok=True)
    counter.write_text("gone\n")
    assert meter.joules() is None


@needs_colons
def test_a_package_that_comes_or_goes_ends_the_sum(tmp_path):
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 1)})
    meter = meter_of(tmp_path)
    assert meter.joules() == 0.0
    powercap(tmp_path, {"intel-rapl:1": ("package-1", 1)})
    assert meter.joules() is None


def test_without_rapl_there_is_none(tmp_path):
    assert RaplEnergy(tmp_path / "none").joules() is None
    assert RaplEnergy(tmp_path).joules() is None


@needs_colons
def test_the_cpus_energy_is_its_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert Cpu().energy() is None
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 1_000_000)})
    cpu = Cpu()
    assert cpu.energy() == ("rapl", 0.0)
    powercap(tmp_path, {"intel-rapl:0": ("package-0", 1_500_000)})
    assert cpu.energy() == ("rapl", 0.5)


# --- the others


@pytest.mark.parametrize("backend", [Mps, Xpu, Standin])
def test_other_backends_tell_none(backend):
    assert (backend().energy(), backend().gpu_uuid()) == (None, None)


def test_a_cpu_is_no_gpu():
    assert Cpu().gpu_uuid() is None
