"""The cost of a job, from the machine's price, the time and the power."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline import config
from pipeline.comparison import stats

OWNED_YEARS = 3
"""Years over which the price of a bought machine is spread."""


@dataclass(frozen=True)
class Costs:
    """On a rented and on a bought machine: the cost of one job, or the images for one unit of `currency`. None without
    that price. `with_electricity`: `bought` includes electricity, because its price and the watts are known."""

    currency: str
    rented: float | None
    bought: float | None
    with_electricity: bool


def costs_of_work(price: config.Price | None, figures: Mapping[str, stats.Estimate]) -> Costs | None:
    """The cost of one job, by the time of its whole process; None without a price or that time."""
    if price is None or "process_seconds" not in figures:
        return None
    watts = None
    if "joules" in figures and "total_seconds" in figures:
        watts = figures["joules"].value / figures["total_seconds"].value
    hours = figures["process_seconds"].value / 3600
    return _costs(price, watts, lambda hourly: hourly * hours)


def costs_of_score(price: config.Price | None, speed: float | None, watts: float | None) -> Costs | None:
    """The images for one unit of money, at `speed` (images/s, of the first step); None without a price or a speed."""
    if price is None or speed is None:
        return None
    images = speed * 3600
    return _costs(price, watts, lambda hourly: images / hourly)


def _costs(price: config.Price, watts: float | None, from_hourly: Callable[[float], float]) -> Costs:
    """Costs by `from_hourly`, which turns the cost of an hour into the figure. The price of a bought machine is spread
    over its hours of use (`hours_per_day`, else 24). Electricity is added if its price and the watts are known."""
    bought = None
    if price.buy is not None:
        owned_hours = OWNED_YEARS * 365.25 * (price.hours_per_day or 24)
        bought = from_hourly(price.buy / owned_hours + _electricity(price, watts))
    return Costs(
        currency=price.currency,
        rented=None if price.per_hour is None else from_hourly(price.per_hour),
        bought=bought,
        with_electricity=watts is not None and price.per_kwh is not None,
    )


def break_even_hours(price: config.Price, watts: float | None) -> float | None:
    """Hours of use after which buying costs less than renting: buy / (per_hour - kW x per_kwh). Infinite if electricity
    costs as much as the rent; None without both prices."""
    if price.buy is None or price.per_hour is None:
        return None
    saved = price.per_hour - _electricity(price, watts)
    return price.buy / saved if saved > 0 else math.inf


def _electricity(price: config.Price, watts: float | None) -> float:
    """The cost of an hour's electricity; 0 if its price or the watts are not known."""
    return watts / 1000 * price.per_kwh if watts is not None and price.per_kwh is not None else 0.0
