"""Noise within a process and between processes: estimated as the formulas say, from what a file holds."""

import math

import numpy as np
import pytest

from pipeline import noise


def process(*seconds, session="s1", date="2026-01-01T00:00:00+00:00", work="step", backend="cpu", **under):
    """A process of the file; made-up figures."""
    told = {"date": date, "hardware": "CPU A", "torch": "2.14.1", "threads": 2, "settings": []} | under
    return {
        "session": session, "backend": backend, "conditions": told, "seconds": {work: list(seconds)},
        "accuracies": {"training": [0.7]},
    }  # fmt: skip


def test_components_by_hand():
    # Means 2, 4 and 9; mean squares 2 within (6 over 6 - 3) and 26 between (52 over 2); 2 values in each.
    assert noise.components([[1, 3], [3, 5], [8, 10]]) == pytest.approx((2, (26 - 2) / 2))
    # Of 1 and 3 values: 2 within (of 2 degrees), 12 between (of 1), and n0 = 4 - (1 + 9) / 4.
    assert noise.components([[6], [1, 2, 3]]) == pytest.approx((1, (12 - 1) / 1.5))


def test_groups_closer_than_their_values_allow_do_not_differ():
    assert noise.components([[1, 3], [1.1, 2.9]]) == (pytest.approx(1.81), 0)


@pytest.mark.parametrize("groups", [[], [[1.0, 2.0]], [[1.0], [2.0], [3.0]]])
def test_what_can_not_be_told_apart_is_not_estimated(groups):
    assert noise.components(groups) is None


def test_components_are_unbiased_in_unequal_groups():
    generator, found = np.random.default_rng(0), []
    for _ in range(4000):
        means = generator.normal(0, 2, 6)
        groups = [generator.normal(m, 1, n).tolist() for m, n in zip(means, (1, 1, 2, 3, 5, 9), strict=True)]
        found.append(noise.components(groups))
    within, between = np.mean(found, axis=0)
    assert within == pytest.approx(1, rel=0.03) and between == pytest.approx(4, rel=0.06)


def test_each_work_hardware_and_settings_are_estimated_apart():
    processes = [process(1.0, 1.1), process(1.0, 1.2)]
    processes += [process(5.0, 5.0, work="training"), process(6.0, 6.0, work="training")]
    processes += [process(1.0, 1.0, hardware="CPU B"), process(1.0, 1.0, settings=["threads=1"])]  # one each
    step, training = noise.measured(processes)
    within, between = noise.components([[math.log(1.0), math.log(1.1)], [math.log(1.0), math.log(1.2)]])
    assert (step.within, step.between) == pytest.approx((within**0.5, between**0.5))
    assert (step.work, training.work) == ("step", "training")
    assert training.between == pytest.approx(math.log(6 / 5) / 2**0.5) and training.within == 0
    assert training.accuracies == [[0.7], [0.7]] and step.accuracies == []


def test_what_differs_between_hours_is_estimated_where_there_are_several():
    first = [process(1.0, 1.0), process(1.1, 1.1)]
    later = [process(2.0, 2.0, session="s2", date="2026-01-02T02:00:00+00:00"), process(2.2, 2.2, session="s2")]
    (alone,), (both,) = noise.measured(first), noise.measured(first + later)
    assert alone.hours is None and alone.span == 0
    assert both.span == 26
    assert both.hours == pytest.approx(math.sqrt(math.log(2) ** 2 / 2 - math.log(1.1) ** 2 / 4))


def test_the_largest_of_a_backend_and_of_its_trainings():
    processes = [process(1.0, 1.0), process(1.1, 1.1), process(1.0, 1.0, work="b"), process(1.2, 1.2, work="b")]
    processes += [process(1.0, 1.0, backend="cuda"), process(1.01, 1.01, backend="cuda")]
    for hardware, factor in (("CPU A", 1.02), ("CPU B", 1.04)):
        processes += [process(value, value, work="blog", hardware=hardware) for value in (1.0, factor)]
    found = noise.between(noise.measured(processes))

    def of(factor):
        return pytest.approx(math.log(factor) / 2**0.5), 1

    assert found == {"cpu": {"any": of(1.2), "images": of(1.04)}, "cuda": {"any": of(1.01)}}


def test_what_stands_for_trainings():
    largest, images, step = noise.Between(0.05, 9), noise.Between(0.01, 9), noise.Between(0.02, 4)
    measured = {"cpu": {"any": largest, "images": images}, "cuda": {"any": step}}
    assert noise.known(measured, "cpu", "images") == images
    assert noise.known(measured, "cpu", "features") == largest
    assert noise.known(measured, "cuda", "images") == step
    assert noise.known(measured, "mps", "images") == largest
