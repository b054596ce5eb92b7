"""Intel's GPUs, with a stand-in for torch.xpu."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.devices.xpu import Xpu

MIB = 2**20


@pytest.mark.parametrize(("has_matrix_units", "best"), [(True, "bf16"), (False, "fp32")])
def test_its_best_precision_depends_on_matrix_units(monkeypatch, has_matrix_units, best):
    properties = SimpleNamespace(has_subgroup_matrix_multiply_accumulate=has_matrix_units)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: properties)
    assert Xpu().best_precision() == best in Xpu.precisions


@pytest.mark.parametrize(("driver_knows", "free"), [(True, 13), (False, 63)])
def test_its_free_memory_is_known_even_if_the_driver_does_not_tell_it(monkeypatch, driver_knows, free):
    figures = {"max_memory_allocated": 2, "max_memory_reserved": 5, "memory_reserved": 4, "memory_allocated": 1}
    for name, mebibytes in figures.items():
        monkeypatch.setattr(torch.xpu, name, lambda device, mebibytes=mebibytes: mebibytes * MIB)

    def mem_get_info(device):
        if not driver_knows:
            raise RuntimeError("The device (Intel Arc) doesn't support querying the available free memory.")
        return 10 * MIB, 64 * MIB

    monkeypatch.setattr(torch.xpu, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: SimpleNamespace(total_memory=64 * MIB))
    chosen = Xpu()
    assert chosen.memory_mib() == {"peak": 2.0, "peak_reserved": 5.0}
    assert (chosen.capacity_mib(), chosen.free_bytes()) == (64.0, free * MIB)
