"""Meters of energy: joules since a moment that stays the same for as long as a meter is kept."""

import re
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.conditions import NvidiaCard

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
        millijoules = self._card.ask("nvmlDeviceGetTotalEnergyConsumption") if self._card else None
        return millijoules / 1000 if millijoules else None


class RaplEnergy:
    """What the processor's packages have drawn since the first reading: cores, caches and their own GPU, not the
    machine's memory. Linux shows Intel's and AMD's RAPL alike, and since 5.10 to root alone.

    A counter starts anew after `max_energy_range_uj`. That is told from a reading lower than the one before, so
    readings must be closer together than the shortest time it can take to get there (two minutes at AMD's 65 kJ).
    After a longer pause a whole round may have gone unseen, and from then on nothing is told.
    """

    def __init__(self, root: Path | None = None, now: Callable[[], float] = time.monotonic):
        self._root, self._now = root or POWERCAP, now
        self._last: dict[Path, int] = {}
        self._last_at = 0.0
        self._microjoules = 0
        self._lost = False

    def joules(self) -> float | None:
        """The sum of all packages; None where one of them can't be read, or may have gone round unseen."""
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
        if self._last:
            pause = at - self._last_at
            rounds = min((ranges[folder] / 1e6 / PACKAGE_WATTS for folder in packages), default=0.0)
            self._lost = self._lost or read.keys() != self._last.keys() or pause > rounds
        if self._lost or not read:
            return None
        for folder, energy in read.items():
            grown = energy - self._last.get(folder, energy)
            self._microjoules += grown if grown >= 0 else grown + ranges[folder]
        self._last, self._last_at = read, at
        return self._microjoules / 1e6
