"""The energy counters of CPU packages on Linux (RAPL)."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")

MAX_PACKAGE_WATTS = 500
"""The most that a CPU package draws for minutes: the power limit of the largest server CPUs."""


def call_every(seconds: float, function: Callable[[], bool]) -> None:
    """Call `function` in a background thread every `seconds`, until it returns False."""

    def loop() -> None:
        time.sleep(seconds)
        while function():
            time.sleep(seconds)

    threading.Thread(target=loop, name="energy", daemon=True).start()


class RaplEnergy:
    """Energy of all CPU packages since the first reading: cores, caches and integrated GPU, without the RAM. Linux has
    RAPL for Intel and AMD. Since Linux 5.10 only root may read it.

    A counter wraps at `max_energy_range_uj`; AMD's (65 kJ) does so after two minutes of full load. A background thread
    therefore reads the counters three times in the shortest possible wrap time. If two readings are further apart than
    that time, a wrap may be missed, and all later readings are None.
    """

    def __init__(
        self,
        root: Path = POWERCAP,
        now: Callable[[], float] = time.monotonic,
        start_timer: Callable[[float, Callable[[], bool]], None] = call_every,
    ):
        self._root, self._now, self._start_timer = root, now, start_timer
        self._lock = threading.Lock()
        self._last: dict[Path, int] = {}
        self._last_time = 0.0
        self._microjoules = 0
        self._lost = False

    def joules(self) -> float | None:
        """The sum over all packages; None if one can't be read, or a wrap may be missed."""
        with self._lock:
            try:
                packages = _read_packages(self._root)
            except (OSError, ValueError):
                return None
            now = self._now()
            shortest_wrap = min((span / 1e6 / MAX_PACKAGE_WATTS for _, span in packages.values()), default=0.0)
            if self._last and (packages.keys() != self._last.keys() or now - self._last_time > shortest_wrap):
                self._lost = True
            if self._lost or not packages:
                return None
            if not self._last:
                self._start_timer(shortest_wrap / 3, self._update)
            for folder, (counter, span) in packages.items():
                self._microjoules += (counter - self._last.get(folder, counter)) % span
            self._last, self._last_time = {folder: counter for folder, (counter, _) in packages.items()}, now
            return self._microjoules / 1e6

    def _update(self) -> bool:
        """Read the counters. Returns False if the sum is lost, which ends the timer."""
        self.joules()
        return not self._lost


def _read_packages(root: Path) -> dict[Path, tuple[int, int]]:
    """The counter of each package and the value at which it wraps, in microjoules."""
    # intel-rapl:0 is a package or the whole machine (psys), intel-rapl:0:0 a part of it, and intel-rapl-mmio:0 the
    # same package again.
    zones = [folder for folder in root.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", folder.name)]
    return {
        folder: (int((folder / "energy_uj").read_text()), int((folder / "max_energy_range_uj").read_text()))
        for folder in zones
        if (folder / "name").read_text().startswith("package")
    }
