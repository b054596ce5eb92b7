"""What work costs, by price, time and power."""

import math

import pytest
from made import price

from pipeline.comparison import costs, stats

HOURS = 3 * 365.25 * 24
"""Of use, day and night."""


def figures(**seconds):
    return {key: stats.Estimate(value, None, None, 1) for key, value in seconds.items()}


def test_a_bought_machine_is_paid_over_three_years_of_its_use():
    assert costs.owned_hours(price(buy=1.0)) == pytest.approx(HOURS)
    assert costs.owned_hours(price(buy=1.0, hours_per_day=8.0)) == pytest.approx(HOURS / 3)


def test_an_hour_costs_its_share_of_the_price_and_the_electricity():
    bought = price(buy=HOURS, per_hour=2.0, per_kwh=0.5)
    assert costs.hourly(bought, 1000.0) == (2.0, pytest.approx(1.5))
    assert costs.hourly(bought, None) == (2.0, pytest.approx(1.0))
    assert costs.hourly(price(per_hour=2.0, per_kwh=0.5), 1000.0) == (2.0, None)


@pytest.mark.parametrize(
    ("given", "watts", "hours"),
    [
        ({"buy": 1000.0, "per_hour": 0.5}, 500.0, 2000.0),
        ({"buy": 1000.0, "per_hour": 0.5, "per_kwh": 0.2}, 500.0, 2500.0),
        ({"buy": 1000.0, "per_hour": 0.5, "per_kwh": 0.2}, None, 2000.0),
        ({"buy": 1000.0, "per_hour": 0.1, "per_kwh": 0.2}, 500.0, math.inf),
        ({"buy": 1000.0, "per_hour": 0.1, "per_kwh": 0.4}, 500.0, math.inf),
        ({"buy": 1000.0}, 500.0, None),
        ({"per_hour": 1.0}, 500.0, None),
    ],
)
def test_break_even_is_the_price_over_what_an_hour_saves(given, watts, hours):
    found = costs.break_even_hours(price(**given), watts)
    assert found == (None if hours is None else pytest.approx(hours))


def test_a_job_costs_the_hours_of_its_whole_process():
    work = figures(total_seconds=360.0, process_seconds=3600.0)
    found = costs.costs_of_work(price(buy=HOURS, per_hour=3.0, per_kwh=0.5), work)
    assert (found.rented, found.bought, found.with_electricity) == (3.0, pytest.approx(1.0), False)
    assert found.currency == "EUR"


def test_a_job_costs_the_electricity_that_it_drew():
    work = figures(total_seconds=360.0, process_seconds=3600.0, joules=360_000.0)  # 1,000 W
    found = costs.costs_of_work(price(buy=HOURS, per_kwh=0.5), work)
    assert (found.rented, found.bought, found.with_electricity) == (None, pytest.approx(1.5), True)


def test_without_a_price_or_a_time_nothing_is_invented():
    assert costs.costs_of_work(None, figures(process_seconds=1.0)) is None
    assert costs.costs_of_work(price(buy=1.0), figures(total_seconds=1.0)) is None
    assert costs.costs_of_score(None, 1.0, None) is None and costs.costs_of_score(price(buy=1.0), None, None) is None


def test_images_for_money_are_those_of_an_hour():
    found = costs.costs_of_score(price(buy=HOURS, per_hour=2.0, per_kwh=0.5), 1000.0, 2000.0)
    assert (found.rented, found.bought) == (1_800_000, pytest.approx(1_800_000))
    assert found.with_electricity
