"""Meters of energy: joules since a moment that stays the same for as long as a meter is kept."""

import re
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from pipeline.profiling.system_state import NvidiaCard

POWERCAP = Path("/sys/class/powercap")

PACKAGE_WATTS = 500
"""More than a processor draws for minutes: the largest servers' are sold with this limit."""


class NvmlEnergy:
    """What an NVIDIA card has drawn since its driver was loaded: GPU, memory and board (Volta and later).

    NVML stays open, so that the driver isn't unloaded, and its counter set back, between two readings.
    """

    def __init__(self, uuid: str | None):
        self._card = NvidiaCard.open(uuid)

    def joules(self) -> float | None:
        """The counter at this moment; None for a card that has none."""
        millijoules = self._card.query("nvmlDeviceGetTotalEnergyConsumption") if self._card else None
        return millijoules / 1000 if millijoules else None


def in_background(seconds: float, method: weakref.WeakMethod[Callable[[], bool]]) -> None:
    """Calls `method` every so many seconds, until it returns False or its object is gone. The thread does not keep the
    process alive."""

    def call() -> bool:
        bound = method()  # only in here: a reference held while the thread sleeps would keep the object alive
        return bound is not None and bound()

    def loop() -> None:
        time.sleep(seconds)
        while call():
            time.sleep(seconds)

    threading.Thread(target=loop, name="energy", daemon=True).start()


class RaplEnergy:
    """What the processor's packages have drawn since the first reading: cores, caches and their own GPU, not the
    machine's memory. Linux shows Intel's and AMD's RAPL alike, and since 5.10 to root alone.

    A counter starts anew after `max_energy_range_uj`, at AMD's 65 kJ after two minutes of full load. A reading lower
    than the one before shows that, if readings are closer together than the shortest time until the counter starts
    anew. So from the first reading on, `repeat` (see `in_background`) reads three times as often. After a longer pause
    a whole round may be missing, and from then on every reading is None.
    """

    def __init__(
        self,
        root: Path | None = None,
        now: Callable[[], float] = time.monotonic,
        repeat: Callable[[float, weakref.WeakMethod[Callable[[], bool]]], None] = in_background,
    ):
        self._root, self._now, self._repeat = root or POWERCAP, now, repeat
        self._lock = threading.Lock()
        self._last: dict[Path, int] = {}
        self._last_at = 0.0
        self._microjoules = 0
        self._lost = False

    def joules(self) -> float | None:
        """The sum of all packages; None where one of them can't be read, or a round may be missing."""
        with self._lock:
            return self._read()

    def _again(self) -> bool:
        """Reads, and tells whether the next reading can still be used."""
        self.joules()
        return not self._lost

    def _read(self) -> float | None:
        try:
            # Below a package, `intel-rapl:0:0` is a part of it; `psys`, beside it, is the whole machine, and
            # `intel-rapl-mmio:0` the same package by another way.
            packages = [
                folder
                for folder in self._root.glob("intel-rapl:*")
                if re.fullmatch(r"intel-rapl:\d+", folder.name) and (folder / "name").read_text().startswith("package")
            ]
            read = {folder: int((folder / "energy_uj").read_text()) for folder in packages}
            ranges = {folder: int((folder / "max_energy_range_uj").read_text()) for folder in packages}
        except (OSError, ValueError):
            return None
        at = self._now()
        round_seconds = min((span / 1e6 / PACKAGE_WATTS for span in ranges.values()), default=0.0)
        if self._last:
            pause = at - self._last_at
            self._lost = self._lost or read.keys() != self._last.keys() or pause > round_seconds
        if self._lost or not read:
            return None
        for folder, energy in read.items():
            grown = energy - self._last.get(folder, energy)
            self._microjoules += grown if grown >= 0 else grown + ranges[folder]
        if not self._last:
            self._repeat(round_seconds / 3, weakref.WeakMethod(self._again))
        self._last, self._last_at = read, at
        return self._microjoules / 1e6
