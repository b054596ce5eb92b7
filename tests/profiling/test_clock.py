"""The clock synchronizes before each reading, spans add up, and a sample of the steps is timed."""

import random

import pytest
from standin import EventStandin, Standin

from pipeline.devices.cpu import Cpu
from pipeline.profiling.clock import Clock, StepTimes


@pytest.fixture
def device():
    """What `queue` takes passes when somebody synchronizes; `time` is the clock's reading."""
    return Standin()


@pytest.fixture
def clock(device):
    return Clock(device.synchronize, device.now)


def test_it_synchronizes_before_each_reading(device, clock):
    with clock.span("train"):
        device.calls.append("work")
    clock.unaccounted()
    assert device.calls == ["synchronize", "now", "work", "synchronize", "now", "synchronize", "now"]


def test_queued_work_belongs_to_the_span_that_queued_it(device, clock):
    device.queue(7)  # before the span
    with clock.span("train") as span:
        device.queue(2)
        assert span.seconds == 0
    device.queue(5)  # between the spans
    with clock.span("val"):
        device.queue(1)
    assert span.seconds == 2
    assert clock.seconds == {"train": 2, "val": 1}


def test_spans_of_one_name_add_up_and_the_rest_is_unaccounted(device, clock):
    assert clock.unaccounted() == clock.total("train") == 0
    device.time += 9  # before the first span
    for name, seconds in (("train", 1), ("train", 2), ("val", 0.5)):
        with clock.span(name) as span:
            device.queue(seconds)
        assert span.seconds == seconds
        device.time += 50
    assert clock.seconds == {"train": 3, "val": 0.5}
    assert clock.total("train", "val", "never") == 3.5
    assert clock.unaccounted() == 150


def test_spans_do_not_nest(clock):
    with pytest.raises(RuntimeError), clock.span("train"), clock.span("val"):
        pass
    assert clock.seconds == {}


def test_a_span_with_an_exception_is_not_counted(device, clock):
    with pytest.raises(KeyboardInterrupt), clock.span("train") as failed:
        device.queue(10)
        raise KeyboardInterrupt
    with clock.span("train") as span:
        device.queue(2)  # synchronizing at the start waited for the failed span's 10
    assert (failed.seconds, span.seconds, clock.seconds) == (0, 2, {"train": 2})


def test_a_clock_goes_on_from_an_earlier_process_and_forgets_its_own(device, clock):
    with clock.span("setup"):
        device.queue(1000)
    device.time += 1000
    device.queue(7)  # belongs to what is forgotten
    clock.resume({"train": 3.0, "val": 0.5}, unaccounted=4.0)
    assert (clock.seconds, clock.unaccounted()) == ({"train": 3.0, "val": 0.5}, 4.0)
    with clock.span("train"):
        device.queue(2)
    device.time += 10
    assert (clock.total("train", "val"), clock.unaccounted()) == (5.5, 14.0)


# --- steps


def run_steps(times, backend, durations):
    for seconds in durations:
        with times.step():
            backend.queue(seconds)


def test_every_step_of_a_synchronous_device_is_timed(device):
    times = StepTimes(Cpu(), device.now)
    for seconds in (0.5, 0.25, 2.0):
        with times.step():
            device.time += seconds
        device.time += 10  # between two steps
    times.collect()
    assert times.seconds == [0.5, 0.25, 2.0]


def test_every_fourth_step_is_timed_by_events_without_synchronizing():
    backend = EventStandin()
    times = StepTimes(backend, backend.now)
    del backend.calls[:]
    for epoch in (range(1, 7), (), range(7, 14)):
        run_steps(times, backend, epoch)
        assert not {"synchronize", "now"} & set(backend.calls)
        backend.synchronize()
        times.collect()
        del backend.calls[:]
    assert times.seconds == [4, 8, 12]


def test_every_twentieth_step_is_timed_by_synchronizing_where_there_are_no_events():
    backend = Standin()
    times = StepTimes(backend, backend.now)
    for number in range(1, 46):
        backend.calls.append(number)
        run_steps(times, backend, [number])
    timed = ["synchronize", "now", "synchronize", "now"]
    assert backend.calls == [*range(1, 21), *timed, *range(21, 41), *timed, *range(41, 46)]
    times.collect()
    assert times.seconds == [20, 40]  # and nothing of the steps queued before


@pytest.mark.parametrize("kind", [EventStandin, Standin])
def test_a_step_that_fails_is_not_timed(kind):
    backend = kind()
    times = StepTimes(backend, backend.now)
    times._interval = 1
    with pytest.raises(ZeroDivisionError), times.step():
        backend.queue(1)
        raise ZeroDivisionError
    run_steps(times, backend, [2])
    backend.synchronize()
    times.collect()
    assert times.seconds == [2]


@pytest.mark.parametrize(
    ("count", "ranks"),
    [
        (1, {}),
        (2, {50: 1}),
        (11, {50: 6, 90: 10}),
        (99, {50: 50, 90: 90}),
        (100, {50: 50, 90: 90, 99: 99}),
    ],
)
def test_percentiles_are_nearest_ranks_if_enough_steps_were_timed(count, ranks):
    times = StepTimes(Cpu(), lambda: 0.0)
    times.seconds = random.Random(0).sample(range(1, count + 1), count)
    assert times.percentiles() == {f"time/step_p{percent}_seconds": rank for percent, rank in ranks.items()}
