"""The one clock: it waits for the device before it is read."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.devices import Backend

EVERY_MARKED, EVERY_AWAITED = 4, 20
"""Which step is timed: two marks in the queue cost the host some microseconds; waiting costs an asynchronous device
the time until it has work again. Of every fourth, or every twentieth, that is less than a hundredth in all."""


@dataclass
class Span:
    """A stretch of time; `seconds` is there once it has ended."""

    seconds: float = 0.0


class Clock:
    """Adds up seconds by the name of a span.

    Devices work asynchronously: a clock read while work is still queued times the queueing. So
    `synchronize` (a backend's) is called before each reading, at the start of a span and at its end.
    Spans do not nest; what lies between two of them is unaccounted.
    """

    def __init__(self, synchronize: Callable[[], None], now: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = {}
        self.now = now
        self._synchronise = synchronize
        self._open: str | None = None
        self._first: float | None = None

    @contextmanager
    def span(self, name: str) -> Iterator[Span]:
        """Bills the time inside to `name`; nothing is billed when an exception leaves it."""
        if self._open is not None:
            raise RuntimeError(f"span {name} opened inside span {self._open}")
        self._synchronise()
        self._open = name
        span = Span()
        start = self.now()
        self._first = start if self._first is None else self._first
        try:
            yield span
            self._synchronise()
            span.seconds = self.now() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + span.seconds
        finally:
            self._open = None

    def total(self, *names: str) -> float:
        """Seconds of these spans together; one that never ran counts nothing."""
        return sum(self.seconds.get(name, 0.0) for name in names)

    def unaccounted(self) -> float:
        """Seconds since the first span began that no span has."""
        if self._first is None:
            return 0.0
        self._synchronise()
        return self.now() - self._first - sum(self.seconds.values())


class StepTimes:
    """Seconds of a sample of the steps of an epoch, without slowing the others down.

    By marks in the device's own queue where it has them; else the device is waited for before and after a step, which
    is why few are. On a synchronous device every step is timed.
    """

    def __init__(self, backend: "Backend", now: Callable[[], float]):
        self.seconds: list[float] = []
        self._backend, self._now = backend, now
        self._marks: list[tuple[Any, Any, int]] = []
        self._every = (
            EVERY_MARKED if backend.record_event() is not None else EVERY_AWAITED if backend.asynchronous else 1
        )
        self._count = 0

    def step(self, steps: int = 1) -> AbstractContextManager[None]:
        """The context in which the next step is queued; of several queued as one, their mean is timed, as one."""
        self._count += 1
        return self._timed(steps) if self._count % self._every == 0 else nullcontext()

    def collect(self) -> None:
        """Reads the marks since the last call; the device must have been waited for."""
        self.seconds += [self._backend.elapsed_seconds(first, last) / steps for first, last, steps in self._marks]
        self._marks.clear()

    def percentiles(self) -> dict[str, float]:
        """Seconds that 50, 90 and 99 of a hundred steps took at most (nearest rank), each only where enough were timed
        that some took longer: 10 for p90, 100 for p99."""
        ranked = sorted(self.seconds)
        enough = {50: 2, 90: 10, 99: 100}
        return {
            f"time/step_p{share}_seconds": ranked[math.ceil(share / 100 * len(ranked)) - 1]
            for share, least in enough.items()
            if len(ranked) >= least
        }

    @contextmanager
    def _timed(self, steps: int) -> Iterator[None]:
        first = self._backend.record_event()
        if first is not None:
            yield
            self._marks.append((first, self._backend.record_event(), steps))
            return
        self._backend.synchronize()
        start = self._now()
        yield
        self._backend.synchronize()
        self.seconds.append((self._now() - start) / steps)
