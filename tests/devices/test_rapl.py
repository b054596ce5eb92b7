"""The energy of CPU packages from Linux's RAPL counters."""

import sys
import threading

import pytest

from pipeline.devices.cpu import Cpu
from pipeline.devices.rapl import RaplEnergy, call_every

INTEL_UJ, AMD_UJ = 262_143_328_850, 65_532_610_987  # max_energy_range_uj
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no file can be called intel-rapl:0")


class Rapl:
    """A powercap folder, a clock that is set by hand, and a timer that does not call anything."""

    def __init__(self, root):
        self.root, self.now, self.timers = root, 1000.0, []

    def write(self, wrap=INTEL_UJ, **counters):
        """Set counters in microjoules. `package0` is intel-rapl:0, and so on."""
        for name, count in counters.items():
            self.write_zone(f"intel-rapl:{name[7:]}", f"package-{name[7:]}", count, wrap)

    def write_zone(self, folder, name, count, wrap=INTEL_UJ):
        (self.root / folder).mkdir(exist_ok=True)
        (self.root / folder / "name").write_text(f"{name}\n")
        (self.root / folder / "energy_uj").write_text(f"{count}\n")
        (self.root / folder / "max_energy_range_uj").write_text(f"{wrap}\n")

    def counter(self):
        return RaplEnergy(self.root, lambda: self.now, lambda seconds, update: self.timers.append((seconds, update)))


@pytest.fixture
def rapl(tmp_path):
    return Rapl(tmp_path)


def test_only_packages_are_summed(rapl):
    (rapl.root / "intel-rapl").mkdir()
    counter, joules = rapl.counter(), []
    for used in (0, 2_500_000):
        rapl.write(package0=1_000_000 + used, package1=5_000_000 + used)
        for folder, name in (("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0")):
            rapl.write_zone(folder, name, used)
        joules.append(counter.joules())
    assert joules == [0.0, 5.0]


@pytest.mark.parametrize("wrap", [INTEL_UJ, AMD_UJ], ids=["intel", "amd"])
def test_a_counter_may_wrap(rapl, wrap):
    counter = rapl.counter()
    joules = []
    for count in (wrap - 1_000_000, 3_000_000, 4_000_000):
        rapl.write(wrap, package0=count)
        joules.append(counter.joules())
    assert joules == [0.0, 4.0, 5.0]


def test_a_wrap_between_two_readings_is_seen_by_the_timer(rapl):
    rapl.write(AMD_UJ, package0=0, package1=0)
    counter = rapl.counter()
    assert counter.joules() == 0.0
    ((seconds, update),) = rapl.timers
    assert seconds == pytest.approx(AMD_UJ / 1e6 / 500 / 3)
    for step in range(1, 10):
        rapl.now += seconds
        rapl.write(AMD_UJ, package0=step * AMD_UJ // 3 % AMD_UJ)
        assert update() is True
    assert counter.joules() == pytest.approx(3 * AMD_UJ / 1e6)
    assert len(rapl.timers) == 1


def test_after_a_gap_that_may_hide_a_wrap_there_is_no_sum(rapl):
    rapl.write(AMD_UJ, package0=1_000_000)
    counter = rapl.counter()
    assert counter.joules() == 0.0
    ((_, update),) = rapl.timers
    rapl.now += 130
    assert (counter.joules(), update()) == (0.0, True)
    rapl.now += 132
    assert (counter.joules(), update()) == (None, False)
    assert counter.joules() is None  # not even from now on


def test_a_package_that_cannot_be_read_makes_the_sum_none(rapl):
    rapl.write(package0=1, package1=1)
    counter = rapl.counter()
    (rapl.root / "intel-rapl:1" / "energy_uj").unlink()
    assert counter.joules() is None and rapl.timers == []
    rapl.write(package1=1)
    assert counter.joules() == 0.0
    rapl.write(package2=1)  # another sum than before
    assert counter.joules() is None


def test_the_cpus_energy_is_the_sum_of_its_packages(rapl):
    assert RaplEnergy(rapl.root / "none").joules() is None
    chosen = Cpu()
    chosen._rapl = rapl.counter()
    assert chosen.energy() is None
    rapl.write(package0=1_000_000)
    assert chosen.energy() == ("rapl", 0.0)


def test_the_timer_stops_on_false_and_its_thread_is_a_daemon():
    threads, third = [], threading.Event()

    def update():
        threads.append(threading.current_thread())
        if len(threads) == 3:
            third.set()
        return len(threads) < 3

    call_every(0, update)
    assert third.wait(60)
    threads[0].join(60)
    assert threads[0].daemon and not threads[0].is_alive() and len(threads) == 3
