"""Apple's GPUs, with a stand-in for torch.mps. Not yet run on a real Mac."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.devices import mps
from pipeline.devices.mps import Mps
from pipeline.profiling import system_info

MIB, GIB = 2**20, 2**30


class Metal:
    """A stand-in for torch.mps, in bytes: `driver` given to the process, `allocated` by tensors, `available` RAM."""

    def __init__(self, monkeypatch):
        self.driver = self.allocated = self.available = self.synchronized = 0
        stand_ins = {
            "synchronize": self.synchronize,
            "driver_allocated_memory": lambda: self.driver,
            "current_allocated_memory": lambda: self.allocated,
            "recommended_max_memory": lambda: 12 * GIB,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.mps, name, stand_in)
        monkeypatch.setattr(mps.psutil, "virtual_memory", lambda: SimpleNamespace(available=self.available))

    def synchronize(self):
        self.synchronized += 1


@pytest.fixture
def metal(monkeypatch):
    return Metal(monkeypatch)


@pytest.fixture
def machine(monkeypatch):
    """Facts of a Mac with an M3 Pro."""
    gpu = {"vendor": "Apple", "name": "Apple M3 Pro", "for_training": True, "cores": 18}
    facts = {"cpu": "Apple M3 Pro", "memory_gib": 36.0, "gpus": [gpu]}
    monkeypatch.setattr(system_info, "facts", lambda: facts)
    return facts


def test_it_is_one_asynchronous_device_without_an_index(monkeypatch):
    chosen = Mps()
    assert str(chosen.device) == "mps"
    assert chosen.asynchronous and not chosen.channels_last("bf16")
    for available in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda available=available: available)
        assert Mps.count() == int(available)


def test_copies_are_neither_pinned_nor_non_blocking(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: calls.append((args, options)) or self)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pytest.fail("mps has no pinned memory"))
    tensor = torch.ones(2, 3)
    copies = Mps().to_device_async((tensor,))
    assert calls == [((torch.device("mps"),), {})]  # done before the tensor may be overwritten
    assert copies() == (tensor,)


@pytest.mark.parametrize(
    ("chip", "best"),
    [("Apple M1", "fp16"), ("Apple M2 Ultra", "fp16"), ("Apple M3 Pro", "bf16"), ("Apple M10", "bf16")],
)
def test_the_first_two_generations_emulate_bf16(metal, machine, chip, best):
    machine["cpu"] = chip
    assert Mps().best_precision() == best in Mps.precisions


def test_its_peak_is_sampled_at_each_synchronize(metal):
    chosen = Mps()
    for mebibytes in (3, 8, 5):
        metal.driver = mebibytes * MIB
        chosen.synchronize()
    assert metal.synchronized == 3
    metal.driver, metal.allocated = 100 * MIB, 40 * MIB
    assert chosen.memory_mib() == {"peak": 8.0, "current": 40.0, "driver": 100.0}
    chosen.reset_peak_memory()
    assert chosen.memory_mib() == {"current": 40.0, "driver": 100.0}  # a peak is never 0


@pytest.mark.parametrize(
    ("driver", "available", "free"),
    [(2, 14, 10), (2, 3, 3), (13, 14, 0)],
    ids=["Metal's limit", "other processes", "beyond the limit"],
)
def test_its_memory_is_limited_by_metal_and_by_the_free_ram(metal, driver, available, free):
    metal.driver, metal.allocated, metal.available = driver * GIB, GIB, available * GIB
    assert (Mps().capacity_mib(), Mps().free_bytes()) == (12 * 2**10, free * GIB)


def test_the_chips_name_comes_from_the_operating_system(metal, machine, monkeypatch):
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    facts = Mps().facts()
    assert (facts["name"], facts["gpu_cores"], facts["memory_gib"]) == ("Apple M3 Pro", 18, 36.0)
    assert (facts["recommended_memory_gib"], facts["mps_cpu_fallback"]) == (12.0, True)
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK")
    assert Mps().facts()["mps_cpu_fallback"] is False
