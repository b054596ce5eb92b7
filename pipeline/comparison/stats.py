"""Intervals, ratios and equivalence of a few measurements; pure functions of lists of floats.

Times and speeds are positive and their noise is relative, so they are compared on logarithms: a ratio of geometric
means. The unit of evidence is a process. Processes that started within an hour share what that hour had in common, so
from three sessions on the unit is the session, by the geometric mean of its processes (`units`).

Two groups are compared by Welch's t, the difference over its unpooled standard error (B. L. Welch, Biometrika 34 (1947)
28-35), with the critical value of W. G. Cochran and G. M. Cox (Experimental Designs, 1950; W. G. Cochran, Biometrics 20
(1964) 191-195): the mean of both groups' own Student quantiles, weighted by their squared errors. It keeps its level
for every ratio of variances (A. F. S. Lee and J. Gurland, JASA 70 (1975) 933-941). Satterthwaite's degrees of freedom,
which most software uses, do not for few and unequal repeats.

Equal accuracy is shown by two one-sided tests (D. J. Schuirmann, J. Pharmacokinet. Biopharm. 15 (1987) 657-680): the
90% interval of the difference lies within the margin.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, variance
from typing import NamedTuple

from scipy import special

LEVEL = 0.95
POWER = 0.8

FEWEST = 3
"""Fewest units that give an interval: of two, one cannot tell which is the odd one."""

SESSIONS = 3
"""From so many sessions on, the session is the unit."""

SESSION_MS = 3_600_000
"""Processes that started within so many milliseconds make one session."""


class Estimate(NamedTuple):
    """What `n` runs say of one group; `low` and `high` bound the interval, None with fewer than FEWEST units."""

    value: float
    low: float | None
    high: float | None
    n: int


class Contrast(NamedTuple):
    """One group against another; `low`, `high` and `detectable` are None where one has fewer than FEWEST units.

    `detectable` is the smallest true effect that would have been found with probability POWER.
    """

    value: float
    low: float | None
    high: float | None
    detectable: float | None


class Equivalence(NamedTuple):
    """The difference of two groups' accuracies (first less second) and its 90% interval, None where too few values give
    one. `pairs`: how many seeds both ran, 0 where the comparison is unpaired. `established`: the interval lies within
    the margin."""

    difference: float
    low: float | None
    high: float | None
    pairs: int
    established: bool


def sessions(started: Sequence[int | None]) -> list[list[int]]:
    """Indices of `started` (milliseconds) by session. A session begins with the first process that starts SESSION_MS or
    more after the session before it began. Without all start times there is one session."""
    if any(start is None for start in started):
        return [list(range(len(started)))]
    groups: list[list[int]] = []
    began = 0
    for index in sorted(range(len(started)), key=lambda index: started[index] or 0):
        start = started[index] or 0
        if not groups or start - began >= SESSION_MS:
            groups.append([])
            began = start
        groups[-1].append(index)
    return groups


def units(values: Sequence[float], started: Sequence[int | None]) -> list[float]:
    """The units of evidence of positive `values`: themselves, or with SESSIONS sessions or more each one's geometric
    mean."""
    groups = sessions(started)
    if len(groups) < SESSIONS:
        return list(values)
    return [math.exp(fmean(math.log(values[index]) for index in group)) for group in groups]


def typical(values: Sequence[float], started: Sequence[int | None], level: float = LEVEL) -> Estimate:
    """The median of positive values, with Student's t interval of the units' logarithms, which holds where the noise is
    log-normal; widened to the median if need be."""
    middle = median(values)
    _, low, high, _ = mean([math.log(value) for value in units(values, started)], level)
    if low is None or high is None:
        return Estimate(middle, None, None, len(values))
    return Estimate(middle, min(middle, _exp(low)), max(middle, _exp(high)), len(values))


def mean(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """The mean of values, with Student's t interval from FEWEST values on."""
    n = len(values)
    if n < FEWEST:
        return Estimate(fmean(values), None, None, n)
    error, critical, _ = _error([values], (1 + level) / 2)
    return Estimate(fmean(values), fmean(values) - critical * error, fmean(values) + critical * error, n)


def ratio(above: Sequence[float], below: Sequence[float], level: float = LEVEL) -> Contrast:
    """The ratio of the geometric means of two groups of positive units. `detectable` is above 1; its reciprocal is
    found as often."""
    logs = difference([math.log(value) for value in above], [math.log(value) for value in below], level)
    value, *rest = (None if part is None else _exp(part) for part in logs)
    assert value is not None
    return Contrast(value, *rest)


def difference(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Contrast:
    """The difference of two groups' means. `detectable` is positive."""
    distance = fmean(first) - fmean(second)
    if min(len(first), len(second)) < FEWEST:
        return Contrast(distance, None, None, None)
    error, critical, degrees = _error([first, second], (1 + level) / 2)
    # Power by the noncentral t with Satterthwaite's degrees of freedom (J. Cohen, Statistical Power Analysis for the
    # Behavioral Sciences, 2nd edition, 1988, chapter 2). The other tail adds nothing.
    detectable = float(special.nctdtrinc(degrees, 1 - POWER, critical)) * error if error else 0.0
    return Contrast(distance, distance - critical * error, distance + critical * error, detectable)


def equivalence(
    first: Mapping[int, float], second: Mapping[int, float], margin: float, level: float = LEVEL
) -> Equivalence:
    """Whether two groups' values by seed are equal to within `margin`, by two one-sided tests at 1 - `level`.

    Paired by seed where both have FEWEST seeds in common: split and order are then the same on both sides. Else
    unpaired, by Welch with Cochran and Cox.
    """
    shared = sorted(first.keys() & second.keys())
    if len(shared) >= FEWEST:
        groups = [[first[seed] - second[seed] for seed in shared]]
        distance = fmean(groups[0])
    else:
        shared = []
        groups = [list(first.values()), list(second.values())]
        distance = fmean(groups[0]) - fmean(groups[1])
        if min(map(len, groups)) < FEWEST:
            return Equivalence(distance, None, None, 0, established=False)
    error, critical, _ = _error(groups, level)
    low, high = distance - critical * error, distance + critical * error
    return Equivalence(distance, low, high, len(shared), established=-margin < low and high < margin)


def shared(level: float, comparisons: int) -> float:
    """The level of each of several intervals that all hold together at `level`, however they depend on each other
    (Bonferroni: O. J. Dunn, JASA 56 (1961) 52-64)."""
    return 1 - (1 - level) / max(comparisons, 1)


def _error(groups: Sequence[Sequence[float]], quantile: float) -> tuple[float, float, float]:
    """The standard error of the sum or difference of the groups' means, its critical value at the one-sided `quantile`
    (Cochran and Cox), and its degrees of freedom (F. E. Satterthwaite, Biometrics Bulletin 2 (1946) 110-114)."""
    squares = [(variance(values) / len(values), len(values) - 1) for values in groups]
    total = math.fsum(square for square, _ in squares)
    shares = [(square / total, degrees) for square, degrees in squares if square]
    critical = math.fsum(share * float(special.stdtrit(degrees, quantile)) for share, degrees in shares)
    degrees = 1 / math.fsum(share**2 / degrees for share, degrees in shares) if shares else math.inf
    return math.sqrt(total), critical, degrees


def _exp(value: float) -> float:
    """e^value, infinite where a float can't hold it."""
    return math.exp(value) if value < 709 else math.inf
