"""Sample CPU, memory, disk, network and NVIDIA GPUs during a run, with the names of MLflow's system metrics.

MLflow's own monitor would write to the store while the clock runs. These samples go to the record instead.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from pipeline.profiling import nvidia

INTERVAL_SECONDS = 5.0

FIRST_SECONDS = 0.1
"""How long the first sample watches the CPU. The others watch it since the one before."""


@contextmanager
def sampled(
    interval_seconds: float = INTERVAL_SECONDS, first_step: int = 0
) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Sample in a thread while the block runs. Yields a function that returns the samples since its last call: each
    with `figures`, `at` (milliseconds since 1970) and `step`, counted from `first_step`."""
    samples: list[dict[str, Any]] = []
    done = threading.Event()

    def sample_repeatedly() -> None:
        first, step = psutil.net_io_counters(), first_step
        psutil.cpu_percent()  # a thread's first answer is always 0
        done.wait(FIRST_SECONDS)
        while step == first_step or not done.wait(interval_seconds):
            figures = {f"system/{name}": round(value, 1) for name, value in _sample(first).items()}
            samples.append({"figures": figures, "at": time.time_ns() // 1_000_000, "step": step})
            step += 1

    def take() -> list[dict[str, Any]]:
        new = samples[:]
        del samples[: len(new)]
        return new

    thread = threading.Thread(target=sample_repeatedly, daemon=True)
    thread.start()
    try:
        yield take
    finally:
        done.set()
        thread.join()


def _sample(first_network: Any) -> dict[str, float]:
    """One sample. Megabytes are 10^6 bytes, as in MLflow; the network's are counted from `first_network` on."""
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
    figures = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.used / memory.total * 100,
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": disk.used / 1e6,
        "disk_available_megabytes": disk.free / 1e6,
    }
    if network and first_network:  # a sandbox may have none
        figures["network_receive_megabytes"] = (network.bytes_recv - first_network.bytes_recv) / 1e6
        figures["network_transmit_megabytes"] = (network.bytes_sent - first_network.bytes_sent) / 1e6
    for number, card in enumerate(nvidia.all_cards()):
        figures |= {f"gpu_{number}_{name}": value for name, value in card.load().items()}
    return figures
