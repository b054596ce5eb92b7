"""Measure energy by the setting `energy.source`: with the device's own counter, or with Apple's powermetrics.

Each source covers other parts of the machine, so joules of two sources can't be compared:
- `nvml`: an NVIDIA card with its memory and board.
- `rapl`: the CPU packages with their integrated GPU, without the RAM.
- `powermetrics`: CPU, GPU and ANE of Apple's chips, without the RAM. This is an estimate. The tool's manual says that
  it may be inaccurate and should not be used to compare devices.
"""

import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from pipeline import terminal
from pipeline.errors import UsageError

Reading = Callable[[], tuple[str, float] | None]
"""Returns the source's name and its joules since a fixed moment; None while they are unknown."""

POWERMETRICS = ("sudo", "-n", "powermetrics", "--samplers", "cpu_power", "-i", "100", "-b", "1")
"""Prints a sample every 100 ms, as line-buffered text. It must run in our session: `sudo -v` covers one
terminal only."""

START_SECONDS, STALE_SECONDS, STOP_SECONDS = 10.0, 2.0, 2.0
"""How long to wait for the first sample (the tool starts in about a second), the next one, and the tool's end."""


def check(name: str) -> None:
    """Raise UsageError if the source does not work here. Takes one sample of `powermetrics`."""
    with source(name, lambda: None):
        pass


@contextmanager
def source(name: str, counter: Reading) -> Iterator[Reading]:
    """Yield the function that reads the energy: for `auto` it is `counter`, the device's own."""
    if name != "powermetrics":
        yield counter
        return
    tool = Powermetrics()
    try:
        tool.start()
        yield tool.reading
    finally:
        tool.stop()


class Powermetrics:
    """An energy counter that sums the samples of Apple's `powermetrics`, which runs in the background."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._latest: tuple[float, float, float] | None = None
        """Joules so far, watts of the latest sample and its time. None before the first sample and after the last."""
        self._started = threading.Event()  # set by the first sample, or when the tool ends without one
        self._stopping = False
        self._child: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the tool and wait for its first sample. Raises UsageError if none comes."""
        refusal = 'energy.source: "powermetrics" is not allowed here: expected'
        if not shutil.which("powermetrics"):
            raise UsageError(f"{refusal} a Mac")
        with tempfile.TemporaryFile("w+", errors="replace") as errors:  # a pipe would have to be emptied
            self._child = subprocess.Popen(
                POWERMETRICS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                encoding="utf-8", errors="replace",
            )  # fmt: skip
            self._thread = threading.Thread(target=self._read, args=(self._child.stdout,), daemon=True)
            self._thread.start()
            self._started.wait(START_SECONDS)
            if self._latest is None:
                errors.seek(0)
                reason = "".join(f" ({line.strip()})" for line in errors.readlines()[-1:])
                raise UsageError(f"{refusal} Apple's own chip, and `sudo -v` run first in this terminal{reason}")

    def reading(self) -> tuple[str, float] | None:
        """Joules since the start, extrapolated from the latest sample at its power. None if samples fail to come."""
        if (latest := self._latest) is None:  # read once, since the other thread may set it
            return None
        joules, watts, sampled_at = latest
        elapsed = self._now() - sampled_at
        return ("powermetrics", joules + watts * elapsed) if elapsed <= STALE_SECONDS else None

    def stop(self) -> None:
        """End the tool, and tell the user if it does not end. It runs as root, so we may not be allowed to signal it.
        But it ends when it writes to a closed pipe, and so also after this process is killed."""
        if self._child is None:
            return
        self._stopping = True
        with suppress(PermissionError):
            self._child.terminate()
        self._thread.join(STOP_SECONDS)
        try:
            self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            terminal.say("energy   powermetrics is still running; end it: sudo killall powermetrics")

    def _read(self, pipe: IO[str]) -> None:
        joules = 0.0
        with pipe:
            for sample in parse_samples(pipe):
                if sample is None or self._stopping:
                    break
                seconds, watts = sample
                joules += seconds * watts
                self._latest = joules, watts, self._now()
                self._started.set()
        self._latest = None
        self._started.set()


def parse_samples(lines: Iterable[str]) -> Iterator[tuple[float, float] | None]:
    """Yield the seconds and mean watts (CPU, GPU and ANE together) of each sample in the tool's output, as soon as it
    is complete. Yields None for a sample that lacks either: Intel's chips have no combined power."""
    seconds: float | None = None
    for line in lines:
        if line.startswith("*** Sampled system activity"):
            if seconds is not None:
                yield None
            elapsed = re.search(r"\((\d+(?:\.\d+)?)\s*ms elapsed\)", line)
            seconds = float(elapsed[1]) / 1e3 if elapsed else None
        elif power := re.match(r"Combined Power \(.+\):\s*(\d+(?:\.\d+)?)\s*mW", line):
            yield None if seconds is None else (seconds, float(power[1]) / 1e3)
            seconds = None
