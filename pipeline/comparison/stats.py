"""Intervals, ratios and equivalence tests for a few measurements: pure functions of lists of floats.

Times and speeds are positive and their noise is relative. So their logarithms are compared, which gives a ratio of
geometric means. The unit of evidence is the process. But processes that start within an hour share the state of that
hour, so from MIN_SESSIONS sessions on, the unit is the session (see `units`).

Two groups are compared by Welch's t: the difference over its unpooled standard error (B. L. Welch, Biometrika 34 (1947)
28-35). The critical value is that of W. G. Cochran and G. M. Cox (Experimental Designs, 1950; W. G. Cochran, Biometrics
20 (1964) 191-195): the mean of both groups' Student quantiles, weighted by their squared standard errors. It keeps its
level for every ratio of variances (A. F. S. Lee and J. Gurland, JASA 70 (1975) 933-941). Satterthwaite's degrees of
freedom, which most software uses, do not keep it for few runs of unequal number.

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

MIN_UNITS = 3
"""The fewest units that give an interval. Of two, nobody can tell which one is the outlier."""

MIN_SESSIONS = 3
"""From this many sessions on, the session is the unit."""

SESSION_MS = 3_600_000
"""Processes that start within this many milliseconds of the first belong to one session."""


class Estimate(NamedTuple):
    """The typical value of `n` runs, and the ends of its interval. They are None with fewer than MIN_UNITS units."""

    value: float
    low: float | None
    high: float | None
    n: int


class Contrast(NamedTuple):
    """The ratio or difference of two groups. `detectable`: the smallest true effect that is found with probability
    POWER. `low`, `high` and `detectable` are None if a group has fewer than MIN_UNITS units."""

    value: float
    low: float | None
    high: float | None
    detectable: float | None


class Equivalence(NamedTuple):
    """The difference of two groups' accuracies (first minus second) and its 90% interval (None with too few values).
    `pairs`: the number of seeds that both ran, 0 if unpaired; `established`: the interval lies within the margin."""

    difference: float
    low: float | None
    high: float | None
    pairs: int
    established: bool


def sessions(started: Sequence[int | None]) -> list[list[int]]:
    """Group the indices of `started` (milliseconds) by session. A new session begins with the first process that starts
    SESSION_MS or more after the previous session began. If a start is unknown, all processes are one session."""
    starts = [(start, index) for index, start in enumerate(started) if start is not None]
    if len(starts) < len(started):
        return [list(range(len(started)))]
    by_session: list[list[int]] = []
    session_start = 0
    for start, index in sorted(starts):
        if not by_session or start - session_start >= SESSION_MS:
            by_session.append([])
            session_start = start
        by_session[-1].append(index)
    return by_session


def units(values: Sequence[float], started: Sequence[int | None]) -> list[float]:
    """The units of evidence: the positive `values`, or from MIN_SESSIONS sessions on each session's geometric mean."""
    by_session = sessions(started)
    if len(by_session) < MIN_SESSIONS:
        return list(values)
    return [math.exp(fmean(math.log(values[index]) for index in session)) for session in by_session]


def span_hours(started: Sequence[int | None]) -> float:
    """Hours from the first known start to the last; 0 if none is known."""
    starts = [start for start in started if start is not None]
    return (max(starts) - min(starts)) / 3_600_000 if starts else 0.0


def median_estimate(values: Sequence[float], started: Sequence[int | None]) -> Estimate:
    """The median of positive values, with Student's t interval of the units' logarithms. The interval assumes
    log-normal noise. It is widened to include the median if necessary."""
    center = median(values)
    _, low, high, _ = mean_estimate([math.log(value) for value in units(values, started)])
    if low is None or high is None:
        return Estimate(center, None, None, len(values))
    return Estimate(center, min(center, _exp(low)), max(center, _exp(high)), len(values))


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean of values, with Student's t interval."""
    mean, n = fmean(values), len(values)
    if n < MIN_UNITS:
        return Estimate(mean, None, None, n)
    error, critical, _ = _standard_error([values], (1 + LEVEL) / 2)
    return Estimate(mean, mean - critical * error, mean + critical * error, n)


def ratio(numerator: Sequence[float], denominator: Sequence[float], level: float = LEVEL) -> Contrast:
    """The ratio of the geometric means of two groups of positive units. `detectable` is above 1; a ratio of its
    reciprocal would be found as often."""
    logs = difference([math.log(value) for value in numerator], [math.log(value) for value in denominator], level)
    bounds = (None if bound is None else _exp(bound) for bound in logs[1:])
    return Contrast(_exp(logs.value), *bounds)


def difference(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Contrast:
    """The difference of two groups' means, first minus second. `detectable` is positive."""
    distance = fmean(first) - fmean(second)
    if min(len(first), len(second)) < MIN_UNITS:
        return Contrast(distance, None, None, None)
    error, critical, degrees = _standard_error([first, second], (1 + level) / 2)
    # Power by the noncentral t with Satterthwaite's degrees of freedom (J. Cohen, Statistical Power Analysis for the
    # Behavioral Sciences, 2nd edition, 1988, chapter 2). The other tail adds nothing.
    detectable = float(special.nctdtrinc(degrees, 1 - POWER, critical)) * error if error else 0.0
    return Contrast(distance, distance - critical * error, distance + critical * error, detectable)


def equivalence(first: Mapping[int, float], second: Mapping[int, float], margin: float) -> Equivalence:
    """Test whether two groups' values, by seed, are equal to within `margin`: two one-sided tests at 1 - LEVEL.
    Values are paired if the groups share MIN_UNITS seeds: a seed fixes the split and the order of the images."""
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) >= MIN_UNITS:
        groups = [[first[seed] - second[seed] for seed in seeds]]
        pairs, distance = len(seeds), fmean(groups[0])
    else:
        groups = [list(first.values()), list(second.values())]
        pairs, distance = 0, fmean(groups[0]) - fmean(groups[1])
        if min(map(len, groups)) < MIN_UNITS:
            return Equivalence(distance, None, None, pairs, established=False)
    error, critical, _ = _standard_error(groups, LEVEL)
    low, high = distance - critical * error, distance + critical * error
    return Equivalence(distance, low, high, pairs, established=-margin < low and high < margin)


def bonferroni(level: float, comparisons: int) -> float:
    """The level that each of several intervals needs so that all hold together at `level`, however they depend on each
    other (O. J. Dunn, JASA 56 (1961) 52-64)."""
    return 1 - (1 - level) / max(comparisons, 1)


def _standard_error(groups: Sequence[Sequence[float]], quantile: float) -> tuple[float, float, float]:
    """The standard error of a group's mean, or of the difference of two groups' means.

    Also returns its critical value at the one-sided `quantile` (Cochran and Cox) and its degrees of freedom
    (F. E. Satterthwaite, Biometrics Bulletin 2 (1946) 110-114).
    """
    variances = [(variance(values) / len(values), len(values) - 1) for values in groups]
    total = math.fsum(squared for squared, _ in variances)
    weights = [(squared / total, degrees) for squared, degrees in variances if squared]
    critical = math.fsum(weight * float(special.stdtrit(degrees, quantile)) for weight, degrees in weights)
    degrees = 1 / math.fsum(weight**2 / degrees for weight, degrees in weights) if weights else math.inf
    return math.sqrt(total), critical, degrees


def _exp(value: float) -> float:
    """e^value; infinity if that overflows."""
    return math.exp(value) if value < 709 else math.inf
