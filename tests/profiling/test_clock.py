"""The clock waits for the device before each reading, and bills each second once; some steps are timed alone."""

import random

import pytest
from standin import Marked, Standin

from pipeline.devices.cpu import Cpu
from pipeline.profiling.clock import Clock, StepTimes


class Device:
    """Work is queued at once and done when somebody waits for it; `time` is the clock's reading."""

    def __init__(self):
        self.time, self.queued, self.calls = 100.0, 0.0, []

    def queue(self, seconds):
        self.queued += seconds

    def synchronize(self):
        self.calls.append("synchronize")
        self.time += self.queued
        self.queued = 0.0

    def now(self):
        self.calls.append("now")
        return self.time


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def clock(device):
    return Clock(device.synchronize, device.now)


def test_it_synchronises_before_each_reading(device, clock):
    with clock.span("train"):
        device.calls.append("work")
    assert device.calls == ["synchronize", "now", "work", "synchronize", "now"]


def test_queued_work_is_billed_where_it_was_queued(device, clock):
    device.queue(7)  # of before: not the span's
    with clock.span("train") as span:
        device.queue(2)
        assert span.seconds == 0
    device.queue(5)
    with clock.span("val"):
        device.queue(1)
    assert span.seconds == 2
    assert clock.seconds == {"train": 2, "val": 1}


def test_spans_of_one_name_add_up(device, clock):
    spans = []
    for seconds in (1, 2, 4):
        with clock.span("train") as span:
            device.queue(seconds)
        spans.append(span.seconds)
        device.time += 50  # between two spans: nobody's
    with clock.span("val"):
        device.queue(0.5)
    assert spans == [1, 2, 4]
    assert clock.seconds == {"train": 7, "val": 0.5}


def test_total(device, clock):
    assert clock.total("train") == 0
    for name, seconds in (("train", 3), ("val", 0.5), ("decode", 8)):
        with clock.span(name):
            device.queue(seconds)
    assert clock.total("train", "val", "never") == 3.5
    assert clock.total() == 0


def test_spans_do_not_nest(device, clock):
    with pytest.raises(RuntimeError, match="span val opened inside span train"), clock.span("train"):
        device.queue(1)
        with clock.span("val"):
            pass
    assert clock.seconds == {}
    with clock.span("val"):
        device.queue(1)
    assert clock.seconds == {"val": 1}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_bills_nothing(device, clock, error):
    with clock.span("train"):
        device.queue(1)
    with pytest.raises(error), clock.span("train") as failed:
        device.queue(10)
        raise error
    assert failed.seconds == 0
    assert clock.seconds == {"train": 1}
    with clock.span("train") as next_one:
        device.queue(2)  # the failed span's 10 were waited for at this one's start
    assert next_one.seconds == 2
    assert clock.seconds == {"train": 3}


def test_a_device_that_fails_when_waited_for(device):
    def fail():
        raise RuntimeError("device lost")

    clock = Clock(device.synchronize, device.now)
    with pytest.raises(RuntimeError, match="device lost"), clock.span("train"):
        clock._synchronise = fail
    assert clock.seconds == {}
    clock._synchronise = device.synchronize
    with clock.span("train"):
        device.queue(1)
    assert clock.seconds == {"train": 1}


def test_by_itself_it_reads_a_clock_that_never_goes_back():
    clock = Clock(lambda: None)
    with clock.span("train") as span:
        sum(range(1000))
    assert 0 < span.seconds == clock.seconds["train"]


def test_what_no_span_has_is_unaccounted(device, clock):
    assert clock.unaccounted() == 0
    device.time += 9  # before the first span
    with clock.span("decode"):
        device.queue(3)
    device.time += 2
    device.queue(0.5)  # waited for before the clock is read
    assert clock.unaccounted() == 2.5
    with clock.span("train"):
        device.queue(4)
    assert clock.unaccounted() == 2.5


# --- steps


def stepped(times, backend, durations):
    """Takes steps that keep `backend` busy for these seconds."""
    for seconds in durations:
        with times.step():
            backend.queue(seconds)


def test_every_step_of_a_synchronous_device_is_timed(device):
    times = StepTimes(Cpu(), device.now)
    for seconds in (0.5, 0.25, 2.0):
        with times.step():
            device.time += seconds
        device.time += 10  # between two steps: nobody's
    times.collect()
    assert times.seconds == [0.5, 0.25, 2.0]


def test_every_fourth_step_is_timed_by_marks_without_waiting_for_the_device():
    backend = Marked()
    times = StepTimes(backend, backend.now)
    assert backend.calls.count("mark") == 1  # whether there are any
    del backend.calls[:]
    stepped(times, backend, range(1, 14))
    assert backend.calls == ["mark"] * 6  # neither waited for nor the clock read
    assert times.seconds == []
    backend.synchronize()
    times.collect()
    assert times.seconds == [4, 8, 12]


def test_of_steps_that_are_queued_as_one_their_mean_counts():
    for backend in (Marked(), Standin()):
        times = StepTimes(backend, backend.now)
        times._every = 1
        for seconds, steps in ((8, 8), (3, 2)):
            with times.step(steps):
                backend.queue(seconds)
        backend.synchronize()
        times.collect()
        assert times.seconds == [1, 1.5]


def test_marks_are_read_once_and_steps_counted_on_over_epochs():
    backend = Marked()
    times = StepTimes(backend, backend.now)
    for epoch in ((1, 2, 3, 4, 5), (), (6, 7, 8)):
        stepped(times, backend, epoch)
        backend.synchronize()
        times.collect()
    assert times.seconds == [4, 8]


def test_every_twentieth_step_is_waited_for_where_there_are_no_marks():
    backend = Standin()
    times = StepTimes(backend, backend.now)
    for number in range(1, 46):
        backend.calls.append(number)
        stepped(times, backend, [number])
    waited = ["synchronize", "now", "synchronize", "now"]
    before = [number for number in range(1, 46) if number <= 20]
    assert backend.calls == [*before, *waited, *range(21, 41), *waited, *range(41, 46)]
    times.collect()
    assert times.seconds == [20, 40]  # and nothing of the steps queued before


def test_a_step_that_fails_is_not_timed():
    for backend in (Marked(), Standin()):
        times = StepTimes(backend, backend.now)
        times._every = 1
        with pytest.raises(ZeroDivisionError), times.step():
            backend.queue(1)
            raise ZeroDivisionError
        stepped(times, backend, [2])
        backend.synchronize()
        times.collect()
        assert times.seconds == [2]


@pytest.mark.parametrize(
    ("count", "ranks"),
    [
        (0, {}),
        (1, {}),
        (2, {50: 1}),
        (3, {50: 2}),
        (9, {50: 5}),
        (10, {50: 5, 90: 9}),
        (11, {50: 6, 90: 10}),
        (99, {50: 50, 90: 90}),
        (100, {50: 50, 90: 90, 99: 99}),
        (101, {50: 51, 90: 91, 99: 100}),
        (1000, {50: 500, 90: 900, 99: 990}),
    ],
)
def test_percentiles_are_nearest_ranks_where_enough_steps_were_timed(count, ranks):
    times = StepTimes(Cpu(), lambda: 0.0)
    times.seconds = random.Random(0).sample(range(1, count + 1), count)
    before = list(times.seconds)
    assert times.percentiles() == {f"time/step_p{share}_seconds": rank for share, rank in ranks.items()}
    assert times.seconds == before
