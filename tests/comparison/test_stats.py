"""Intervals and ratios: against scipy, by hand, and in simulations of what they promise."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pipeline.comparison import stats

A, B = [10.0, 11.0, 12.5, 9.5, 10.5], [7.0, 7.2, 6.9]
HOUR, MINUTE = 3_600_000, 60_000


def logs(values):
    return [math.log(value) for value in values]


def by_seed(values, first=0):
    return dict(enumerate(values, first))


def times(generator, count, spread):
    """`count` times whose logarithms vary by `spread`; their median is 1."""
    return np.exp(generator.normal(0, spread, count)).tolist()


def excludes(interval, value):
    return not interval.low <= value <= interval.high


def share(trial, trials, seed):
    """How often `trial` of a random generator is true."""
    generator = np.random.default_rng(seed)
    return sum(trial(generator) for _ in range(trials)) / trials


def at_most(expected, trials):
    """The largest share that chance explains if `expected` is the true one: three standard deviations more."""
    return expected + 3 * math.sqrt(expected * (1 - expected) / trials)


# --- one group


def test_one_group_has_students_interval():
    low, high = scipy_stats.t.interval(0.95, 4, np.mean(A), scipy_stats.sem(A))
    assert stats.mean_estimate(A) == pytest.approx((np.mean(A), low, high, 5))
    low, high = scipy_stats.t.interval(0.95, 4, np.mean(logs(A)), scipy_stats.sem(logs(A)))
    assert stats.median_estimate(A, [0] * 5) == pytest.approx((10.5, math.exp(low), math.exp(high), 5))


@pytest.mark.parametrize("count", [3, 10])
def test_the_interval_holds_the_true_median_in_95_of_100(count):
    def misses(generator):
        return excludes(stats.median_estimate(times(generator, count, 0.05), [0] * count), 1)

    assert share(misses, 1000, count) <= at_most(0.05, 1000)


@pytest.mark.parametrize("values", [[3.0], [2.0, 4.0]])
def test_fewer_than_three_values_have_no_interval(values):
    without = (3.0, None, None, len(values))
    assert stats.median_estimate(values, [0] * len(values)) == stats.mean_estimate(values) == without
    assert stats.ratio(values, [2.0, 2.0, 2.0])[1:] == stats.difference([1.0] * 3, values)[1:] == (None, None, None)
    seeds = by_seed([0.7] * len(values))
    assert stats.equivalence(seeds, seeds, 0.01) == (0.0, None, None, 0, False)


def test_the_interval_includes_the_median_and_may_be_a_point_or_infinite():
    skewed = stats.median_estimate([1.0] * 13 + [4.0] * 7, [0] * 20)
    assert skewed.low <= skewed.value == 1.0 < skewed.high
    assert stats.median_estimate([2.0] * 3, [0] * 3) == pytest.approx((2, 2, 2, 3))
    assert stats.ratio([1e-99, 1.0, 1e99], [1.0, 1.1, 1.2], 0.999).high == math.inf


# --- two groups


def test_a_ratio_is_of_geometric_means_with_the_critical_value_of_cochran_and_cox():
    ratio = stats.ratio(A, B)
    assert ratio.value == pytest.approx(scipy_stats.gmean(A) / scipy_stats.gmean(B))
    welch = scipy_stats.ttest_ind(logs(A), logs(B), equal_var=False)
    squares = [scipy_stats.sem(logs(values)) ** 2 for values in (A, B)]
    quantiles = [scipy_stats.t.ppf(0.975, len(values) - 1) for values in (A, B)]
    half = np.average(quantiles, weights=squares) * math.log(ratio.value) / welch.statistic
    assert logs(ratio[1:3]) == pytest.approx([math.log(ratio.value) - half, math.log(ratio.value) + half])
    assert ratio.low < math.exp(welch.confidence_interval().low)  # wider than by Satterthwaite's degrees of freedom


def test_a_group_without_spread_adds_no_error():
    assert stats.ratio([3.0] * 3, [2.0] * 3) == pytest.approx((1.5, 1.5, 1.5, 1))
    one_sided = stats.difference([5.0, 5.0, 5.0], [1.0, 2.0, 3.0])
    assert one_sided.high - one_sided.value == pytest.approx(scipy_stats.t.ppf(0.975, 2) * math.sqrt(1 / 3))


@pytest.mark.parametrize(("counts", "spreads"), [((3, 3), (5, 1)), ((3, 10), (2, 1)), ((3, 30), (1, 1))])
def test_equal_machines_are_called_equal_in_95_of_100(counts, spreads):
    def is_false_claim(generator):
        sides = [times(generator, n, 0.01 * spread) for n, spread in zip(counts, spreads, strict=True)]
        return excludes(stats.ratio(*sides), 1)

    assert share(is_false_claim, 1000, counts) <= at_most(0.05, 1000)


def test_no_machine_of_forty_equal_ones_is_called_faster_in_95_of_100():
    level = stats.bonferroni(stats.LEVEL, 39)

    def has_false_claim(generator):
        baseline = times(generator, 10, 0.01)
        others = [times(generator, int(count), 0.01) for count in generator.integers(3, 11, 39)]
        return any(excludes(stats.ratio(other, baseline, level), 1) for other in others)

    assert share(has_false_claim, 100, 40) <= at_most(0.05, 100)


@pytest.mark.parametrize("count", [3, 10])
def test_a_detectable_difference_is_found_in_80_of_100(count):
    values = np.linspace(-1, 1, count)
    typical = (values / values.std(ddof=1)).tolist()
    detectable = stats.difference(typical, typical).detectable

    def is_found(generator):
        sides = [generator.normal(mean, 1, count).tolist() for mean in (detectable, 0)]
        return excludes(stats.difference(*sides), 0)

    assert share(is_found, 1000, count) == pytest.approx(0.8, abs=0.05)


# --- sessions


@pytest.mark.parametrize(
    ("minutes", "expected"),
    [([0, 10, 59], [[0, 1, 2]]), ([0, 59, 60, 119, 120], [[0, 1], [2, 3], [4]]), ([120, 0, 60], [[1], [2], [0]]),
     ([0, 30, 61, 90], [[0, 1], [2, 3]]), ([0, None, 900], [[0, 1, 2]])],
)  # fmt: skip
def test_processes_that_start_within_an_hour_are_a_session(minutes, expected):
    assert stats.sessions([None if start is None else MINUTE * start for start in minutes]) == expected


def test_with_three_sessions_the_session_is_the_unit():
    values, starts = [2.0, 8.0, 5.0, 7.0], [0, MINUTE, HOUR, 2 * HOUR]
    assert stats.units(values, starts) == pytest.approx([4.0, 5.0, 7.0])
    assert stats.units(values, [0, MINUTE, HOUR, HOUR]) == values
    low, high = scipy_stats.t.interval(0.95, 2, np.mean(logs([4, 5, 7])), scipy_stats.sem(logs([4, 5, 7])))
    assert stats.median_estimate(values, starts) == pytest.approx((6.0, math.exp(low), math.exp(high), 4))


# --- equal accuracy


def test_accuracies_are_paired_by_the_seeds_that_both_ran():
    first, second = by_seed([0.70, 0.75, 0.80, 0.10]), by_seed([0.69, 0.76, 0.80])
    low, high = scipy_stats.t.interval(0.90, 2, 0, scipy_stats.sem([0.01, -0.01, 0]))
    equivalence = stats.equivalence(first, second, 0.02)
    assert equivalence[1:] == (pytest.approx(low), pytest.approx(high), 3, True)
    assert not stats.equivalence(first, second, 0.01).established


def test_without_common_seeds_all_values_are_compared():
    values = [0.70, 0.701, 0.702]
    equivalence = stats.equivalence(by_seed(values), by_seed(values, 5), 0.01)
    half = scipy_stats.t.ppf(0.95, 2) * math.sqrt(2 * scipy_stats.sem(values) ** 2)
    assert equivalence == (0, pytest.approx(-half), pytest.approx(half), 0, True)


@pytest.mark.parametrize(("loss", "spread", "least", "most"), [(0.02, 0.009, 0, 0.05), (0, 0.0046 / 2**0.5, 0.8, 1)])
def test_a_loss_does_not_pass_and_equal_machines_do(loss, spread, least, most):
    def passes(generator):
        sides = [by_seed(generator.normal(mean, spread, 5).tolist()) for mean in (0.75 - loss, 0.75)]
        return stats.equivalence(*sides, 0.01).established

    assert least <= share(passes, 500, 7) <= most
