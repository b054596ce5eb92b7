"""The one clock: it waits for the device before it is read."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Span:
    """A stretch of time; `seconds` is there once it has ended."""

    seconds: float = 0.0


class Clock:
    """Adds up seconds by the name of a span.

    Devices work asynchronously: a clock read while work is still queued times the queueing. So
    `synchronise` (a backend's) is called before each reading, at the start of a span and at its end.
    Spans do not nest; what lies between two of them is unaccounted.
    """

    def __init__(self, synchronise: Callable[[], None], now: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = {}
        self._synchronise = synchronise
        self._now = now
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
        start = self._now()
        self._first = start if self._first is None else self._first
        try:
            yield span
            self._synchronise()
            span.seconds = self._now() - start
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
        return self._now() - self._first - sum(self.seconds.values())
