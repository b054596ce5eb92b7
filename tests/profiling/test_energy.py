"""The energy sources: the device's counter, or powermetrics, replaced by a shell script."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import fails

from pipeline import config
from pipeline.errors import UsageError
from pipeline.profiling import energy
from pipeline.profiling.energy import Powermetrics

needs_sh = pytest.mark.skipif(sys.platform == "win32", reason="the tool's stand-in is a shell script")

SAMPLE = """
*** Sampled system activity (Fri Sep 11 13:41:46 2026 -0700) (500.00ms elapsed) ***


**** Processor usage ****

E-Cluster HW active frequency: 1248 MHz
E-Cluster HW active residency:  77.43% (600 MHz:   0% 912 MHz:  54% 2424 MHz: 8.7%)
CPU 0 frequency: 1359 MHz

CPU Power: 823 mW
GPU Power: 26 mW
ANE Power: 351 mW
Combined Power (CPU + GPU + ANE): 1200 mW
"""
"""The output of an M2, with 0.6 J."""

INTEL = SAMPLE.split("CPU Power")[0] + "Intel energy model derived package power (CPUs+GT+SA): 2.48W\n"
NO_TIME = SAMPLE.replace("500.00ms", "ms")
HANG = "exec sleep 60\n"


def printing(text):
    """A shell command that prints the text. printf is built in, so that a closed pipe ends the shell."""
    return f"printf '{text.replace('%', '%%')}'\n"


FOREVER = "while :; do " + printing(SAMPLE) + "sleep 0.02 > /dev/null; done\n"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Put a `powermetrics` with this shell script on the PATH, and a `sudo` that needs no password."""

    def put(script, sudo='[ "$1" = -n ] || exit 9; shift; exec "$@"'):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in (("powermetrics", script), ("sudo", sudo)):
            (folder / name).write_text(f"#!/bin/sh\n{text}")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    return put


def wait_for(condition):
    """Wait until another thread or process makes the condition true."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Time:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def started(tool):
    """Start the tool as a counter, with a clock that is set by hand. Stops it after the test."""
    counters = []

    def start(script):
        tool(script)
        counter = Powermetrics(now=Time())
        counter.start()
        counters.append(counter)
        return counter

    yield start
    for counter in counters:
        counter.stop()


# --- the tool's output


def samples(text):
    return list(energy.parse_samples(text.splitlines(keepends=True)))


def test_samples_are_seconds_and_watts():
    start = "Machine model: Mac14,2\nOS version: 25C56\nBoot time: Thu Sep 10 23:42:17 2026\n"
    other = SAMPLE.replace("500.00ms", "1010.09ms").replace("1200 mW", "45 mW")
    end = "\n**** Thermal pressure ****\n\nCurrent pressure level: Nominal\n"
    assert samples(start + SAMPLE + end + other) == [(0.5, 1.2), (pytest.approx(1.01009), 0.045)]
    assert samples(SAMPLE[: SAMPLE.index(" mW\n", SAMPLE.index("Combined"))]) == []


@pytest.mark.parametrize(
    "text",
    [INTEL + SAMPLE, NO_TIME, "Combined Power (CPU + GPU + ANE): 1200 mW\n"],
    ids=["intel", "no time", "no header"],
)
def test_a_sample_that_lacks_something_is_none(text):
    assert samples(text)[0] is None


# --- the tool as a counter


@needs_sh
def test_joules_are_summed_and_extrapolated_at_the_latest_power(started):
    counter = started(printing(SAMPLE) * 3 + HANG)
    wait_for(lambda: counter.reading()[1] == pytest.approx(1.8))
    counter._now.now += 0.5
    assert counter.reading() == ("powermetrics", pytest.approx(1.8 + 0.6))
    counter._now.now += 2
    assert counter.reading() is None  # the tool hangs
    counter.stop()
    assert counter._child.returncode is not None and counter.reading() is None


@needs_sh
@pytest.mark.parametrize("end", ["exit 0\n", printing(INTEL + SAMPLE) + HANG])
def test_after_a_missing_sample_there_is_no_reading(started, tmp_path, monkeypatch, end):
    go = tmp_path / "go"
    counter = started(printing(SAMPLE) + f'while [ ! -e "{go}" ]; do sleep 0.02 > /dev/null; done\n' + end)
    assert counter.reading() == ("powermetrics", pytest.approx(0.6))
    go.touch()
    wait_for(lambda: counter.reading() is None)
    counter._thread.join()
    assert counter.reading() is None


@needs_sh
def test_a_tool_that_we_may_not_signal_ends_when_its_pipe_closes(started, monkeypatch):
    def refuse(self):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(subprocess.Popen, "terminate", refuse)
    counter = started(FOREVER)
    counter.stop()
    assert counter._child.returncode == -signal.SIGPIPE


@needs_sh
def test_the_user_is_told_of_a_tool_that_does_not_end(started, monkeypatch, capsys):
    monkeypatch.setattr(energy, "STOP_SECONDS", 0.05)
    counter = started("trap '' TERM\n" + printing(SAMPLE) + HANG)
    counter.stop()
    assert "sudo killall powermetrics" in capsys.readouterr().out
    counter._child.kill()
    counter._child.wait()


@needs_sh
def test_the_tool_does_not_outlive_us(tool):
    tool(FOREVER)
    code = (
        "import os, signal\nfrom pipeline.profiling.energy import Powermetrics\ncounter = Powermetrics()\n"
        "counter.start()\nprint(counter._child.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr

    def gone():
        try:
            return psutil.Process(int(ended.stdout)).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_for(gone)


# --- what the training calls


def test_auto_is_the_devices_own_counter():
    def counter():
        raise AssertionError("asked before it is needed")

    energy.check("auto")
    with energy.source("auto", counter) as reading:
        assert reading is counter


@needs_sh
def test_powermetrics_replaces_the_counter_and_ends(tool, tmp_path):
    tool("echo $$ > " + str(tmp_path / "pid") + "\n" + printing(SAMPLE) + HANG)
    energy.check("powermetrics")
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    with energy.source("powermetrics", lambda: ("nvml", 1.0)) as reading:
        name, joules = reading()
        assert name == "powermetrics" and joules >= 0.6


def test_a_machine_without_the_tool_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    message = fails(UsageError, energy.check, "powermetrics")
    assert message.startswith('energy.source: "powermetrics" ') and "Mac" in message


@needs_sh
@pytest.mark.parametrize(
    ("script", "sudo", "words"),
    [
        (HANG, "echo sudo: a password is required >&2; exit 1", "(sudo: a password is required)"),
        (printing(INTEL) * 2 + HANG, 'shift; exec "$@"', "Apple's own chip"),
        (HANG, 'shift; exec "$@"', "sudo -v"),
    ],
    ids=["password", "intel", "no sample"],
)
def test_a_tool_that_gives_no_samples_is_refused(tool, monkeypatch, script, sudo, words):
    monkeypatch.setattr(energy, "START_SECONDS", 1)
    tool(script, sudo)
    assert words in fails(UsageError, energy.check, "powermetrics")
    with pytest.raises(UsageError), energy.source("powermetrics", lambda: None):
        raise AssertionError("went on without")
