"""Measure time. Devices work asynchronously, so the device is synchronized before each reading of the clock."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.devices import Backend

EVENT_INTERVAL, SYNC_INTERVAL = 4, 20
"""Time every 4th step by events, or every 20th by synchronizing, so that timing costs less than 1% of the time."""


@dataclass
class Span:
    """A timed interval. `seconds` is set at its end."""

    seconds: float = 0.0


class Clock:
    """Sums the seconds of named spans. Spans do not nest. Time outside them is unaccounted."""

    def __init__(self, synchronize: Callable[[], None], now: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = {}
        self.now = now
        self._synchronize = synchronize
        self._open: str | None = None
        self._first_start: float | None = None

    @contextmanager
    def span(self, name: str) -> Iterator[Span]:
        """Add the time inside to `name`, unless an exception is raised inside."""
        if self._open is not None:
            raise RuntimeError(f"span {name} opened inside span {self._open}")
        self._synchronize()
        self._open = name
        span = Span()
        start = self.now()
        if self._first_start is None:
            self._first_start = start
        try:
            yield span
            self._synchronize()
            span.seconds = self.now() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + span.seconds
        finally:
            self._open = None

    def total(self, *names: str) -> float:
        """The sum of these spans in seconds. A span that never ran counts as 0."""
        return sum(self.seconds.get(name, 0.0) for name in names)

    def resume(self, seconds: dict[str, float], unaccounted: float) -> None:
        """Continue the spans of an earlier process, and discard all that this clock has measured."""
        self._synchronize()
        self.seconds = dict(seconds)
        self._first_start = self.now() - sum(seconds.values()) - unaccounted

    def unaccounted(self) -> float:
        """Seconds since the start of the first span that no span covers."""
        if self._first_start is None:
            return 0.0
        self._synchronize()
        return self.now() - self._first_start - sum(self.seconds.values())


class StepTimes:
    """Times a sample of the training steps, in `seconds`, so that the other steps are not slowed down.

    It uses events on the device's queue, or synchronizes before and after a step if the device has no events. On a
    synchronous device every step is timed.
    """

    def __init__(self, backend: "Backend", now: Callable[[], float]):
        self.seconds: list[float] = []
        self._backend, self._now = backend, now
        self._events: list[tuple[Any, Any]] = []
        self._has_events = backend.record_event() is not None
        self._interval = EVENT_INTERVAL if self._has_events else SYNC_INTERVAL if backend.asynchronous else 1
        self._count = 0

    def step(self) -> AbstractContextManager[None]:
        """The context to run the next step in."""
        self._count += 1
        if self._count % self._interval:
            return nullcontext()
        return self._by_events() if self._has_events else self._by_clock()

    def collect(self) -> None:
        """Read the events since the last call. Synchronize the device first."""
        self.seconds += [self._backend.elapsed_seconds(first, last) for first, last in self._events]
        self._events.clear()

    def percentiles(self) -> dict[str, float]:
        """The 50th, 90th and 99th percentile (nearest rank) in seconds. A percentile is left out if too few steps were
        timed for any to lie above it."""
        ranked = sorted(self.seconds)
        return {
            f"time/step_p{percent}_seconds": ranked[math.ceil(percent / 100 * len(ranked)) - 1]
            for percent, min_steps in ((50, 2), (90, 10), (99, 100))
            if len(ranked) >= min_steps
        }

    @contextmanager
    def _by_events(self) -> Iterator[None]:
        first = self._backend.record_event()
        yield
        self._events.append((first, self._backend.record_event()))

    @contextmanager
    def _by_clock(self) -> Iterator[None]:
        self._backend.synchronize()
        start = self._now()
        yield
        self._backend.synchronize()
        self.seconds.append(self._now() - start)
