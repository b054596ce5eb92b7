"""Samples while a run lasts: MLflow's names, plain values, each once; what can't be read is absent."""

import threading
from types import SimpleNamespace

import psutil
import pytest
from nvml import Nvml, NVMLError

from pipeline.profiling import nvidia, system_metrics

MACHINE = {
    "cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage",
    "disk_usage_percentage", "disk_usage_megabytes", "disk_available_megabytes",
}  # fmt: skip
NETWORK = {"network_receive_megabytes", "network_transmit_megabytes"}


@pytest.fixture(autouse=True)
def cards(monkeypatch):
    """No card, unless a test appends one."""
    found = []
    monkeypatch.setattr(nvidia, "all_cards", lambda: found)
    return found


def wait_for(condition):
    """Wait until another thread makes this true."""
    moment = threading.Event()
    for _ in range(1000):
        if condition():
            return
        moment.wait(0.01)
    raise AssertionError("it did not come true")


def test_each_sample_is_taken_once_in_order(monkeypatch):
    taken, numbers = [], iter(range(1000))
    monkeypatch.setattr(system_metrics, "_sample", lambda first: {"number": next(numbers) + 0.26})
    before = set(threading.enumerate())
    with system_metrics.sampled(0.001) as take:
        wait_for(lambda: taken.extend(take()) or len(taken) > 4)
        wait_for(lambda: taken.extend(take()) or len(taken) > 8)
        assert len(threading.enumerate()) == len(before) + 1
    taken += take()
    assert [sample["step"] for sample in taken] == list(range(len(taken)))
    assert [sample["figures"] for sample in taken] == [{"system/number": n + 0.3} for n in range(len(taken))]
    assert [sample["at"] for sample in taken] == sorted(sample["at"] for sample in taken)
    assert take() == [] and set(threading.enumerate()) == before


def test_the_first_answer_of_psutil_is_no_load(monkeypatch):
    answers = iter([0.0, 42.0])
    monkeypatch.setattr(psutil, "cpu_percent", lambda: next(answers))
    with system_metrics.sampled() as take:
        pass
    assert [sample["figures"]["system/cpu_utilization_percentage"] for sample in take()] == [42.0]


def test_a_run_that_fails_ends_the_sampling():
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), system_metrics.sampled():
        raise KeyboardInterrupt
    assert set(threading.enumerate()) == before


def test_the_shortest_run_has_a_sample_of_this_machine():
    with system_metrics.sampled() as take:
        pass
    (sample,) = take()
    figures = {key.removeprefix("system/"): value for key, value in sample["figures"].items()}
    assert MACHINE <= figures.keys() <= MACHINE | NETWORK and sample["step"] == 0
    assert all(isinstance(value, float) and value >= 0 for value in figures.values())


@pytest.mark.parametrize("has_network", [True, False])
def test_the_network_counts_from_the_beginning_in_millions_of_bytes(monkeypatch, has_network):
    counters = [SimpleNamespace(bytes_recv=5e6 * n, bytes_sent=1e6 * n) for n in (10, 11)]
    monkeypatch.setattr(psutil, "net_io_counters", lambda: counters.pop(0) if has_network else None)
    with system_metrics.sampled() as take:
        pass
    figures = take()[0]["figures"]
    network = {key: value for key, value in figures.items() if "network" in key}
    expected = {"system/network_receive_megabytes": 5.0, "system/network_transmit_megabytes": 1.0}
    assert network == (expected if has_network else {})


def test_each_card_has_its_number_and_tells_what_it_knows(cards):
    whole = Nvml(
        MemoryInfo=SimpleNamespace(used=20e9, total=80e9), UtilizationRates=SimpleNamespace(gpu=97),
        PowerUsage=350_000, EnforcedPowerLimit=700_000,
    )  # fmt: skip
    shy = Nvml(MemoryInfo=NVMLError("Not Supported"), UtilizationRates=SimpleNamespace(gpu=0), PowerUsage=50_000)
    cards += [nvidia.NvidiaCard(fake, "a handle") for fake in (whole, shy)]
    with system_metrics.sampled() as take:
        pass
    figures = take()[0]["figures"]
    assert {key.removeprefix("system/"): value for key, value in figures.items() if "gpu" in key} == {
        "gpu_0_memory_usage_percentage": 25.0, "gpu_0_memory_usage_megabytes": 20_000.0,
        "gpu_0_utilization_percentage": 97, "gpu_0_power_usage_watts": 350.0, "gpu_0_power_usage_percentage": 50.0,
        "gpu_1_utilization_percentage": 0, "gpu_1_power_usage_watts": 50.0,
    }  # fmt: skip
