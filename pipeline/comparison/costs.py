"""What a machine's work costs, from its price, the time it takes and the power it draws."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline import config
from pipeline.comparison import stats

OWNED_YEARS = 3
"""Years over which the price of a bought machine is spread."""


@dataclass(frozen=True)
class Costs:
    """`rented` and `bought`: of one job, or images for one unit of `currency`; None where that price is not known.
    `with_electricity`: whether `bought` includes it, which takes a price of it and measured watts."""

    currency: str
    rented: float | None
    bought: float | None
    with_electricity: bool


def owned_hours(price: config.Price) -> float:
    """Hours of use over which a bought machine's price is spread: by `hours_per_day`, else day and night."""
    return OWNED_YEARS * 365.25 * (price.hours_per_day or 24)


def _electricity(price: config.Price, watts: float | None) -> float:
    """Of an hour; 0 where its price or the watts are not known."""
    return watts / 1000 * price.per_kwh if watts is not None and price.per_kwh is not None else 0.0


def hourly(price: config.Price, watts: float | None) -> tuple[float | None, float | None]:
    """What an hour costs, rented and bought; the latter with electricity where its price and the watts are known."""
    return price.per_hour, None if price.buy is None else price.buy / owned_hours(price) + _electricity(price, watts)


def break_even_hours(price: config.Price, watts: float | None) -> float | None:
    """Hours of use after which buying costs less than renting: buy / (per_hour - kW x per_kwh); infinite where the
    electricity costs as much as the rent. None without both prices."""
    if price.buy is None or price.per_hour is None:
        return None
    saved = price.per_hour - _electricity(price, watts)
    return price.buy / saved if saved > 0 else float("inf")


def costs_of_work(price: config.Price | None, figures: Mapping[str, stats.Estimate]) -> Costs | None:
    """Of one job, by the time that its whole process takes; None without a price or that time."""
    if price is None or "process_seconds" not in figures:
        return None
    watts = None
    if "joules" in figures and "total_seconds" in figures:
        watts = figures["joules"].value / figures["total_seconds"].value
    hours = figures["process_seconds"].value / 3600
    rented, bought = hourly(price, watts)
    return Costs(
        currency=price.currency,
        rented=None if rented is None else rented * hours,
        bought=None if bought is None else bought * hours,
        with_electricity=watts is not None and price.per_kwh is not None,
    )


def costs_of_score(price: config.Price | None, speed: float | None, watts: float | None) -> Costs | None:
    """Images for one unit of money, at the `speed` (images/s) of the first step; None without a price or that speed."""
    if price is None or speed is None:
        return None
    images = speed * 3600
    rented, bought = hourly(price, watts)
    return Costs(
        currency=price.currency,
        rented=None if rented is None else images / rented,
        bought=None if bought is None else images / bought,
        with_electricity=watts is not None and price.per_kwh is not None,
    )
