"""The clock waits for the device before each reading, and bills each second once."""

import pytest

from pipeline.clock import Clock


class Device:
    """Work is queued at once and done when somebody waits for it; `time` is the clock's reading."""

    def __init__(self):
        self.time, self.queued, self.calls = 100.0, 0.0, []

    def queue(self, seconds):
        self.queued += seconds

    def synchronise(self):
        self.calls.append("synchronise")
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
    return Clock(device.synchronise, device.now)


def test_it_synchronises_before_each_reading(device, clock):
    with clock.span("train"):
        device.calls.append("work")
    assert device.calls == ["synchronise", "now", "work", "synchronise", "now"]


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

    clock = Clock(device.synchronise, device.now)
    with pytest.raises(RuntimeError, match="device lost"), clock.span("train"):
        clock._synchronise = fail
    assert clock.seconds == {}
    clock._synchronise = device.synchronise
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
