"""Numbers as text, for sentences, tables and charts."""

import math


def format_figure(value: float) -> str:
    """Three significant digits: 0.0932, 0.604, 1.52, 31.5, 312. From 1,000 on, a whole number."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.{_decimals(value)}f}" if value >= 0.1 or not value else f"{value:.3g}"


def format_ratio(value: float) -> str:
    """A ratio as `1.52`, or as a fraction if it is below 1: `1/140`."""
    return format_figure(value) if value >= 1 else f"1/{format_figure(1 / value)}"


def format_interval(low: float, high: float, *, ratio: bool = False) -> tuple[str, str]:
    """Both ends, with enough decimals to tell them apart; those of a `ratio` also from 1, unless they are 1."""
    if high > 3 * low or high < (1 + 1e-6) * low:  # far apart, or equal except for rounding errors
        return format_figure(low), format_figure(high)
    for decimals in range(_decimals(high), 7):
        ends = f"{low:,.{decimals}f}", f"{high:,.{decimals}f}"
        rounded = [float(end.replace(",", "")) for end in ends]
        looks_like_one = ratio and any(value == 1 != end for value, end in zip(rounded, (low, high), strict=True))
        if rounded[0] < rounded[1] and not looks_like_one:
            break
    return ends


def _decimals(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3


def format_percent(fraction: float) -> str:
    """Two significant digits or more: 0.31%, 3.1%, 31.4%, 312%."""
    value = 100 * fraction
    return f"{value:,.0f}%" if value >= 200 else f"{value:.1f}%" if value >= 1 else f"{value:.2g}%"


def format_count(count: int, noun: str) -> str:
    """`1 run`, `3 runs`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def format_large(value: float) -> str:
    """A whole number; from a million on, four significant digits and a word: `8.327 million`."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:,.4g} {word}"
    return f"{value:,.0f}"


def format_duration(minutes: float) -> str:
    """A duration, with minutes rounded up: `12 minutes`, `3.5 hours`, `3 days`."""
    minutes = max(1, math.ceil(minutes))
    if minutes < 120:
        return format_count(minutes, "minute")
    hours = minutes / 60
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
