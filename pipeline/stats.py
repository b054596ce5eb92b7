"""Medians, means, ratios and differences of a few repeats, each with a 95% interval; pure functions of lists of floats.

Times and speeds are positive and their noise is relative, so they are compared on logarithms: a ratio of geometric
means, each of which estimates the median where the noise is log-normal.

Two groups of unequal variances are compared by Welch's t, the difference over its unpooled standard error (B. L. Welch,
Biometrika 34 (1947) 28-35), with the critical value of W. G. Cochran and G. M. Cox (Experimental Designs, 1950; W. G.
Cochran, Biometrics 20 (1964) 191-195): the mean of both groups' own Student quantiles, weighted by their squared
errors. It keeps its level for every ratio of variances (A. F. S. Lee and J. Gurland, JASA 70 (1975) 933-941). Welch's
own degrees of freedom, by Satterthwaite's formula, do not for few and unequal repeats: with 3 and 10 of them, the 3
varying twice as much, they call a difference that is not there in 7% of trials in place of 5%, and in 9 times as many
as promised at the level that 40 machines need (tests/test_stats.py).

Runs of one process share what differs between processes, and their spread can't show it. With m_i runs in process i, n
in all, variance w within a process and b between processes, the mean of all has the variance w/n + b sum(m_i^2)/n^2,
and their sample variance s^2 the expectation w + b (n^2 - sum(m_i^2))/(n (n - 1)); so

    s^2/n + b (sum(m_i^2) - n)/(n (n - 1))

is an unbiased estimate of the former: s^2/n where every run has a process of its own, b more in one process. `unseen`
is the second term, with b and its degrees of freedom from elsewhere. It is one more squared error in Cochran and Cox's
mean of quantiles: with that of b taken for known, runs of one process would be called different in up to 12% of trials
(tests/test_stats.py).
"""

import math
from collections.abc import Sequence
from statistics import fmean, median, variance
from typing import NamedTuple

from scipy import special

LEVEL = 0.95
POWER = 0.8


class Estimate(NamedTuple):
    """What `n` repeats say of one group; `low` and `high` bound the interval, None where one repeat gives none."""

    value: float
    low: float | None
    high: float | None
    n: int


class Contrast(NamedTuple):
    """One group against another; `low`, `high` and `detectable` are None where one of them has a single repeat.

    `detectable` is the smallest true effect that would have been found with probability POWER.
    """

    value: float
    low: float | None
    high: float | None
    detectable: float | None


class Part(NamedTuple):
    """Of a mean's squared error, with its degrees of freedom. `unseen` is the part that the values can't show."""

    square: float
    degrees: int


NONE = Part(0.0, 1)


def between_processes(sizes: Sequence[int], variance: float, degrees: int) -> Part:
    """What values in processes of these `sizes` can't show; `variance` is that between processes."""
    n = sum(sizes)
    return Part(variance * (sum(size**2 for size in sizes) - n) / (n * (n - 1)), degrees) if n > 1 else NONE


def typical(values: Sequence[float], level: float = LEVEL, unseen: Part = NONE) -> Estimate:
    """The median of positive values, with an interval for it: Student's t on logarithms (of which `unseen` is), valid
    from two values on where the noise is log-normal. (Without such an assumption there is no 95% interval of fewer than
    six values: the range of five holds the median in 1 - 2/2^5 = 93.75% of cases.) Widened to the sample's own median
    if need be."""
    middle = median(values)
    _, low, high, n = mean([math.log(value) for value in values], level, unseen)
    if low is None or high is None:
        return Estimate(middle, None, None, n)
    return Estimate(middle, min(middle, _exp(low)), max(middle, _exp(high)), n)


def mean(values: Sequence[float], level: float = LEVEL, unseen: Part = NONE) -> Estimate:
    """The mean of values, with Student's t interval."""
    n = len(values)
    if n == 1:
        return Estimate(values[0], None, None, 1)
    error, critical, _ = _error([_seen(values), unseen], level)
    return Estimate(fmean(values), fmean(values) - critical * error, fmean(values) + critical * error, n)


def ratio(
    above: Sequence[float], below: Sequence[float], level: float = LEVEL, unseen: Sequence[Part] = ()
) -> Contrast:
    """The ratio of two groups of positive values: of their geometric means, compared on logarithms (of which
    `unseen` is, one for each group). `detectable` is above 1; its reciprocal is found as often."""
    logs = difference([math.log(value) for value in above], [math.log(value) for value in below], level, unseen)
    value, *rest = (None if part is None else _exp(part) for part in logs)
    assert value is not None
    return Contrast(value, *rest)


def difference(
    first: Sequence[float], second: Sequence[float], level: float = LEVEL, unseen: Sequence[Part] = ()
) -> Contrast:
    """The difference of two groups' means. `detectable` is positive."""
    distance = fmean(first) - fmean(second)
    if min(len(first), len(second)) == 1:
        return Contrast(distance, None, None, None)
    error, critical, degrees = _error([_seen(first), _seen(second), *unseen], level)
    # The statistic itself has about Student's distribution with Satterthwaite's degrees of freedom, noncentral where
    # there is an effect (J. Cohen, Statistical Power Analysis for the Behavioral Sciences, 2nd edition, 1988, chapter
    # 2); the error is taken for known. The other tail adds nothing.
    detectable = float(special.nctdtrinc(degrees, 1 - POWER, critical)) * error if error else 0.0
    return Contrast(distance, distance - critical * error, distance + critical * error, detectable)


def _seen(values: Sequence[float]) -> Part:
    return Part(variance(values) / len(values), len(values) - 1)


def _error(parts: Sequence[Part], level: float) -> tuple[float, float, float]:
    """The root of the sum of squared errors, its critical value (Cochran and Cox), and the degrees of freedom of the
    sum (F. E. Satterthwaite, Biometrics Bulletin 2 (1946) 110-114)."""
    total = math.fsum(part.square for part in parts)
    shares = [(part.square / total, part.degrees) for part in parts if part.square]
    critical = math.fsum(share * _quantile(degrees, level) for share, degrees in shares)
    return math.sqrt(total), critical, 1 / math.fsum(share**2 / own for share, own in shares) if shares else math.inf


def shared(level: float, comparisons: int) -> float:
    """The level of each of several intervals that all hold together at `level`, however they depend on each other
    (Bonferroni: O. J. Dunn, JASA 56 (1961) 52-64). Holm's steps would find a little more, but no intervals go with
    them that agree with what is claimed."""
    return 1 - (1 - level) / max(comparisons, 1)


def _quantile(degrees: float, level: float) -> float:
    return float(special.stdtrit(degrees, (1 + level) / 2))


def _exp(value: float) -> float:
    """e^value, infinite where a float can't hold it."""
    return math.exp(value) if value < 709 else math.inf
