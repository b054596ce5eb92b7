"""The energy source that the setting `energy.source` names: the device's own counter, or Apple's tool.

Joules depend on the source, so figures of two sources can't be compared:
- `nvml`: an NVIDIA card with its memory and board.
- `rapl`: the CPU packages with their integrated GPU, without the RAM.
- `powermetrics`: CPU, GPU and ANE of Apple's chips, without the RAM. An estimate: its manual says that it may be
  inaccurate and is not for comparing devices.
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

from pipeline.errors import UsageError

Reading = Callable[[], tuple[str, float] | None]
"""The source's name and its joules since some fixed moment; None while they are unknown."""

POWERMETRICS = ("sudo", "-n", "powermetrics", "--samplers", "cpu_power", "-i", "100", "-b", "1")
"""A sample every 100 ms, so that short epochs are not blurred; line-buffered text, cheaper to parse than a property
list. Not in a session of its own: a password given to `sudo -v` is valid for one terminal."""

START_SECONDS, STALE_SECONDS, STOP_SECONDS = 10.0, 2.0, 2.0
"""How long the first sample may take (the tool starts in about a second), the next one, and the tool's end."""


def check(name: str) -> None:
    """Raise UsageError if the source can't be had here. Takes one sample of `powermetrics`."""
    with source(name, lambda: None):
        pass


@contextmanager
def source(name: str, counter: Reading) -> Iterator[Reading]:
    """The reading to take before and after each timed span: for `auto` that is `counter`, the device's own."""
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
    """Apple's `powermetrics`, running in the background, as a counter of joules."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._latest: tuple[float, float, float] | None = None
        """Joules so far, watts of the latest sample and its time; None before the first one and after the last."""
        self._settled = threading.Event()  # the first sample is there, or none will come
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
            self._settled.wait(START_SECONDS)
            if self._latest is None:
                errors.seek(0)
                reason = "".join(f" ({line.strip()})" for line in errors.readlines()[-1:])
                raise UsageError(f"{refusal} Apple's own chip, and `sudo -v` run first in this terminal{reason}")

    def reading(self) -> tuple[str, float] | None:
        """Joules since the start; since the latest sample, at its power. None once a sample was missed."""
        if (latest := self._latest) is None:
            return None
        joules, watts, then = latest
        elapsed = self._now() - then
        return ("powermetrics", joules + watts * elapsed) if elapsed <= STALE_SECONDS else None

    def stop(self) -> None:
        """End the tool. It runs as root, so we may not signal it; but it ends when it writes to the pipe that we close,
        and so also when this process is killed."""
        if self._child is None:
            return
        self._stopping = True
        with suppress(PermissionError):
            self._child.terminate()
        self._thread.join(STOP_SECONDS)
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(STOP_SECONDS)

    def _read(self, pipe: IO[str]) -> None:
        joules = 0.0
        with pipe:
            for sample in parse_samples(pipe):
                if sample is None or self._stopping:
                    break
                seconds, watts = sample
                joules += seconds * watts
                self._latest = joules, watts, self._now()
                self._settled.set()
        self._latest = None
        self._settled.set()


def parse_samples(lines: Iterable[str]) -> Iterator[tuple[float, float] | None]:
    """Seconds and mean watts (CPU, GPU and ANE together) of each sample in the tool's output, as soon as it is
    complete; None for one that lacks either. Intel's chips have no combined power."""
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
