"""Energy from what the user chose: the device's own counter, Apple's tool, or a plug meter that is read by eye.

What joules are of depends on the source, so figures of two sources are never of the same thing:
- `nvml`: the NVIDIA card, its memory and board.
- `rapl`: the processor's packages, with the cores and GPU in them; not the machine's memory.
- `powermetrics`: CPU, GPU and ANE of Apple's chip, not its memory; an estimate of Apple's, whose manual says that it
  may be inaccurate and is not for comparing devices.
- `meter`: the whole machine at the plug, with screen and charger (and what the battery takes), from one reading to
  the next: also between the timed spans and while the readings are typed.

For the stage that trains, in this order: `check` before any work; `with source(...) as reading` around all timed
spans, `reading()` before and after each; with `meter`, where `reading()` gives nothing, `ask_reading` before the
first span and after the last.
"""

import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import IO, Self

from pipeline import terminal
from pipeline.errors import UsageError

Reading = Callable[[], tuple[str, float] | None]
"""The source's name and its joules since a moment that stays the same; None where they can't be told."""

POWERMETRICS = ("sudo", "-n", "powermetrics", "--samplers", "cpu_power", "-i", "100", "-b", "1")
"""A sample each 100 ms, written line by line, since a longer one would blur short epochs. As text: the property list
is far longer, and would be parsed on the CPU that is measured. Not in a session of its own: what `sudo -v` permits
holds for one terminal."""

START_SECONDS = 10.0
"""How long the first sample may take, of a tool that starts in a second."""

STALE_SECONDS = 2.0
"""After this long without a sample, twenty times the interval, no energy is told."""

PATIENCE_SECONDS = 2.0
"""How long a child may take to end once it is told to, before it is killed."""


def check(chosen: str) -> None:
    """Raises UsageError where the source (`energy.source`) can't be had here: no terminal for `meter`; no such tool,
    no leave to run it, or no figures from it for `powermetrics`, which is run for one sample."""
    if chosen == "powermetrics":
        with Powermetrics():
            pass


@contextmanager
def source(chosen: str, counter: Reading) -> Iterator[Reading]:
    """The reading to take before and after each timed span: `counter`, the device's own, for `auto`.

    For `meter` it gives None, since nobody reads a plug meter each epoch: see `ask_reading`. Raises UsageError where
    `powermetrics` gives nothing, as `check` does: what `sudo -v` permits ends after five minutes.
    """
    if chosen == "powermetrics":
        with Powermetrics() as tool:
            yield tool.reading
    else:
        yield counter


class Powermetrics:
    """Apple's `powermetrics` as a counter, running for as long as the context is open.

    The tool is root's, so we may not signal it. It ends as soon as it writes to a pipe that nobody reads: when we
    close it, and also when we are killed (Python gives SIGPIPE back to its children; one that ignores it lives on).
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._latest: tuple[float, float, float] | None = None
        """Joules so far, watts of the last sample and when it came; None before the first and once one is missed."""
        self._settled = threading.Event()
        self._unusable = False
        self._closing = False

    def __enter__(self) -> Self:
        """Starts the tool and waits for its first sample; raises UsageError where none comes."""
        if not shutil.which("powermetrics"):
            raise _refusal("powermetrics", "a Mac, whose tool it is")
        with tempfile.TemporaryFile() as said:  # not a pipe, which somebody would have to empty
            try:
                self._child = subprocess.Popen(
                    POWERMETRICS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said,
                    encoding="utf-8", errors="replace",
                )  # fmt: skip
            except OSError as error:
                raise _refusal("powermetrics", f"sudo to run it with ({error.strerror})") from None
            self._thread = threading.Thread(target=self._read, args=(self._child.stdout,), daemon=True)
            self._thread.start()
            try:
                came = self._settled.wait(START_SECONDS)
                if self._latest is None:
                    raise self._failure(came, said)
            except BaseException:  # Ctrl-C, too
                self.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def reading(self) -> tuple[str, float] | None:
        """`joules` as a Reading."""
        joules = self.joules()
        return None if joules is None else ("powermetrics", joules)

    def joules(self) -> float | None:
        """What the chip has drawn since the tool was started; since the last sample, at that one's power.

        None from the first sample on that can't be read, and after the tool's end: a sum that lacks some would be
        too little. None, too, while no sample has come for two seconds.
        """
        latest = self._latest
        if latest is None:
            return None
        joules, watts, at = latest
        since = self._now() - at
        return joules + watts * since if since <= STALE_SECONDS else None

    def close(self) -> None:
        """Ends the tool, within a few seconds; says so where it can't."""
        self._closing = True
        for end in (self._child.terminate, self._child.kill):
            with suppress(PermissionError):  # root's: it ends at its next sample
                end()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(PATIENCE_SECONDS)
            self._thread.join(PATIENCE_SECONDS)
            if self._child.returncode is not None and not self._thread.is_alive():
                return
        terminal.shout("powermetrics does not end, and takes power from what runs here", "sudo killall powermetrics")

    def _failure(self, came: bool, said: IO[bytes]) -> UsageError:
        if self._unusable:
            return _refusal("powermetrics", "Apple's own chip, of which alone it tells the combined power")
        if not came:
            return _refusal("powermetrics", f"a sample of it within {START_SECONDS:g} s")
        said.seek(0)
        words = said.read().decode(errors="replace").strip().splitlines()
        why = f" ({words[-1]})" if words else ""
        return _refusal("powermetrics", f"leave to run it as root{why}: run `sudo -v` in this terminal first")

    def _read(self, pipe: IO[str]) -> None:
        joules = 0.0
        with pipe:
            for sample in parse_samples(pipe):
                if sample is None:
                    self._unusable = True
                if sample is None or self._closing:
                    break
                seconds, watts = sample
                joules += seconds * watts
                self._latest = joules, watts, self._now()
                self._settled.set()
        self._latest = None
        self._settled.set()


def parse_samples(lines: Iterable[str]) -> Iterator[tuple[float, float] | None]:
    """Seconds and mean watts of CPU, GPU and ANE together, of each of `powermetrics`' samples as soon as both are
    there; None for a sample that lacks one of them. Intel's chips have no combined power."""
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


def _refusal(chosen: str, expected: str) -> UsageError:
    return UsageError(f'energy.source: "{chosen}" is not allowed here: expected {expected}')
