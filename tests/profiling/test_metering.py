"""Energy from a plug meter that is read by eye, and from Apple's tool: here a script that stands for it."""

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
"""As an M2 tells it; 0.6 J."""

INTEL = SAMPLE.split("CPU Power")[0] + "Intel energy model derived package power (CPUs+GT+SA): 2.48W\n"
NO_TIME = SAMPLE.replace("500.00ms", "ms")
WAIT = "exec sleep 60\n"


def told(text):
    """A line of shell that writes the text itself, so that a closed pipe ends the shell."""
    return f"printf '{text.replace('%', '%%')}'\n"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a `powermetrics` of this shell script on the PATH, and a `sudo` that asks for nothing."""

    def put(script, sudo='[ "$1" = -n ] || exit 9; shift; exec "$@"'):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in (("powermetrics", script), ("sudo", sudo)):
            (folder / name).write_text(f"#!/bin/sh\n{text}")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        return folder

    return put


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Lets the tool's script go on from `until_go`."""
    monkeypatch.setenv("GO", str(tmp_path / "go"))
    return (tmp_path / "go").touch


UNTIL_GO = 'while [ ! -e "$GO" ]; do sleep 0.02 > /dev/null; done\n'


def until(condition):
    """Waits for another thread or process."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Time:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self):
        return self.now


# --- powermetrics' words


def samples(text):
    return list(energy.parse_samples(text.splitlines(keepends=True)))


def test_samples_are_seconds_and_watts():
    start = "Machine model: Mac14,2\nOS version: 25C56\nBoot time: Thu Sep 10 23:42:17 2026\n"
    other = SAMPLE.replace("500.00ms", "1010.09ms").replace("1200 mW", "45 mW")
    end = "\n**** Thermal pressure ****\n\nCurrent pressure level: Nominal\n"
    assert samples(start + SAMPLE + end + other) == [(0.5, 1.2), (pytest.approx(1.01009), 0.045)]


def test_a_sample_is_there_with_its_last_line():
    lines = iter(SAMPLE.splitlines())
    assert next(energy.parse_samples(lines)) == (0.5, 1.2)
    assert list(lines) == []


def test_a_cut_sample_is_none_yet():
    assert samples(SAMPLE[: SAMPLE.index(" mW\n", SAMPLE.index("Combined"))]) == []
    assert samples("") == []


@pytest.mark.parametrize(
    "text",
    [
        INTEL + SAMPLE,
        NO_TIME,
        SAMPLE.partition("ANE):")[2].join(["Combined Power (CPU + GPU + ANE):", ""]),
        SAMPLE.replace("1200", "-5") + SAMPLE,
        SAMPLE.replace("1200", "nan") + SAMPLE,
    ],
    ids=["intel", "no time", "no header", "negative", "no number"],
)
def test_a_sample_that_lacks_something_is_told_apart(text):
    assert samples(text)[0] is None


# --- powermetrics as a counter


@needs_sh
def test_samples_are_summed_up_and_gone_on_from_at_the_last_ones_power(tool):
    tool(told(SAMPLE) * 3 + WAIT)
    clock = Time()
    with Powermetrics(now=clock) as counter:
        until(lambda: counter.joules() == pytest.approx(1.8))
        clock.now += 0.5
        assert counter.joules() == pytest.approx(1.8 + 0.6)
        assert counter.reading() == ("powermetrics", counter.joules())
        clock.now += 2
        assert counter.joules() is None and counter.reading() is None  # it hangs
    assert counter._child.returncode is not None
    assert counter.joules() is None


@needs_sh
@pytest.mark.parametrize("end", ["exit 0\n", told(INTEL + SAMPLE) + WAIT, told(NO_TIME) + WAIT, "kill -9 $$\n"])
def test_from_a_missing_sample_on_nothing_is_told(tool, go, end):
    tool(told(SAMPLE) + UNTIL_GO + end)
    with Powermetrics(now=Time()) as counter:
        assert counter.joules() == pytest.approx(0.6)
        go()
        until(lambda: counter.joules() is None)
        counter._thread.join()
        assert counter.joules() is None


@needs_sh
def test_a_tool_that_will_not_end_is_killed(tool, monkeypatch):
    monkeypatch.setattr(energy, "PATIENCE_SECONDS", 0.2)
    tool("trap '' TERM\n" + told(SAMPLE) + "while :; do sleep 0.02 > /dev/null; done")
    with Powermetrics() as counter:
        pass
    assert counter._child.returncode == -signal.SIGKILL


def refuse(self):
    raise PermissionError(1, "Operation not permitted")


@needs_sh
def test_a_tool_that_we_may_not_signal_ends_by_its_pipe(tool, monkeypatch):
    monkeypatch.setattr(subprocess.Popen, "terminate", refuse)
    monkeypatch.setattr(subprocess.Popen, "kill", refuse)
    tool("while :; do " + told(SAMPLE) + "sleep 0.02 > /dev/null; done")
    with Powermetrics() as counter:
        pass
    assert counter._child.returncode == -signal.SIGPIPE


@needs_sh
def test_a_tool_that_cannot_be_ended_is_told_and_does_not_hold_us_up(tool, go, monkeypatch, capsys):
    tool(told(SAMPLE) + UNTIL_GO)
    with monkeypatch.context() as patch:
        patch.setattr(energy, "PATIENCE_SECONDS", 0.05)
        patch.setattr(subprocess.Popen, "terminate", refuse)
        patch.setattr(subprocess.Popen, "kill", refuse)
        with Powermetrics() as counter:
            pass
    assert "sudo killall powermetrics" in capsys.readouterr().err
    go()
    counter._child.wait()
    counter._thread.join()


@needs_sh
def test_the_tool_does_not_outlive_us(tool):
    tool("while :; do " + told(SAMPLE) + "sleep 0.02 > /dev/null; done")
    code = (
        "import os, signal\nfrom pipeline.profiling.energy import Powermetrics\nwith Powermetrics() as counter:\n"
        "    print(counter._child.pid, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr

    def gone():
        try:
            return psutil.Process(int(ended.stdout)).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    until(gone)


@needs_sh
def test_ctrl_c_while_it_starts_leaves_no_child(tool, monkeypatch):
    tool(WAIT)
    counter = Powermetrics()

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(counter._settled, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt), counter:
        pass
    assert counter._child.returncode == -signal.SIGTERM


# --- what is refused


def refusal(source):
    line = fails(UsageError, energy.check, source)
    start = f'energy.source: "{source}" is not allowed here: expected '
    assert line.startswith(start)
    return line.removeprefix(start)


def test_without_the_tool(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal("powermetrics") == "a Mac, whose tool it is"


@needs_sh
def test_without_sudo(tool, monkeypatch):
    folder = tool(WAIT)
    (folder / "sudo").unlink()
    monkeypatch.setenv("PATH", str(folder))
    assert refusal("powermetrics") == "sudo to run it with (No such file or directory)"


@needs_sh
@pytest.mark.parametrize(
    ("words", "why"), [("echo sudo: a password is required >&2; ", " (sudo: a password is required)"), ("", "")]
)
def test_without_leave(tool, words, why):
    tool(WAIT, sudo=f"{words}exit 1")
    assert refusal("powermetrics") == f"leave to run it as root{why}: run `sudo -v` in this terminal first"


@needs_sh
def test_a_tool_that_says_nothing(tool, monkeypatch):
    monkeypatch.setattr(energy, "START_SECONDS", 0.1)
    tool(WAIT)
    assert refusal("powermetrics") == "a sample of it within 0.1 s"


@needs_sh
def test_an_intel_mac(tool):
    tool(told(INTEL) * 2 + WAIT)
    assert refusal("powermetrics") == "Apple's own chip, of which alone it tells the combined power"


@needs_sh
def test_a_mac_of_apples_passes_and_the_tool_ends(tool, tmp_path):
    tool("echo $$ > " + str(tmp_path / "pid") + "\n" + told(SAMPLE) + WAIT)
    energy.check("powermetrics")
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


# --- what the stage calls


def test_auto_is_the_devices_own_counter():
    def counter():
        raise AssertionError("asked before it is needed")

    with energy.source("auto", counter) as reading:
        assert reading is counter


@needs_sh
def test_powermetrics_takes_the_counters_place(tool):
    tool(told(SAMPLE) + WAIT)
    with energy.source("powermetrics", lambda: ("nvml", 1.0)) as reading:
        name, joules = reading()
        assert name == "powermetrics" and joules >= 0.6


@needs_sh
def test_leave_that_has_ended_since_is_refused_before_anything_is_measured(tool):
    tool(WAIT, sudo="exit 1")
    with pytest.raises(UsageError), energy.source("powermetrics", lambda: None):
        raise AssertionError("went on without")
