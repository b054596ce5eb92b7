"""What work costs, by price, time and power."""

import math

import pytest
from made import price

from pipeline.comparison import costs
from pipeline.comparison.stats import Estimate

HOURS = 3 * 365.25 * 24
"""Of three years, day and night."""


def figures(**values):
    return {key: Estimate(value, None, None, 1) for key, value in values.items()}


@pytest.mark.parametrize(
    ("given", "watts", "hours"),
    [({"buy": 1000.0, "per_hour": 0.5}, 500.0, 2000.0),
     ({"buy": 1000.0, "per_hour": 0.5, "per_kwh": 0.2}, 500.0, 2500.0),
     ({"buy": 1000.0, "per_hour": 0.5, "per_kwh": 0.2}, None, 2000.0),
     ({"buy": 1000.0, "per_hour": 0.1, "per_kwh": 0.2}, 500.0, math.inf),
     ({"buy": 1000.0}, 500.0, None), ({"per_hour": 1.0}, 500.0, None)],
)  # fmt: skip
def test_break_even_is_the_price_over_what_an_hour_saves(given, watts, hours):
    expected = None if hours is None else pytest.approx(hours)
    assert costs.break_even_hours(price(**given), watts) == expected


@pytest.mark.parametrize(
    ("given", "joules", "rented", "bought"),
    [({"buy": HOURS, "per_hour": 3.0, "per_kwh": 0.5}, None, 3.0, 1.0),
     ({"buy": HOURS, "hours_per_day": 8.0}, None, None, 3.0),
     ({"buy": HOURS, "per_kwh": 0.5}, 360_000.0, None, 1.5),  # 1,000 W
     ({"per_hour": 3.0, "per_kwh": 0.5}, 360_000.0, 3.0, None)],
)  # fmt: skip
def test_a_job_costs_the_hour_of_its_whole_process(given, joules, rented, bought):
    energy = {} if joules is None else {"joules": joules}
    cost = costs.costs_of_work(price(**given), figures(total_seconds=360.0, process_seconds=3600.0, **energy))
    assert cost == costs.Costs("EUR", rented, None if bought is None else pytest.approx(bought), joules is not None)


def test_images_for_money_are_those_of_an_hour():
    cost = costs.costs_of_score(price(buy=HOURS, per_hour=2.0, per_kwh=0.5), 1000.0, 2000.0)
    assert cost == costs.Costs("EUR", 1_800_000, pytest.approx(1_800_000), with_electricity=True)


def test_without_a_price_or_a_time_nothing_is_invented():
    assert costs.costs_of_work(None, figures(process_seconds=1.0)) is None
    assert costs.costs_of_work(price(buy=1.0), figures(total_seconds=1.0)) is None
    assert costs.costs_of_score(None, 1.0, None) is None and costs.costs_of_score(price(buy=1.0), None, None) is None
